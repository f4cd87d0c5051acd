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
from dataclasses import dataclass
from types import MappingProxyType

from torch_vtensor.compile.addends import Reader, find_addends, place_under_sums
from torch_vtensor.compile.alike import Pattern
from torch_vtensor.compile.communication import Buffer, Communication, Placed
from torch_vtensor.compile.equal_ranks import Views, find_like
from torch_vtensor.compile.exchange import Exchange, GradientGroup, Input, Instance
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.plan import Plan
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Operator, Task
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, LogicalTensor, Mask, ValueChunk, covers, cut_evenly
from torch_vtensor.compile.topology import Topology

NOTHING_KEPT: Mapping[LogicalTensor, Mapping[int, Mask]] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Dataflow:
    """All exchanges of a plan.

    ``inputs`` has what each instance reads, by position. ``storage`` tells which part of each parameter each rank keeps
    between calls. ``like`` has for each rank the one that is planned for it, itself unless one of each kind is: then
    the plan is for these.
    """

    plan: Plan
    exchanges: tuple[Exchange, ...]
    inputs: Mapping[Instance, Sequence[Input]]
    returns: tuple[tuple[Exchange, Reader], ...]
    storage: Mapping[LogicalTensor, Mapping[int, Mask]]
    active: frozenset[LogicalTensor]
    like: Mapping[int, int]

    @property
    def is_of_all(self) -> bool:
        """Whether every rank is planned."""
        return len(self.plan.mesh) == len(self.like)

    @property
    def is_whole_step(self) -> bool:
        """Whether the function returns one number that gradients flow through, so that a call can do the whole step."""
        flowing = {tensor for tensor in self.plan.graph.outputs if tensor in self.active}
        return len(flowing) == 1 and all(tensor.shape == () for tensor in flowing)


def find_dataflow(
    plan: Plan,
    topology: Topology,
    *,
    trains: bool,
    kept: Mapping[LogicalTensor, Mapping[int, Mask]] = NOTHING_KEPT,
    one_of_each: bool = False,
) -> Dataflow:
    """Find what every rank reads and writes, and all communication.

    ``trains``: also backward, from the outputs that gradients flow through. ``kept`` are the parts of parameters that
    ranks keep already, whatever the plan would have them keep. ``one_of_each``: for one rank of those that do the same.
    """
    uses = _Uses(plan, topology.ranks_per_node)
    active = _active(plan) if trains else frozenset()
    found = _Patterns(plan, topology, uses, active, kept, looks=one_of_each)
    of_tensor = {tensor: found.of(tensor) for tensor in uses.tensors}
    like = find_like(plan, uses.cuts, found.views) if one_of_each else {rank: rank for rank in plan.mesh.ranks}
    planned = frozenset(like.values())
    if len(planned) < len(like):
        plan = plan.on(planned)
        uses = _Uses(plan, topology.ranks_per_node)
        patterns = {id(pattern): pattern for pattern in of_tensor.values()}
        on_planned = {number: pattern.on(planned) for number, pattern in patterns.items()}
        of_tensor = {tensor: on_planned[id(pattern)] for tensor, pattern in of_tensor.items()}
    storage: dict[LogicalTensor, Mapping[int, Mask]] = {}
    exchanges: list[Exchange] = []
    inputs: dict[Instance, list[Input]] = {}
    returns: list[tuple[Exchange, Reader]] = []
    for tensor, pattern in of_tensor.items():
        if pattern.storage is not None:
            storage[tensor] = pattern.storage
        for exchange, reads in pattern.exchanges_of(tensor, uses.makers(tensor), uses.readers(tensor)):
            exchanges.append(exchange)
            for read in reads:
                task, rank, position, _ = read.reader
                if task is None:
                    returns.append((exchange, read.reader))
                    continue
                instance = Instance(task, rank)
                of_instance = inputs.get(instance)
                if of_instance is None:
                    of_instance = inputs[instance] = [read] * len(task.operator.inputs)
                of_instance[position] = read
    returns.sort(key=lambda item: item[1].position)
    return Dataflow(plan, tuple(exchanges), inputs, tuple(returns), storage, active, like)


