"""A segment's function with its gradients, cut into passes: forward, and backward in one or in two.

The joint graph holds everything. A pass makes what it is asked for, out of what earlier passes made::

    primals  ── forward ──► outputs                   y = x w, z = gelu(y)
                  │ saved: x, y
    tangents ──── dI ─────► gradients of inputs       dy = dz gelu'(y), dx = dy wᵀ
                  │ kept: dy
                  dW ─────► gradients of weights      dw = xᵀ dy

Each product of matrices is in one of them. A view is no value to hand on: a pass that needs one makes it again, so that
what it is a view of can be read anew, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.schedules.job import JobKind

Parts = Mapping[JobKind, Sequence[int]]
"""The inputs whose gradients each backward pass computes, passes in order: B alone, or dI and dW."""


@dataclass(frozen=True, eq=False)
class Pass:
    """A graph from named values to named values; None where there is none, as the gradient of what is not used."""

    graph: fx.GraphModule
    reads: tuple[str, ...]
    makes: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class JointPasses:
    """The passes of a function: ``primals_i`` are its inputs, ``tangents_i`` the gradients of its outputs.

    ``forward`` makes the ``num_outputs`` outputs, then what is saved. The pass of ``backward`` for a part makes the
    gradients that `Parts` names for it, then what is kept for the next part. ``flowing`` are the outputs that have
    tangents; ``saved`` has by part what it reads that was there or made before backward, ``kept`` what dW reads else.
    """

    forward: Pass
    backward: Mapping[JobKind, Pass]
    num_outputs: int
    flowing: tuple[int, ...]
    saved: Mapping[JobKind, tuple[str, ...]]
    kept: tuple[str, ...]


def find_passes(
    function: fx.GraphModule,
    inputs: Sequence[Tensor],
    wants: Sequence[bool],
    parts: Parts,
    settings: Mapping[str, Any],
    *,
    recomputes: bool,
    generates: bool,
) -> JointPasses:
    """Trace a function with its gradients for inputs of these sizes, and cut it.

    If it `recomputes`, forward saves nothing but its inputs, and the first backward pass does its work again. If
    inductor `generates` the code, it chooses what is saved and what cheap work is done again.
    """
    joint, num_outputs, flowing = _torch_compat.trace_joint(function, inputs, wants, generates=generates)
    if len(parts) > 1:
        _split_convolutions(joint)
    if generates and not recomputes:
        ahead, behind = _torch_compat.partition(joint, num_outputs, settings)
        entering = [node for node in behind.graph.find_nodes(op="placeholder") if not _is_tangent(node)]
        made_ahead = dict(zip((node.name for node in entering), _outputs(ahead.graph)[num_outputs:], strict=True))
        _make_views_again(behind, made_ahead)
        early: set[fx.Node] = set()
    else:
        ahead = behind = joint
        made_ahead = {node.name: node for node in joint.graph.nodes}
        early = set() if recomputes else _without_tangents(joint.graph)
    gradients = _outputs(behind.graph)[-len(wants) :]
    backward, kept = _cut_backward(behind, gradients, parts, early)
    saved = {
        part: tuple(name for name in one.reads if not name.startswith("tangents_") and name not in kept)
        for part, one in backward.items()
    }
    outputs = _outputs(ahead.graph)[:num_outputs]
    extra = [name for name in dict.fromkeys(n for names in saved.values() for n in names) if not is_primal(name)]
    forward = _cut(ahead, [*outputs, *(made_ahead[name] for name in extra)], set())
    forward = Pass(forward.graph, forward.reads, (*(None for _ in outputs), *extra))
    return JointPasses(forward, backward, num_outputs, tuple(flowing), saved, kept)


def _make_views_again(behind: fx.GraphModule, made_ahead: Mapping[str, fx.Node | None]) -> None:
    """Have backward make views of the function's inputs out of these: to hand on a view is to hold on to the input."""
    placeholders = behind.graph.find_nodes(op="placeholder")
    primals = {node.name: node for node in placeholders if is_primal(node.name)}
    for entering in placeholders:
        made = made_ahead.get(entering.name)
        views: list[fx.Node] = []
        while made is not None and made.op == "call_function" and _torch_compat.is_view(made):
            views.append(made)
            made = made.all_input_nodes[0]
        if made is None or made.op != "placeholder" or not views:
            continue
        if made.name not in primals:
            with behind.graph.inserting_before(next(iter(behind.graph.nodes))):
                primals[made.name] = behind.graph.placeholder(made.name)
            primals[made.name].meta = dict(made.meta)
        copies = {made: primals[made.name]}
        with behind.graph.inserting_before(placeholders[-1].next):
            for view in reversed(views):
                copies[view] = behind.graph.node_copy(view, copies.__getitem__)
        entering.replace_all_uses_with(copies[views[0]])
        behind.graph.erase_node(entering)


