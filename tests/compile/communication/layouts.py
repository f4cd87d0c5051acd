"""Layouts to communicate between: grids of ranks whose axes cut dimensions, add up or repeat; and random parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from torch_vtensor.compile.communication import Placed
from torch_vtensor.compile.tensor_view import Interval, Mask, ValueChunk, cut_evenly


def grid(shape: Sequence[int], ranks: Sequence[int], axes: Sequence[tuple[int, str | int]]) -> list[Placed]:
    """What ranks hold, the last axis varying fastest: axes are (size, "R"), (size, "V") or (size, dimension)."""
    assert math.prod(size for size, _ in axes) == len(ranks)
    placed = []
    for position, rank in enumerate(ranks):
        counts: dict[str | int, int] = {}
        numbers: dict[str | int, int] = {}
        stride = len(ranks)
        for size, role in axes:
            stride //= size
            counts[role] = counts.get(role, 1) * size
            numbers[role] = numbers.get(role, 0) * size + position // stride % size
        mask = Mask.of(shape)
        for dim, size in enumerate(shape):
            if dim in counts:
                mask = mask.with_interval(dim, cut_evenly(size, counts[dim])[numbers[dim]])
        placed.append(Placed(rank, mask.with_chunk(ValueChunk(numbers.get("V", 0), counts.get("V", 1)))))
    return placed


@dataclass(frozen=True)
class Tensor:
    """An integer tensor with addends: the `FINEST` finest ones, of which chunk i of n is the i-th n-th, added up."""

    value: torch.Tensor

    FINEST = 5040

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Tensor":
        """Values that tell all indices apart."""
        return cls((torch.arange(math.prod(shape)).reshape(tuple(shape)) * 1_000_003 + 17) * cls.FINEST)

    def at(self, mask: Mask) -> torch.Tensor:
        """The values of a part: no addend of an index equals another."""
        number, of = mask.chunk
        return (self._below(number + 1, of) - self._below(number, of))[mask.within(Mask.of(self.value.shape))]

    def _below(self, number: int, of: int) -> torch.Tensor:
        """The sum of the addends before ``number / of``: a curve from 0 to the value."""
        place, rest = divmod(number * self.FINEST, of)
        assert not rest, f"tests cut values in divisors of {self.FINEST}, not in {of}"
        return self.value // self.FINEST * place + place * (self.FINEST - place) * (self.value % 101 + 7919)


def have_values(tensor: Tensor, have: Sequence[Placed]) -> dict[Placed, torch.Tensor]:
    """What exists."""
    return {placed: tensor.at(placed.mask) for placed in have}


def factorizations(num_ranks: int, num_dims: int) -> st.SearchStrategy[list[tuple[int, str | int]]]:
    """Axes of a grid of so many ranks, with a role for each."""

    @st.composite
    def axes(draw: st.DrawFn) -> list[tuple[int, str | int]]:
        left, found = num_ranks, []
        while left > 1:
            size = draw(st.sampled_from([size for size in range(2, left + 1) if left % size == 0]))
            found.append((size, draw(st.sampled_from(["R", "V", *range(num_dims)]))))
            left //= size
        return found

    return axes()


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12]), max_size=3).map(tuple)


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...], ranks: Sequence[int]) -> list[Placed]:
    """A regular layout on these ranks; where a dimension is too small for its axes, they repeat instead."""
    axes = draw(factorizations(len(ranks), len(shape)))
    for dim, size in enumerate(shape):
        if math.prod(count for count, role in axes if role == dim) > size:
            axes = [(count, "R" if role == dim else role) for count, role in axes]
    return grid(shape, ranks, axes)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...], num_cuts: int = 4) -> list[Mask]:
    """Boxes that tile a shape, cut from side to side again and again."""
    found = [Mask.of(shape)]
    for _ in range(draw(st.integers(0, num_cuts))):
        box = found.pop(draw(st.integers(0, len(found) - 1)))
        dims = [dim for dim, interval in enumerate(box.intervals) if interval.size > 1]
        if not dims:
            return [*found, box]
        dim = draw(st.sampled_from(dims))
        start, stop = box.intervals[dim]
        cut = draw(st.integers(start + 1, stop - 1))
        found += [box.with_interval(dim, Interval(start, cut)), box.with_interval(dim, Interval(cut, stop))]
    return found


@st.composite
def chunks(draw: st.DrawFn) -> list[ValueChunk]:
    """Value chunks that add up, of different counts at times."""
    found = [ValueChunk(0, 1)]
    for _ in range(draw(st.integers(0, 2))):
        chunk = found.pop(draw(st.integers(0, len(found) - 1)))
        of = draw(st.integers(2, 3))
        found += [chunk.split(number, of) for number in range(of)]
    return found


RANKS = st.integers(0, 7)


@st.composite
def scattered(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Placed]:
    """All of a tensor in any boxes, addends and replicas, on any ranks, with more that nobody needs."""
    found: list[Placed] = []
    for box in draw(boxes(shape)):
        for chunk in draw(chunks()):
            ranks = draw(st.lists(RANKS, min_size=1, max_size=2, unique=True))
            found += [Placed(rank, box.with_chunk(chunk)) for rank in ranks]
    more = draw(boxes(shape))
    found += [Placed(draw(RANKS), box) for box in more[: draw(st.integers(0, 2))]]
    return draw(st.permutations(list(dict.fromkeys(found))))


@st.composite
def wanted(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Placed]:
    """Any boxes on any ranks, overlapping or not, whole or in full sets of addends."""
    found: list[Placed] = []
    for _ in range(draw(st.integers(1, 3))):
        for box in draw(boxes(shape))[:3]:
            for chunk in draw(chunks()) if draw(st.booleans()) else [ValueChunk(0, 1)]:
                ranks = draw(st.lists(RANKS, min_size=1, max_size=3, unique=True))
                found += [Placed(rank, box.with_chunk(chunk)) for rank in ranks]
    return list(dict.fromkeys(found))
