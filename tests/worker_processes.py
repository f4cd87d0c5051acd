"""Real processes with VTensors, which do what a test tells them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A process that does what it is told, a line at a time, and answers each with a line.
WORKER = """
import os, sys, torch
from torch_vtensor.allocator import pools
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError

if "SHARED_DEVICE_BYTES" in os.environ:
    from shared_device import SharedDriver
    pools._make_driver = lambda device: SharedDriver(int(os.environ["SHARED_DEVICE_BYTES"]))
device = torch.device(os.environ.get("WORKER_DEVICE", "cpu"))
make = lambda: VTensor((65536,), capacity=1000 if device.type == "cpu" else 100_000, dtype=torch.uint8, device=device)
vtensor, scheduler = make(), default_scheduler(device)
print("ready", flush=True)
for line in sys.stdin:
    try:
        exec(line)
    except OutOfPagesError:
        print("out of pages", flush=True)
    else:
        print("done", flush=True)
"""
GROW = "vtensor.append(torch.ones({}, 65536, dtype=torch.uint8))"


class Worker:
    """A process with a VTensor of rows of 64 KiB."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def do(self, line: str) -> str:
        self.tell(line)
        return self.answer()


@contextmanager
def worker(**environ: str) -> Iterator[Worker]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environ,
    )  # fmt: skip
    with process:
        yield Worker(process)
        process.kill()


def eventually(is_so: Callable[[], bool]) -> bool:
    """Whether it is so soon: what another process does by itself takes it a moment."""
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()
