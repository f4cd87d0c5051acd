"""What a plan says: op_trans, op_assign, op_order and what is made of them, about a `Graph` that keeps it."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch_vtensor.compile.cost import task_work
from torch_vtensor.compile.dimensions import Dimension, find_dimensions, identifier_to_cut
from torch_vtensor.compile.mesh import Mesh, Place, ranks_of
from torch_vtensor.compile.pieces import cut, replicate, split_value
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Operator, OperatorGraph, Piece, Task
from torch_vtensor.compile.tensor_view import Interval, LogicalTensor, cut_evenly

DimensionName = str
"""``"batch"``; ``"sequence"``: dimension 1 of what has the batch for dimension 0 and features after; ``"hidden"`` or
``"heads"``: the largest dimension inside the tasks; ``"vocab"``: the largest of their parameters; or a parameter's, as
``"up_proj.weight:0"``."""


class Graph:
    """A captured program as a plan sees it: tasks to select, and a record of what is decided about them."""

    def __init__(self, graph: OperatorGraph, mesh: Mesh) -> None:
        self.operator_graph = graph
        self.mesh = mesh
        self.microbatch_of: dict[Task, int] = {}
        self.recomputed: dict[Task, int] = {}
        self.apart: dict[Task, int] = {}
        self.ranks: dict[Task, tuple[int, ...]] = {}
        self.chains: list[tuple[Tasks, ...]] = []
        self.finishing: set[int] = set()
        self.stored: dict[LogicalTensor, Storage] = {}
        self.unit_of: dict[Operator, int] = {}
        self.pipeline: Pipeline | None = None
        self.num_microbatches = 1
        self.num_cut = 0  # how often a task was cut: what `current` says holds until the next time
        self._pieces: dict[Task, tuple[Task, ...]] = {}
        self._all = Tasks(self, _whole_tasks(graph.operators))
        self._dimensions: tuple[Dimension, ...] | None = None

    @property
    def tasks(self) -> Tasks:
        """Every task."""
        return self._all

    @property
    def parameters(self) -> tuple[LogicalTensor, ...]:
        """Every parameter of the program."""
        return tuple(tensor for tensor in self.operator_graph.inputs if tensor.kind == "parameter")

    def select(self, pattern: str) -> Tasks:
        """The tasks of every module whose path matches a shell pattern, and of those inside it.

        ``select("layers.*")`` takes all layers, ``select("*.mlp")`` every mlp; ``""`` is what runs in no module.

        Raises:  ValueError if no module matches, naming the closest.
        """
        return self.tasks.select(pattern)

    def layers(self, pattern: str) -> tuple[Tasks, ...]:
        """The tasks of each module that matches, one `Tasks` a module, in the order in which they run.

        Raises:  ValueError if no module matches, naming the closest.
        """
        return self.tasks.layers(pattern)

    def microbatch(self, count: int, *, whole: Collection[Task] = frozenset()) -> Microbatches:
        """Cut everything that runs over the batch into `count` pieces along it, uneven where it does not divide.

        What stays `whole` runs once for all microbatches: forward before the first, backward after the last. It may
        read nothing that gradients flow through and that is in pieces.

        The batch is dimension 0 of the inputs. What is summed over it stays in pieces for as long as that is exact:
        each microbatch has its share of the loss, and its backward pass waits for no other.

        Raises:  ValueError if the batch is smaller than that, or there is none, or what is whole comes after a piece.
        Source:  SuperScaler (arXiv 2301.08984) section 3.1: micro-batching is an op-trans along the batch.
        """
        if self.num_microbatches != 1:
            raise ValueError(f"the batch is cut into {self.num_microbatches} microbatches already; cut it once.")
        tasks = Tasks(self, [task for task in self.tasks if task not in whole]) if whole else self.tasks
        if whole:
            self._check_comes_first(whole)
        groups = _cut_along(tasks, self._batch_dimension(), count, shares_the_rest=True, follows_sums=True)
        for index, group in enumerate(groups):
            self.microbatch_of.update(dict.fromkeys(group, index))
        self.num_microbatches = count
        return Microbatches(tuple(groups))

    def _check_comes_first(self, whole: Collection[Task]) -> None:
        """Raise ValueError if one of these tasks needs what gradients flow through and that others make in pieces."""
        dimension, made = self._batch_dimension(), set[LogicalTensor | None]()
        for task in self.tasks:
            operator = task.operator
            comes_after = not made.isdisjoint(operator.inputs)
            if comes_after and task in whole:
                raise ValueError(f"{task.name} needs what microbatches compute, so it cannot run once for all of them.")
            is_cut = task not in whole and identifier_to_cut(operator, dimension) is not None
            if comes_after or (is_cut and any(one is not None and one.differentiable for one in operator.outputs)):
                made.update(operator.outputs)

    def current(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks that these are now: each itself, or the pieces that it was cut into."""
        found: list[Task] = []
        pieces_of = self._pieces
        for task in tasks:
            if task not in pieces_of:
                found.append(task)
                continue
            ahead = [task]
            while ahead:
                now = ahead.pop()
                pieces = pieces_of.get(now)
                if pieces is None:
                    found.append(now)
                else:
                    ahead.extend(reversed(pieces))
        return found

    def replace(self, task: Task, pieces: tuple[Task, ...]) -> None:
        """Put pieces in the place of a task; they inherit what was decided about it."""
        if pieces == (task,):
            return  # cut into one
        self._pieces[task] = pieces
        self.num_cut += 1
        decided: tuple[dict[Task, object], ...] = (self.microbatch_of, self.recomputed, self.apart, self.ranks)  # type: ignore[assignment]
        for decisions in decided:
            if task in decisions:
                decision = decisions.pop(task)
                for piece in pieces:
                    decisions[piece] = decision

    def dimension(self, name: DimensionName, tasks: Tasks) -> Dimension:
        """The dimension that a name means for these tasks.

        Raises:  ValueError if there is none, listing those that there are.
        """
        if name == "batch":
            return self._batch_dimension()
        operators = list(dict.fromkeys(task.operator for task in tasks))
        inside = find_dimensions(operators)
        if ":" in name:
            wanted, _, dim = name.rpartition(":")
            candidates = [d for d in inside if any(_is_called(*tied, wanted, dim) for tied in d.tensor_dims)]
        elif name in ("hidden", "heads"):
            candidates = [found for found in inside if _is_internal(found, operators)]
            attention = [found for found in candidates if _touches_attention(found)]
            others = [found for found in candidates if found not in attention]
            candidates = attention if name == "heads" else others or candidates
        elif name == "vocab":
            candidates = [found for found in inside if _parameter_extent(found)]
        elif name == "sequence":
            batch = self._batch_dimension().tensor_dims
            candidates = [
                found
                for found in inside
                if any(dim == 1 and (tensor, 0) in batch and len(tensor.shape) > 2 for tensor, dim in found.tensor_dims)
            ]
        else:
            candidates = []
        if not candidates:
            known = "\n  ".join(sorted(str(found) for found in inside if found.size > 1))
            raise ValueError(
                f"{tasks} have no dimension {name!r}. Names are 'batch', 'sequence', 'hidden', 'heads', 'vocab', or a "
                f"parameter's as in 'up_proj.weight:0'. These tasks can be cut along\n  {known}"
            )
        return max(candidates, key=lambda found: (_parameter_extent(found), len(found.identifiers)))

    def _batch_dimension(self) -> Dimension:
        if self._dimensions is None:
            self._dimensions = find_dimensions(self.operator_graph.operators)
        inputs = [tensor for tensor in self.operator_graph.inputs if tensor.kind == "input" and tensor.shape]
        for dimension in self._dimensions:
            if any((tensor, 0) in dimension.tensor_dims for tensor in inputs):
                return dimension
        raise ValueError(
            "the program has no batch to cut: none of its operators can be cut along dimension 0 of an input. "
            "Operators that mix the samples of a batch, such as batch_norm, keep it whole."
        )

    def __str__(self) -> str:
        """Print the captured graph."""
        return str(self.operator_graph)


