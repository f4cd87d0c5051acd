"""Logical tensors, and the parts of them that pieces of operators read and write.

A part is a `Mask`: one interval for each dimension, and a value chunk. Value chunks of the same region add up to it::

    intervals ((0, 4), (2, 6)), chunk 0 of 1     x[0:4, 2:6]
    intervals ((0, 4), (2, 6)), chunk 1 of 2     the second of two tensors whose sum is x[0:4, 2:6]
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """Indices ``[start, stop)`` of one dimension."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many indices."""
        return self.stop - self.start

    def __str__(self) -> str:
        """As in a subscript: ``0:4``."""
        return f"{self.start}:{self.stop}"


class ValueChunk(NamedTuple):
    """Number ``number`` of ``of`` tensors of one shape that add up to a value; 0 of 1 is the value itself."""

    number: int
    of: int

    def split(self, number: int, of: int) -> ValueChunk:
        """Chunk `number` of `of` of this chunk."""
        return ValueChunk(self.number * of + number, self.of * of)

    def contains(self, other: ValueChunk) -> bool:
        """Whether the other is this chunk or a chunk of it.

        A chunk of 6 is in none of 4, whatever fractions they are: addends of sixths are not addends of quarters.
        """
        return other.of % self.of == 0 and other.number // (other.of // self.of) == self.number

    def __str__(self) -> str:
        """``1 of 2``."""
        return f"{self.number} of {self.of}"


WHOLE_VALUE = ValueChunk(0, 1)


