"""Dataflow → segments: what one rank can run in one piece, forward and backward, between communications.

Tasks of one rank and one microbatch are one segment if nothing has to move between them, forward or backward. Each task
gets a level that rises along every edge where something does::

    level 0                level 1                      level 2
    norm → x  ──────────►  linear[n 0:4] → gelu → ...   ── all_reduce ──► add → norm
            (dx is summed)  linear[k 0:4]

All segments on a path from a segment back to itself would have its level, so there is no such path. What no gradient
flows through and needs nothing that one flows through, masks and positions, comes before all levels: it raises none.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_vtensor.compile.addends import Reader
from torch_vtensor.compile.communication import Placed
from torch_vtensor.compile.dataflow import Dataflow, Exchange, GradientGroup, Instance
from torch_vtensor.compile.pieces import backward_reads
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.stages import find_stages
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask, TensorView


class Arrival(NamedTuple):
    """A value that enters a segment, once for each part of the gradient to which its readers contribute."""

    exchange: Exchange
    mask: Mask
    group: GradientGroup | None
    part: Placed | None

    @property
    def is_weight(self) -> bool:
        """Whether no task makes it, so that no other backward pass waits for its gradient."""
        return not any(self.exchange.makers.values())


@dataclass(frozen=True, eq=False)
class Segment:
    """Tasks that one rank runs in one piece.

    ``flows`` tells whether gradients flow through it, ``turn`` its place where the plan orders groups. ``arrivals`` are
    its inputs, with the readers that read each; ``departures`` the views that others need; ``internal`` has the inputs
    of tasks that are made inside. ``parts`` has the arrivals, by number, whose gradients each backward pass computes:
    B, or dI and dW where the plan's pipeline has backward in two. ``reads_again`` has those that backward reads anew.
    """

    name: str
    rank: int
    microbatch: int | None
    stage: int
    level: int
    recomputes: bool
    flows: bool
    turn: tuple[int, int] | None
    tasks: tuple[Task, ...]
    arrivals: Mapping[Arrival, tuple[Reader, ...]]
    departures: tuple[TensorView, ...]
    internal: frozenset[tuple[Task, int]]
    parts: Mapping[JobKind, tuple[int, ...]]
    reads_again: tuple[int, ...]

    @property
    def in_passes(self) -> bool:
        """Whether forward must not keep for backward just whatever it has."""
        return len(self.parts) > 1 or any(arrival.exchange.anew for arrival in self.arrivals)

    def __str__(self) -> str:
        """One line."""
        of = "" if self.microbatch is None else f" of microbatch {self.microbatch}"
        first, last = self.tasks[0].name, self.tasks[-1].name
        names = first if len(self.tasks) == 1 else f"{first} … {last}"
        return f"{self.name} on rank {self.rank}{of}: {len(self.tasks)} tasks, {names}"


class _Key(NamedTuple):
    """What tasks of one segment have in common."""

    rank: int
    microbatch: int | None
    stage: int
    recomputed: int | None
    apart: int | None
    turn: tuple[int, int] | None
    unit: int | None
    flows: bool
    before: bool
    level: int


class Output(NamedTuple):
    """A part of a tensor that a task makes on a rank."""

    tensor: LogicalTensor
    rank: int
    mask: Mask


def find_segments(flow: Dataflow) -> tuple[Segment, ...]:
    """Put tasks into segments, as few as communication, recomputation and what the plan asks for allow."""
    plan = flow.plan
    stages = find_stages(plan).of_task
    level: dict[Instance, int] = {}
    keys: dict[Instance, _Key] = {}
    internal: set[tuple[Instance, int]] = set()
    above: dict[tuple[Exchange, bool], int] = {}
    before: set[Instance] = set()
    is_cut = bool(plan.microbatch or plan.recomputed or plan.apart or plan.turn)
    for task in plan.tasks:
        for rank in plan.ranks[task]:
            instance = Instance(task, rank)
            index, recomputed, turn = plan.microbatch.get(task), plan.recomputed.get(task), plan.turn.get(task)
            # What needs no turn in a pipeline must not wait for one: all microbatches' targets are counted first.
            flows = index is None or _flows(flow, task)
            apart, unit = plan.apart.get(task), plan.unit.get(task.operator)
            if is_cut and (recomputed, apart, turn) == (None, None, None) and not _flows(flow, task):
                read = (flow.reads[instance, position][0].makers for position in range(len(task.inputs)))
                if before.issuperset(maker for parts in read for makers in parts.values() for maker in makers):
                    before.add(instance)
            is_before = instance in before
            own = _Key(rank, index, stages[task], recomputed, apart, turn, unit, flows, is_before, level=0)
            sources = {
                position: source
                for position in range(len(task.inputs))
                if (source := _direct_source(flow, *flow.reads[instance, position])) is not None
                and keys[source]._replace(level=0) == own
            }
            lowest = max((level[source] for source in sources.values()), default=0)
            settled = False
            while not settled:
                settled = True
                for position in range(len(task.inputs)):
                    # What is made below arrives like everything else: its gradient goes back once all readers are done.
                    if position not in sources or level[sources[position]] < lowest:
                        exchange, _ = flow.reads[instance, position]
                        if (exchange, is_before) not in above:
                            makers = itertools.chain(*exchange.makers.values())
                            levels = (level[maker] for maker in makers if is_before or maker not in before)
                            above[exchange, is_before] = max(levels, default=-1) + 1
                        if above[exchange, is_before] > lowest:
                            lowest, settled = above[exchange, is_before], False
            level[instance] = lowest
            keys[instance] = own._replace(level=lowest)
            internal.update(
                (instance, position) for position, source in sources.items() if keys[source] == keys[instance]
            )

    members: defaultdict[_Key, list[Instance]] = defaultdict(list)
    for instance, key in keys.items():
        members[key].append(instance)
    in_order = sorted(members, key=lambda key: (not key.before, key.level, key.rank))
    leaving = _leaving(flow, internal)
    return tuple(_segment(flow, f"s{n}", key, members[key], internal, leaving) for n, key in enumerate(in_order))


def _direct_source(flow: Dataflow, exchange: Exchange, reader: Reader) -> Instance | None:
    """The task on the reader's rank whose output it reads as it is, if the gradient also comes back as it is."""
    part = Placed(reader.rank, reader.mask)
    makers = exchange.makers.get(part, ())
    if not makers or exchange.buffer(reader) != exchange.communication.have[part]:
        return None
    if exchange.tensor in flow.active:
        group = exchange.group_of.get(reader)
        if group is None:
            return None
        region = Placed(reader.rank, reader.mask.region)
        needed = group.communication.need[region]
        if needed != group.communication.have.get(region) or reader.mask != reader.mask.region:
            return None
        if group.sends(needed):
            return None
    return makers[0]


