"""What ready plans look for in any model: its layers, and the dimensions inside them that can be cut over devices."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch_vtensor.compile.cost import task_work
from torch_vtensor.compile.dimensions import Dimension, find_dimensions, identifier_to_cut
from torch_vtensor.compile.primitives import DimensionName, Graph, Tasks
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Operator, Task
from torch_vtensor.compile.tensor_view import LogicalTensor

_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)(?:\.|$)")
_LEAST_SHARE = 0.1


class Cut(NamedTuple):
    """Tasks that compute along one dimension, what op_trans calls it, and into how many pieces each can be cut."""

    tasks: Tasks
    dim: DimensionName
    size: int


def find_layers(graph: Graph, pattern: str | None = None) -> tuple[Tasks, ...]:
    """The tasks of each layer, in the order in which they run.

    Layers are modules with a number for a name, as a ModuleList has them (``model.layers.0``, ``h.0``), the outermost
    where they lie in each other; of several families, as an encoder's and a decoder's, all whose layers do a tenth or
    more of the work of any other's. A pattern, as in ``"model.layers.*"``, names them instead.

    Raises:  ValueError if there are none.
    """
    if pattern is not None:
        return graph.layers(pattern)
    families: defaultdict[str, defaultdict[str, list[Task]]] = defaultdict(lambda: defaultdict(list))
    for module, tasks in itertools.groupby(graph.tasks, lambda task: task.operator.module):
        if match := _NUMBERED.match(module):
            families[match[1] or ""][match[2]].extend(tasks)
    repeated = [family for family in families.values() if len(family) > 1]
    work = [sum(map(task_work, itertools.chain(*family.values()))) / len(family) for family in repeated]
    layers = [
        layer
        for family, own in zip(repeated, work, strict=True)
        if own >= _LEAST_SHARE * max(work)
        for layer in family.values()
    ]
    if not layers:
        modules = ", ".join(sorted({repr(task.operator.module) for task in graph.tasks})[:5])
        raise ValueError(
            f"the model has no layers that a plan could find: it looks for modules with numbers for names, as "
            f"'model.layers.0', and this one's are {modules} … Name them in a plan of your own: "
            f"functools.partial(plan, layers='blocks_*')."
        )
    order = {task: number for number, task in enumerate(graph.tasks)}
    return tuple(Tasks(graph, layer) for layer in sorted(layers, key=lambda layer: order[layer[0]]))


def flows(task: Task) -> bool:
    """Whether gradients flow through what the task makes."""
    return any(made is not None and made.tensor.differentiable for made in task.outputs)


def few_lookups(graph: Graph) -> frozenset[Task]:
    """Those who look up no more rows of a parameter than that has, by what is there before any layer runs."""
    made: set[LogicalTensor | None] = set()  # by what gradients flow through, and of that
    lookups: set[Task] = set()
    for task in graph.tasks:
        comes_after = not made.isdisjoint(task.operator.inputs)
        if not comes_after and _looks_few_up(task.operator):
            lookups.add(task)
        if comes_after or flows(task):
            made.update(task.operator.outputs)
    return frozenset(lookups)


def _looks_few_up(operator: Operator) -> bool:
    if not str(operator.target).startswith("aten.embedding."):
        return False
    (table, *_), (found, *_) = operator.inputs, operator.outputs
    return table.kind == "parameter" and found is not None and math.prod(found.shape) <= math.prod(table.shape)


def around_layers(graph: Graph, layers: Sequence[Tasks]) -> tuple[Tasks, ...]:
    """All through which gradients flow: each layer with what runs after it, the first also with what runs before."""
    layer_of = {task.operator: number for number, layer in enumerate(layers) for task in layer}
    units: list[list[Task]] = [[] for _ in layers]
    current = 0
    for task in graph.tasks:
        if flows(task):
            current = layer_of.get(task.operator, current)
            units[current].append(task)
    return tuple(Tasks(graph, unit) for unit in units)


def find_rounds(graph: Graph, layers: Sequence[Tasks]) -> tuple[tuple[Tasks, ...], ...]:
    """Of each pass through the layers, each layer with what runs after it; what runs before any layer is none's.

    A pass begins where a layer comes after a later one. What lies between two passes belongs to the first layer of the
    second, as what a loop does before it calls the layers.
    """
    layer_of = {task.operator: number for number, layer in enumerate(layers) for task in layer}
    rounds: list[list[list[Task]]] = []
    between: list[Task] = []
    current = 0
    for task in graph.tasks:
        layer = layer_of.get(task.operator)
        if layer is None:
            between.append(task)
            continue
        if rounds and layer >= current:
            rounds[-1][current] += between
        else:
            rounds.append([[] for _ in layers])
            rounds[-1][layer] += between if len(rounds) > 1 else []
        rounds[-1][layer].append(task)
        between, current = [], layer
    if rounds:
        rounds[-1][current] += between
    return tuple(tuple(Tasks(graph, unit) for unit in units) for units in rounds)


def find_units(graph: Graph, layers: Sequence[Tasks]) -> tuple[Tasks, ...]:
    """All that gradients flow through: what runs before the layers, each layer with what runs behind it, the rest."""
    layer_of = {task.operator: number for number, layer in enumerate(layers, start=1) for task in layer}
    after = after_layers(graph, layers)
    last = dict.fromkeys((task.operator for task in after), len(layers) + 1)
    units: list[list[Task]] = [[] for _ in range(len(layers) + 2)]
    current = 0
    for task in graph.tasks:
        if flows(task):
            current = last.get(task.operator, layer_of.get(task.operator, current))
            units[current].append(task)
    return tuple(Tasks(graph, unit) for unit in units if unit)


def after_layers(graph: Graph, layers: Sequence[Tasks]) -> Tasks:
    """What gradients flow through after the last layer, the head and the loss, and what is computed from that."""
    inside = {task.operator for layer in layers for task in layer}
    tail: list[Task] = []
    made: set[LogicalTensor] = set()
    for task in graph.tasks:
        if task.operator in inside:
            tail, made = [], set()
        elif flows(task) or any(view.tensor in made for view in task.inputs):
            tail.append(task)
            made.update(view.tensor for view in task.outputs if view is not None)
    return Tasks(graph, tail)


def inner_cuts(layer: Tasks) -> tuple[Cut, ...]:
    """The heads of each attention and the hidden dimension of each mlp: what begins and ends inside a layer.

    Such a dimension is made by a parameter or an attention and summed with a parameter, and what the layer hands on
    does not lie along it.
    """
    operators = list(dict.fromkeys(task.operator for task in layer))
    read = {tensor for operator in operators for tensor in operator.inputs}
    handed_on = {made for operator in operators for made in operator.outputs if made is not None} - read
    weights = _weights(operators)
    found = [
        dimension
        for dimension in find_dimensions(operators)
        if dimension.size > 1
        and not any(tensor in handed_on for tensor, _ in dimension.tensor_dims)
        and any(_sums(operator, dimension, weights) for operator in dimension.identifiers)
        and any(_makes(operator, dimension, weights) for operator in dimension.identifiers)
    ]
    return _apart(layer, found)


def vocabulary_cuts(graph: Graph, layers: Sequence[Tasks]) -> tuple[Cut, ...]:
    """The vocabulary of the embeddings and of the head outside of the layers; one cut where they are tied.

    The vocabulary is what the largest table that is looked up has rows for, and whatever parameter is as large.
    """
    inside = {task.operator for layer in layers for task in layer}
    outside = Tasks.uncut(graph, [task for task in graph.tasks if task.operator not in inside])
    operators = list(dict.fromkeys(task.operator for task in outside))
    rows = [op.inputs[0].shape[0] for op in operators if "aten.embedding" in str(op.target)]
    found = [dimension for dimension in find_dimensions(operators) if rows and _extent(dimension) == max(rows)]
    return _apart(outside, found)


def _weights(operators: Sequence[Operator]) -> frozenset[LogicalTensor]:
    """Parameters, and what is made of these alone: their casts, their transposes."""
    found = {tensor for operator in operators for tensor in operator.inputs if tensor.kind == "parameter"}
    for operator in operators:
        if operator.inputs and found.issuperset(operator.inputs):
            found.update(made for made in operator.outputs if made is not None)
    return frozenset(found)


def _sums(operator: Operator, dimension: Dimension, weights: frozenset[LogicalTensor]) -> bool:
    """Whether the operator is a product with a parameter that sums over the dimension."""
    identifier = identifier_to_cut(operator, dimension)
    return identifier in find_rule(operator).summed and _has_weight(operator, dimension, weights)


def _makes(operator: Operator, dimension: Dimension, weights: frozenset[LogicalTensor]) -> bool:
    if identifier_to_cut(operator, dimension) in find_rule(operator).summed:
        return False
    is_attention = any(word in str(operator.target) for word in ("attention", "softmax"))
    return is_attention or _has_weight(operator, dimension, weights)


def _has_weight(operator: Operator, dimension: Dimension, weights: frozenset[LogicalTensor]) -> bool:
    lies_along = {tensor for tensor, _ in dimension.tensor_dims}
    return any(tensor in weights and tensor in lies_along for tensor in operator.inputs)


def _extent(dimension: Dimension) -> int:
    return max((tensor.shape[dim] for tensor, dim in dimension.tensor_dims if tensor.kind == "parameter"), default=0)


def _apart(tasks: Tasks, dimensions: Iterable[Dimension]) -> tuple[Cut, ...]:
    """Cuts of different tasks: of dimensions that share some, as both of an outer product, that of the most tasks."""
    taken: set[Operator] = set()
    cuts = []
    for dimension in sorted(dimensions, key=lambda dimension: -len(dimension.identifiers)):
        if taken.isdisjoint(dimension.identifiers):
            taken.update(dimension.identifiers)
            cuts.append(_cut(tasks, dimension))
    return tuple(cuts)


def _cut(tasks: Tasks, dimension: Dimension) -> Cut:
    along = Tasks.uncut(tasks.graph, [task for task in tasks if task.operator in dimension.identifiers])
    name, dim = min((tensor.name, dim) for tensor, dim in dimension.tensor_dims if tensor.kind == "parameter")
    return Cut(along, f"{name}:{dim}", min(_size_left(task, dimension) for task in along))


def _size_left(task: Task, dimension: Dimension) -> int:
    identifier = identifier_to_cut(task.operator, dimension)
    assert identifier is not None
    size = find_rule(task.operator).sizes[identifier]
    left = task.cuts[identifier].size if identifier in task.cuts else size
    return left // (size // dimension.size)
