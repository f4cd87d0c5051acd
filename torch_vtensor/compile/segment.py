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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_vtensor.compile.addends import Reader
from torch_vtensor.compile.communication import Placed
from torch_vtensor.compile.dataflow import Dataflow
from torch_vtensor.compile.exchange import Exchange, GradientGroup, Input, Instance
from torch_vtensor.compile.pieces import backward_reads
from torch_vtensor.compile.random_numbers import find_random, find_unlike
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.stages import find_stages
from torch_vtensor.compile.task_graph import Operator, Task
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
    B, or dI and dW where the plan's pipeline has backward in two. ``reads_again`` has those that backward reads anew,
    ``holds`` those that move anew for each unit and stay from forward to backward.
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
    holds: tuple[int, ...]

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


class _Common(NamedTuple):
    """What tasks of one segment have in common, beside the rank and the level."""

    microbatch: int | None
    stage: int
    recomputed: int | None
    apart: int | None
    turn: tuple[int, int] | None
    unit: int | None
    flows: bool
    before: bool
    drawn: Task | None


def find_segments(flow: Dataflow) -> tuple[Segment, ...]:
    """Put tasks into segments, as few as communication, recomputation, random numbers and the plan allow."""
    random = find_random(flow.plan)
    drawn_alone: frozenset[Operator] = frozenset()
    while True:
        segments = _find_segments(flow, drawn_alone)
        # What is drawn alone cuts segments in two: others may be drawn between something else than before.
        unlike = find_unlike(segments, random) - drawn_alone if random else None
        if not unlike:
            return segments
        drawn_alone |= unlike


def _find_segments(flow: Dataflow, drawn_alone: frozenset[Operator]) -> tuple[Segment, ...]:
    plan = flow.plan
    stages = find_stages(plan).of_task
    level_of: dict[Instance, int] = {}
    common: dict[Task, _Common] = {}
    known: dict[_Common, _Common] = {}  # equal ones are one object
    internal: set[int] = set()  # readers, by identity: there are many, and what they hold takes long to hash
    above: tuple[dict[Exchange, int], dict[Exchange, int]] = {}, {}
    all_before: dict[Exchange, bool] = {}
    is_cut = bool(plan.microbatch or plan.recomputed or plan.apart or plan.turn)

    def level_above(exchange: Exchange, before: bool) -> int:
        found = above[before].get(exchange)
        if found is None:
            makers = itertools.chain(*exchange.makers.values())
            levels = (level_of[maker] for maker in makers if before or not common[maker.task].before)
            found = above[before][exchange] = max(levels, default=-1) + 1
        return found

    def is_made_before(exchange: Exchange) -> bool:
        found = all_before.get(exchange)
        if found is None:
            makers = itertools.chain(*exchange.makers.values())
            found = all_before[exchange] = all(common[maker.task].before for maker in makers)
        return found

    def is_before(task: Task) -> bool:
        read = (one.exchange for rank in plan.ranks[task] for one in flow.inputs.get(Instance(task, rank), ()))
        return all(map(is_made_before, read))

    members: defaultdict[tuple[int, int, int], list[Instance]] = defaultdict(list)
    commons: dict[_Common, int] = {}
    for task in plan.tasks:
        index = plan.microbatch.get(task)
        # What needs no turn in a pipeline must not wait for one: all microbatches' targets are counted first.
        has_gradient = any(made in flow.active for made in task.operator.outputs)
        recomputed, apart, turn = plan.recomputed.get(task), plan.apart.get(task), plan.turn.get(task)
        is_free = is_cut and (recomputed, apart, turn) == (None, None, None)
        before = is_free and not has_gradient and is_before(task)
        unit = plan.unit.get(task.operator)
        flows = index is None or has_gradient
        drawn = task if task.operator in drawn_alone else None
        own = _Common(index, stages[task], recomputed, apart, turn, unit, flows, before, drawn)
        own = common[task] = known.setdefault(own, own)
        number, settled_above = commons.setdefault(own, len(commons)), above[before]
        for rank in plan.ranks[task]:
            instance = Instance(task, rank)
            direct: list[tuple[int, Input]] = []
            lowest = 0
            for read in flow.inputs.get(instance, ()):
                exchange, _, source, *_ = read
                if source is not None and common[source.task] is own:
                    of_source = level_of[source]
                    direct.append((of_source, read))
                elif (of_source := settled_above.get(exchange, -1)) < 0:
                    of_source = level_above(exchange, before)
                if of_source > lowest:
                    lowest = of_source
            settled = False
            while not settled:
                settled = True
                for of_source, read in direct:
                    # What is made below arrives like everything else: its gradient goes back once all readers are done.
                    if of_source < lowest and level_above(read.exchange, before) > lowest:
                        lowest, settled = level_above(read.exchange, before), False
            level_of[instance] = lowest
            internal.update([id(read.reader) for of_source, read in direct if of_source == lowest])
            members[lowest, rank, number].append(instance)

    numbered = tuple(commons)
    in_order = sorted(members, key=lambda key: (not numbered[key[2]].before, *key[:2]))
    leaving, turns = _leaving(flow, internal), _turns_round(flow)
    return tuple(
        _segment(flow, f"s{n}", rank, level, numbered[number], members[level, rank, number], internal, leaving, turns)
        for n, (level, rank, number) in enumerate(in_order)
    )