class Tasks:
    """Some tasks of a graph: what the primitives take. Tasks that are cut later stand for their pieces."""

    def __init__(self, graph: Graph, tasks: Iterable[Task]) -> None:
        self.graph = graph
        self._current = tuple(tasks), -1  # what they are now, and after how many cuts that was looked up

    @classmethod
    def uncut(cls, graph: Graph, tasks: Iterable[Task]) -> Tasks:
        """Tasks of which none is cut."""
        made = cls(graph, tasks)
        made._current = made._current[0], graph.num_cut
        return made

    def select(self, pattern: str) -> Tasks:
        """Those of these tasks that `Graph.select` would take."""
        chosen = [task for task in self if _is_inside(task.operator.module, pattern)]
        if not chosen:
            modules = sorted({task.operator.module for task in self})
            closest = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.3) or modules[:3]
            raise ValueError(
                f"no module matches {pattern!r} among {len(modules)}; the closest are {', '.join(map(repr, closest))}. "
                f"Patterns match whole module paths, as in '*.mlp' or 'layers.*'."
            )
        return Tasks(self.graph, chosen)

    def layers(self, pattern: str) -> tuple[Tasks, ...]:
        """Those of these tasks that `Graph.layers` would take, one `Tasks` a module."""
        groups: defaultdict[str, list[Task]] = defaultdict(list)
        for task in self.select(pattern):
            parts = task.operator.module.split(".")
            prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            groups[next((prefix for prefix in prefixes if fnmatch.fnmatchcase(prefix, pattern)), "")].append(task)
        return tuple(Tasks(self.graph, tasks) for tasks in groups.values())

    def __iter__(self) -> Iterator[Task]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> tuple[Task, ...]:
        tasks, num_cut = self._current
        if num_cut != self.graph.num_cut:
            tasks = tuple(self.graph.current(tasks))
            self._current = tasks, self.graph.num_cut
        return tasks

    def __add__(self, other: Tasks) -> Tasks:
        return Tasks(self.graph, dict.fromkeys([*self, *other]))

    def __str__(self) -> str:
        """Count them and name their modules."""
        modules = list(dict.fromkeys(task.operator.module for task in self))
        return f"{len(self)} tasks of {', '.join(map(repr, modules[:3]))}{' …' if len(modules) > 3 else ''}"


