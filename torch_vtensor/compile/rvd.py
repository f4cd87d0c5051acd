"""Regular layouts of a tensor over ranks, and the communication that leads from one to another.

Ranks form a grid. Each axis of it repeats the tensor (R), splits its values into addends (V), or cuts a dimension (D);
several axes may cut one dimension, the outermost first. A layout is the role of every axis, so that the ranks which
take part in a step are known one by one: those along the axes that change their role.

Source:  SuperScaler (arXiv 2301.08984) section 4, RVD(r, v, d1 … dn). The paper tracks how many replicas, addends and
shards there are; here it is axes, so two layouts with equal counts but different ranks in them are two layouts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch_vtensor.compile.communication import CollectiveKind
from torch_vtensor.compile.tensor_view import Interval, Mask, ValueChunk, cut_evenly
from torch_vtensor.compile.topology import Topology

Axes: TypeAlias = tuple[int, ...]


class Layout(NamedTuple):
    """Which axes split values, and which cut each dimension, outermost first. The others repeat."""

    values: Axes
    dims: tuple[Axes, ...]

    def repeating(self, num_axes: int) -> Axes:
        """The axes along which ranks hold the same."""
        used = {*self.values, *itertools.chain(*self.dims)}
        return tuple(axis for axis in range(num_axes) if axis not in used)

    def with_dim(self, dim: int, axes: Axes) -> Layout:
        """This layout with other axes for a dimension."""
        return self._replace(dims=(*self.dims[:dim], axes, *self.dims[dim + 1 :]))

    def without_values(self, axes: Iterable[int]) -> Layout:
        """This layout with these axes no longer splitting values."""
        return self._replace(values=tuple(axis for axis in self.values if axis not in set(axes)))


class Hop(NamedTuple):
    """One step of all ranks from a layout to the next, along some axes; ``local`` if ranks just drop something."""

    kind: CollectiveKind | Literal["local"]
    axes: Axes
    layout: Layout
    gather_dim: int | None = None
    scatter_dim: int | None = None


@dataclass(frozen=True, eq=False)
class Grid:
    """Ranks along axes, the last varying fastest, and how dimensions are cut by axes that cut them in a known layout.

    ``known`` holds the shards that given layouts have, by dimension and axes; the rest is cut evenly or not at all.
    """

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    hull: Mask
    known: Mapping[tuple[int, Axes], tuple[Interval, ...]]

    def size(self, axes: Axes) -> int:
        """How many ranks there are along these axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    @functools.cached_property
    def digits(self) -> tuple[tuple[int, ...], ...]:
        """Where each rank is, by position in `ranks`: its index along each axis."""
        return tuple(itertools.product(*map(range, self.sizes)))

    def index(self, position: int, axes: Axes) -> int:
        """Where a rank is along several axes, the first of them counting most."""
        number = 0
        for axis in axes:
            number = number * self.sizes[axis] + self.digits[position][axis]
        return number

    @functools.cached_property
    def _shards(self) -> dict[tuple[int, Axes], tuple[Interval, ...] | None]:
        return {**self.known}

    def shards(self, dim: int, axes: Axes) -> tuple[Interval, ...] | None:
        """The intervals into which axes cut a dimension; None if what the outer ones make is not known or not even."""
        key = dim, axes
        if key not in self._shards:
            outer, size = self.shards(dim, axes[:-1]), self.sizes[axes[-1]]
            even = outer is not None and all(shard.size and not shard.size % size for shard in outer)
            self._shards[key] = (
                tuple(
                    Interval(shard.start + part.start, shard.start + part.stop)
                    for shard in (outer if outer and even else ())
                    for part in cut_evenly(shard.size, size)
                )
                or None
            )
        return self._shards[key]

    def mask(self, layout: Layout, position: int) -> Mask:
        """What a rank holds."""
        intervals = []
        for dim, axes in enumerate(layout.dims):
            shards = self.shards(dim, axes)
            assert shards is not None, f"{layout} cuts dimension {dim} in a way that is not known"
            intervals.append(shards[self.index(position, axes)])
        chunk = ValueChunk(self.index(position, layout.values), self.size(layout.values))
        return Mask(tuple(intervals), chunk)

    def num_elements(self, layout: Layout) -> int:
        """Elements on the rank that holds most."""
        return math.prod(
            max(shard.size for shard in self.shards(dim, axes) or ()) for dim, axes in enumerate(layout.dims)
        )

    def num_shards(self, layout: Layout, mask: Mask) -> int:
        """How many shards of a layout a box reaches into."""
        number = 1
        for dim, axes in enumerate(layout.dims):
            if axes:
                key = dim, axes, mask.intervals[dim]
                if key not in self._reaches:
                    start, stop = mask.intervals[dim]
                    shards = self.shards(dim, axes) or ()
                    self._reaches[key] = sum(shard.start < stop and start < shard.stop for shard in shards)
                number *= self._reaches[key]
        return number

    @functools.cached_property
    def _reaches(self) -> dict[tuple[int, Axes, Interval], int]:
        return {}

    def groups(self, axes: Axes) -> list[list[int]]:
        """Positions of the ranks that differ along these axes alone, for each place along the others, in order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        rest = [axis for axis in range(len(self.sizes)) if axis not in axes]
        for position, digits in enumerate(self.digits):
            groups.setdefault(tuple(digits[axis] for axis in rest), []).append(position)
        return [sorted(group, key=lambda position: self.index(position, axes)) for group in groups.values()]

    @functools.cached_property
    def _slowest(self) -> dict[frozenset[int], tuple[int, ...]]:
        return {}

    def slowest(self, axes: Axes, topology: Topology) -> tuple[int, ...]:
        """Ranks of the group along these axes that has the slowest links."""
        key = frozenset(axes)
        if key not in self._slowest:
            groups = (tuple(self.ranks[position] for position in group) for group in self.groups(axes))
            self._slowest[key] = max(groups, key=lambda ranks: topology.ring_seconds(ranks, 1e6))
        return self._slowest[key]

    def splits_evenly(self, dim: int, outer: Axes, axes: Axes) -> bool:
        """Whether `axes` cut each shard that `outer` make of a dimension into shards of one size."""
        if self.shards(dim, outer) is None or (shards := self.shards(dim, outer + axes)) is None:
            return False
        sizes, number = [shard.size for shard in shards], self.size(axes)
        return all(len({*sizes[first : first + number]}) == 1 for first in range(0, len(sizes), number))

    def hops(self, layout: Layout, dims: Sequence[int], values: Axes) -> Iterator[Hop]:
        """All that leads on from a layout in one step; free axes cut `dims` only, or split values if in `values`."""
        for axes in _orders(layout.values):
            added = layout.without_values(axes)
            if axes == tuple(sorted(axes)):
                yield Hop("all_reduce", axes, added)
            for dim in dims:
                if self.splits_evenly(dim, layout.dims[dim], axes):
                    yield Hop("reduce_scatter", axes, added.with_dim(dim, layout.dims[dim] + axes), scatter_dim=dim)
        for dim, cut in enumerate(layout.dims):
            for number in range(len(cut)):
                outer, axes = cut[:number], cut[number:]
                if not self.splits_evenly(dim, outer, axes):
                    continue
                gathered = layout.with_dim(dim, outer)
                yield Hop("all_gather", axes, gathered, gather_dim=dim)
                for other in dims:
                    if other != dim and self.splits_evenly(other, layout.dims[other], axes):
                        exchanged = gathered.with_dim(other, layout.dims[other] + axes)
                        yield Hop("all_to_all", axes, exchanged, gather_dim=dim, scatter_dim=other)
        for axis in layout.repeating(len(self.sizes)):
            for dim in dims:
                if self.shards(dim, (*layout.dims[dim], axis)) is not None:
                    yield Hop("local", (axis,), layout.with_dim(dim, (*layout.dims[dim], axis)))
            if axis in values:
                yield Hop("local", (axis,), layout._replace(values=(*layout.values, axis)))

    def seconds(self, layout: Layout, hop: Hop, itemsize: int, topology: Topology) -> float:
        """Predicted time of a hop from a layout."""
        if hop.kind == "local":
            return 0.0
        num_bytes = self.num_elements(layout) * itemsize
        ranks = self.slowest(hop.axes, topology)
        return topology.collective_seconds(hop.kind, ranks, num_bytes)


def _orders(axes: Axes) -> Iterator[Axes]:
    """Non-empty choices of axes in every order; of more than three, all of them in the order given."""
    for number in range(1, min(len(axes), 3) + 1):
        yield from itertools.permutations(axes, number)
    if len(axes) > 3:
        yield axes


def find_grid(*placings: Mapping[int, Mask]) -> tuple[Grid, tuple[Layout, ...]] | None:
    """The grid, of the fewest axes, in which what the ranks hold in each of these is a layout; None if none is found.

    Axes are looked for along ascending ranks, and along ranks in the order of what they hold.
    """
    labels = [_labels(placing) for placing in placings]
    hulls = {_hull(placing) for placing in placings}
    if len(hulls) != 1:
        return None
    (hull,) = hulls
    ranks = sorted(placings[0])
    held = {rank: tuple(label[rank] for label in labels) for rank in ranks}
    orders = [sorted(ranks, key=held.__getitem__), sorted(ranks, key=lambda rank: held[rank][::-1])]
    for sizes in _prime_orders(len(ranks)):
        for order in (ranks, *orders):
            layouts = [_layout([label[rank] for rank in order], sizes) for label in labels]
            if None not in layouts:
                sizes, found = _merge_axes(sizes, [layout for layout in layouts if layout is not None])
                return _with_known_shards(Grid(tuple(order), sizes, hull, {}), found, placings)
    return None


def _hull(placing: Mapping[int, Mask]) -> Mask:
    """The smallest box around all that ranks hold."""
    dims = zip(*(mask.intervals for mask in placing.values()), strict=True)
    return Mask(tuple(Interval(min(one.start for one in dim), max(one.stop for one in dim)) for dim in dims))


def _labels(placing: Mapping[int, Mask]) -> dict[int, tuple[int, ...]]:
    """Which addend, and in each dimension which shard, each rank holds, as numbers."""
    dims = zip(*(mask.intervals for mask in placing.values()), strict=True)
    numbers = [{interval: number for number, interval in enumerate(sorted(set(dim)))} for dim in dims]
    return {
        rank: (mask.chunk.number, *(number[one] for number, one in zip(numbers, mask.intervals, strict=True)))
        for rank, mask in placing.items()
    }


def _prime_orders(number: int) -> list[Axes]:
    """A number's prime factors in every order, or in the first few dozen."""
    factors, left = [], number
    for factor in range(2, number + 1):
        while left % factor == 0:
            factors.append(factor)
            left //= factor
    if len(set(factors)) < 2:
        return [tuple(factors)]
    return list(dict.fromkeys(itertools.islice(itertools.permutations(factors), 5040)))[:40]


