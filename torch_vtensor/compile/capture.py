"""Captured dynamo graph → OperatorGraph: the forward program as functional aten operators, in the user's names."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.names import InputNames
from torch_vtensor.compile.rules import DECOMPOSITIONS, cross_entropy_over_cut_classes
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
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotImplementedError(
                f"the program has a nested region, {node.target}, which no plan cuts. Turn off gradient checkpointing "
                f"(a plan recomputes with op_trans(..., recompute=True)) and control-flow operators in the compiled "
                f"function."
            )
    decompositions = dict(DECOMPOSITIONS)
    if cuts_classes:
        decompositions[torch.ops.aten.cross_entropy_loss.default] = cross_entropy_over_cut_classes
    traced, mutated = _torch_compat.trace_forward(gm, example_inputs, decompositions)
    return _Reader(traced, mutated, example_inputs, names).read()


class _Reader:
    """Reads one traced graph, node by node."""

    def __init__(
        self, traced: GraphModule, mutated: dict[int, int], example_inputs: Sequence[Any], names: InputNames
    ) -> None:
        self._module = traced
        self._mutated = mutated
        self._examples = _torch_compat.leaves(list(example_inputs))
        self._names = names
        # What a node holds: a tensor, or for a node of several outputs the list of them.
        self._values: dict[Node, Any] = {}
        self._inputs: list[LogicalTensor] = []
        self._arguments: list[LogicalTensor | None] = []
        self._constants: dict[LogicalTensor, torch.Tensor] = {}
        self._operators: list[Operator] = []
        self._grad_enabled = True

    def read(self) -> Captured:
        results: tuple[Any, ...] = ()
        mutations: dict[LogicalTensor, LogicalTensor] = {}
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._read_input(node)
            elif node.op == "get_attr":
                self._read_constant(node)
            elif node.op == "call_function":
                self._read_call(node)
            elif node.op == "output":
                values = [self._value_of(value) for value in node.args[0]]
                for position, index in self._mutated.items():
                    overwritten = self._arguments[index]
                    assert overwritten is not None
                    mutations[overwritten] = values[position]
                results = tuple(values[len(self._mutated) :])
        outputs = tuple(value for value in results if isinstance(value, LogicalTensor))
        needed = tuple(_needed(self._operators, outputs, mutations))
        graph = OperatorGraph(tuple(self._inputs), needed, outputs, mutations)
        return Captured(graph, tuple(self._arguments), self._constants, results)

    def _read_input(self, node: Node) -> None:
        index = len(self._arguments)
        example = self._examples[index]
        if not isinstance(example, torch.Tensor):
            self._values[node] = int(example) if isinstance(example, torch.SymInt) else example
            self._arguments.append(None)
            return
        tensor = LogicalTensor(
            self._names.names[index],
            tuple(int(size) for size in example.shape),
            example.dtype,
            self._names.kinds[index],
            example.requires_grad,
        )
        self._values[node] = tensor
        self._inputs.append(tensor)
        self._arguments.append(tensor)

    def _read_constant(self, node: Node) -> None:
        value = getattr(self._module, str(node.target))
        assert isinstance(value, torch.Tensor), f"{node.target} is no tensor"
        tensor = LogicalTensor(str(node.target), tuple(value.shape), value.dtype, "constant")
        self._constants[tensor] = value
        self._values[node] = tensor
        self._inputs.append(tensor)

    def _read_call(self, node: Node) -> None:
        name = _torch_compat.operator_name(node)
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            self._values[node] = self._values[source][index]
        elif node.target is torch._C._set_grad_enabled:
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
        made = node.meta["val"]
        several = isinstance(made, list | tuple)
        flows = self._grad_enabled and any(tensor.differentiable for tensor in inputs)
        outputs = tuple(
            self._made(f"{node.name}.{index}" if several else node.name, value, flows)
            for index, value in enumerate(made if several else [made])
        )
        module = self._names.module(_torch_compat.module_path_of(node))
        target = node.target
        assert callable(target)
        self._operators.append(Operator(node.name, target, tuple(args), kwargs, tuple(inputs), outputs, module))
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
