"""What a prefix tree lends: new VTensors that begin with pages of recorded sequences.

    recorded    [  7 ][  2 ][  9 ][  4 ]          rows [0, M) are lent
                  |     |     |     : copied: the rows before M of the page that M lies in
    lent        [  7 ][  2 ][  9 ][ 11 ]

A slot with padding in front has its rows at other offsets than they were recorded at: it gets copies of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_run import PageRun
from torch_vtensor.allocator.vtensor import VTensor

__all__ = ["Lane", "Source", "lend"]


class Lane(NamedTuple):
    """One of the VTensors that a sequence lies in: ``outer_shape`` is that of one slot."""

    row_shape: tuple[int, ...]
    outer_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a strip."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @classmethod
    def of(cls, vtensor: VTensor) -> Lane:
        """The lane that a tensor [slots, *outer_shape, rows, *row_shape] is made of."""
        return cls(vtensor.row_shape, vtensor.outer_shape[1:], vtensor.dtype)

    def make(self, num_slots: int, capacity: int, scheduler: GrowthScheduler, salt: Hashable) -> VTensor:
        """An empty tensor of this lane."""
        return VTensor(
            self.row_shape,
            capacity=capacity,
            dtype=self.dtype,
            outer_shape=(num_slots, *self.outer_shape),
            scheduler=scheduler,
            adopt=False,
            salt=salt,
        )


@dataclass(frozen=True, eq=False)
class Source:
    """What a slot begins with: ``padding`` rows of zeros, then a sequence that lies in ``runs``, a lane each."""

    runs: tuple[PageRun, ...]
    padding: int


def lend(
    lanes: Sequence[Lane],
    sources: Sequence[Source],
    num_rows: int,
    capacity: int,
    scheduler: GrowthScheduler,
    salt: Hashable,
    max_mappings: int,
) -> tuple[list[VTensor], bool]:
    """New tensors, one a lane, whose slot i has ``num_rows`` rows as ``sources[i]`` says.

    The caller keeps the sources' pages meanwhile.

    Effects: whole pages are mapped a second time, but for slots with padding; other rows are copied. So is all of it
        where the pool's mappings would be more than ``max_mappings`` otherwise. Never waits for the device.
    Returns: the tensors, and whether that limit made it copy.
    Raises:  OutOfPagesError or DriverError, with everything as it was.
    """
    made: list[VTensor] = []
    try:
        shared = [_shared_run(sources, index, num_rows * lane.row_bytes) for index, lane in enumerate(lanes)]
        num_new = sum(len(run.sizes) * len(run.strips) for run in shared)
        is_copy = scheduler.pool.num_mappings + num_new > max_mappings
        for index, (lane, run) in enumerate(zip(lanes, shared, strict=True)):
            target = lane.make(len(sources), capacity, scheduler, salt)
            made.append(target)
            run = run.whole_until(0) if is_copy else run
            target.borrow(run, [source.padding > 0 for source in sources], num_rows)
            _copy_rest(lane, index, sources, target, run.bounds[-1], num_rows)
    except BaseException:
        for vtensor in made:
            vtensor.close()
        raise
    return made, is_copy and num_new > 0


def _shared_run(sources: Sequence[Source], lane: int, nbytes: int) -> PageRun:
    """The whole pages before offset ``nbytes`` that all slots without padding can map side by side."""
    runs = [source.runs[lane].whole_until(nbytes) for source in sources if source.padding == 0]
    if not runs:
        return PageRun((0,), ())
    edges = zip(*(run.bounds for run in runs), strict=False)
    end = sum(1 for _ in takewhile(lambda bounds: len(set(bounds)) == 1, edges)) - 1
    bounds = runs[0].bounds[: end + 1]
    return PageRun(bounds, tuple(strip[:end] for run in runs for strip in run.strips))


def _copy_rest(
    lane: Lane, index: int, sources: Sequence[Source], target: VTensor, shared_bytes: int, num_rows: int
) -> None:
    """Copy to every slot of ``target`` the rows that do not lie in its shared pages."""
    for source in dict.fromkeys(sources):
        length, start = num_rows - source.padding, 0 if source.padding else shared_bytes
        slots = [slot for slot, other in enumerate(sources) if other is source]
        if length * lane.row_bytes <= start and not source.padding:
            continue
        run = source.runs[index].since(start).covering(length * lane.row_bytes)
        # Its pages are mapped here until the device has copied them.
        num_staged = max(-(-run.bounds[-1] // lane.row_bytes), 1)
        staged = lane.make(1, num_staged, target.scheduler, target.salt)
        try:
            staged.borrow(run, [False], length)
            for slot in slots:
                target.copy_slot(slot, staged, start, source.padding)
        finally:
            staged.close()
