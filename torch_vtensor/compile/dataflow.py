"""Which values a plan's tasks read and write on each rank, and the communication between them, forward and backward.

A tensor's readers are served by one `Communication` from its makers. Its gradient goes the other way by communications
of its own, found by the same search: readers hold addends of it, makers need it whole::

    x ── on both ranks ──►  linear[n 0:4] on rank 0 ─┐            dx is two addends  ── all_reduce ──►  dx on both
      (no communication)    linear[n 4:8] on rank 1 ─┘
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from torch_vtensor.compile.addends import Reader, find_addends, place_under_sums
from torch_vtensor.compile.communication import Buffer, Communication, Placed
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.plan import Plan
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, LogicalTensor, Mask, ValueChunk, covers, cut_evenly
from torch_vtensor.compile.topology import Topology

NOTHING_KEPT: Mapping[LogicalTensor, Mapping[int, Mask]] = MappingProxyType({})


class Instance(NamedTuple):
    """A task on one of the ranks that run it."""

    task: Task
    rank: int


@dataclass(eq=False)
class GradientGroup:
    """Readers of a tensor that hold the same addends of its gradient on the same ranks: added up before they move.

    ``addends`` has the readers that contribute to each part that a rank holds; ``communication`` takes these parts to
    the makers.
    """

    addends: Mapping[Placed, tuple[Reader, ...]]
    communication: Communication

    @cached_property
    def part_of(self) -> Mapping[Reader, Placed]:
        """The part to which a reader contributes."""
        return {reader: part for part, readers in self.addends.items() for reader in readers}

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
    no gradient flows. What is read ``anew`` moves for forward passes, and again for backward ones that need it.
    """

    tensor: LogicalTensor
    microbatch: int | None
    makers: Mapping[Placed, tuple[Instance, ...]]
    readers: tuple[Reader, ...]
    communication: Communication
    groups: tuple[GradientGroup, ...] = ()
    group_of: Mapping[Reader, GradientGroup] = field(default_factory=dict)
    anew: bool = False

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


