"""Dynamo graph → stretches: what each layer does, so that of equal layers only the first is traced.

A stretch are neighbouring nodes of one numbered module, as a ModuleList has them, or of none. Stretches are alike if
they call the same on tensors of the same layout, wired up in the same way::

    embedding, positions │ layers.0 │ layers.1 │ layers.2 │ norm, head, loss
           traced           traced   as before  as before        traced
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule, Node

from torch_vtensor.compile import _torch_compat

_LAYER = re.compile(r".*?[.\[']\d+(?=['\].]|$)")
_WRITES_ITS_ARGUMENT = re.compile(r"setitem|i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)|.*[^_]_")


@dataclass(frozen=True, eq=False)
class Stretch:
    """Some nodes in order, what they read of the nodes before, and those of them that nodes after them read."""

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    outputs: tuple[Node, ...]
    likeness: Hashable

    @property
    def paths(self) -> tuple[str | None, ...]:
        """The module of each node."""
        return tuple(map(_torch_compat.module_path_of, self.nodes))

    def module(self, root: GraphModule) -> GraphModule:
        """The stretch as a graph of its own: what it reads to what is read of it."""
        graph = fx.Graph()
        copies: dict[Node, Node] = {node: graph.placeholder(node.name) for node in self.reads}
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.outputs))
        return GraphModule(root, graph)


def find_stretches(gm: GraphModule) -> tuple[Stretch, ...] | None:
    """The stretches of a graph; None if none are alike, or something else than tensors lies between them."""
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    values = [_value(node) for node in gm.graph.find_nodes(op="placeholder")]
    if any(not isinstance(value, torch.Tensor) or _is_symbolic(value) for value in values):
        return None
    runs = [(run, _stretch(run)) for run in _runs(nodes)]
    counts = Counter(stretch.likeness for _, stretch in runs if stretch is not None)
    groups: list[list[int]] = []
    last_alone = False
    for number, (_, stretch) in enumerate(runs):
        alone = stretch is None or counts[stretch.likeness] == 1
        if alone and last_alone:
            groups[-1].append(number)
        else:
            groups.append([number])
        last_alone = alone
    stretches = [
        runs[group[0]][1] if len(group) == 1 else _stretch([node for number in group for node in runs[number][0]])
        for group in groups
    ]
    if len(stretches) == len(counts) or None in stretches:
        return None
    return tuple(stretch for stretch in stretches if stretch is not None)


def _runs(nodes: Sequence[Node]) -> list[list[Node]]:
    """Neighbouring nodes of one layer; what is computed without gradients is not torn apart."""
    runs: list[list[Node]] = []
    layer: str | None = None
    grad_enabled = True
    for node in nodes:
        own = _LAYER.match(_torch_compat.module_path_of(node) or "")
        if not runs or (grad_enabled and (own and own[0]) != layer):
            runs.append([])
            layer = own and own[0]
        runs[-1].append(node)
        if _torch_compat.operator_name(node) == "_set_grad_enabled":
            grad_enabled = bool(node.args[0])
    return runs


def _stretch(nodes: Sequence[Node]) -> Stretch | None:
    """None if it reads, or others read of it, something else than tensors, or if it overwrites what it reads."""
    inside = dict.fromkeys(nodes)
    reads = tuple(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in inside))
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    values = [_value(node) for node in (*reads, *outputs)]
    if any(not isinstance(value, torch.Tensor) or _is_symbolic(value) for value in values):
        return None
    if any(_writes(node) and node.args and node.args[0] in reads for node in nodes):
        return None
    number: dict[Node, tuple[str, int]] = {node: ("reads", index) for index, node in enumerate(reads)}
    number.update((node, ("makes", index)) for index, node in enumerate(nodes))
    paths: dict[str | None, int] = {}
    calls = tuple(
        (
            node.op,
            node.target,
            _frozen(node.args, number),
            _frozen(node.kwargs, number),
            paths.setdefault(_torch_compat.module_path_of(node), len(paths)),
        )
        for node in nodes
    )
    likeness: Hashable = calls, tuple(map(_layout, map(_value, reads))), tuple(number[node] for node in outputs)
    try:
        hash(likeness)
    except TypeError:
        likeness = object()
    return Stretch(tuple(nodes), reads, outputs, likeness)


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _is_symbolic(value: torch.Tensor) -> bool:
    return any(not isinstance(size, int) for size in value.shape)


def _layout(value: torch.Tensor) -> Hashable:
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


def _writes(node: Node) -> bool:
    """Whether a call may overwrite its first argument, by its name."""
    name = _torch_compat.operator_name(node)
    return bool(_WRITES_ITS_ARGUMENT.fullmatch(name)) or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _frozen(value: Any, number: Mapping[Node, tuple[str, int]]) -> Hashable:
    """An argument with numbers for nodes, hashable."""
    if isinstance(value, Node):
        return number[value]
    if isinstance(value, Mapping):
        return dict, tuple((key, _frozen(one, number)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(one, number) for one in value)
    if isinstance(value, slice):
        return slice, tuple(_frozen(one, number) for one in (value.start, value.stop, value.step))
    frozen: Hashable = (type(value), value)
    return frozen
