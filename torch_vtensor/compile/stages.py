"""The stages of a plan: stretches of the program that run on the same ranks, and the order of their passes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.compile.plan import Plan, flows
from torch_vtensor.compile.schedules.job import Job
from torch_vtensor.compile.schedules.pipelines import (
    Orders,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    three_f_one_b,
    zero_bubble,
    zero_bubble_h2,
)
from torch_vtensor.compile.task_graph import Operator, Task

if TYPE_CHECKING:
    from torch_vtensor.compile.segment import Segment


class Stages(NamedTuple):
    """The stage of every task, and the ranks of every stage."""

    of_task: Mapping[Task, int]
    ranks: tuple[frozenset[int], ...]


def find_stages(plan: Plan) -> Stages:
    """Number the stretches of the program that run on the same ranks, in order, unless the plan names its stages.

    Tasks through which no gradient flows, and those on every rank of a mesh whose other tasks are not, belong to the
    stage around them; so do those that are in no stage that the plan names.
    """
    if plan.pipeline is not None and plan.pipeline.stages:
        return _named_stages(plan, plan.pipeline.stages)
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


def _named_stages(plan: Plan, stages: Sequence[frozenset[Operator]]) -> Stages:
    named = {operator: number for number, operators in enumerate(stages) for operator in operators}
    of_task: dict[Task, int] = {}
    ranks: list[set[int]] = [set() for _ in stages]
    current = 0
    for task in plan.tasks:
        current = named.get(task.operator, current)
        of_task[task] = current
        if task.operator in named:
            ranks[current].update(plan.ranks[task])
    return Stages(of_task, tuple(map(frozenset, ranks)))


def find_turns(plan: Plan, segments: Sequence[Segment], jobs: Sequence[Job]) -> dict[int, list[str]]:
    """The order of each rank's passes that the plan's pipeline asks for; nothing where it asks for none.

    Raises:  ValueError for a pipeline that the plan's stages do not fit.
    """
    if plan.pipeline is None:
        return {}
    stages = find_stages(plan)
    orders = _orders(plan.pipeline.kind, stages.ranks, plan.num_microbatches)
    known = {job.name for job in jobs}
    runs_backward = {compute.stage for order in orders.values() for compute in order if compute.kind != "F"}
    of_stage: defaultdict[tuple[int, int, int], list[Segment]] = defaultdict(list)
    for segment in segments:
        # What op_order puts in turn finds its place by that, between those that it reads from and those it gives to.
        takes_turns = segment.flows or segment.stage not in runs_backward
        microbatch = 0 if plan.num_microbatches == 1 else segment.microbatch
        if microbatch is not None and takes_turns and segment.turn is None:
            of_stage[segment.rank, segment.stage, microbatch].append(segment)
    _refuse_gradients(plan, [segment for some in of_stage.values() for segment in some], runs_backward, known)
    turns: dict[int, list[str]] = {}
    for order in orders.values():
        for rank in sorted(stages.ranks[order[0].stage]):
            names = []
            for compute in order:
                mine = of_stage[rank, compute.stage, compute.microbatch]  # in the order in which they can run
                for segment in mine if compute.kind == "F" else reversed(mine):
                    # What has no weights, or nothing else, runs backward in one where the gradient of its input is due.
                    kinds = ("dI", "B") if compute.kind == "dI" else (compute.kind,)
                    names += [name for kind in kinds if (name := f"{kind} {segment.name}") in known]
            turns[rank] = names
    return turns


def _refuse_gradients(plan: Plan, segments: Sequence[Segment], runs_backward: set[int], known: set[str]) -> None:
    """Refuse a pipeline that has no backward for a stage through which gradients flow."""
    named = plan.pipeline.stages if plan.pipeline is not None else ()
    for segment in segments:
        if segment.stage not in runs_backward and f"B {segment.name}" in known:
            task = next((task for task in segment.tasks if task.operator in named[segment.stage]), None)
            if task is not None:
                raise ValueError(
                    f"the pipeline runs stage {segment.stage} forward only, and gradients flow through {task} "
                    f"({task.operator.target} of module {task.operator.module!r}) there. Run all passes but the last "
                    f"under torch.no_grad(), or detach what the next one takes from it."
                )


def find_constraints(segments: Sequence[Segment], finishing: Container[int] = ()) -> list[tuple[str, str]]:
    """Which passes op_order puts before which: on a rank, of a microbatch, those of one group and of the next.

    Of the calls of op_order that `finishing` numbers, a group's backward passes come before the next one's forward.
    """
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
    ] + [
        (f"{kind}{before[1:]}", after)
        for kind in ("B", "dI")
        for (_, _, chain), by_position in groups.items()
        if chain in finishing
        for first, second in itertools.pairwise(sorted(by_position))
        for before in by_position[first]
        for after in by_position[second]
    ]


def _orders(kind: str, ranks: Sequence[frozenset[int]], num_microbatches: int) -> Orders:
    num_groups = len(dict.fromkeys(ranks))
    if num_groups == len(ranks):
        simple = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb": zero_bubble, "zbh2": zero_bubble_h2}
        if kind in simple:
            return simple[kind](len(ranks), num_microbatches)
    elif kind in ("1f1b", "3f1b") and len(ranks) % num_groups == 0:
        rounds = [tuple(ranks[start : start + num_groups]) for start in range(0, len(ranks), num_groups)]
        if len(set(rounds)) == 1 and kind == "1f1b":
            return interleaved_one_f_one_b(num_groups, len(rounds), num_microbatches)
        if len(set(rounds)) == 1:
            return three_f_one_b(num_groups, num_microbatches, len(rounds))
    places = ", ".join(str(sorted(place)) for place in ranks)
    raise ValueError(
        f"the stages of the plan run on ranks {places}: no {kind} order fits. Place each stage on ranks of its own, "
        f"or, interleaved, stage after stage round and round over the same groups of ranks."
    )
