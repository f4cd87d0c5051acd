"""Ready plans on real processes, which talk by gloo: they train as one process does, and none outlives another."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[3]
WAIT_SECONDS = 200
KILLED = 13

pytestmark = [
    pytest.mark.xdist_group("processes"),  # two worlds at once would share two cores
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
]


def environment() -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "compile")))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}


def run_world(num_ranks: int, tasks: Sequence[str], folder: Path) -> list[tuple[int, str]]:
    """What each rank ended with, and what it printed; none is left running."""
    command = [sys.executable, "-m", "distributed.train", str(folder / "store")]
    logs = [(folder / f"rank{rank}.txt").open("w+") for rank in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(num_ranks), *tasks], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    until = time.monotonic() + WAIT_SECONDS
    try:
        for process in ranks:
            process.wait(max(until - time.monotonic(), 0.1))
    finally:
        for process in ranks:
            process.kill()
    ended = []
    for process, log in zip(ranks, logs, strict=True):
        log.seek(0)
        ended.append((process.wait(), log.read()))
        log.close()
    return ended


@dataclass(frozen=True)
class World:
    """Ranks that trained by some plans until the last of them was killed."""

    tasks: Sequence[str]
    ended: Sequence[tuple[int, str]]


WORLDS = {
    "two ranks": (
        2,
        (
            *("dp2@gpt2@eager", "tp2@tied_llama@eager", "interlaced/2@tied_llama@eager"),
            *("sp2@mlp@eager", "1f1b/4@mlp@eager", "zb/4@mlp@eager", "zero3/2@mlp@eager"),
            *("dp2@mlp@inductor", "die@dp2"),
        ),
    ),
    "four ranks": (
        4,
        (
            *("dp2+tp2@mlp@eager", "dp2+1f1b/2@mlp@eager", "zero2+pp2+zb/2@mlp@eager", "tp2+gpipe/2@gpt2@eager"),
            "die@dp2+1f1b/2",
        ),
    ),
}


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    num_ranks, tasks = WORLDS[request.param]
    return World(tasks, run_world(num_ranks, tasks, tmp_path_factory.mktemp("world")))


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
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dp2" in done.stdout
    assert "step 20" in done.stdout