class Mask(NamedTuple):
    """A part of a tensor: a box of indices, and which addend of the values there."""

    intervals: tuple[Interval, ...]
    chunk: ValueChunk = WHOLE_VALUE

    @classmethod
    def of(cls, shape: Sequence[int]) -> Mask:
        """All of a tensor of this shape."""
        return cls(tuple(Interval(0, size) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(interval.size for interval in self.intervals)

    @property
    def num_elements(self) -> int:
        """Elements in the part."""
        number = 1
        for start, stop in self.intervals:
            number *= stop - start
        return number

    @property
    def region(self) -> Mask:
        """The same indices with their whole values."""
        return self if self.chunk == WHOLE_VALUE else Mask(self.intervals)

    def with_interval(self, dim: int, interval: Interval) -> Mask:
        """This mask with another interval in one dimension."""
        return Mask((*self.intervals[:dim], interval, *self.intervals[dim + 1 :]), self.chunk)

    def with_chunk(self, chunk: ValueChunk) -> Mask:
        """This mask with another value chunk."""
        return Mask(self.intervals, chunk)

    def moved(self, offsets: Sequence[int]) -> Mask:
        """The same part of another region: every interval moved by its dimension's offset."""
        pairs = zip(self.intervals, offsets, strict=True)
        return Mask(tuple([Interval(start + offset, stop + offset) for (start, stop), offset in pairs]), self.chunk)

    def intersection(self, other: Mask) -> Mask | None:
        """The indices and addends that both have; None if there are none.

        Raises:  ValueError for chunks of counts neither of which divides the other: no addend belongs to both.
        """
        assert len(self.intervals) == len(other.intervals), f"{self} and {other} are parts of different tensors"
        if self.chunk.contains(other.chunk):
            chunk = other.chunk
        elif other.chunk.contains(self.chunk):
            chunk = self.chunk
        elif self.chunk.of % other.chunk.of and other.chunk.of % self.chunk.of:
            raise ValueError(f"chunk {self.chunk} and chunk {other.chunk} have no addend in common; add them up first")
        else:
            return None
        both = self.overlap(other)
        return None if both is None else both.with_chunk(chunk)

    def overlap(self, other: Mask) -> Mask | None:
        """The indices that both have, with whole values; None if there are none."""
        intervals: list[Interval] = []
        for (start, stop), (other_start, other_stop) in zip(self.intervals, other.intervals, strict=True):
            start, stop = max(start, other_start), min(stop, other_stop)
            if start >= stop:
                return None
            intervals.append(Interval(start, stop))
        return Mask(tuple(intervals))

    def overlaps(self, other: Mask) -> bool:
        """Whether there are indices that both have."""
        for (start, stop), (other_start, other_stop) in zip(self.intervals, other.intervals, strict=True):
            if start >= other_stop or other_start >= stop or start >= stop or other_start >= other_stop:
                return False
        return True

    def contains(self, other: Mask) -> bool:
        """Whether all indices and addends of the other are in this one."""
        return self.chunk.contains(other.chunk) and all(
            a.start <= b.start and b.stop <= a.stop for a, b in zip(self.intervals, other.intervals, strict=True)
        )

    def difference(self, other: Mask) -> tuple[Mask, ...]:
        """Disjoint boxes that cover what of this region is not in the other's, both with whole values.

        At most two for each dimension: what lies before and what lies after, the rest going on to the next dimension.
        """
        both = self.overlap(other)
        if both is None:
            return (self,)
        left: list[Mask] = []
        rest = self
        for dim, inner in enumerate(both.intervals):
            outer = rest.intervals[dim]
            if outer.start < inner.start:
                left.append(rest.with_interval(dim, Interval(outer.start, inner.start)))
            if inner.stop < outer.stop:
                left.append(rest.with_interval(dim, Interval(inner.stop, outer.stop)))
            rest = rest.with_interval(dim, inner)
        return tuple(left)

    def union(self, other: Mask) -> Mask | None:
        """The one mask that is both together, overlaps counted once; None if no mask is.

        Two boxes make a box if they differ in one dimension and touch there; two value chunks make a chunk if they are
        the halves, thirds … of one and all there: of two masks, that is two halves.
        """
        if self.contains(other):
            return self
        if other.contains(self):
            return other
        if self.intervals == other.intervals:
            first, second = sorted((self.chunk, other.chunk))
            halves = first.of == second.of and first.of % 2 == 0 and first.number % 2 == 0
            if halves and second.number == first.number + 1:
                return Mask(self.intervals, ValueChunk(first.number // 2, first.of // 2))
            return None
        if self.chunk != other.chunk:
            return None
        pairs = zip(self.intervals, other.intervals, strict=True)
        differing = [dim for dim, (a, b) in enumerate(pairs) if a != b]
        if len(differing) != 1:
            return None
        (dim,) = differing
        a, b = sorted((self.intervals[dim], other.intervals[dim]))
        return self.with_interval(dim, Interval(a.start, max(a.stop, b.stop))) if b.start <= a.stop else None

    def hull(self, other: Mask) -> Mask:
        """The smallest box around both, with whole values."""
        pairs = zip(self.intervals, other.intervals, strict=True)
        return Mask(tuple(Interval(min(a.start, b.start), max(a.stop, b.stop)) for a, b in pairs))

    def within(self, outer: Mask) -> tuple[slice, ...]:
        """The subscript that takes this part out of a tensor that holds `outer`."""
        return tuple(
            slice(a.start - b.start, a.stop - b.start) for a, b in zip(self.intervals, outer.intervals, strict=True)
        )

    def __str__(self) -> str:
        """``[0:4, 2:6]``, followed by the chunk where that is not all."""
        return _text(self)


@dataclass(frozen=True, slots=True, eq=False)
class LogicalTensor:
    """A tensor of the program as its author wrote it, on no device in particular (the paper's pTensor).

    ``kind`` is parameter, buffer, input, constant or activation; ``differentiable`` tells whether a gradient flows
    through it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "activation"
    differentiable: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def whole(self) -> TensorView:
        """The view of all of it."""
        return TensorView(self, Mask.of(self.shape))

    def __str__(self) -> str:
        """``hidden float32[8, 64]``."""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class TensorView:
    """What one piece of an operator reads or writes of a logical tensor (the paper's vTensor)."""

    tensor: LogicalTensor
    mask: Mask

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return self.mask.num_elements * self.tensor.dtype.itemsize

    def __str__(self) -> str:
        """``hidden[0:4, 0:64]``."""
        return f"{self.tensor.name}{self.mask}"


@functools.lru_cache(maxsize=65536)
def _text(mask: Mask) -> str:
    box = f"[{', '.join(f'{start}:{stop}' for start, stop in mask.intervals)}]"
    return box if mask.chunk == WHOLE_VALUE else f"{box} {mask.chunk}"


@functools.lru_cache(maxsize=4096)
def cut_evenly(size: int, num_parts: int) -> tuple[Interval, ...]:
    """Intervals that cover ``[0, size)``, the first ones longer by one where it does not divide.

    Raises:  ValueError for more parts than indices.
    """
    if not 1 <= num_parts <= size:
        raise ValueError(f"{size} indices cannot be cut into {num_parts} parts; choose 1 to {size}.")
    short, num_long = divmod(size, num_parts)
    bounds = [index * short + min(index, num_long) for index in range(num_parts + 1)]
    return tuple(Interval(start, stop) for start, stop in itertools.pairwise(bounds))


def covers(parts: Iterable[Mask], whole: Mask) -> bool:
    """Whether each index of `whole`, with its whole value, is in some part or in parts whose chunks add up to it."""
    return next(missing(parts, whole), None) is None


def missing(parts: Iterable[Mask], whole: Mask) -> Iterator[Mask]:
    """Boxes of `whole` for which no part, and no full set of chunks, has the values."""
    parts = [part for part in parts if part.overlaps(whole)]
    if not parts:
        yield whole
        return
    first = parts[0]
    box = whole.overlap(first)
    assert box is not None
    inside = [part for part in parts if part.overlaps(box)]
    for dim, interval in enumerate(box.intervals):
        bounds = {bound for part in inside for bound in part.intervals[dim] if interval.start < bound < interval.stop}
        if bounds:
            # Parts whose edges cross this box: look at what lies on either side of the edge by itself.
            bound = min(bounds)
            yield from missing(parts, box.with_interval(dim, Interval(interval.start, bound)))
            yield from missing(parts, box.with_interval(dim, Interval(bound, interval.stop)))
            break
    else:
        if tiling(part.chunk for part in inside) is None:
            yield box.with_chunk(whole.chunk)
    for rest in whole.region.difference(box):
        yield from missing(parts, rest.with_chunk(whole.chunk))


def cells(box: Mask, masks: Iterable[Mask]) -> Iterator[Mask]:
    """The box cut along the edges of the masks, so that each has all of a cell or nothing of it."""
    masks = [mask for mask in masks if mask.overlaps(box)]
    for dim, (start, stop) in enumerate(box.intervals):
        bounds = sorted({bound for mask in masks for bound in mask.intervals[dim] if start < bound < stop})
        if bounds:
            middle = bounds[len(bounds) // 2]
            yield from cells(box.with_interval(dim, Interval(start, middle)), masks)
            yield from cells(box.with_interval(dim, Interval(middle, stop)), masks)
            return
    yield box


def merge(boxes: Iterable[Mask]) -> list[Mask]:
    """The same indices in fewer boxes, where two make one."""
    merged: list[Mask] = []
    for box in boxes:
        again = True
        while again:
            again = False
            for index, other in enumerate(merged):
                both = box.union(other)
                if both is not None:
                    box, again = both, True
                    del merged[index]
                    break
        merged.append(box)
    return merged


def tiling(chunks: Iterable[ValueChunk]) -> tuple[ValueChunk, ...] | None:
    """Some of these chunks that add up to the whole value, each addend in exactly one of them; None if none do.

    The largest are taken where there is a choice: the whole value alone, if it is among them.
    """
    distinct = set(chunks)
    finest = math.lcm(*(chunk.of for chunk in distinct))
    # From the last addend to the first: which chunk, the largest last, leads on from a start to the end.
    leads_on: dict[int, ValueChunk] = {}
    for chunk in sorted(distinct, key=lambda chunk: (chunk.number * finest // chunk.of, chunk.of), reverse=True):
        width = finest // chunk.of
        stop = (chunk.number + 1) * width
        if stop == finest or stop in leads_on:
            leads_on[stop - width] = chunk
    if 0 not in leads_on:
        return None
    tiles = [leads_on[0]]
    while (tiles[-1].number + 1) != tiles[-1].of:
        tiles.append(leads_on[(tiles[-1].number + 1) * finest // tiles[-1].of])
    return tuple(tiles)
