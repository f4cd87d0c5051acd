"""Ready plans on two GPUs, which talk by NCCL: they train as one GPU does, and none waits for one that is gone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
NUM_GPUS = torch.cuda.device_count()
PLANS = (
    *("dp2@gpt2@eager", "tp2@tied_llama@eager", "interlaced/2@tied_llama@eager", "sp2@mlp@eager", "1f1b/4@mlp@eager"),
    *("zb/4@mlp@eager", "zero3/2@mlp@eager", "gpipe/2@gpt2@eager", "dp2@mlp@inductor", "zero2/2@gpt2@inductor"),
    *("draw@tp2@eager", "draw@dp2@inductor", "scale@zero2/2@inductor"),
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two GPUs; there are {NUM_GPUS}"),
]


def launch(folder: Path, *tasks: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "compile")))
    script = ROOT / "tests" / "compile" / "distributed" / "train_on_gpus.py"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *tasks],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_plans_train_as_one_gpu_does(tmp_path: Path) -> None:
    done = launch(tmp_path, *PLANS)
    for rank in range(2):
        printed = (tmp_path / f"rank{rank}.txt").read_text()
        assert re.findall(r"^(\S+) is right$", printed, re.MULTILINE) == [*PLANS], f"{printed}\n{done.stderr}"
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("plan", ["dp2", "1f1b/2"])
def test_no_rank_outlives_a_killed_one(plan: str, tmp_path: Path) -> None:
    done = launch(tmp_path, f"die@{plan}")
    assert done.returncode != 0
    assert "exitcode  : 13" in done.stderr, done.stderr