def find_dataflow(
    plan: Plan, topology: Topology, *, trains: bool, kept: Mapping[LogicalTensor, Mapping[int, Mask]] = NOTHING_KEPT
) -> Dataflow:
    """Find what every rank reads and writes, and all communication.

    ``trains``: also backward, from the outputs that gradients flow through. ``kept`` are the parts of parameters that
    ranks keep already, whatever the plan would have them keep.
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
        tensor: kept.get(tensor) or _stored(plan, tensor, readers[tensor])
        for tensor in graph.inputs
        if tensor.kind == "parameter" and readers[tensor]
    }
    exchanges: list[Exchange] = []
    reads: dict[tuple[Instance, int], tuple[Exchange, Reader]] = {}
    returns: list[tuple[Exchange, Reader]] = []
    for tensor, all_readers in readers.items():
        for exchange in _exchanges(plan, topology, tensor, makers[tensor], all_readers, storage.get(tensor)):
            if tensor in active:
                _add_gradients(exchange, plan, active, topology)
            exchanges.append(exchange)
            for reader in exchange.readers:
                if reader.task is None:
                    returns.append((exchange, reader))
                else:
                    reads[Instance(reader.task, reader.rank), reader.position] = exchange, reader
    returns.sort(key=lambda item: item[1].position)
    return Dataflow(plan, tuple(exchanges), reads, tuple(returns), storage, active)


def _flows(task: Task, active: frozenset[LogicalTensor]) -> bool:
    return any(view is not None and view.tensor in active for view in task.outputs)


def _active(plan: Plan) -> frozenset[LogicalTensor]:
    """The tensors whose gradients are wanted: what leads from a parameter, or an input with one, to an output."""
    wanted = {tensor for tensor in plan.graph.outputs if tensor.differentiable}
    for operator in reversed(plan.graph.operators):
        if any(output in wanted for output in operator.outputs if output is not None):
            wanted.update(tensor for tensor in operator.inputs if tensor.differentiable)
    return frozenset(wanted)


def _stored(plan: Plan, tensor: LogicalTensor, readers: Sequence[Reader]) -> dict[int, Mask]:
    """The part of a parameter that each rank keeps between steps.

    It is a shard where the plan says so, else the smallest box around what the rank reads. Scalars stay whole.
    """
    whole = tensor.whole.mask
    asked = plan.stored.get(tensor)
    if asked is not None and asked.ranks is not None and asked.dim is not None:
        shards = cut_evenly(tensor.shape[asked.dim], len(asked.ranks))
        return {rank: whole.with_interval(asked.dim, shard) for rank, shard in zip(asked.ranks, shards, strict=True)}
    if asked is not None and asked.ranks is not None and tensor.shape:
        return dict.fromkeys(asked.ranks, whole)
    boxes: dict[int, Mask] = {}
    for reader in readers:
        box = reader.mask.region
        boxes[reader.rank] = boxes.get(reader.rank, box).hull(box)
    if not tensor.shape or not covers(boxes.values(), whole):
        boxes = dict.fromkeys(plan.mesh.ranks, whole)
    return boxes if asked is None or not tensor.shape else _shared_out(boxes)


def _shared_out(boxes: Mapping[int, Mask]) -> dict[int, Mask]:
    """Boxes that several ranks have, cut along dimension 0 so that each has a shard; whole where rows are too few."""
    ranks_of: defaultdict[Mask, list[int]] = defaultdict(list)
    for rank in sorted(boxes):
        ranks_of[boxes[rank]].append(rank)
    found: dict[int, Mask] = {}
    for box, ranks in ranks_of.items():
        rows = box.intervals[0]
        if rows.size < len(ranks):
            found.update(dict.fromkeys(ranks, box))
            continue
        for rank, shard in zip(ranks, cut_evenly(rows.size, len(ranks)), strict=True):
            found[rank] = box.with_interval(0, Interval(rows.start + shard.start, rows.start + shard.stop))
    return found


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
        asked = plan.stored.get(tensor)
        anew = asked is not None and asked.anew
        for index, some in _by_unit(plan, readers) if anew else [(None, readers)]:
            exchange = _exchange(tensor, index, have, some, topology)
            exchange.anew = anew
            yield exchange
        return
    in_microbatches = {plan.microbatch.get(maker.task) for maker in makers}
    written = {index: _written(plan, tensor, makers, index) for index in (*in_microbatches, None)}
    by_microbatch: defaultdict[int | None, list[Reader]] = defaultdict(list)
    for uses in _by_use(readers).values():
        indices = [None if reader.task is None else plan.microbatch.get(reader.task) for reader in uses]
        # What is summed over all microbatches, and read by each: no microbatch has it.
        apart = all(
            index is None or (index in written and _is_made_of(written[index], reader.mask))
            for index, reader in zip(indices, uses, strict=True)
        )
        for index, reader in zip(indices, uses, strict=True):
            by_microbatch[index if apart else None].append(reader)
    for index, some in by_microbatch.items():
        yield _exchange(tensor, index, written[index], some, topology)


def _by_microbatch(plan: Plan, uses: Sequence[Reader]) -> Mapping[int | None, list[Reader]]:
    """Readers of one use by microbatch; all in one, if microbatches would then count what they take once each."""
    found: defaultdict[int | None, list[Reader]] = defaultdict(list)
    for reader in uses:
        found[None if reader.task is None else plan.microbatch.get(reader.task)].append(reader)
    places = {frozenset(frozenset(place_under_sums(reader).items()) for reader in some) for some in found.values()}
    return found if len(places) == 1 else {None: list(uses)}


def _by_unit(plan: Plan, readers: Sequence[Reader]) -> Iterable[tuple[int | None, list[Reader]]]:
    """Readers of what is gathered anew, by the passes that it is gathered for, with their microbatch."""
    found: defaultdict[tuple[int | None, int | None], list[Reader]] = defaultdict(list)
    for uses in _by_use(readers).values():
        for index, some in _by_microbatch(plan, uses).items():
            for reader in some:
                unit = None if reader.task is None else plan.unit.get(reader.task.operator)
                found[unit, index].append(reader)
    return [(index, some) for (_, index), some in found.items()]


def _by_use(readers: Iterable[Reader]) -> Mapping[Hashable, list[Reader]]:
    """Readers by what they are pieces of: one input of an operator, or what is returned."""
    by_use: defaultdict[Hashable, list[Reader]] = defaultdict(list)
    for reader in readers:
        by_use["caller" if reader.task is None else (reader.task.operator, reader.position)].append(reader)
    return by_use


def _written(
    plan: Plan, tensor: LogicalTensor, makers: Sequence[Instance], microbatch: int | None
) -> dict[Placed, tuple[Instance, ...]]:
    """The parts of a tensor that are made in a microbatch, or in none; all parts, for None."""
    written: defaultdict[Placed, list[Instance]] = defaultdict(list)
    for maker in makers:
        if microbatch is None or plan.microbatch.get(maker.task) in (microbatch, None):
            for view in maker.task.outputs:
                if view is not None and view.tensor is tensor:
                    written[Placed(maker.rank, view.mask)].append(maker)
    return {part: tuple(by) for part, by in written.items()}


def _is_made_of(parts: Iterable[Placed], mask: Mask) -> bool:
    """Whether these parts are enough to read a mask from."""
    masks = dict.fromkeys(part.mask for part in parts)
    if mask in masks:
        return True
    if mask.chunk == WHOLE_VALUE:
        return covers(masks, mask)
    # Chunks of what is made here, or what is made here of the chunk.
    inside = [part.region for part in masks if mask.chunk.contains(part.chunk) or part.chunk.contains(mask.chunk)]
    return covers(inside, mask.region)


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
    among = _among_themselves({part.mask.chunk for part in (*have, *need)}, {part.mask.chunk for part in need})
    if among is None:
        return find_communication(tensor.shape, tensor.dtype.itemsize, have, need, topology)

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


def _among_themselves(
    chunks: Collection[ValueChunk], needed: Collection[ValueChunk]
) -> dict[ValueChunk, ValueChunk] | None:
    """Chunks numbered within the smallest chunk that all are in, or in a row; None if that is how they are numbered."""
    if not needed or WHOLE_VALUE in needed:
        return None
    common = math.gcd(*(chunk.of for chunk in chunks))
    around = next(
        ValueChunk(numbers.pop(), of)
        for of in range(common, 0, -1)
        if common % of == 0 and len(numbers := {chunk.number * of // chunk.of for chunk in chunks}) == 1
    )
    inside = {
        chunk: ValueChunk(chunk.number - around.number * (chunk.of // around.of), chunk.of // around.of)
        for chunk in chunks
    }
    if len({chunk.of for chunk in inside.values()}) == 1:
        return {chunk: ValueChunk(number, len(inside)) for number, chunk in enumerate(sorted(inside))}
    return inside


def _add_gradients(exchange: Exchange, plan: Plan, active: frozenset[LogicalTensor], topology: Topology) -> None:
    """Find how the gradient gets from those readers that have one to the makers."""
    tensor = exchange.tensor
    by_layout: defaultdict[Hashable, list[Mapping[Placed, tuple[Reader, ...]]]] = defaultdict(list)
    flowing = [reader for reader in exchange.readers if reader.task is None or _flows(reader.task, active)]
    asked = plan.stored.get(tensor)
    for uses in _by_use(flowing).values():
        apart = _by_microbatch(plan, uses) if asked is not None and asked.each_microbatch else {None: uses}
        for index, readers in apart.items():
            addends = find_addends(readers)
            by_layout[index, frozenset(addends)].append(addends)

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
