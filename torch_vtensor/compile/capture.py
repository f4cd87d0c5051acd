"""Captured dynamo graph → OperatorGraph: the forward program as functional aten operators, in the user's names."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.names import InputNames
from torch_vtensor.compile.rules import DECOMPOSITIONS, cross_entropy_over_cut_classes
from torch_vtensor.compile.stretches import find_stretches
from torch_vtensor.compile.task_graph import Operator, OperatorGraph, Slot
from torch_vtensor.compile.tensor_view import LogicalTensor

_CHECKS = {"aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_scalar.default"}
_SAME_AS_ITS_INPUT = {"aten.lift_fresh_copy.default", "aten.alias.default", "aten.detach_.default"}


@dataclass(frozen=True, eq=False)
class Captured:
    """A forward program and how to call it.

    ``arguments`` has, for each argument of the compiled function, its tensor in the program, or None for a number that
    the program holds fixed. ``constants`` are the tensors that the program brings along. ``results`` has, for each
    value that the function returns, its tensor or the value itself.
    """

    graph: OperatorGraph
    arguments: tuple[LogicalTensor | None, ...]
    constants: dict[LogicalTensor, torch.Tensor] = field(repr=False)
    results: tuple[LogicalTensor | Any, ...] = field(repr=False)


def capture(
    gm: GraphModule, example_inputs: Sequence[Any], names: InputNames, *, cuts_classes: bool = False
) -> Captured:
    """Trace a dynamo graph to functional aten operators that autograd has not taken apart yet.

    Sizes that were dynamic become those of the examples, with a guard, so that other sizes compile anew. Where a plan
    cuts the classes of losses, a vocabulary, these are taken apart into operators that can be cut so.

    Raises:  NotImplementedError for a program with parts that only run as they are: nested regions, autocast.
    """
    for node in gm.graph.nodes:
        if _torch_compat.is_nested_region(node):
            raise NotImplementedError(
                f"the program has a nested region, {node.target}, which no plan cuts. Turn off gradient checkpointing "
                f"(a plan recomputes with op_trans(..., recompute=True)), control-flow operators and hooks on tensors "
                f"that the compiled function makes; hooks on parameters run, if they are registered after its first "
                f"call."
            )
    decompositions = dict(DECOMPOSITIONS)
    if cuts_classes:
        decompositions[torch.ops.aten.cross_entropy_loss.default] = cross_entropy_over_cut_classes
    reader = _Reader(example_inputs, names)
    return reader.read_stretches(gm, decompositions) or reader.read_whole(gm, decompositions)


class _Reader:
    """Reads traced graphs, node by node."""

    def __init__(self, example_inputs: Sequence[Any], names: InputNames) -> None:
        self._example_inputs = example_inputs
        self._names = names
        self._arguments = tuple(
            self._argument(index, example) for index, example in enumerate(_torch_compat.leaves(list(example_inputs)))
        )
        self._begin()

    def _begin(self) -> None:
        # What a node holds: a tensor, or for a node of several outputs the list of them.
        self._values: dict[Node, Any] = {}
        self._module: GraphModule | None = None
        self._path_of: Mapping[str | None, str | None] = {}
        self._constants: dict[LogicalTensor, torch.Tensor] = {}
        self._operators: list[Operator] = []
        self._taken: Counter[str] = Counter()
        self._grad_enabled = True

    def read_whole(self, gm: GraphModule, decompositions: Mapping[Any, Any]) -> Captured:
        """Trace the graph at once."""
        self._begin()
        traced, mutated = _torch_compat.trace_forward(gm, self._example_inputs, decompositions)
        values = self._read(traced, self._arguments)
        mutations: dict[LogicalTensor, LogicalTensor] = {}
        for position, index in mutated.items():
            overwritten = self._arguments[index]
            assert isinstance(overwritten, LogicalTensor)
            mutations[overwritten] = values[position]
        return self._captured(values[len(mutated) :], mutations)

    def read_stretches(self, gm: GraphModule, decompositions: Mapping[Any, Any]) -> Captured | None:
        """Trace stretches of the graph, those that are alike once; None if there are none or some overwrite inputs."""
        stretches = find_stretches(gm)
        if stretches is None:
            return None
        self._begin()
        held: dict[Node, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), self._arguments, strict=True))
        examples: dict[Node, Any] = dict(zip(held, self._example_inputs, strict=True))
        traced: dict[Hashable, tuple[GraphModule, tuple[str | None, ...]]] = {}
        for stretch in stretches:
            if stretch.likeness not in traced:
                inputs = [examples.get(node, node.meta["example_value"]) for node in stretch.reads]
                graph, mutated = _torch_compat.trace_forward(stretch.module(gm), inputs, decompositions)
                if mutated:
                    return None
                traced[stretch.likeness] = graph, stretch.paths
            graph, paths = traced[stretch.likeness]
            self._path_of = dict(zip(paths, stretch.paths, strict=True))
            made = self._read(graph, [held[node] for node in stretch.reads])
            held.update(zip(stretch.outputs, made, strict=True))
        (results,) = next(iter(gm.graph.find_nodes(op="output"))).args
        return self._captured(
            [held[one] if isinstance(one, Node) else one for one in _torch_compat.leaves(results)], {}
        )

    def _captured(self, results: Sequence[Any], mutations: dict[LogicalTensor, LogicalTensor]) -> Captured:
        outputs = tuple(value for value in results if isinstance(value, LogicalTensor))
        needed = tuple(_needed(self._operators, outputs, mutations))
        tensors = tuple(value if isinstance(value, LogicalTensor) else None for value in self._arguments)
        read = dict.fromkeys(tensor for operator in needed for tensor in operator.inputs)
        first_read = {tensor: number for number, tensor in enumerate(read)}
        inputs = sorted(
            (*(tensor for tensor in tensors if tensor is not None), *self._constants),
            key=lambda tensor: first_read.get(tensor, len(first_read)),
        )
        return Captured(
            OperatorGraph(tuple(inputs), needed, outputs, mutations), tensors, self._constants, tuple(results)
        )

    def _argument(self, index: int, example: Any) -> Any:
        """The tensor that an argument is in the program; a number itself, which the program holds fixed."""
        if not isinstance(example, torch.Tensor):
            return int(example) if isinstance(example, torch.SymInt) else example
        return LogicalTensor(
            self._names.names[index],
            tuple(int(size) for size in example.shape),
            example.dtype,
            self._names.kinds[index],
            example.requires_grad,
        )

    def _read(self, traced: GraphModule, inputs: Sequence[Any]) -> list[Any]:
        """Read a graph of these inputs; returns what its outputs are."""
        self._module = traced
        self._values = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                self._read_constant(node)
            elif node.op == "call_function":
                self._read_call(node)
        (results,) = next(iter(traced.graph.find_nodes(op="output"))).args
        return [self._value_of(value) for value in results]

    def _name(self, name: str) -> str:
        """A name that no other operator has: itself, or with the next number."""
        base = re.sub(r"_\d+$", "", name)
        while name in self._taken:
            self._taken[base] += 1
            name = f"{base}_{self._taken[base]}"
        self._taken[name] += 0
        return name

    def _read_constant(self, node: Node) -> None:
        value = getattr(self._module, str(node.target))
        assert isinstance(value, torch.Tensor), f"{node.target} is no tensor"
        tensor = LogicalTensor(self._name(str(node.target)), tuple(value.shape), value.dtype, "constant")
        self._constants[tensor] = value
        self._values[node] = tensor

    def _read_call(self, node: Node) -> None:
        name = _torch_compat.operator_name(node)
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            self._values[node] = self._values[source][index]
        elif name == "_set_grad_enabled":
            self._grad_enabled = bool(node.args[0])
        elif name in ("_enter_autocast", "_exit_autocast"):
            if name == "_enter_autocast" and node.args[2]:
                raise NotImplementedError(
                    "the compiled function enters torch.autocast, which a plan cannot cut. Cast the model's parameters "
                    "(model.to(torch.bfloat16)) instead."
                )
        elif name in _CHECKS:
            pass
        elif name in _SAME_AS_ITS_INPUT:
            self._values[node] = self._value_of(node.args[0])
        else:
            self._read_operator(node)

    def _read_operator(self, node: Node) -> None:
        inputs: list[LogicalTensor] = []

        def slot(value: Any) -> Any:
            value = self._value_of(value)
            if isinstance(value, LogicalTensor):
                inputs.append(value)
                return Slot(len(inputs) - 1)
            return value

        args, kwargs = pytree.tree_map(slot, (node.args, node.kwargs), is_leaf=lambda value: isinstance(value, Node))
        name = self._name(node.name)
        made = node.meta["val"]
        several = isinstance(made, list | tuple)
        flows = self._grad_enabled and any(tensor.differentiable for tensor in inputs)
        outputs = tuple(
            self._made(f"{name}.{index}" if several else name, value, flows)
            for index, value in enumerate(made if several else [made])
        )
        path = _torch_compat.module_path_of(node)
        module = self._names.module(self._path_of.get(path, path))
        target = node.target
        assert callable(target)
        self._operators.append(Operator(name, target, tuple(args), kwargs, tuple(inputs), outputs, module))
        self._values[node] = outputs if several else outputs[0]

    @staticmethod
    def _made(name: str, value: Any, flows: bool) -> LogicalTensor | None:
        if not isinstance(value, torch.Tensor):
            return None
        floating = value.dtype.is_floating_point or value.dtype.is_complex
        differentiable = flows and floating and not re.match(r"detach", name)
        return LogicalTensor(name, tuple(int(s) for s in value.shape), value.dtype, differentiable=differentiable)

    def _value_of(self, value: Any) -> Any:
        return self._values[value] if isinstance(value, Node) else value


def _needed(
    operators: Sequence[Operator], outputs: Sequence[LogicalTensor], mutations: dict[LogicalTensor, LogicalTensor]
) -> Iterator[Operator]:
    """Those operators that something returned or overwritten depends on, in order."""
    needed = {*outputs, *mutations.values()}
    kept = []
    for candidate in reversed(operators):
        if not needed.isdisjoint(output for output in candidate.outputs if output is not None):
            needed.update(candidate.inputs)
            kept.append(candidate)
    yield from reversed(kept)