def _leaving(flow: Dataflow, internal: set[int]) -> dict[LogicalTensor, set[Placed]]:
    """The parts of tensors that others read than the segment that makes them, or whose gradient comes from others.

    A replica that nobody reads has a gradient nevertheless: its pieces of parameters are trained by it.
    """

    leaving: defaultdict[LogicalTensor, set[Placed]] = defaultdict(set)
    for exchange in flow.exchanges:
        if not exchange.makers or not next(iter(exchange.makers.values())):
            continue  # there from the start: no segment makes it
        parts, communication = leaving[exchange.tensor], exchange.communication
        outside = [reader for reader in exchange.readers if id(reader) not in internal]
        if outside:
            met = communication.met
            needed = (met.get(Placed(reader.rank, reader.mask)) for reader in outside)
            parts.update([part for part in needed if part is not None])
        parts.update(communication.given)
        for group in exchange.groups:
            direct, addends = group.communication.met, group.addends
            for maker in exchange.makers:
                region = Placed(maker.rank, maker.mask.region)
                if direct.get(region) != region or not internal.issuperset(map(id, addends[region])):
                    parts.add(maker)
    return leaving


def _segment(
    flow: Dataflow,
    name: str,
    rank: int,
    level: int,
    common: _Common,
    instances: list[Instance],
    internal: set[int],
    leaving: Mapping[LogicalTensor, Collection[Placed]],
    turns_round: int | None,
) -> Segment:
    arrivals: defaultdict[Arrival, list[Reader]] = defaultdict(list)
    inside: set[tuple[Task, int]] = set()
    for instance in instances:
        for exchange, reader, _, group, part in flow.inputs.get(instance, ()):
            if id(reader) in internal:
                inside.add((instance.task, reader.position))
            else:
                arrivals[Arrival(exchange, reader.mask, group, part)].append(reader)
    departures: list[TensorView] = []
    for task, _ in instances:
        for tensor, mask in zip(task.operator.outputs, task.piece.outputs, strict=True):
            if tensor is not None and mask is not None:
                parts = leaving.get(tensor)
                if parts and Placed(rank, mask) in parts:
                    departures.append(TensorView(tensor, mask))
    cuts_backward = flow.plan.pipeline is not None and flow.plan.pipeline.cuts_backward
    anew = tuple(
        index
        for index, (arrival, readers) in enumerate(arrivals.items())
        if arrival.exchange.anew and (common.recomputed is not None or any(map(_is_read_backward, readers)))
    )
    stays = common.unit is not None and common.unit == turns_round
    return Segment(
        name,
        rank,
        common.microbatch,
        common.stage,
        level,
        common.recomputed is not None,
        common.flows,
        common.turn,
        tuple(instance.task for instance in instances),
        {arrival: tuple(readers) for arrival, readers in arrivals.items()},
        tuple(departures),
        frozenset(inside),
        _parts(list(arrivals), in_two=cuts_backward and common.microbatch is not None),
        () if stays else anew,
        anew if stays else (),
    )


def _turns_round(flow: Dataflow) -> int | None:
    """The unit whose backward pass follows its forward pass, so that what is gathered for this one stays for that.

    It is the last that reads such parameters, where a call does the whole step and microbatches run backward in turn.
    """
    plan = flow.plan
    pipeline = plan.pipeline
    if not flow.is_whole_step or pipeline is None or not (pipeline.kind == "1f1b" or pipeline.cuts_backward):
        return None
    anew = {tensor for tensor, stored in plan.stored.items() if stored.anew}
    last = next((one for one in reversed(plan.graph.operators) if not anew.isdisjoint(one.inputs)), None)
    return None if last is None else plan.unit.get(last)


def _is_read_backward(reader: Reader) -> bool:
    return reader.task is not None and backward_reads(reader.task, reader.position)


def _parts(arrivals: Sequence[Arrival], *, in_two: bool) -> dict[JobKind, tuple[int, ...]]:
    """The backward passes of a segment, and the arrivals that each is for: one pass if all are weights, or none is."""
    wanted = tuple(index for index, arrival in enumerate(arrivals) if arrival.group is not None)
    weights = tuple(index for index in wanted if arrivals[index].is_weight)
    if not in_two or not weights or weights == wanted:
        return {"B": wanted}
    return {"dI": tuple(index for index in wanted if index not in weights), "dW": weights}
