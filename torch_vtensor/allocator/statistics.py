"""stats(), trim() and empty_cache(): what this process's memory is doing, and giving back what is idle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch

from torch_vtensor.allocator.captures import outside_captures
from torch_vtensor.allocator.page_pool import PoolStats
from torch_vtensor.allocator.pools import DEVICE_TYPES, all_schedulers
from torch_vtensor.allocator.torch_pool import release_idle
from torch_vtensor.settings import format_bytes

__all__ = ["Stats", "count_with", "empty_cache", "stats", "trim"]

_counts: dict[str, Callable[[], Mapping[str, int]]] = {}


class Stats(NamedTuple):
    """Every device's memory, and how many appends of cache layers were zero-copy or stock, by reason.

    ``attention`` counts the calls of attention while attention="fast" was on, in the same way; ``prefixes`` what calls
    of generate() reused while prefix_cache=True was, in tokens, and how often calls did not, by reason; ``serving``
    what continuous batching did, and how often it was left to transformers, by reason. All four are empty in a process
    that generates nothing.
    """

    devices: dict[torch.device, PoolStats]
    appends: dict[str, int]
    attention: dict[str, int]
    prefixes: dict[str, int]
    serving: dict[str, int]

    def __str__(self) -> str:
        lines = []
        for device, pool in self.devices.items():
            names = ("committed", "live", "shared", "prefix", "parked", "pooled", "torch", "offloaded", "reserved")
            sizes = ", ".join(f"{name} {format_bytes(getattr(pool, name + '_bytes'))}" for name in names)
            lines.append(f"{device}: {sizes}; {pool.num_driver_calls} driver calls, {pool.num_device_waits} waits")
            lines += [
                f"  {name:<11} {call.count:>7} calls, p50 {call.p50_us:.1f} us, p99 {call.p99_us:.1f} us"
                for name, call in pool.driver_calls.items()
            ]
        for name in Stats._fields[1:]:
            lines += [f"{name} {reason}: {count}" for reason, count in getattr(self, name).items()]
        return "\n".join(lines) or "nothing was allocated yet"


def count_with(name: str, read: Callable[[], Mapping[str, int]]) -> None:
    """Have a field of ``Stats`` filled by the module that counts for it, which this one need not import.

    Args:
        name: ``appends``, ``attention``, ``prefixes`` or ``serving``.
        read: the counts so far, by reason.
    """
    assert name in Stats._fields[1:], name
    _counts[name] = read


def stats() -> Stats:
    """Exact figures of this process's memory, by device, and of what the cache layers did."""
    devices = {device: scheduler.stats() for device, scheduler in all_schedulers().items()}
    return Stats(devices, *(dict(_counts[name]()) if name in _counts else {} for name in Stats._fields[1:]))


def trim(device: torch.device | str | None = None) -> int:
    """Give all memory that no live tensor uses back to the system; may wait for the device.

    Args:
        device: only this one; without an index, all of its type; default: all.

    Returns: bytes of physical memory given back.
    Raises:  ValueError for a device type without a memory driver.
    """
    wanted = None if device is None else torch.device(device)
    if wanted is not None and wanted.type not in DEVICE_TYPES:
        known_types = " and ".join(map(repr, DEVICE_TYPES))
        raise ValueError(
            f"device is '{wanted}', which has no memory driver: give one of {known_types}, or none for all."
        )
    freed_bytes = 0
    for known, scheduler in all_schedulers().items():
        if wanted is None or (known.type == wanted.type and wanted.index in (None, known.index or 0)):
            if known.type == "cuda":
                with outside_captures(scheduler.pool.driver, nullcontext()):
                    release_idle(known)
            freed_bytes += scheduler.trim()
    return freed_bytes


def empty_cache() -> None:
    """``trim()`` under the name that torch.cuda's users know."""
    trim()
