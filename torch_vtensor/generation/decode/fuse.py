"""What surrounds the matrix products of a traced step, moved into them: five operators a transformer block.

A step of a few rows reads gigabytes of weights and next to nothing else, so everything between two matrix products is a
launch and a wait for what costs nothing inside the one or the other:

    norm, q, k, v              -> skinny_linear        rotary embedding, append, attention -> cached_attention
    output, residual           -> skinny_linear        norm, gate, up, silu, product       -> skinny_gated_linear
    down, residual             -> skinny_linear

Of several rows a norm is part of the sum before it, not of the products after it (skinny_linear_normed). Everything is
matched by what it computes. What is written another way stays as it is, and inductor compiles it.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Graph, GraphModule, Node

from torch_vtensor.ops.cached_attention import cached_attention
from torch_vtensor.ops.skinny_linear import (
    MAX_WEIGHTS,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_normed,
    takes,
)

__all__ = ["fuse"]


def fuse(graph_module: GraphModule) -> None:
    """Rewrite the graph of a step in place. One that changes tensors in place stays as it is: order matters there."""
    graph = graph_module.graph
    if any(_changes_in_place(node) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (cached_attention, cached_attention.default):
            _take_in_rotation(graph, node)
    for node in list(graph.nodes):
        _merge_gate(graph, node)
    of_input: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_linear(node):
            of_input[node.args[0]].append(node)
    for x, linears in of_input.items():
        for start in range(0, len(linears), MAX_WEIGHTS):
            _merge_linears(graph, x, linears[start : start + MAX_WEIGHTS])
    for node in list(graph.nodes):
        if _calls(node, skinny_linear.default):
            _norm_sum(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


_ASSIGNMENTS = {
    getattr(operator, name)
    for name in (
        "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
        "itruediv", "ixor", "setitem",
    )
}  # fmt: skip


class _Norm(NamedTuple):
    x: Node
    weight: Node
    eps: float


def _merge_linears(graph: Graph, x: Node, linears: list[Node]) -> None:
    """Linear layers of the same input as one `skinny_linear`, with the norm before and the sum behind."""
    weights = [node.args[1] for node in linears]
    biases = [_argument(node, 2, "bias") for node in linears]
    norm, residual, last = _norm(x), None, linears[0]
    if len(linears) == 1 and (found := _residual(linears[0])) is not None:
        residual, last = found
    source, norm_weight, eps = norm or (x, None, 0.0)
    # Right before the first that uses a result, where all inputs exist: between linears of one input nothing uses one.
    with graph.inserting_before(last):
        merged = graph.call_function(skinny_linear.default, (source, weights, biases, norm_weight, eps, residual))
        for index, node in enumerate([last] if residual is not None else linears):
            item = graph.call_function(operator.getitem, (merged, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)


def _norm_sum(graph: Graph, node: Node) -> None:
    """The sum of several rows whose norm is the input of products, as a `skinny_linear_normed`: normed only once."""
    x, weights, biases, norm, _, residual = cast("tuple[Any, ...]", node.args)
    if residual is None or norm is not None or _is_one_row(_value(x)):
        return
    (total,) = node.users
    norms = {user: user.args[3:5] for user in total.users if _norms(user, total)}
    if len(set(norms.values())) != 1:
        return
    with graph.inserting_before(node):
        arguments = x, weights[0], biases[0], residual, *next(iter(norms.values()))
        merged = graph.call_function(skinny_linear_normed.default, arguments)
        plain, normed = (graph.call_function(operator.getitem, (merged, index)) for index in range(2))
    plain.meta, normed.meta = dict(total.meta), dict(total.meta)
    for user in norms:
        user.args = (normed, *user.args[1:3], None, 0.0, *user.args[5:])
    total.replace_all_uses_with(plain)
    graph.erase_node(total)
    graph.erase_node(node)


def _is_one_row(x: torch.Tensor) -> bool:
    num_rows = x.numel() // x.shape[-1]
    return not isinstance(num_rows, torch.SymInt) and num_rows == 1


def _norms(node: Node, x: Node) -> bool:
    """Whether the node is products of x's norm, by a weight that the graph is given."""
    is_product = _calls(node, skinny_linear.default) or _calls(node, skinny_gated_linear.default)
    return is_product and node.args[0] is x and isinstance(norm := node.args[3], Node) and _is_given(norm)


def _merge_gate(graph: Graph, node: Node) -> None:
    """``silu(linear) * linear`` of the same input as one `skinny_gated_linear`."""
    factors = _binary(node, operator.mul)
    if factors is None:
        return
    for activated, up in (factors, factors[::-1]):
        gate = activated.args[0] if _calls(activated, torch.nn.functional.silu) else None
        if gate is None or not (_is_linear(gate) and _is_linear(up)) or gate.args[0] is not up.args[0]:
            continue
        same = _value(gate).shape == _value(up).shape and _argument(gate, 2, "bias") is _argument(up, 2, "bias") is None
        if not same or len(gate.users) > 1 or len(up.users) > 1:
            continue
        x, norm_weight, eps = _norm(gate.args[0]) or (gate.args[0], None, 0.0)
        with graph.inserting_before(node):
            merged = graph.call_function(skinny_gated_linear.default, (x, gate.args[1], up.args[1], norm_weight, eps))
        merged.meta = dict(node.meta)
        node.replace_all_uses_with(merged)
        graph.erase_node(node)
        for leftover in (activated, gate, up):
            if not leftover.users:
                graph.erase_node(leftover)
        return


