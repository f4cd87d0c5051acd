"""Worlds of gloo processes that are forks of one, which has imported everything: for each that would take seconds."""

import datetime
import os
import signal
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
WAIT = datetime.timedelta(seconds=120)
WORLD_SECONDS = 600


def environment() -> dict[str, str]:
    """What a program needs that forks ranks, and finds the modules that lie beside this one."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "compile")))
    # A process with threads cannot be forked: neither OpenMP's nor that of inductor's compile workers.
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | alone | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}


def run_world(folder: Path, num_ranks: int, work: Callable[[], None]) -> list[int]:
    """The exit codes of ranks that each do the work; what they print is in folder/rank0.txt and so on.

    One that has to be stopped has a negative code.
    """
    folder.mkdir()
    ranks = [_fork_rank(folder, rank, num_ranks, work) for rank in range(num_ranks)]
    codes: dict[int, int] = {}
    until = time.monotonic() + WORLD_SECONDS
    while len(codes) < num_ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() < until:
            time.sleep(0.1)
        else:
            for rank in set(ranks) - set(codes):
                os.kill(rank, signal.SIGKILL)
    return [codes[rank] for rank in ranks]


def prepare_to_fork() -> None:
    """Import and set up here what every rank would by itself.

    Raises:  AssertionError where that left a thread behind.
    """
    import_module("torch_vtensor.compile.backend")
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) == 1, f"a process with threads cannot be forked safely, and this has {threads}"


def _fork_rank(folder: Path, rank: int, num_ranks: int, work: Callable[[], None]) -> int:
    """The process id of a rank."""
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        store = dist.FileStore(str(folder / "store"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=WAIT)
        work()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
