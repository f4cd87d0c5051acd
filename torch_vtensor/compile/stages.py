"""The stages of a plan: stretches of the program that run on the same ranks, and the order of their passes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.compile.plan import Plan, flows
from torch_vtensor.compile.schedules.job import Job
from torch_vtensor.compile.schedules.pipelines import (
    Orders,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
)
from torch_vtensor.compile.task_graph import Operator, Task

if TYPE_CHECKING:
    from torch_vtensor.compile.segment import Segment


class Stages(NamedTuple):
    """The stage of every task, and the ranks of every stage."""

    of_task: Mapping[Task, int]
    ranks: tuple[frozenset[int], ...]


def find_stages(plan: Plan) -> Stages:
    """Number the stretches of the program that run on the same ranks, in order.

    Tasks through which no gradient flows, and those on every rank of a mesh whose other tasks are not, belong to the
    stage around them.
    """
    # The ranks of an operator in a microbatch are those of all its pieces.
    home: defaultdict[tuple[Operator, int | None], set[int]] = defaultdict(set)
    flowing = {operator for operator in plan.graph.operators if flows(operator)}
    for task in plan.tasks:
        if task.operator in flowing:
            home[task.operator, plan.microbatch.get(task)].update(plan.ranks[task])
    everywhere = set(plan.mesh.ranks)
    apart = any(ranks != everywhere for ranks in home.values())
    stage_of: dict[Operator, int] = {}
    ranks_of_stage: list[frozenset[int]] = []
    for task in plan.tasks:
        if task.operator in stage_of:
            continue
        ranks = home.get((task.operator, plan.microbatch.get(task)), set())
        counts = bool(ranks) and not (apart and ranks == everywhere)
        if counts and (not ranks_of_stage or ranks_of_stage[-1] != frozenset(ranks)):
            ranks_of_stage.append(frozenset(ranks))
        stage_of[task.operator] = max(len(ranks_of_stage) - 1, 0)
    return Stages({task: stage_of[task.operator] for task in plan.tasks}, tuple(ranks_of_stage))


def find_turns(plan: Plan, segments: Sequence[Segment], jobs: Sequence[Job]) -> dict[int, list[str]]:
    """The order of each rank's passes that the plan's pipeline asks for; nothing where it asks for none.

    Raises:  ValueError for a pipeline that the plan's stages do not fit.
    """
    if plan.pipeline is None:
        return {}
    stages = find_stages(plan)
    orders = _orders(plan.pipeline.kind, stages.ranks, plan.num_microbatches)
    known = {job.name for job in jobs}
    of_stage: defaultdict[tuple[int, int, int], list[Segment]] = defaultdict(list)
    for segment in segments:
        # What op_order puts in turn finds its place by that, between those that it reads from and those it gives to.
        if segment.microbatch is not None and segment.flows and segment.turn is None:
            of_stage[segment.rank, segment.stage, segment.microbatch].append(segment)
    turns: dict[int, list[str]] = {}
    for order in orders.values():
        for rank in sorted(stages.ranks[order[0].stage]):
            names = []
            for compute in order:
                mine = sorted(of_stage[rank, compute.stage, compute.microbatch], key=lambda segment: segment.level)
                for segment in mine if compute.kind == "F" else reversed(mine):
                    if (name := f"{compute.kind} {segment.name}") in known:
                        names.append(name)
            turns[rank] = names
    return turns


def find_constraints(segments: Sequence[Segment]) -> list[tuple[str, str]]:
    """Which passes op_order puts before which: on a rank, of a microbatch, those of one group and of the next."""
    groups: defaultdict[tuple[int, int | None, int], defaultdict[int, list[str]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for segment in segments:
        if segment.turn is not None:
            chain, position = segment.turn
            groups[segment.rank, segment.microbatch, chain][position].append(f"F {segment.name}")
    return [
        (before, after)
        for by_position in groups.values()
        for first, second in itertools.pairwise(sorted(by_position))
        for before in by_position[first]
        for after in by_position[second]
    ]


def _orders(kind: str, ranks: Sequence[frozenset[int]], num_microbatches: int) -> Orders:
    num_groups = len(dict.fromkeys(ranks))
    if num_groups == len(ranks):
        simple = {"gpipe": gpipe, "1f1b": one_f_one_b}
        if kind in simple:
            return simple[kind](len(ranks), num_microbatches)
    elif kind == "1f1b" and len(ranks) % num_groups == 0:
        rounds = [tuple(ranks[start : start + num_groups]) for start in range(0, len(ranks), num_groups)]
        if len(set(rounds)) == 1:
            return interleaved_one_f_one_b(num_groups, len(rounds), num_microbatches)
    places = ", ".join(str(sorted(place)) for place in ranks)
    raise ValueError(
        f"the stages of the plan run on ranks {places}: no {kind} order fits. Place each stage on ranks of its own, "
        f"or, interleaved, stage after stage round and round over the same groups of ranks."
    )
