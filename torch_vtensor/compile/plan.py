"""The record of what a plan said: every task with its ranks, those that the plan left alone included."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch_vtensor.compile.mesh import Mesh, name_ranks
from torch_vtensor.compile.primitives import Graph, Pipeline, PlanFunction, Storage, op_assign
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Operator, OperatorGraph, Task
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask


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

    def on(self, ranks: frozenset[int]) -> Plan:
        """What it decides for these ranks of its mesh alone."""
        mesh = Mesh(tuple([rank for rank in self.mesh.ranks if rank in ranks]))
        of_task = {}
        for task, everywhere in self.ranks.items():
            if here := tuple([rank for rank in everywhere if rank in ranks]):
                of_task[task] = here
        return replace(self, mesh=mesh, tasks=tuple(of_task), ranks=of_task)

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
    """Give tasks that no op_assign named the ranks of those that they are connected to, piece by piece.

    What gradients flow through, and what is computed of that, runs where its latest input is made, or else where it is
    first read; what has nothing to do with gradients, positions and masks, wherever it is read.
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
    follows: set[Operator] = set()
    for operator in pieces:
        if flows(operator) or any(maker.get(read) in follows for read in operator.inputs):
            follows.add(operator)
        maker.update((made, operator) for made in operator.outputs if made is not None)
        for read in dict.fromkeys(operator.inputs):
            readers[read].append(operator)

    def place(task: Task, ranks: Iterable[int]) -> bool:
        if found := tuple(sorted(set(ranks))):
            view.ranks[task] = found
        return bool(found)

    placed = _Placed(view, pieces)
    for task in left:  # after what makes its latest input
        if task.operator in follows:
            made = [tensor for tensor in dict.fromkeys(task.operator.inputs) if tensor in maker]
            for tensor in sorted(made, key=lambda tensor: position[maker[tensor]], reverse=True):
                if place(task, placed.makers(maker[tensor], tensor, task)):
                    break
    placed = _Placed(view, pieces)
    for task in reversed(left):  # where it is read
        if task not in view.ranks:
            written = [tensor for tensor in task.operator.outputs if tensor is not None]
            wanting = [(reader, tensor) for tensor in written for reader in readers[tensor]]
            found = [ranks for reader, tensor in wanting if (ranks := placed.readers(reader, tensor, task))]
            place(task, itertools.chain.from_iterable(found[:1] if task.operator in follows else found))
    placed = _Placed(view, pieces)
    for task in left:  # what nobody reads but the caller
        if task not in view.ranks:
            of_makers = [placed.makers(maker[read], read, task) for read in task.operator.inputs if read in maker]
            *_, last = [view.mesh.ranks[:1], *filter(None, of_makers)]
            place(task, last)


class _Placed:
    """Where the pieces of operators run that are placed, as long as no more of these operators are.

    Of a microbatch, a task has to do with pieces of the same or of none.
    """

    def __init__(self, view: Graph, pieces: Mapping[Operator, Sequence[Task]]) -> None:
        self._view = view
        self._pieces = pieces
        self._known: dict[Hashable, dict[Mask, dict[int, None]]] = {}

    def makers(self, operator: Operator, tensor: LogicalTensor, task: Task) -> tuple[int, ...]:
        """The ranks that make what a task reads of a tensor that the operator makes."""
        return self._ranks(operator, _written, tensor, _read(task, tensor), self._view.microbatch_of.get(task))

    def readers(self, operator: Operator, tensor: LogicalTensor, task: Task) -> tuple[int, ...]:
        """The ranks on which the operator reads what a task makes of a tensor."""
        return self._ranks(operator, _read, tensor, _written(task, tensor), self._view.microbatch_of.get(task))

    def _ranks(
        self,
        operator: Operator,
        masks_of: Callable[[Task, LogicalTensor], list[Mask]],
        tensor: LogicalTensor,
        masks: Sequence[Mask],
        microbatch: int | None,
    ) -> tuple[int, ...]:
        asked = operator, masks_of, tensor, microbatch
        there = self._known.get(asked)
        if there is None:
            there = self._known[asked] = {}
            ranks, microbatch_of = self._view.ranks, self._view.microbatch_of
            for task in self._pieces[operator]:
                if task in ranks and (microbatch is None or microbatch_of.get(task, microbatch) == microbatch):
                    for mask in masks_of(task, tensor):
                        there.setdefault(mask, {}).update(dict.fromkeys(ranks[task]))
        touched = [ranks for mask, ranks in there.items() if any(_overlap(mask, one) for one in masks)]
        return tuple(dict.fromkeys(itertools.chain.from_iterable(touched or there.values())))


def _read(task: Task, tensor: LogicalTensor) -> list[Mask]:
    return [mask for mask, one in zip(task.piece.inputs, task.operator.inputs, strict=True) if one is tensor]


def _written(task: Task, tensor: LogicalTensor) -> list[Mask]:
    pairs = zip(task.piece.outputs, task.operator.outputs, strict=True)
    return [mask for mask, one in pairs if one is tensor and mask is not None]


@functools.lru_cache(1 << 16)
def _overlap(mask: Mask, other: Mask) -> bool:
    return mask.overlaps(other)


def flows(operator: Operator) -> bool:
    """Whether gradients flow through what the operator makes."""
    return any(made is not None and made.differentiable for made in operator.outputs)


def _merge_replicas(view: Graph, tasks: Sequence[Task]) -> dict[Task, tuple[int, ...]]:
    """The tasks with their ranks; of replicas, only the first on each rank.

    Operators of one rule whose pieces are the same, and on the same ranks, are looked at once.
    """
    pieces: defaultdict[Operator, list[Task]] = defaultdict(list)
    for task in tasks:
        pieces[task.operator].append(task)
    known: dict[Hashable, list[tuple[int, ...]]] = {}
    merged: dict[Task, tuple[int, ...]] = {}
    for operator, some in pieces.items():
        asked = find_rule(operator), tuple([(task.piece, view.ranks[task]) for task in some])
        left = known.get(asked)
        if left is None:
            left = known[asked] = _ranks_left(view, operator, some)
        merged.update([(task, ranks) for task, ranks in zip(some, left, strict=True) if ranks])
    return merged


def _ranks_left(view: Graph, operator: Operator, pieces: Sequence[Task]) -> list[tuple[int, ...]]:
    """The ranks of each piece of an operator on which no replica of it comes before."""
    taken: defaultdict[Hashable, set[int]] = defaultdict(set)
    different: dict[Hashable, Task] = {}
    left: list[tuple[int, ...]] = []
    for task in pieces:
        same = _computes(task)
        different.setdefault(same, task)
        left.append(tuple([rank for rank in view.ranks[task] if rank not in taken[same]]))
        taken[same].update(left[-1])
    _check_replicas(operator, tuple(different.values()))
    return left


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
