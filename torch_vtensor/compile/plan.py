"""The record of what a plan said: every task with its ranks, those that the plan left alone included."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch_vtensor.compile.mesh import Mesh, name_ranks
from torch_vtensor.compile.primitives import Graph, Pipeline, PlanFunction, Storage, op_assign
from torch_vtensor.compile.random_numbers import draws_random_numbers
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Operator, OperatorGraph, Task
from torch_vtensor.compile.tensor_view import LogicalTensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What a plan decided, for every task.

    ``tasks`` are all pieces in an order in which one process could run them. ``ranks`` are those that run each.
    ``microbatch`` has those tasks that belong to one, ``recomputed`` the group of those that are computed again,
    ``apart`` the group of those whose code is generated apart, and ``turn`` those that op_order names: the number of
    the call, and the group's number in it; ``finishing`` are the calls of which each group also runs backward before
    the next begins. ``unit`` has the operators of those groups for which parameters move apart.
    """

    graph: OperatorGraph
    mesh: Mesh
    tasks: tuple[Task, ...]
    ranks: Mapping[Task, tuple[int, ...]]
    microbatch: Mapping[Task, int]
    recomputed: Mapping[Task, int]
    apart: Mapping[Task, int]
    turn: Mapping[Task, tuple[int, int]]
    finishing: frozenset[int]
    stored: Mapping[LogicalTensor, Storage]
    unit: Mapping[Operator, int]
    pipeline: Pipeline | None
    num_microbatches: int

    def __str__(self) -> str:
        """Count the tasks of each rank, and name what is decided for all."""
        rows = [f"Plan for a {self.mesh}, {self.num_microbatches} microbatches"]
        equal: defaultdict[str, list[int]] = defaultdict(list)
        tasks: defaultdict[int, list[Task]] = defaultdict(list)
        for task in self.tasks:
            for rank in self.ranks[task]:
                tasks[rank].append(task)
        for rank in self.mesh.ranks:
            num_cut = sum(bool(task.cuts) for task in tasks[rank])
            recomputed = sum(task in self.recomputed for task in tasks[rank])
            equal[f"{len(tasks[rank])} tasks, {num_cut} of them cut, {recomputed} recomputed"].append(rank)
        return "\n".join([*rows, *(f"  {name_ranks(ranks)}: {text}" for text, ranks in equal.items())])


def record(plan: PlanFunction, graph: OperatorGraph, mesh: Mesh) -> Plan:
    """Run a plan over a program and keep what it decides.

    Raises:  ValueError if it places nothing on a mesh of several ranks, or the same random numbers on several.
    """
    view = Graph(graph, mesh)
    plan(view, mesh)
    if not view.ranks:
        if len(mesh) > 1:
            name = getattr(plan, "__name__", plan)
            raise ValueError(f"the plan {name!r} places nothing on the {mesh}. Call op_assign(tasks, rank).")
        op_assign(view.tasks, mesh.ranks[0])
    tasks = tuple(view.tasks)
    _place_the_rest(view, tasks)
    merged = _merge_replicas(view, tasks)
    _check_random_numbers(merged)
    turn = {
        task: (number, position)
        for number, chain in enumerate(view.chains)
        for position, group in enumerate(chain)
        for task in group
    }
    return Plan(
        graph,
        mesh,
        tuple(merged),
        merged,
        {task: index for task, index in view.microbatch_of.items() if task in merged},
        {task: group for task, group in view.recomputed.items() if task in merged},
        {task: group for task, group in view.apart.items() if task in merged},
        {task: place for task, place in turn.items() if task in merged},
        frozenset(view.finishing),
        dict(view.stored),
        dict(view.unit_of),
        view.pipeline,
        view.num_microbatches,
    )


