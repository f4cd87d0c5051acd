"""Which values a plan's tasks read and write on each rank, and the communication between them, forward and backward.

A tensor's readers are served by one `Communication` from its makers. Its gradient goes the other way by communications
of its own, found by the same search: readers hold addends of it, makers need it whole::

    x ── on both ranks ──►  linear[n 0:4] on rank 0 ─┐            dx is two addends  ── all_reduce ──►  dx on both
      (no communication)    linear[n 4:8] on rank 1 ─┘
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch_vtensor.compile.communication import Buffer, Communication, Placed
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.pieces import gradient_chunk
from torch_vtensor.compile.primitives import Plan
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, LogicalTensor, Mask, ValueChunk, cut_evenly
from torch_vtensor.compile.topology import Topology


class Instance(NamedTuple):
    """A task on one of the ranks that run it."""

    task: Task
    rank: int


class Reader(NamedTuple):
    """Who reads a part of a tensor: input `position` of an instance, or the caller on a rank (no task)."""

    task: Task | None
    rank: int
    position: int
    mask: Mask


@dataclass(eq=False)
class GradientGroup:
    """Readers of a tensor that hold the same addends of its gradient on the same ranks: added up before they move.

    ``addends`` has the readers that contribute to each part that a rank holds; ``communication`` takes these parts to
    the makers.
    """

    addends: Mapping[Placed, tuple[Reader, ...]]
    communication: Communication

    @cached_property
    def _sent(self) -> frozenset[Buffer]:
        steps = self.communication.steps
        return frozenset(buffer for step in steps for rank in step.ranks for buffer in step.reads(rank))

    def sends(self, buffer: Buffer) -> bool:
        """Whether some step reads the buffer."""
        return buffer in self._sent


@dataclass(eq=False)
class Exchange:
    """One tensor, of one microbatch where it has any: makers, readers, and what moves between them.

    ``makers`` are the instances that write each part, empty for what is there from the start. ``groups`` is empty where
    no gradient flows.
    """

    tensor: LogicalTensor
    microbatch: int | None
    makers: Mapping[Placed, tuple[Instance, ...]]
    readers: tuple[Reader, ...]
    communication: Communication
    groups: tuple[GradientGroup, ...] = ()
    group_of: Mapping[Reader, GradientGroup] = field(default_factory=dict)

    def buffer(self, reader: Reader) -> Buffer:
        """The buffer that a reader reads."""
        return self.communication.need[Placed(reader.rank, reader.mask)]


@dataclass(frozen=True, eq=False)
class Dataflow:
    """All exchanges of a plan.

    ``reads`` has the exchange and reader of each input of each instance. ``storage`` tells which part of each parameter
    and buffer each rank keeps between calls.
    """

    plan: Plan
    exchanges: tuple[Exchange, ...]
    reads: Mapping[tuple[Instance, int], tuple[Exchange, Reader]]
    returns: tuple[tuple[Exchange, Reader], ...]
    storage: Mapping[LogicalTensor, Mapping[int, Mask]]
    active: frozenset[LogicalTensor]


def find_dataflow(plan: Plan, topology: Topology, *, trains: bool) -> Dataflow:
    """Find what every rank reads and writes, and all communication.

    ``trains``: also backward, from the outputs that gradients flow through.
    """
    graph = plan.graph
    makers: defaultdict[LogicalTensor, list[Instance]] = defaultdict(list)
    readers: defaultdict[LogicalTensor, list[Reader]] = defaultdict(list)
    for task in plan.tasks:
        for rank in plan.ranks[task]:
            for view in task.outputs:
                if view is not None:
                    makers[view.tensor].append(Instance(task, rank))
            for position, view in enumerate(task.inputs):
                readers[view.tensor].append(Reader(task, rank, position, view.mask))
    returned = dict.fromkeys((*graph.outputs, *graph.mutations.values()))
    for position, tensor in enumerate(returned):
        for rank in plan.mesh.ranks:
            readers[tensor].append(Reader(None, rank, position, tensor.whole.mask))

    active = _active(plan) if trains else frozenset()
    storage = {
        tensor: _stored(plan, tensor) for tensor in graph.inputs if tensor.kind == "parameter" and readers[tensor]
    }
    exchanges: list[Exchange] = []
    reads: dict[tuple[Instance, int], tuple[Exchange, Reader]] = {}
    returns: list[tuple[Exchange, Reader]] = []
    for tensor, all_readers in readers.items():
        for exchange in _exchanges(plan, topology, tensor, makers[tensor], all_readers, storage.get(tensor)):
            if tensor in active:
                _add_gradients(exchange, topology)
            exchanges.append(exchange)
            for reader in exchange.readers:
                if reader.task is None:
                    returns.append((exchange, reader))
                else:
                    reads[Instance(reader.task, reader.rank), reader.position] = exchange, reader
    returns.sort(key=lambda item: item[1].position)
    return Dataflow(plan, tuple(exchanges), reads, tuple(returns), storage, active)


def _active(plan: Plan) -> frozenset[LogicalTensor]:
    """The tensors whose gradients are wanted: what leads from a parameter, or an input with one, to an output."""
    wanted = {tensor for tensor in plan.graph.outputs if tensor.differentiable}
    for operator in reversed(plan.graph.operators):
        if any(output in wanted for output in operator.outputs if output is not None):
            wanted.update(tensor for tensor in operator.inputs if tensor.differentiable)
    return frozenset(wanted)


def _stored(plan: Plan, tensor: LogicalTensor) -> dict[int, Mask]:
    """The part of a parameter that each rank keeps between steps: a shard where the plan says so, else all of it."""
    whole = tensor.whole.mask
    asked = plan.stored.get(tensor)
    if asked is None:
        return dict.fromkeys(plan.mesh.ranks, whole)
    if asked.dim is None:
        return dict.fromkeys(asked.ranks, whole)
    shards = cut_evenly(tensor.shape[asked.dim], len(asked.ranks))
    return {rank: whole.with_interval(asked.dim, shard) for rank, shard in zip(asked.ranks, shards, strict=True)}


def _exchanges(
    plan: Plan,
    topology: Topology,
    tensor: LogicalTensor,
    makers: Sequence[Instance],
    readers: Sequence[Reader],
    storage: Mapping[int, Mask] | None,
) -> Iterable[Exchange]:
    """One exchange for each microbatch in which the tensor is made; what is not made in any has one."""
    if not makers:
        there = storage or dict.fromkeys(plan.mesh.ranks, tensor.whole.mask)
        have = {Placed(rank, mask): () for rank, mask in there.items()}
        yield _exchange(tensor, None, have, readers, topology)
        return
    by_microbatch: defaultdict[int | None, list[Reader]] = defaultdict(list)
    in_microbatches = {plan.microbatch.get(maker.task) for maker in makers}
    for reader in readers:
        index = None if reader.task is None else plan.microbatch.get(reader.task)
        by_microbatch[index if index in in_microbatches else None].append(reader)
    for index, some in by_microbatch.items():
        written: defaultdict[Placed, list[Instance]] = defaultdict(list)
        for maker in makers:
            if index is None or plan.microbatch.get(maker.task) in (index, None):
                for view in maker.task.outputs:
                    if view is not None and view.tensor is tensor:
                        written[Placed(maker.rank, view.mask)].append(maker)
        yield _exchange(tensor, index, {part: tuple(by) for part, by in written.items()}, some, topology)


def _exchange(
    tensor: LogicalTensor,
    microbatch: int | None,
    makers: Mapping[Placed, tuple[Instance, ...]],
    readers: Sequence[Reader],
    topology: Topology,
) -> Exchange:
    need = tuple(dict.fromkeys(Placed(reader.rank, reader.mask) for reader in readers))
    found = _find_among_chunks(tensor, tuple(makers), need, topology)
    return Exchange(tensor, microbatch, makers, tuple(readers), found)


def _find_among_chunks(
    tensor: LogicalTensor, have: Sequence[Placed], need: Sequence[Placed], topology: Topology
) -> Communication:
    """Find communication where all that is there may be some chunks of a value, as the sums of one microbatch are.

    What is searched for is how to make, of these chunks alone, those that are read: they are numbered among themselves.
    """
    chunks = sorted({part.mask.chunk for part in (*have, *need)})
    apart = need and all(part.mask.chunk != WHOLE_VALUE for part in need) and len({chunk.of for chunk in chunks}) == 1
    if not apart or len(chunks) == chunks[0].of:
        return find_communication(tensor.shape, tensor.dtype.itemsize, have, need, topology)
    among = {chunk: ValueChunk(number, len(chunks)) for number, chunk in enumerate(chunks)}

    def renumbered(parts: Sequence[Placed]) -> dict[Placed, Placed]:
        return {part: Placed(part.rank, part.mask.with_chunk(among[part.mask.chunk])) for part in parts}

    haves, needs = renumbered(have), renumbered(need)
    found = find_communication(
        tensor.shape, tensor.dtype.itemsize, tuple(haves.values()), tuple(needs.values()), topology
    )
    names = {found.have[there]: Buffer(*part) for part, there in haves.items()}

    def named(buffer: Buffer) -> Buffer:
        return names.get(buffer, buffer)

    return Communication(
        {part: named(found.have[there]) for part, there in haves.items()},
        {part: named(found.need[there]) for part, there in needs.items()},
        tuple(step.renamed(named) for step in found.steps),
    )


def _add_gradients(exchange: Exchange, topology: Topology) -> None:
    """Find how the gradient gets from the readers to the makers."""
    tensor = exchange.tensor
    by_use: defaultdict[Hashable, list[Reader]] = defaultdict(list)
    for reader in exchange.readers:
        by_use["caller" if reader.task is None else (reader.task.operator, reader.position)].append(reader)
    by_layout: defaultdict[frozenset[Placed], list[Mapping[Placed, tuple[Reader, ...]]]] = defaultdict(list)
    for readers in by_use.values():
        addends = _addends(readers)
        by_layout[frozenset(addends)].append(addends)

    need = tuple(dict.fromkeys(Placed(part.rank, part.mask.region) for part in exchange.makers))
    groups: list[GradientGroup] = []
    group_of: dict[Reader, GradientGroup] = {}
    for layouts in by_layout.values():
        together = {part: tuple(reader for layout in layouts for reader in layout[part]) for part in layouts[0]}
        found = find_communication(tensor.shape, tensor.dtype.itemsize, tuple(together), need, topology)
        group = GradientGroup(together, found)
        groups.append(group)
        group_of.update((reader, group) for readers_ in together.values() for reader in readers_)
    exchange.groups = tuple(groups)
    exchange.group_of = group_of


def _addends(readers: Sequence[Reader]) -> dict[Placed, tuple[Reader, ...]]:
    """Which addends of the gradient the readers hold, all of one operator's input.

    Of one part, a rank first adds up what it has: microbatches of a parameter's gradient become one addend. Ranks that
    then hold the same hold replicas. Where they hold some of the same, everything stays apart.
    """
    keys: defaultdict[Mask, defaultdict[int, dict[Hashable, list[Reader]]]] = defaultdict(lambda: defaultdict(dict))
    for reader in readers:
        key: Hashable = None if reader.task is None else gradient_chunk(reader.task, reader.position)
        keys[reader.mask.region][reader.rank].setdefault(key, []).append(reader)
    held: dict[Placed, tuple[Reader, ...]] = {}
    for regions in _overlapping(list(keys)):
        by_rank = keys[regions[0]]
        sets = dict.fromkeys(frozenset(addends) for addends in by_rank.values())
        names = dict.fromkeys(key for region in regions for addends in keys[region].values() for key in addends)
        if len(regions) == 1 and sum(map(len, sets)) == len(names):
            number = {addends: index for index, addends in enumerate(sets)}
            for rank, addends in by_rank.items():
                chunk = ValueChunk(number[frozenset(addends)], len(sets))
                # Readers with one key compute the same: a rank that has several counts the first.
                held[Placed(rank, regions[0].with_chunk(chunk))] = tuple(first for first, *_ in addends.values())
            continue
        order = {key: index for index, key in enumerate(names)}
        for region in regions:
            for rank, addends in keys[region].items():
                for key, (first, *_) in addends.items():
                    held[Placed(rank, region.with_chunk(ValueChunk(order[key], len(names))))] = (first,)
    return held


def _overlapping(regions: Sequence[Mask]) -> list[list[Mask]]:
    """Regions in groups, such that those of different groups have nothing in common."""
    groups: list[list[Mask]] = []
    for region in regions:
        touched = [group for group in groups if any(region.intersection(other) is not None for other in group)]
        groups = [group for group in groups if group not in touched]
        groups.append([*(other for group in touched for other in group), region])
    return groups
