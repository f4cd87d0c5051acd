"""Sequences whose rows a prefix tree's tests can tell: a row follows from the tokens up to it, and the tenant."""

import itertools
import zlib
from collections.abc import Hashable, Sequence

import torch

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.prefix import Lane, PrefixTree
from torch_vtensor.allocator.vtensor import VTensor

LANES = (Lane((700,), (2,), torch.uint8), Lane((3, 100), (), torch.uint8))  # rows lie across the edges of pages
SALTS: tuple[Hashable, ...] = (None, "alice", "bob")
_VALUES = 80  # a tenant's rows hold numbers of its own


def expected_rows(lane: Lane, tokens: Sequence[int], salt: Hashable) -> torch.Tensor:
    """The rows [*outer, T, *row] of a sequence."""
    digests = itertools.accumulate(tokens, lambda digest, token: zlib.crc32(bytes([token]), digest), initial=0)
    values = [1 + digest % _VALUES + SALTS.index(salt) * _VALUES for digest in digests][1:]
    shape = (*[1] * len(lane.outer_shape), len(tokens), *[1] * len(lane.row_shape))
    rows = torch.tensor(values, dtype=torch.uint8).reshape(shape)
    return rows.expand(*lane.outer_shape, len(tokens), *lane.row_shape).to(lane.dtype).contiguous()


def make(
    scheduler: GrowthScheduler, sequences: Sequence[Sequence[int]], salt: Hashable = None, capacity: int = 200
) -> list[VTensor]:
    """Tensors, one a lane, that hold equally long sequences, a slot each."""
    vtensors = [lane.make(len(sequences), capacity, scheduler, salt) for lane in LANES]
    append(vtensors, sequences, 0, salt)
    return vtensors


def append(vtensors: Sequence[VTensor], sequences: Sequence[Sequence[int]], start: int, salt: Hashable) -> None:
    """Write the rows of each slot's tokens from ``start`` on."""
    for lane, vtensor in zip(LANES, vtensors, strict=True):
        axis = len(lane.outer_shape)
        slots = [expected_rows(lane, tokens, salt).narrow(axis, start, len(tokens) - start) for tokens in sequences]
        vtensor.append(torch.stack(slots))


def check(
    vtensors: Sequence[VTensor], sequences: Sequence[Sequence[int]], salt: Hashable, paddings: Sequence[int] = ()
) -> None:
    """Every slot holds the rows of its tokens, behind as many rows of zeros as it has padding."""
    for lane, vtensor in zip(LANES, vtensors, strict=True):
        axis, rows = len(lane.outer_shape), vtensor.tensor()
        for slot, tokens in enumerate(sequences):
            padding = paddings[slot] if paddings else 0
            assert vtensor.length == padding + len(tokens)
            assert not rows[slot].narrow(axis, 0, padding).any()
            assert torch.equal(rows[slot].narrow(axis, padding, len(tokens)), expected_rows(lane, tokens, salt))


def close(vtensors: Sequence[VTensor]) -> None:
    for vtensor in vtensors:
        vtensor.close()


def settle(scheduler: GrowthScheduler) -> None:
    """What ended is unmapped, so that only those who use or hold a page count."""
    scheduler.reap()
    scheduler.settle()


def record(tree: PrefixTree, tokens: Sequence[int], salt: Hashable = None) -> int:
    """Compute a sequence, from the longest prefix that the tree lends, and record it."""
    loan = tree.fork([tokens], capacity=200, salt=salt)
    vtensors = [lane.make(1, 200, tree.scheduler, salt) for lane in LANES] if loan is None else loan.vtensors
    try:
        append(vtensors, [tokens], 0 if loan is None else loan.num_rows, salt)
        return tree.record(tokens, vtensors, salt=salt)
    finally:
        close(vtensors)
        settle(tree.scheduler)
