"""The record of what a plan said: every task with its ranks, those that the plan left alone included."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch_vtensor.compile.mesh import Mesh, name_ranks
from torch_vtensor.compile.primitives import Graph, Pipeline, PlanFunction, Storage, op_assign
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

    Raises:  ValueError if it places nothing on a mesh of several ranks.
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
    left = [task for task in tasks if task not in view.ranks]
    if not left:
        return
    pieces: defaultdict[Operator, list[Task]] = defaultdict(list)
    for task in tasks:
        pieces[task.operator].append(task)
    position = {operator: number for number, operator in enumerate(pieces)}
    maker: dict[LogicalTensor, Operator] = {}
    readers: defaultdict[LogicalTensor, list[Operator]] = defaultdict(list)
    for operator in pieces:
        maker.update((made, operator) for made in operator.outputs if made is not None)
        for read in dict.fromkeys(operator.inputs):
            readers[read].append(operator)

    def related(candidates: Iterable[Operator], own: int | None) -> Iterator[Task]:
        """Their tasks that are placed, of a microbatch those of the same or of none."""
        for task in itertools.chain.from_iterable(pieces[candidate] for candidate in candidates):
            if task in view.ranks and (own is None or view.microbatch_of.get(task, own) == own):
                yield task

    def place(task: Task, ranks: Iterable[int]) -> None:
        if found := tuple(sorted(set(ranks))):
            view.ranks[task] = found

    def ranks_of(neighbours: Iterable[Task]) -> Iterator[int]:
        return (rank for other in neighbours for rank in view.ranks[other])

    for task in left:  # after what makes its latest input
        if flows(task.operator):
            own = view.microbatch_of.get(task)
            makers = {maker[read] for read in task.operator.inputs if read in maker}
            for candidate in sorted(makers, key=position.__getitem__, reverse=True):
                place(task, ranks_of(related([candidate], own)))
                if task in view.ranks:
                    break
    # What later operators run on is settled when an earlier one asks.
    settled: dict[tuple[Operator, int | None], set[int]] = {}
    for task in reversed(left):  # where it is read
        if task not in view.ranks:
            own = view.microbatch_of.get(task)
            wanting = [reader for made in task.operator.outputs if made is not None for reader in readers[made]]
            for reader in wanting:
                if (reader, own) not in settled:
                    settled[reader, own] = set(ranks_of(related([reader], own)))
            if flows(task.operator):
                wanting = [reader for reader in wanting if settled[reader, own]][:1]
            place(task, itertools.chain.from_iterable(settled[reader, own] for reader in wanting))
    for task in left:  # what nobody reads but the caller
        if task not in view.ranks:
            makers_of = [maker[read] for read in task.operator.inputs if read in maker]
            *_, last = [None, *related(makers_of, view.microbatch_of.get(task))]
            view.ranks[task] = view.mesh.ranks[:1] if last is None else tuple(sorted(view.ranks[last]))


def flows(operator: Operator) -> bool:
    """Whether gradients flow through what the operator makes."""
    return any(made is not None and made.differentiable for made in operator.outputs)


def _merge_replicas(view: Graph, tasks: Sequence[Task]) -> dict[Task, tuple[int, ...]]:
    """The tasks with their ranks; of replicas, only the first on each rank."""
    taken: defaultdict[tuple[object, ...], set[int]] = defaultdict(set)
    merged: dict[Task, tuple[int, ...]] = {}
    pieces: defaultdict[Operator, dict[tuple[object, ...], Task]] = defaultdict(dict)
    for task in tasks:
        same = task.operator, _computes(task)
        pieces[task.operator].setdefault(same, task)
        on = taken[same]
        ranks = view.ranks[task]
        if on:
            ranks = tuple([rank for rank in ranks if rank not in on])
        on.update(ranks)
        if ranks:
            merged[task] = ranks
    for operator, of_operator in pieces.items():
        _check_replicas(operator, tuple(of_operator.values()))
    return merged


def _computes(task: Task) -> tuple[object, ...]:
    """What tasks of one operator have in common if they compute the same."""
    known = task.piece.found
    if "computes" not in known:
        # Sums cut in another order have their addends in another order.
        chunks = tuple(mask and mask.chunk for mask in task.piece.outputs)
        known["computes"] = frozenset(task.cuts.items()), task.chunk, chunks
    computes: tuple[object, ...] = known["computes"]
    return computes


def _check_replicas(operator: Operator, pieces: Sequence[Task]) -> None:
    """Refuse pieces of which some compute what others compute, too, and are no replicas of these."""
    parts = (_share(task) for task in pieces)
    if len(pieces) > 1 and sum(parts) > 1 + 1e-6:
        names = ", ".join(map(str, pieces[:6])) + (" …" if len(pieces) > 6 else "")
        raise ValueError(
            f"the replicas of {operator.name} ({operator.target}) are cut differently, into {names}, so that ranks "
            f"would not know whose parts belong together. Cut all replicas alike, or cut before replicating."
        )


def _share(task: Task) -> float:
    """Which part of its operator a task computes."""
    rule = find_rule(task.operator)
    known = task.piece.found
    if ("share", rule) not in known:
        parts = (part.size / rule.sizes[name] for name, part in task.cuts.items())
        known["share", rule] = math.prod(parts) / task.chunk.of
    share: float = known["share", rule]
    return share