def is_primal(name: str) -> bool:
    """Whether a value is an input of the function."""
    return name.startswith("primals_")


def _cut_backward(
    module: fx.GraphModule, gradients: Sequence[fx.Node | None], parts: Parts, early: set[fx.Node]
) -> tuple[dict[JobKind, Pass], tuple[str, ...]]:
    """The backward passes, and the names of what the second reads that the first had."""
    (first, positions), *others = parts.items()
    wanted = [gradients[index] for index in positions]
    if not others:
        return {first: _cut(module, wanted, early)}, ()
    ((second, later_positions),) = others
    mine = _with_elements(_ancestors(wanted) - early)
    later = _cut(module, [gradients[index] for index in later_positions], early | mine)
    keeps = [node for node in module.graph.nodes if node.name in later.reads and node in mine]
    kept = tuple(name for name in later.reads if name.startswith("tangents_") or name in {n.name for n in keeps})
    return {first: _cut(module, [*wanted, *keeps], early), second: later}, kept


def _cut(module: fx.GraphModule, wanted: Sequence[fx.Node | None], computed: set[fx.Node]) -> Pass:
    """The part of a graph that makes what is wanted, from inputs and from what is computed already."""
    needed: set[fx.Node] = set()
    reads: set[fx.Node] = set()
    ahead = [node for node in wanted if node is not None]
    while ahead:
        node = ahead.pop()
        if node in needed or node in reads:
            continue
        if node.op == "placeholder" or (node in computed and not _torch_compat.is_view(node)):
            reads.add(node)
        else:
            needed.add(node)
            ahead += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    entering = [node for node in module.graph.nodes if node in reads]
    for node in entering:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(None if node is None else copies[node] for node in wanted))
    makes = tuple(None if node is None else node.name for node in wanted)
    return Pass(fx.GraphModule(module, graph), tuple(node.name for node in entering), makes)


def _outputs(graph: fx.Graph) -> list[fx.Node | None]:
    (node,) = graph.find_nodes(op="output")
    return list(node.args[0])


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.name.startswith("tangents_")


def _without_tangents(graph: fx.Graph) -> set[fx.Node]:
    """What can be computed before any gradient is there."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_tangent(node) or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    return {node for node in graph.nodes if node.op == "call_function" and node not in late}


def _ancestors(wanted: Iterable[fx.Node | None]) -> set[fx.Node]:
    """The calls that these need, themselves included."""
    found: set[fx.Node] = set()
    ahead = [node for node in wanted if node is not None]
    while ahead:
        node = ahead.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return found


def _with_elements(nodes: set[fx.Node]) -> set[fx.Node]:
    """These calls, and all elements of what they return: a call of several results is run once."""
    return nodes | {user for node in nodes for user in node.users if user.target is operator.getitem}


def _split_convolutions(module: fx.GraphModule) -> None:
    """Take backward of convolutions apart: one call for the input, one for weight and bias."""
    target = torch.ops.aten.convolution_backward.default
    for node in module.graph.find_nodes(op="call_function", target=target):
        *arguments, mask = node.args
        if not mask[0] or not any(mask[1:]):
            continue
        with module.graph.inserting_before(node):
            for_input = module.graph.call_function(target, (*arguments, [True, False, False]))
            for_weight = module.graph.call_function(target, (*arguments, [False, *mask[1:]]))
        for one in (for_input, for_weight):
            one.meta = dict(node.meta)
        for user in list(node.users):
            user.replace_input_with(node, for_input if user.args[1] == 0 else for_weight)
        module.graph.erase_node(node)
