"""sleep() and wake(): a device's memory for somebody else, and back, under tensors and graphs that stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.pools import all_schedulers
from torch_vtensor.errors import VTensorError

__all__ = ["sleep", "wake"]


def sleep(
    tag: str | Sequence[str] | None = None,
    *,
    discard: bool | str | Sequence[str] = False,
    device: torch.device | str | None = None,
) -> int:
    """Give the physical memory of tensors back to the device, until ``wake``; their addresses stay reserved.

    Of VTensors and the caches on them, and of torch tensors that were made inside ``memory_pool``.

    What they hold is kept outside the device: in pinned memory of the host for a GPU, in an unnamed file on a disk for
    the CPU. Pages that several tensors share are kept once. Idle memory goes back as well. Until ``wake``, neither the
    tensors nor their views nor graphs that read them may be used: a VTensor raises AsleepError, a view of a GPU's
    memory faults, one of the CPU's shows zeros and faults when it is written.

    Args:
        tag: only what has this tag, or one of these; default: everything. KV caches have "kv_cache", tensors of
            ``memory_pool`` "weights", unless they were made with another one.
        discard: the tags of what need not be kept, or True: it comes back as zeros. With "kv_cache", prefixes that no
            cache uses are forgotten.
        device: only this one; without an index, all of its type; default: all.

    Returns: bytes of physical memory given back to the devices. What it took outside of them stays for the next time,
        until ``trim``.
    Effects: waits for the device, and for what other threads are writing, or calling generate() for under ``enable()``
        or by a ``Session``. Managers of continuous batching on it pause until ``wake``; requests whose rows were
        discarded are run again from their tokens.
    Raises:  ValueError for a tag that no tensor ever had; OffloadLimitError or DriverError, with every tensor as it
        was, or awake; VTensorError while a graph is being captured.
    """
    schedulers = _schedulers_on(device)
    tags = _known_tags(tag, schedulers)
    lost = (tags if discard else ()) if isinstance(discard, bool) else _known_tags(discard, schedulers)
    freed_bytes = 0
    for index, scheduler in enumerate(schedulers):
        try:
            freed_bytes += scheduler.sleep(tags, lost)
        except BaseException:
            for earlier in schedulers[:index]:
                with suppress(VTensorError):
                    earlier.wake(tags)
            raise
    return freed_bytes


def wake(tag: str | Sequence[str] | None = None, *, device: torch.device | str | None = None) -> int:
    """Bring back what ``sleep`` took off the device, bit for bit, at the same addresses: views and graphs are valid.

    Args:
        tag, device: as in ``sleep``; what sleeps under other tags goes on sleeping.

    Returns: bytes of the devices' memory that it takes.
    Effects: waits for the device.
    Raises:  ValueError for a tag that no tensor ever had; OutOfPagesError or DriverError, with every tensor as it
        was, or awake; VTensorError while a graph is being captured.
    """
    schedulers = _schedulers_on(device)
    tags = _known_tags(tag, schedulers)
    return sum(scheduler.wake(tags) for scheduler in schedulers)


def _schedulers_on(device: torch.device | str | None) -> list[GrowthScheduler]:
    wanted = None if device is None else torch.device(device)
    return [
        scheduler
        for known, scheduler in all_schedulers().items()
        if wanted is None or (known.type == wanted.type and wanted.index in (None, known.index or 0))
    ]


def _known_tags(tag: str | Sequence[str] | None, schedulers: Sequence[GrowthScheduler]) -> frozenset[str] | None:
    if tag is None:
        return None
    tags = frozenset([tag] if isinstance(tag, str) else tag)
    known = {"kv_cache", "weights"}.union(*(scheduler.pool.tags for scheduler in schedulers))
    if unknown := sorted(tags - known):
        raise ValueError(f"tag is {unknown[0]!r}, and nothing has that tag: the tags are {', '.join(sorted(known))}")
    return tags
