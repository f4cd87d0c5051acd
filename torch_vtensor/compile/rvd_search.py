"""The cheapest way from one regular layout to another: on the same ranks, or from ranks to others.

Shortest path over layouts. Where ranks differ, or hold things in ways that no one grid has, layouts of the grid that
has lead to layouts of the grid that needs by one exchange of exact messages; that may also end a path in one grid::

    has  V(2) on ranks 0, 1     reduce_scatter   D0(2) on 0, 1 ┐
    needs    R(2) on ranks 2, 3     all_gather   D0(2) on 2, 3 ┘ exchange: two messages of half the size

Source:  SuperScaler (arXiv 2301.08984) section 4, intra-RVD and inter-RVD search.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from torch_vtensor.compile.communication import Assemble, Buffer, Collective, Part, Placed, Step
from torch_vtensor.compile.point_to_point import find_point_to_point
from torch_vtensor.compile.rvd import Grid, Hop, Layout
from torch_vtensor.compile.tensor_view import Mask
from torch_vtensor.compile.topology import Topology

# Layouts that are looked at before messages are sent straight to the goal: more than grids of three axes have.
_MOST_LAYOUTS = 400

# Ranks that are looked at to predict how long an exchange between many takes.
_MOST_RANKS = 12

# A local step takes no time that matters, and yet none is better than one.
_LOCAL_SECONDS = 1e-9


class Exchange(NamedTuple):
    """Exact messages between all ranks, to a layout of the grid that needs."""

    layout: Layout


Path: TypeAlias = tuple[Hop | Exchange, ...]


class _Node(NamedTuple):
    """A layout of the grid that has (number 0) or of the one that needs (the last)."""

    number: int
    layout: Layout


class _Entry(NamedTuple):
    """A way to a node, as long as a path may be through it; ``is_exact`` if that is how long it is."""

    seconds: float
    order: int
    node: _Node
    previous: _Node | None
    hop: Hop | Exchange | None
    is_exact: bool = True


class Search:
    """From a layout of one grid to a layout of another, or of the same one, which is then given twice."""

    def __init__(
        self, grids: tuple[Grid, Grid], start: Layout, goal: Layout, itemsize: int, topology: Topology
    ) -> None:
        self._grids = grids
        self._start = _Node(0, start)
        self._goal = _Node(0 if grids[0] is grids[1] else 1, goal)
        self._itemsize = itemsize
        self._topology = topology
        self._dims = self._dims_to_cut()
        self._arrivals = (goal,) if self._goal.number == 0 else tuple(self._layouts_before_gathers())
        self._masks: dict[_Node, list[Mask]] = {}

    def path(self) -> Path:
        """The hops of the cheapest way."""
        order = itertools.count()
        heap = [_Entry(0.0, next(order), self._start, None, None)]
        came: dict[_Node, tuple[_Node | None, Hop | Exchange | None]] = {}
        while heap and len(came) < _MOST_LAYOUTS:
            entry = heapq.heappop(heap)
            seconds, _, node, previous, hop, is_exact = entry
            if node in came:
                continue
            if not is_exact:
                assert previous is not None
                seconds += self._exchange_seconds(previous.layout, node.layout) - self._exchange_bound(
                    previous.layout, node.layout
                )
                heapq.heappush(heap, entry._replace(seconds=seconds, is_exact=True))
                continue
            came[node] = previous, hop
            if self._is_goal(node):
                return tuple(reversed(list(self._back(node, came))))
            for hop, length in self._hops(node):
                heapq.heappush(heap, _Entry(seconds + length, next(order), node._replace(layout=hop.layout), node, hop))
            for layout in self._arrivals if node.number == 0 and self._may_exchange(node.layout) else ():
                bound = seconds + self._exchange_bound(node.layout, layout)
                arrival = _Node(self._goal.number, layout)
                heapq.heappush(heap, _Entry(bound, next(order), arrival, node, Exchange(layout), is_exact=False))
        return (Exchange(self._goal.layout),)

    def _is_goal(self, node: _Node) -> bool:
        """Whether a node is the goal but for the order of the axes that split values, which only names addends."""
        layout, goal = node.layout, self._goal.layout
        same = layout.dims == goal.dims and set(layout.values) == set(goal.values)
        return same and node.number == self._goal.number

    @staticmethod
    def _back(
        node: _Node, came: Mapping[_Node, tuple[_Node | None, Hop | Exchange | None]]
    ) -> Iterator[Hop | Exchange]:
        previous, hop = came[node]
        while previous is not None and hop is not None:
            yield hop
            previous, hop = came[previous]

    def _hops(self, node: _Node) -> Iterator[tuple[Hop, float]]:
        grid = self._grids[node.number]
        to_goal = self._goal.layout if node.number == self._goal.number else Layout((), ())
        for hop in grid.hops(node.layout, self._dims, to_goal.values):
            seconds = grid.seconds(node.layout, hop, self._itemsize, self._topology)
            yield hop, max(seconds, _LOCAL_SECONDS)

    def _dims_to_cut(self) -> tuple[int, ...]:
        """Dimensions that one of the layouts cuts, and the first that all ranks of a grid can share evenly."""
        found = {dim for node in (self._start, self._goal) for dim, axes in enumerate(node.layout.dims) if axes}
        for grid in self._grids:
            sizes = [interval.size for interval in grid.hull.intervals]
            for among in (math.prod(grid.sizes), max(grid.sizes, default=1)):
                even = [dim for dim, size in enumerate(sizes) if size and size % among == 0]
                if even:
                    found.add(even[0])
                    break
        return tuple(sorted(found))

    def _layouts_before_gathers(self) -> Iterator[Layout]:
        """The goal, and layouts from which all-gathers along one dimension lead to it."""
        grid, goal = self._grids[1], self._goal.layout
        yield goal
        repeating = goal.repeating(len(grid.sizes))
        for number in range(1, len(repeating) + 1):
            for axes in itertools.combinations(repeating, number):
                for dim in self._dims:
                    if grid.splits_evenly(dim, goal.dims[dim], axes):
                        yield goal.with_dim(dim, goal.dims[dim] + axes)

    def _may_exchange(self, layout: Layout) -> bool:
        """In one grid, an exchange leaves addends as they are; between grids it may add them up."""
        return self._goal.number == 1 or {*layout.values} == {*self._goal.layout.values}

    def _masks_of(self, node: _Node) -> list[Mask]:
        """What each rank of a grid holds."""
        if node not in self._masks:
            grid = self._grids[node.number]
            self._masks[node] = [grid.mask(node.layout, position) for position in range(len(grid.ranks))]
        return self._masks[node]

    def _exchange_bound(self, has: Layout, needs: Layout) -> float:
        """A time that no exchange can beat: what the last rank receives, over the best link."""
        source, target = self._grids[0], self._grids[self._goal.number]
        rank, mask = target.ranks[-1], target.mask(needs, len(target.ranks) - 1)
        elements = mask.num_elements
        if rank in source.ranks:
            here = source.mask(has, source.ranks.index(rank)).overlap(mask)
            elements -= here.num_elements if here else 0
        if not elements or mask.chunk.number:
            return 0.0
        link = self._topology.inside
        return self._topology.launch_seconds + link.latency_seconds + elements * self._itemsize / link.bytes_per_second

    def _exchange_seconds(self, has: Layout, needs: Layout) -> float:
        """Predicted time of an exchange: of the rank that receives most, or of sending, spread over all senders."""
        source, target = self._grids[0], self._grids[self._goal.number]
        axes = (*has.values, *itertools.chain(*has.dims))
        on_node: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
        for rank, digits in zip(source.ranks, source.digits, strict=True):
            on_node[self._topology.node(rank)].add(tuple(digits[axis] for axis in axes))
        num_addends = max(1, source.size(has.values) // target.size(needs.values))
        position_of = {rank: position for position, rank in enumerate(source.ranks)}
        # Some ranks stand for all where there are many.
        last = len(target.ranks) - 1
        some = sorted({last, *range(0, last, max(1, len(target.ranks) // _MOST_RANKS))})
        slowest, latency, total = 0.0, 0.0, 0.0
        for position in some:
            rank, mask = target.ranks[position], target.mask(needs, position)
            here = source.mask(has, position_of[rank]).overlap(mask) if rank in position_of else None
            if mask.chunk.number and not has.values:
                continue  # zeros
            elements = mask.num_elements * num_addends - (here.num_elements if here else 0)
            if not elements:
                continue
            num_messages = num_addends * source.num_shards(has, mask) - (here is not None)
            near = len(on_node.get(self._topology.node(rank), ())) == source.size(axes)
            link = self._topology.inside if near else self._topology.between
            seconds = elements * self._itemsize / link.bytes_per_second
            slowest = max(slowest, seconds)
            # A rank that gives and gets sends as many messages as it receives.
            latency = max(latency, (1 + (rank in position_of)) * num_messages * link.latency_seconds)
            total += seconds
        if not total:
            return 0.0
        sending = max(slowest, total * len(target.ranks) / len(some) / len(source.ranks))
        # One that has what several need may send it once, to be handed on.
        handed_on = -(-len(target.ranks) // len(source.ranks)) * latency + slowest
        return self._topology.launch_seconds + min(latency + sending, handed_on)

    def steps(
        self, path: Path, held: Mapping[int, Buffer], tags: Iterator[int]
    ) -> tuple[dict[int, Buffer], tuple[Step, ...]]:
        """The steps of a path, from what each rank has, and the buffer in which each then has what it needs."""
        steps: list[Step] = []
        node, buffers = self._start, dict(held)
        dropped_from = node
        for hop in path:
            if isinstance(hop, Hop) and hop.kind == "local":
                node = node._replace(layout=hop.layout)
                continue
            buffers = self._drop(dropped_from, node, buffers, steps, tags)
            if isinstance(hop, Exchange):
                node, buffers = self._exchange(node, hop, buffers, steps, tags)
            else:
                node, buffers = self._collective(node, hop, buffers, steps, tags)
            dropped_from = node
        return self._drop(dropped_from, node, buffers, steps, tags), tuple(steps)

    def _drop(
        self, before: _Node, after: _Node, buffers: dict[int, Buffer], steps: list[Step], tags: Iterator[int]
    ) -> dict[int, Buffer]:
        """Local hops, all at once: each rank keeps a slice of what it has, or zeros if it is not the first addend."""
        grid = self._grids[before.number]
        split = tuple(axis for axis in after.layout.values if axis not in before.layout.values)
        found: dict[int, Buffer] = {}
        for position, (rank, mask) in enumerate(zip(grid.ranks, self._masks_of(after), strict=True)):
            buffer = buffers[rank]
            is_zero = grid.index(position, split) > 0
            if buffer.mask.intervals != mask.intervals or is_zero:
                parts = () if is_zero else (Part(buffer, mask.region),)
                buffer = Buffer(rank, mask, next(tags))
                steps.append(Assemble(parts, buffer))
            found[rank] = buffer
        return found

    def _exchange(
        self, node: _Node, hop: Exchange, buffers: dict[int, Buffer], steps: list[Step], tags: Iterator[int]
    ) -> tuple[_Node, dict[int, Buffer]]:
        layout = hop.layout
        if self._goal.number == 0:
            layout = layout._replace(values=node.layout.values)
        after = _Node(self._goal.number, layout)
        ranks = self._grids[after.number].ranks
        need = [Placed(rank, mask) for rank, mask in zip(ranks, self._masks_of(after), strict=True)]
        found, messages = find_point_to_point(buffers.values(), need, self._itemsize, self._topology, tags)
        steps += messages
        return after, {placed.rank: buffer for placed, buffer in found.items()}

    def _collective(
        self, node: _Node, hop: Hop, buffers: dict[int, Buffer], steps: list[Step], tags: Iterator[int]
    ) -> tuple[_Node, dict[int, Buffer]]:
        assert hop.kind != "local"
        grid = self._grids[node.number]
        after = node._replace(layout=hop.layout)
        masks = self._masks_of(after)
        found: dict[int, Buffer] = {}
        for group in grid.groups(hop.axes):
            outputs = tuple(Buffer(grid.ranks[position], masks[position], next(tags)) for position in group)
            inputs = tuple(buffers[buffer.rank] for buffer in outputs)
            steps.append(Collective(hop.kind, inputs, outputs, hop.gather_dim, hop.scatter_dim))
            found.update((buffer.rank, buffer) for buffer in outputs)
        return after, found
