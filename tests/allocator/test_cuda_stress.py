"""VTensors on a GPU under threads, streams, a scarce budget, compute-sanitizer and fork()."""

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from vtensors import MakeScheduler

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError

pytestmark = pytest.mark.gpu

ROW = 1024  # float32: 4 KiB a row, 512 rows a page of 2 MiB


@pytest.fixture
def scheduler(make_cuda_scheduler: MakeScheduler) -> GrowthScheduler:
    return make_cuda_scheduler()


def make(scheduler: GrowthScheduler, num_rows: int, value: float, **options: object) -> VTensor:
    vtensor = VTensor((ROW,), scheduler=scheduler, **({"capacity": 200_000} | options))
    vtensor.append(torch.full((num_rows, ROW), float(value), device="cuda"))
    return vtensor


def test_any_thread_may_give_memory_back(scheduler: GrowthScheduler) -> None:
    """Also one on which CUDA was never used, and which therefore has no context."""
    vtensor, trimmed = make(scheduler, 1000, 1.0), []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: (vtensor.close(), trimmed.append(scheduler.trim())))
    thread.start()
    thread.join()
    assert trimmed
    assert trimmed[0] >= 1000 * 4 * ROW


def stress(scheduler: GrowthScheduler, num_steps: int, seed: int = 0) -> int:
    """Sequences on four streams that take and give back each other's pages; wrong bytes are counted on the device.

    Returns how often there was no memory.
    """
    choose, streams = random.Random(seed), [torch.cuda.Stream() for _ in range(4)]
    num_wrong = torch.zeros(4, dtype=torch.int64, device="cuda")
    sequences: list[list[tuple[VTensor, float]]] = [[] for _ in streams]
    torch.cuda.synchronize()
    num_refused = 0
    for step in range(num_steps):
        lane = choose.randrange(4)
        mine, num_rows = sequences[lane], choose.choice([1, 300, 2000])
        with torch.cuda.stream(streams[lane]):
            try:
                if len(mine) < 3:
                    options = {"capacity": 20_000, "adopt": choose.random() < 0.5, "first_rows": num_rows}
                    mine.append((make(scheduler, num_rows, step, **options), step))
                vtensor, value = mine[choose.randrange(len(mine))]
                new = torch.full((num_rows, ROW), float(value), device="cuda")
                if vtensor.length < 15_000:
                    vtensor.commit_ahead(vtensor.length + num_rows)
                    vtensor.append(new)
                action = choose.choice(["fork", "rewrite", "close", "none"])
                if action == "fork":
                    mine.append((vtensor.fork(), value))
                elif action == "rewrite":
                    vtensor.truncate(vtensor.length // 2)
                    vtensor.append(new)
                elif action == "close" or len(mine) > 5:
                    mine.pop(0)[0].close()
            except OutOfPagesError:
                num_refused += 1
                while mine:
                    mine.pop()[0].close()
            for vtensor, value in mine:
                num_wrong[lane] += (vtensor.tensor() != value).sum()
        if step % 25 == 24:
            scheduler.trim()
    torch.cuda.synchronize()
    assert num_wrong.tolist() == [0, 0, 0, 0]
    for mine in sequences:  # not left to this frame's end: a tool such as compute-sanitizer keeps frames alive
        while mine:
            mine.pop()[0].close()
    return num_refused


def test_multi_stream_stress(make_cuda_scheduler: MakeScheduler) -> None:
    assert stress(make_cuda_scheduler(idle_bytes=64 * 2**20), num_steps=150) == 0


def test_multi_stream_stress_within_a_budget(make_cuda_scheduler: MakeScheduler) -> None:
    """Memory moves from stream to stream all the time, behind fences that have not passed."""
    scheduler = make_cuda_scheduler(budget_bytes=128 * 2**20)
    assert stress(scheduler, num_steps=150, seed=1) > 0
    assert scheduler.stats().committed_bytes <= 128 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_multi_stream_stress_under_compute_sanitizer() -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin: install the CUDA toolkit")
    # Calls that torch makes to find out what a device can do are meant to fail: only wrong accesses are errors here.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99", sys.executable]
    test = f"{__file__}::test_multi_stream_stress"
    done = subprocess.run(
        [*command, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "800", test],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout


def test_a_forked_process_is_told_to_spawn(run_python: Callable[..., str]) -> None:
    script = """
import os, torch
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import ForkedProcessError
vtensor = VTensor((8,), capacity=100, device="cuda")
vtensor.append(torch.ones(5, 8, device="cuda"))
pid = os.fork()
if pid == 0:
    driver = vtensor.scheduler.pool.driver
    for use in (lambda: vtensor.prepare_write(5, 6), vtensor.fork, lambda: driver.reserve(2**21)):
        try:
            use()
        except ForkedProcessError:
            continue
        os._exit(1)
    vtensor.close()
    os._exit(0)
_, status = os.waitpid(pid, 0)
print(status, vtensor.tensor().sum().item())
"""
    assert run_python(script) == "0 40.0\n"
