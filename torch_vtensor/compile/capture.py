"""Captured graph → TaskGraph: what is computed, from what, under which names; not yet where or when."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch.fx import GraphModule, Node

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.names import InputNames

Direction = Literal["forward", "backward"]

_WRAPPED = re.compile(r"__(output_tangent|grad|input_mutation)\((.*)\)(.*)")
_KINDS = {"output_tangent": "tangent", "grad": "gradient", "input_mutation": "mutation"}


class Value(NamedTuple):
    """What flows into or out of a graph.

    ``kind`` is parameter, buffer, input, number, constant or tangent for what flows in; output, gradient or mutation,
    an input's new value, for what flows out. ``name`` is what the user calls it; ``task`` is the node that holds it.
    """

    kind: str
    name: str
    task: str
    spec: str


class Task(NamedTuple):
    """One operator of the captured graph: the unit that a plan places.

    ``module`` is the path of the innermost module that made it, ``""`` outside any; ``reads`` names the tasks and the
    inputs whose values it takes; ``spec`` is dtype and shape of what it makes.
    """

    name: str
    op: str
    module: str
    direction: Direction
    reads: tuple[str, ...]
    spec: str


@dataclass(frozen=True)
class TaskGraph:
    """A captured computation: forward and backward in one graph (``is_joint``) for training, forward for inference.

    ``module`` is the graph itself. `segment` consumes it; everything else here is a description that stays as it is.
    """

    inputs: tuple[Value, ...]
    tasks: tuple[Task, ...]
    outputs: tuple[Value, ...]
    is_joint: bool
    module: GraphModule = field(repr=False, compare=False)

    def __str__(self) -> str:
        """One line for each value and each task, in order."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        num_backward = sum(task.direction == "backward" for task in self.tasks)
        yield (
            f"TaskGraph of {len(self.tasks) - num_backward} forward and {num_backward} backward tasks, "
            f"{len(self.inputs)} inputs, {len(self.outputs)} outputs"
        )
        yield from (f"  {value.kind:10} {value.task:20} {value.spec:24} {value.name}" for value in self.inputs)
        for task in self.tasks:
            reads = ", ".join(task.reads)
            yield f"  {task.direction:10} {task.name:20} {task.spec:24} {task.op}({reads})  {task.module}".rstrip()
        yield from (f"  {value.kind:10} {value.task:20} {value.spec:24} {value.name}" for value in self.outputs)


def capture(module: GraphModule, names: InputNames, *, is_joint: bool) -> TaskGraph:
    """Describe an aten graph in the user's names; the graph is not changed."""
    inputs: list[Value] = []
    tasks: list[Task] = []
    backward: set[str] = set()
    for node in module.graph.nodes:
        reads = tuple(source.name for source in node.all_input_nodes)
        if _torch_compat.is_backward(node) or not backward.isdisjoint(reads):
            backward.add(node.name)
        if node.op == "placeholder":
            expression = _torch_compat.input_expression(node)
            inputs.append(_value(node, "input", node.name if expression is None else expression, names))
        elif node.op == "get_attr":
            inputs.append(_value(node, "constant", str(node.target), names))
        elif node.op != "output":
            module_name = names.module(_torch_compat.module_path_of(node))
            direction: Direction = "backward" if node.name in backward else "forward"
            tasks.append(Task(node.name, _torch_compat.operator_name(node), module_name, direction, reads, _spec(node)))
    return TaskGraph(tuple(inputs), tuple(tasks), tuple(_outputs(module, names)), is_joint, module)


def _outputs(module: GraphModule, names: InputNames) -> Iterator[Value]:
    nodes, expressions = _torch_compat.outputs(module)
    for index, (node, expression) in enumerate(zip(nodes, expressions, strict=True)):
        if isinstance(node, Node):
            yield _value(node, "output", f"output[{index}]" if expression is None else expression, names)


def _value(node: Node, kind: str, expression: str, names: InputNames) -> Value:
    """Name a value by AOTAutograd's expression: ``args[0]`` is an input, ``__grad(args[0])`` its gradient."""
    wrapped = _WRAPPED.fullmatch(expression)
    kind = _KINDS[wrapped[1]] if wrapped else names.kind(expression) or kind
    while wrapped:
        expression = wrapped[2] + wrapped[3]
        wrapped = _WRAPPED.fullmatch(expression)
    return Value(kind, names.substitute(expression), node.name, _spec(node))


def _spec(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"{len(value)} values"
    return type(value).__name__