def _place_the_rest(view: Graph, tasks: Sequence[Task]) -> None:
    """Give tasks that no op_assign named the ranks of those that they are connected to.

    What gradients flow through runs where its latest input is made, or else where it is first read; what none flow
    through, positions and masks, wherever it is read.
    """
    makers: defaultdict[LogicalTensor, list[Task]] = defaultdict(list)
    readers: defaultdict[LogicalTensor, list[Task]] = defaultdict(list)
    for task in tasks:
        for made in task.outputs:
            if made is not None:
                makers[made.tensor].append(task)
        for read in dict.fromkeys(view_.tensor for view_ in task.inputs):
            readers[read].append(task)
    position = {task: index for index, task in enumerate(tasks)}

    def related(candidates: Iterable[Task], task: Task) -> list[Task]:
        own = view.microbatch_of.get(task)
        return [
            other
            for other in candidates
            if other in view.ranks and (own is None or view.microbatch_of.get(other, own) == own)
        ]

    def flows(task: Task) -> bool:
        return any(made is not None and made.tensor.differentiable for made in task.outputs)

    def place(task: Task, neighbours: Sequence[Task]) -> None:
        if neighbours:
            view.ranks[task] = tuple(sorted({rank for other in neighbours for rank in view.ranks[other]}))

    for task in tasks:  # after what makes its latest input
        if task not in view.ranks and flows(task):
            for tensor in sorted(
                {read.tensor for read in task.inputs if makers[read.tensor]},
                key=lambda tensor: -max(position[maker] for maker in makers[tensor]),
            ):
                if found := related(makers[tensor], task):
                    place(task, found)
                    break
    for task in reversed(tasks):  # where it is read
        if task not in view.ranks:
            found = related((r for made in task.outputs if made is not None for r in readers[made.tensor]), task)
            if flows(task) and found:
                found = [reader for reader in found if reader.operator is found[0].operator]
            place(task, found)
    for task in tasks:  # what nobody reads but the caller
        if task not in view.ranks:
            found = related((maker for read in task.inputs for maker in makers[read.tensor]), task)
            place(task, found[-1:])
            view.ranks.setdefault(task, view.mesh.ranks[:1])


def _merge_replicas(view: Graph, tasks: Sequence[Task]) -> dict[Task, tuple[int, ...]]:
    """The tasks with their ranks; of replicas, only the first on each rank."""
    taken: dict[tuple[object, ...], set[int]] = defaultdict(set)
    merged: dict[Task, tuple[int, ...]] = {}
    pieces: defaultdict[Operator, dict[tuple[object, ...], Task]] = defaultdict(dict)
    for task in tasks:
        # Sums cut in another order have their addends in another order.
        chunks = tuple(made and made.mask.chunk for made in task.outputs)
        same = (task.operator, frozenset(task.cuts.items()), task.chunk, chunks)
        pieces[task.operator].setdefault(same, task)
        ranks = tuple(rank for rank in view.ranks[task] if rank not in taken[same])
        taken[same].update(ranks)
        if ranks:
            merged[task] = ranks
    for operator, of_operator in pieces.items():
        _check_replicas(operator, tuple(of_operator.values()))
    return merged


def _check_random_numbers(ranks_of_task: Mapping[Task, tuple[int, ...]]) -> None:
    """Refuse replicas of what draws random numbers: each rank would draw its own, and train on something else."""
    ranks: defaultdict[tuple[object, ...], set[int]] = defaultdict(set)
    for task, own in ranks_of_task.items():
        if draws_random_numbers(task.operator):
            same = ranks[task.operator, tuple(task.cuts.items()), task.chunk]
            same.update(own)
            if len(same) > 1:
                raise ValueError(
                    f"{task} ({task.operator.target} of module {task.operator.module!r}) draws random numbers, and the "
                    f"plan runs it on {name_ranks(sorted(same))}, which would each draw others. Cut it so that every "
                    f"rank has a piece of its own, as sequence parallel does, run it on one rank, or set its "
                    f"probability to 0."
                )


def _check_replicas(operator: Operator, pieces: Sequence[Task]) -> None:
    """Refuse pieces of which some compute what others compute, too, and are no replicas of these."""
    sizes = find_rule(operator).sizes
    parts = (math.prod(part.size / sizes[name] for name, part in task.cuts.items()) / task.chunk.of for task in pieces)
    if len(pieces) > 1 and sum(parts) > 1 + 1e-6:
        names = ", ".join(map(str, pieces[:6])) + (" …" if len(pieces) > 6 else "")
        raise ValueError(
            f"the replicas of {operator.name} ({operator.target}) are cut differently, into {names}, so that ranks "
            f"would not know whose parts belong together. Cut all replicas alike, or cut before replicating."
        )
