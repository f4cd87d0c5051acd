"""Ready plans on real processes, which talk by gloo: they train as one process does, and none outlives another."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from forked_ranks import ROOT, environment

KILLED = 13

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("processes"),  # two worlds at once would share two cores
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
]


@dataclass(frozen=True)
class World:
    """Ranks that trained by some plans until the last of them was killed."""

    tasks: Sequence[str]
    ended: Sequence[tuple[int, str]]


WORLDS: Mapping[str, tuple[int, Sequence[str]]] = {  # the number of ranks, and what they do
    "two ranks": (
        2,
        (
            *("dp2@mlp@eager", "tp2@mlp@eager", "sp2@mlp@eager", "1f1b/4@mlp@eager", "zb/4@mlp@eager"),
            *("zero3/2@mlp@eager", "interlaced/2@tied_llama@eager"),
            *("draw@tp2@eager", "draw@dp2@eager", "draw@1f1b/2@eager"),
            *("scale@1f1b/2@eager", "scale@zero2/2@eager", "scale@tp2@eager"),
            *("begin@zero3@eager", "begin@tp2@eager", "begin@1f1b/2@eager", "die@dp2"),
        ),
    ),
    "four ranks": (
        4,
        (
            *("dp2+tp2@mlp@eager", "dp2+1f1b/2@mlp@eager", "zero2+pp2+zb/2@mlp@eager", "tp2+gpipe/2@mlp@eager"),
            "die@dp2+1f1b/2",
        ),
    ),
    "two ranks, transformers": (2, ("dp2@gpt2@eager", "tp2@tied_llama@eager", "zero3@tied_llama@eager", "die@dp2")),
    "four ranks, transformers": (4, ("tp2+gpipe/2@gpt2@eager", "die@dp2+1f1b/2")),
    "compiled": (2, ("dp2@mlp@inductor", "1f1b/2@mlp@inductor", "zero3/2@mlp@inductor", "die@dp2")),
}


def run_worlds(names: Sequence[str], folder: Path) -> dict[str, World]:
    worlds = [f"{num_ranks}:{','.join(tasks)}" for num_ranks, tasks in map(WORLDS.__getitem__, names)]
    command = [sys.executable, "-m", "distributed.train", str(folder), *worlds]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for number, (name, codes) in enumerate(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True)):
        printed = [(folder / str(number) / f"rank{rank}.txt").read_text() for rank in range(len(codes))]
        found[name] = World(WORLDS[name][1], list(zip(codes, printed, strict=True)))
    return found


QUICK = ("two ranks", "four ranks")


@pytest.fixture(scope="module")
def quick_worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return run_worlds(QUICK, tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def slow_worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return run_worlds([name for name in WORLDS if name not in QUICK], tmp_path_factory.mktemp("worlds"))


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WORLDS])
def world(request: pytest.FixtureRequest) -> World:
    worlds: dict[str, World] = request.getfixturevalue(f"{'quick' if request.param in QUICK else 'slow'}_worlds")
    return worlds[request.param]


def test_plans_train_as_one_process_does(world: World) -> None:
    for _, printed in world.ended:
        assert re.findall(r"^(\S+) is right$", printed, re.MULTILINE) == [*world.tasks[:-1]], printed


def test_no_rank_outlives_a_killed_one(world: World) -> None:
    *others, (killed, printed) = world.ended
    assert killed == KILLED, printed
    for code, printed in others:
        assert code == 1, printed
        last = printed.strip().splitlines()[-1]
        assert re.search(r"RuntimeError: .*(closed|reset) by peer", last), printed


def test_torchrun_is_all_it_takes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "examples" / "train_with_a_plan.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dp2" in done.stdout
    assert "step 20" in done.stdout