def _leaving(flow: Dataflow, internal: set[tuple[Instance, int]]) -> set[Output]:
    """The parts of tensors that others read than the segment that makes them, or whose gradient comes from others.

    A replica that nobody reads has a gradient nevertheless: its pieces of parameters are trained by it.
    """

    def is_internal(reader: Reader) -> bool:
        return reader.task is not None and (Instance(reader.task, reader.rank), reader.position) in internal

    leaving: set[Output] = set()
    for exchange in flow.exchanges:
        tensor, communication = exchange.tensor, exchange.communication
        for reader in exchange.readers:
            # Of a value that exists whole, the whole may be read as its first chunk.
            buffer = exchange.buffer(reader)
            if not is_internal(reader) and buffer == communication.have.get(Placed(reader.rank, buffer.mask)):
                leaving.add(Output(tensor, reader.rank, buffer.mask))
        for step in communication.steps:
            for rank in step.ranks:
                for buffer in step.reads(rank):
                    if buffer == communication.have.get(Placed(rank, buffer.mask)):
                        leaving.add(Output(tensor, rank, buffer.mask))
        for group in exchange.groups:
            for maker in exchange.makers:
                region = Placed(maker.rank, maker.mask.region)
                direct = group.communication.need[region] == group.communication.have.get(region)
                if not direct or not all(map(is_internal, group.addends[region])):
                    leaving.add(Output(tensor, maker.rank, maker.mask))
    return leaving


def _segment(
    flow: Dataflow,
    name: str,
    key: _Key,
    instances: list[Instance],
    internal: set[tuple[Instance, int]],
    leaving: set[Output],
) -> Segment:
    arrivals: defaultdict[Arrival, list[Reader]] = defaultdict(list)
    inside: set[tuple[Task, int]] = set()
    for instance in instances:
        for position in range(len(instance.task.inputs)):
            if (instance, position) in internal:
                inside.add((instance.task, position))
                continue
            exchange, reader = flow.reads[instance, position]
            group = exchange.group_of.get(reader)
            part = None if group is None else group.part_of[reader]
            arrivals[Arrival(exchange, reader.mask, group, part)].append(reader)
    departures = tuple(
        view
        for instance in instances
        for view in instance.task.outputs
        if view is not None and Output(view.tensor, key.rank, view.mask) in leaving
    )
    cuts_backward = flow.plan.pipeline is not None and flow.plan.pipeline.cuts_backward
    return Segment(
        name,
        key.rank,
        key.microbatch,
        key.stage,
        key.level,
        key.recomputed is not None,
        key.flows,
        key.turn,
        tuple(instance.task for instance in instances),
        {arrival: tuple(readers) for arrival, readers in arrivals.items()},
        departures,
        frozenset(inside),
        _parts(list(arrivals), in_two=cuts_backward and key.microbatch is not None),
        tuple(
            index
            for index, (arrival, readers) in enumerate(arrivals.items())
            if arrival.exchange.anew and (key.recomputed is not None or any(map(_is_read_backward, readers)))
        ),
    )


def _is_read_backward(reader: Reader) -> bool:
    return reader.task is not None and backward_reads(reader.task, reader.position)


def _parts(arrivals: Sequence[Arrival], *, in_two: bool) -> dict[JobKind, tuple[int, ...]]:
    """The backward passes of a segment, and the arrivals that each is for: one pass if all are weights, or none is."""
    wanted = tuple(index for index, arrival in enumerate(arrivals) if arrival.group is not None)
    weights = tuple(index for index in wanted if arrivals[index].is_weight)
    if not in_two or not weights or weights == wanted:
        return {"B": wanted}
    return {"dI": tuple(index for index in wanted if index not in weights), "dW": weights}


def _flows(flow: Dataflow, task: Task) -> bool:
    return any(view is not None and view.tensor in flow.active for view in task.outputs)