class _Patterns:
    """The exchanges of tensors, found once for those that are alike, and what ranks see of them if somebody looks."""

    def __init__(
        self,
        plan: Plan,
        topology: Topology,
        uses: _Uses,
        active: frozenset[LogicalTensor],
        kept: Mapping[LogicalTensor, Mapping[int, Mask]],
        *,
        looks: bool,
    ) -> None:
        self.views: list[Views] = []
        self._plan, self._topology, self._uses, self._active, self._kept = plan, topology, uses, active, kept
        self._looks = looks
        self._known: dict[Hashable, dict[int, Pattern]] = {}
        self._views: dict[Hashable, Views] = {}

    def of(self, tensor: LogicalTensor) -> Pattern:
        """The pattern of a tensor's exchanges."""
        active, kept = self._active, self._kept
        of_uses, start = self._uses.likeness(tensor, active)
        likeness = of_uses, tensor in active, (start, *kept[tensor].items()) if tensor in kept else None
        known = self._known.setdefault(likeness, {})
        if start in known:
            return known[start]
        first = next(iter(known), start)
        if known and known[first].is_local:
            pattern = known[first].shifted(start - first)
            if self._looks:
                self.views.append(self._views[likeness].shifted(start - first))
        else:
            pattern, views = self._find(tensor)
            if views is not None:
                self._views.setdefault(likeness, views)
                self.views.append(views)
        known[start] = pattern
        return pattern

    def _find(self, tensor: LogicalTensor) -> tuple[Pattern, Views | None]:
        plan, topology = self._plan, self._topology
        makers, readers = self._uses.makers(tensor), self._uses.readers(tensor)
        parts = self._kept.get(tensor) or (_stored(plan, tensor, readers) if tensor.kind == "parameter" else None)
        found = list(_exchanges(plan, topology, tensor, makers, readers, parts))
        for exchange in found if tensor in self._active else ():
            _add_gradients(exchange, plan, self._active, topology)
        views = Views.of(found, parts, topology) if self._looks else None
        return Pattern.of(found, parts, makers, readers), views


class _Uses:
    """Which instances make and read each tensor, in the order of the plan's tasks."""

    def __init__(self, plan: Plan, ranks_per_node: int) -> None:
        self._plan = plan
        self._ranks_per_node = ranks_per_node
        self._tasks: defaultdict[Operator, list[Task]] = defaultdict(list)
        for task in plan.tasks:
            self._tasks[task.operator].append(task)
        self._maker: dict[LogicalTensor, tuple[Operator, int]] = {}
        self._readers: defaultdict[LogicalTensor, dict[Operator, tuple[int, ...]]] = defaultdict(dict)
        for operator in self._tasks:
            made = ((tensor, slot) for slot, tensor in enumerate(operator.outputs) if tensor is not None)
            self._maker.update((tensor, (operator, slot)) for tensor, slot in made)
            for position, tensor in enumerate(operator.inputs):
                readers = self._readers[tensor]
                readers[operator] = (*readers.get(operator, ()), position)
        graph = plan.graph
        self._returned = {t: n for n, t in enumerate(dict.fromkeys((*graph.outputs, *graph.mutations.values())))}
        self.tensors = tuple(dict.fromkeys((*self._readers, *self._returned)))
        self._cuts: dict[Hashable, int] = {}
        self._cut_of: dict[Operator, tuple[int, int]] = {}
        self._relative: defaultdict[int, dict[tuple[int, ...], tuple[int, ...]]] = defaultdict(dict)

    def makers(self, tensor: LogicalTensor) -> list[Instance]:
        """Those who make parts of it; none of what is there from the start."""
        if tensor not in self._maker:
            return []
        ranks = self._plan.ranks
        return [Instance(task, rank) for task in self._tasks[self._maker[tensor][0]] for rank in ranks[task]]

    def readers(self, tensor: LogicalTensor) -> list[Reader]:
        """Those who read parts of it, the caller last."""
        ranks = self._plan.ranks
        found = [
            Reader(task, rank, position, task.piece.inputs[position])
            for operator, positions in self._readers.get(tensor, {}).items()
            for task in self._tasks[operator]
            for rank in ranks[task]
            for position in positions
        ]
        if (number := self._returned.get(tensor)) is not None:
            whole = tensor.whole.mask
            found += [Reader(None, rank, number, whole) for rank in self._plan.mesh.ranks]
        return found

    def likeness(self, tensor: LogicalTensor, active: frozenset[LogicalTensor]) -> tuple[Hashable, int]:
        """Equal for tensors whose exchanges differ in nothing but which tensors and tasks they are about, and ranks.

        Those are counted from the number that is returned too: the first rank of a node.
        """
        maker = self._maker.get(tensor)
        made = None if maker is None else (self._cut(maker[0]), maker[1])
        readers = self._readers.get(tensor, {})
        read = [(self._cut(operator), find_rule(operator), positions) for operator, positions in readers.items()]
        stored = self._plan.stored.get(tensor)
        units = [self._plan.unit.get(operator) for operator in readers] if stored is not None and stored.anew else []
        starts = [start for (_, start), *_ in read]
        if made is not None:
            starts.append(made[0][1])
        # What every rank has from the start, or gets in the end, is about all ranks by their numbers.
        everywhere = tensor in self._returned or stored is not None or (made is None and tensor.kind != "parameter")
        first = 0 if everywhere else min(starts)
        likeness = (
            tensor.shape,
            tensor.dtype,
            tensor.kind == "parameter",
            stored,
            everywhere,
            tensor in self._returned,
            made and (made[0][0], made[0][1] - first, made[1]),
            tuple([(number, start - first, rule, positions) for (number, start), rule, positions in read]),
            tuple([any(made in active for made in operator.outputs) for operator in readers]),
            tuple(map(units.index, units)),
        )
        return likeness, first

    @property
    def cuts(self) -> Mapping[Operator, Hashable]:
        """Equal for operators that are cut, placed and shared out among microbatches in the same way."""
        return {operator: self._cut(operator) for operator in self._tasks}

    def _cut(self, operator: Operator) -> tuple[int, int]:
        """A number for how an operator is cut, placed and shared out among microbatches, and where its ranks start."""
        cut = self._cut_of.get(operator)
        if cut is None:
            ranks, microbatch, tasks = self._plan.ranks, self._plan.microbatch, self._tasks[operator]
            first = min(map(min, {ranks[task] for task in tasks})) // self._ranks_per_node * self._ranks_per_node
            relative = self._relative[first]
            key: list[Hashable] = []
            for task in tasks:
                on = ranks[task]
                there = relative.get(on)
                if there is None:
                    there = relative[on] = tuple([rank - first for rank in on])
                key.append((task.piece, there, microbatch.get(task)))
            cut = self._cut_of[operator] = self._cuts.setdefault(tuple(key), len(self._cuts)), first
        return cut