@dataclass(frozen=True)
class Microbatches:
    """The tasks of each microbatch."""

    groups: tuple[Tasks, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Tasks:
        return self.groups[index]


@dataclass(frozen=True)
class Storage:
    """Where a parameter lies between steps, and how it moves in one.

    Each of ``ranks`` keeps one interval of dimension ``dim``, all of it where that is None; without ranks, those that
    read the same share it out. Its gradient is added up over ranks once a step, or for each microbatch. It is gathered
    once a step, or ``anew`` for each pass of each unit of the plan, which is a group of tasks.
    """

    ranks: tuple[int, ...] | None
    dim: int | None
    each_microbatch: bool = False
    anew: bool = False


@dataclass(frozen=True)
class Pipeline:
    """The order in which each rank runs the passes of its stages, by the name of a pipeline schedule.

    ``stages`` are the operators of each stage where the plan says it; else stages are what runs on the same ranks.
    """

    kind: str
    stages: tuple[frozenset[Operator], ...] = ()

    @property
    def cuts_backward(self) -> bool:
        """Whether gradients of weights are passes of their own."""
        return self.kind in ("zb", "zbh2")


def op_trans(
    tasks: Tasks, dim: DimensionName | None = None, n: int = 1, *, recompute: bool = False
) -> tuple[Tasks, ...]:
    """Cut tasks into `n` groups along a dimension, each a piece of what computes along it and a replica of the rest.

    Without `dim`, each group is a replica of everything. With `recompute`, what a group's forward pass computes inside
    is not kept: its backward pass computes it again.

    Raises:  ValueError for a dimension that the tasks do not have or that is too short.
    Source:  SuperScaler (arXiv 2301.08984) section 3.1.
    """
    if n < 1:
        raise ValueError(f"op_trans got n={n}; cut into 1 or more groups.")
    graph = tasks.graph
    if n == 1:
        groups = [Tasks(graph, tuple(tasks))]
    elif dim is None:
        groups = _transpose(graph, [_replace(graph, task, replicate(task, n)) for task in tasks])
    else:
        dimension = graph.dimension(dim, tasks)
        groups = _cut_along(tasks, dimension, n, shares_the_rest=False, follows_sums=dim == "batch")
    if recompute:
        first = len(graph.recomputed)
        for offset, group in enumerate(groups):
            graph.recomputed.update(dict.fromkeys(group, first + offset))
    return tuple(groups)


def op_assign(tasks: Tasks | Sequence[Tasks], place: Place | Sequence[Place]) -> None:
    """Place tasks: on a rank, or on each of several as replicas; a sequence of groups goes to as many places.

    A task that is placed again moves. Tasks that a plan leaves alone follow those that they are connected to.

    Raises:  ValueError for a rank that the mesh does not have, or other than one place for each group.
    Source:  SuperScaler (arXiv 2301.08984) section 3.2; backward passes run where their forward passes do.
    """
    if not isinstance(tasks, Tasks):
        places = list(place) if not isinstance(place, int) else [place]
        if len(places) != len(tasks):
            raise ValueError(f"op_assign got {len(tasks)} groups and {len(places)} places; give one for each.")
        for group, one in zip(tasks, places, strict=True):
            op_assign(group, one)
        return
    ranks = ranks_of(place)  # type: ignore[arg-type]
    unknown = [rank for rank in ranks if rank not in tasks.graph.mesh.ranks]
    if unknown or not ranks:
        raise ValueError(f"op_assign got rank {unknown or 'none'}, not in the {tasks.graph.mesh}. Use mesh.ranks.")
    tasks.graph.ranks.update(dict.fromkeys(tasks, ranks))


def op_order(*groups: Tasks, finish: bool = False) -> None:
    """Run groups one after the other: of each microbatch, on each rank, all of a group before any of the next.

    This is about forward passes; a group's backward pass runs as soon as it can. With `finish`, it runs before the
    next group's forward pass where a call runs the whole step, so that what backward needs is there for one group at a
    time::

        op_order(a, b, c)               F a  F b  F c  B c  B b  B a
        op_order(a, b, c, finish=True)  F a  B a  F b  B b  F c  B c

    A group whose backward pass needs what a later group computes, as in a loss that is no sum over the groups, cannot
    finish first: the plan is refused as one that waits in a circle.

    Source:  SuperScaler (arXiv 2301.08984) section 3.2.
    """
    if groups:
        graph = groups[0].graph
        if finish:
            graph.finishing.add(len(graph.chains))
        graph.chains.append(groups)


def compile_apart(*groups: Tasks) -> None:
    """Generate code for each group by itself, so that groups that compute the same, as a model's layers, share it.

    This changes nothing about what runs where and when. It takes a compiler a layer's time instead of the model's, and
    costs what could have been fused over the borders.
    """
    if groups:
        apart = groups[0].graph.apart
        first = len(apart)
        for offset, group in enumerate(groups):
            apart.update(dict.fromkeys(group, first + offset))


def balance(layers: Sequence[Tasks], num_stages: int) -> tuple[Tasks, ...]:
    """Neighbouring layers put together so that the stage with the most work has as little as possible.

    Raises:  ValueError for more stages than layers.
    """
    if not 1 <= num_stages <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot make {num_stages} stages; choose 1 to {len(layers)}.")
    work = [sum(task_work(task) for task in layer) for layer in layers]
    # best[k][i]: the least that the largest of k stages over the first i layers can be, and where the last one begins.
    best = [[(math.inf, 0)] * (len(layers) + 1) for _ in range(num_stages + 1)]
    best[0][0] = (0, 0)
    for stage in range(1, num_stages + 1):
        for stop in range(stage, len(layers) + 1):
            best[stage][stop] = min(
                (max(best[stage - 1][start][0], sum(work[start:stop])), start) for start in range(stage - 1, stop)
            )
    stages: list[Tasks] = []
    stop = len(layers)
    for stage in range(num_stages, 0, -1):
        start = best[stage][stop][1]
        stages.append(Tasks(layers[0].graph, [task for layer in layers[start:stop] for task in layer]))
        stop = start
    return tuple(reversed(stages))


def store(
    graph: Graph,
    ranks: Sequence[int] | None = None,
    pattern: str = "*",
    *,
    each_microbatch: bool = False,
    units: Sequence[Tasks] = (),
    anew: bool = False,
) -> None:
    """Shard parameters whose names match over ranks, by dimension 0; those with too few rows stay whole.

    Without ranks, what several ranks read is shared out among those. Parameters are gathered for a step where tasks
    read them, and their gradients come back as shards, added up once a step.

    each_microbatch: gradients are added up over ranks for each microbatch, and only shards are kept.
    units: groups of tasks that run apart from each other, so that gradients of one are added up, and freed, while the
        next runs backward.
    anew: parameters are gathered for each pass of a unit, forward or backward, and freed after it; gradients are added
        up after each backward pass.

    Source:  ZeRO (arXiv 1910.02054) as SuperScaler section 3.3 states it: an op-trans of the optimizer.
    """
    for parameter in graph.parameters:
        if fnmatch.fnmatchcase(parameter.name, pattern):
            fits = ranks is not None and bool(parameter.shape) and parameter.shape[0] >= len(ranks)
            graph.stored[parameter] = Storage(
                None if ranks is None else tuple(ranks),
                0 if fits else None,
                each_microbatch or anew,
                anew,
            )
    first = len(graph.unit_of)
    for number, unit in enumerate(units):
        graph.unit_of.update((task.operator, first + number) for task in unit)


def _whole_tasks(operators: Iterable[Operator]) -> Iterator[Task]:
    """All of each operator; those that are alike share their pieces, and with them what is found out about these."""
    whole: dict[Hashable, Piece] = {}
    for operator in operators:
        likeness = operator.likeness
        piece = Piece.whole(operator) if likeness is None else whole.get(likeness)
        if piece is None:
            piece = whole[likeness] = Piece.whole(operator)
        yield Task(operator, piece)


PlanFunction = Callable[[Graph, Mesh], None]
"""A plan: decides about a graph by calling primitives."""


def _cut_along(tasks: Tasks, dimension: Dimension, n: int, *, shares_the_rest: bool, follows_sums: bool) -> list[Tasks]:
    """Cut every task that computes along a dimension into n pieces; the i-th pieces are group i.

    What does not compute along it becomes n replicas, or, if they share it, stays one that is in no group. If they
    follow sums, what is linear in a sum over the dimension is cut into the addends.
    """
    graph = tasks.graph
    summed: set[LogicalTensor] = set()
    rows: list[tuple[Task, ...]] = []
    for operator, of_operator in itertools.groupby(tuple(tasks), lambda task: task.operator):
        identifier = identifier_to_cut(operator, dimension)
        if identifier is not None:
            rule = find_rule(operator)
            unit = rule.sizes[identifier] // dimension.size
            everything = Interval(0, rule.sizes[identifier])
            intervals: dict[Interval, tuple[Interval, ...]] = {}
            for task in of_operator:
                has = task.cuts.get(identifier, everything)
                if has not in intervals:
                    starts = [has.start + part.start * unit for part in cut_evenly(has.size // unit, n)]
                    # What was cut between units before has a part of one in the end.
                    intervals[has] = tuple(itertools.starmap(Interval, itertools.pairwise((*starts, has.stop))))
                rows.append(_replace(graph, task, cut(task, identifier, intervals[has])))
            if follows_sums and identifier in rule.summed:
                summed.update(tensor for tensor in operator.outputs if tensor is not None)
        elif follows_sums and (positions := _linear_in(operator, summed)):
            rows += [_replace(graph, task, split_value(task, positions, n)) for task in of_operator]
            summed.update(tensor for tensor in operator.outputs if tensor is not None)
        elif not shares_the_rest:
            rows += [_replace(graph, task, replicate(task, n)) for task in of_operator]
    if not rows:
        raise ValueError(f"none of {tasks} computes along {dimension}.")
    return _transpose(graph, rows)


def _linear_in(operator: Operator, summed: set[LogicalTensor]) -> tuple[int, ...]:
    """The inputs in which the operator is linear if these are exactly the ones that are sums."""
    positions = tuple(index for index, tensor in enumerate(operator.inputs) if tensor in summed)
    return positions if positions in map(tuple, map(sorted, find_rule(operator).linear)) else ()


def _replace(graph: Graph, task: Task, pieces: tuple[Task, ...]) -> tuple[Task, ...]:
    graph.replace(task, pieces)
    return pieces


def _transpose(graph: Graph, rows: Sequence[tuple[Task, ...]]) -> list[Tasks]:
    return [Tasks.uncut(graph, group) for group in zip(*rows, strict=True)]


def _is_called(tensor: LogicalTensor, dim: int, wanted: str, wanted_dim: str) -> bool:
    matches = fnmatch.fnmatchcase(tensor.name, wanted) or tensor.name.endswith(f".{wanted}")
    return matches and str(dim) == wanted_dim


def _is_internal(dimension: Dimension, operators: Sequence[Operator]) -> bool:
    """Whether it lies along parameters, and along nothing else that comes from or goes to other operators."""
    made = {tensor for operator in operators for tensor in operator.outputs}
    # What is made here and read by nobody here is what the rest of the program reads.
    read = {tensor for operator in operators for tensor in operator.inputs}
    outside = [
        tensor
        for tensor, _ in dimension.tensor_dims
        if (tensor.kind != "parameter" and tensor not in made) or (tensor in made and tensor not in read)
    ]
    return not outside and _parameter_extent(dimension) > 0


def _touches_attention(dimension: Dimension) -> bool:
    targets = [str(operator.target) for operator in dimension.identifiers]
    return any("attention" in target or "softmax" in target for target in targets)


def _parameter_extent(dimension: Dimension) -> int:
    return max((tensor.shape[dim] for tensor, dim in dimension.tensor_dims if tensor.kind == "parameter"), default=0)


def _is_inside(module: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(module, pattern) or (pattern != "" and fnmatch.fnmatchcase(module, f"{pattern}.*"))