def _take_in_rotation(graph: Graph, node: Node) -> None:
    """The rotary embedding of query and key, if both have the same, moves into the attention."""
    query, key = _rotation(node.args[0]), _rotation(node.args[1])
    if query is None or key is None or query[1:] != key[1:]:
        return
    with graph.inserting_before(node):
        arguments = query[0], key[0], *node.args[2:], query[1], query[2]
        merged = graph.call_function(cached_attention.default, arguments, dict(node.kwargs))
    merged.meta = dict(node.meta)
    node.replace_all_uses_with(merged)
    graph.erase_node(node)


def _rotation(node: Any) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) if the node is ``x * cos + cat(-x2, x1) * sin``; cos and sin [B, Q, D], unsqueezed for heads."""
    sides = _binary(node, operator.add)
    if sides is None:
        return None
    straight, turned = (_binary(side, operator.mul) for side in sides)
    if straight is None or turned is None:
        return None
    (x, cos), (halves, sin) = straight, turned
    cos, sin = _unsqueezed(cos), _unsqueezed(sin)
    if cos is None or sin is None or not _calls(halves, torch.cat):
        return None
    parts = halves.args[0]
    if len(parts) != 2 or not _calls(parts[0], operator.neg) or _argument(halves, 1, "dim") != -1:
        return None
    second, first = parts[0].args[0], parts[1]
    half = _value(x).shape[-1] // 2
    if not (_calls(first, operator.getitem) and _calls(second, operator.getitem)):
        return None
    is_half = first.args == (x, (Ellipsis, slice(None, half, None))) and second.args == (
        x,
        (Ellipsis, slice(half, None, None)),
    )
    fits = _value(cos).shape[-1] == 2 * half and _value(x).dtype is _value(cos).dtype is _value(sin).dtype
    return (x, cos, sin) if is_half and fits else None


def _unsqueezed(node: Any) -> Node | None:
    is_it = isinstance(node, Node) and node.op == "call_method" and node.target == "unsqueeze" and node.args[1] == 1
    return node.args[0] if is_it and _value(node).dim() == 4 else None


def _norm(node: Any) -> _Norm | None:
    """The RMS norm that the node is the result of: ``weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)``."""
    outer = _binary(node, operator.mul)
    if outer is None:
        return None
    weight, normed = outer
    normed = _converted(normed)
    product = _binary(normed, operator.mul) if normed is not None else None
    if product is None:
        return None
    wide, root = product
    total = _binary(root.args[0], operator.add) if _calls(root, torch.rsqrt) else None
    if total is None:
        return None
    mean, eps = total
    if not _calls_method(mean, "mean") or mean.args[1] not in (-1, [-1], (-1,)) or not mean.kwargs.get("keepdim"):
        return None
    power = mean.args[0]
    if not _calls_method(power, "pow") or power.args != (wide, 2):
        return None
    x = _converted(wide)
    is_plain = x is not None and _value(weight).shape == _value(x).shape[-1:] and _value(x).dtype is _value(node).dtype
    is_plain = is_plain and _value(wide).dtype is torch.float32
    return _Norm(x, weight, float(eps)) if is_plain and isinstance(eps, float) else None


def _residual(linear: Node) -> tuple[Node, Node] | None:
    """(other, sum) if the linear layer's only use is a sum with something of its shape."""
    users = list(linear.users)
    sides = _binary(users[0], operator.add) if len(users) == 1 else None
    if sides is None:
        return None
    other = sides[0] if sides[1] is linear else sides[1]
    if not isinstance(other, Node) or other is linear or _value(other).shape != _value(linear).shape:
        return None
    return (other, users[0]) if _value(other).dtype is _value(linear).dtype else None


def _is_linear(node: Any) -> bool:
    """Whether the node is a linear layer that `skinny_linear` takes."""
    if not _calls(node, torch._C._nn.linear):
        return False
    others = *node.args[1:], *node.kwargs.values()
    if len(node.args) < 2 or any(isinstance(of, Node) and not _is_given(of) for of in others):
        return False
    return takes(_value(node.args[0]), _value(node.args[1]))


def _is_given(node: Node) -> bool:
    """Whether it is there from the start: what is made on the way may come after where a product goes."""
    return node.op in ("placeholder", "get_attr")


def _changes_in_place(node: Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    is_operator = getattr(operator, name, None) is node.target  # and_, not_, ... change nothing
    is_named_so = node.target in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__") and not is_operator)
    return node.op == "call_function" and (is_named_so or "out" in node.kwargs or node.kwargs.get("inplace") is True)


def _binary(node: Any, function: Callable[..., Any]) -> tuple[Any, Any] | None:
    return (node.args[0], node.args[1]) if _calls(node, function) and len(node.args) == 2 else None


def _converted(node: Any) -> Any:
    """What was converted to another dtype."""
    return node.args[0] if _calls_method(node, "to") else None


def _calls(node: Any, function: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is function


def _calls_method(node: Any, name: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target == name


def _argument(node: Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _value(node: Any) -> Any:
    return node.meta["example_value"]