def _flows(task: Task, active: frozenset[LogicalTensor]) -> bool:
    return any(made in active for made in task.operator.outputs)


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
    written = _written(plan, tensor, makers)
    made: dict[tuple[int | None, Mask], bool] = {}

    def is_made(index: int | None, mask: Mask) -> bool:
        if (index, mask) not in made:
            made[index, mask] = index in written and _is_made_of(written[index], mask)
        return made[index, mask]

    by_microbatch: defaultdict[int | None, list[Reader]] = defaultdict(list)
    for uses in _by_use(readers).values():
        indices = [None if reader.task is None else plan.microbatch.get(reader.task) for reader in uses]
        # What is summed over all microbatches, and read by each: no microbatch has it.
        apart = all(index is None or is_made(index, reader.mask) for index, reader in zip(indices, uses, strict=True))
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
    plan: Plan, tensor: LogicalTensor, makers: Sequence[Instance]
) -> dict[int | None, dict[Placed, tuple[Instance, ...]]]:
    """The parts of a tensor that are made in each microbatch, or in none; all parts, for None."""
    indices = [plan.microbatch.get(maker.task) for maker in makers]
    written: dict[int | None, defaultdict[Placed, list[Instance]]] = {
        index: defaultdict(list) for index in (*indices, None)
    }
    for maker, index in zip(makers, indices, strict=True):
        task, rank = maker
        into = list(written.values()) if index is None else [written[index], written[None]]
        for made, mask in zip(task.operator.outputs, task.piece.outputs, strict=True):
            if made is tensor and mask is not None:
                part = Placed(rank, mask)
                for parts in into:
                    parts[part].append(maker)
    return {index: {part: tuple(by) for part, by in parts.items()} for index, parts in written.items()}


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
    for layouts in by_layout.values():
        together = {part: tuple(reader for layout in layouts for reader in layout[part]) for part in layouts[0]}
        found = find_communication(tensor.shape, tensor.dtype.itemsize, tuple(together), need, topology)
        groups.append(GradientGroup(together, found))
    exchange.groups = tuple(groups)