def _layout(labels: Sequence[tuple[int, ...]], sizes: Axes) -> Layout | None:
    """The layout in which ranks along axes of these sizes hold what the labels say; None if there is none."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    steps: list[dict[int, int]] = [{} for _ in labels[0]]  # of each label, by axis
    for axis, stride in enumerate(strides):
        changes = [after - before for before, after in zip(labels[0], labels[stride], strict=True)]
        for step, change in zip(steps, changes, strict=True):
            if change:
                step[axis] = change
    if len({*itertools.chain(*steps)}) != sum(map(len, steps)):
        return None
    axes = []
    for step in steps:
        axes.append(tuple(sorted(step, key=lambda axis: -step[axis])))
        if any(
            step[axis] != math.prod(sizes[inner] for inner in axes[-1][at + 1 :]) for at, axis in enumerate(axes[-1])
        ):
            return None
    for position, label in enumerate(labels):
        digits = [position // stride % size for stride, size in zip(strides, sizes, strict=True)]
        if label != tuple(sum(digits[axis] * change for axis, change in step.items()) for step in steps):
            return None
    return Layout(axes[0], tuple(axes[1:]))


def _merge_axes(sizes: Axes, layouts: Sequence[Layout]) -> tuple[Axes, list[Layout]]:
    """The same layouts with axes that lie next to each other in all of them, and in the grid, as one."""
    merged: list[list[int]] = []
    for axis in range(len(sizes)):
        if merged and all(_adjacent(layout, axis - 1, axis) for layout in layouts):
            merged[-1].append(axis)
        else:
            merged.append([axis])
    number = {group[0]: index for index, group in enumerate(merged)}

    def rename(axes: Axes) -> Axes:
        return tuple(number[axis] for axis in axes if axis in number)

    return tuple(math.prod(sizes[axis] for axis in group) for group in merged), [
        Layout(rename(layout.values), tuple(map(rename, layout.dims))) for layout in layouts
    ]


def _adjacent(layout: Layout, outer: int, inner: int) -> bool:
    for axes in (layout.values, *layout.dims):
        if outer in axes or inner in axes:
            return (outer, inner) in itertools.pairwise(axes)
    return True


def _with_known_shards(
    grid: Grid, layouts: Sequence[Layout], placings: Sequence[Mapping[int, Mask]]
) -> tuple[Grid, tuple[Layout, ...]] | None:
    """The grid with the layouts' shards, uneven ones too; None if the layouts do not go together."""
    known: dict[tuple[int, Axes], tuple[Interval, ...]] = {}
    for layout, placing in zip(layouts, placings, strict=True):
        if {mask.chunk.of for mask in placing.values()} != {grid.size(layout.values)}:
            return None
        for dim, axes in enumerate(layout.dims):
            shards = sorted({mask.intervals[dim] for mask in placing.values()})
            if len(shards) != grid.size(axes) or any(a.stop != b.start for a, b in itertools.pairwise(shards)):
                return None
            for number in range(len(axes) + 1):
                size = grid.size(axes[number:])
                merged = tuple(
                    Interval(shards[first].start, shards[first + size - 1].stop)
                    for first in range(0, len(shards), size)
                )
                if known.setdefault((dim, axes[:number]), merged) != merged:
                    return None
    orders = {frozenset(layout.values): layout.values for layout in layouts}
    if any(orders[frozenset(layout.values)] != layout.values for layout in layouts):
        return None
    return Grid(grid.ranks, grid.sizes, grid.hull, known), tuple(layouts)
