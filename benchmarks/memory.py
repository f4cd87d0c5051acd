"""Physical memory as the system counts it, and giving back what nobody uses."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler

__all__ = ["Peak", "give_back", "used_bytes"]

_libc = ctypes.CDLL(None)


def used_bytes(device: torch.device) -> int:
    """Physical bytes in use on the device, by whomever.

    On a CPU by this process: anonymous memory, where torch's tensors are, and torch_vtensor's pages, each once.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return _kept_by_the_system("RssAnon") + int(default_scheduler(device).pool.driver.inner.physical_bytes())


class Peak:
    """The most memory at any time of a stretch, above what there was when this was made.

    On a GPU torch's own memory and torch_vtensor's; on a CPU all that the system kept resident for this process, with
    torch_vtensor's pages counted once, also those that are mapped nowhere, not written yet, or mapped twice.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before_bytes = (
            torch.cuda.memory_allocated(device) if device.type == "cuda" else _kept_by_the_system("VmRSS")
        )

    def start(self) -> None:
        """Begin the stretch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is resident now

    def nbytes(self, committed_bytes: int) -> int:
        """End it.

        Args:
            committed_bytes: the most that torch_vtensor had committed in it, of which torch's figures hold nothing,
                and the system's how it is mapped.
        """
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before_bytes + committed_bytes
        return _kept_by_the_system("VmHWM") - self._before_bytes + committed_bytes - _kept_by_the_system("RssShmem")


def give_back(device: torch.device) -> None:
    """Give back everything that is not in use."""
    gc.collect()
    torch_vtensor.trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        _libc.malloc_trim(0)


def _kept_by_the_system(what: str) -> int:
    """A figure of this process, by its name in proc_pid_status(5), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.removesuffix("kB")) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}")
