"""Scaled dot product attention: batch, heads, queries and value features are cut; keys are summed by a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_vtensor.compile.rules.builder import Arguments, Rules, interval_of
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Call, Rule
from torch_vtensor.compile.task_graph import Operator, Slot, Task
from torch_vtensor.compile.tensor_view import Interval

aten = torch.ops.aten


@rule_for("scaled_dot_product_attention")
def attention(operator: Operator) -> Rule | None:
    """``b (h g) q e^, b h s^ e^, b h s^ f, b (h g) q s^ -> b (h g) q f``, query heads in groups of ``g`` (GQA)."""
    arguments = Arguments(operator)
    q_shape, k_shape, v_shape = (arguments.shape(name) for name in ("query", "key", "value"))
    made = operator.outputs[0]
    assert made is not None
    if len({len(q_shape), len(k_shape), len(v_shape)}) > 1:
        return None
    rules = Rules(operator)
    if arguments["enable_gqa"]:
        h = rules.plain(k_shape[-3], "h")
        query_heads = (*h, *rules.plain(q_shape[-3] // k_shape[-3], "g"))
        leading = (*rules.all_plain(made.shape[:-3]), query_heads)
        if v_shape[-3] != k_shape[-3]:
            return None
        key_leading = (*rules.broadcast(leading[:-1], k_shape[:-3]), h)
        value_leading = (*rules.broadcast(leading[:-1], v_shape[:-3]), h)
    else:
        batch, heads = made.shape[:-2][:-1], made.shape[:-2][-1:]
        leading = (*rules.all_plain(batch), *(rules.plain(size, "h") for size in heads))
        key_leading, value_leading = (rules.broadcast(leading, shape[:-2]) for shape in (k_shape, v_shape))
    q, s = rules.plain(q_shape[-2], "q"), rules.whole(k_shape[-2], "s")
    e, f = rules.whole(q_shape[-1], "e"), rules.plain(v_shape[-1], "f")
    query, key, value, mask = (arguments.slot(name) for name in ("query", "key", "value", "attn_mask"))
    rules.reads(query, (*rules.broadcast(leading, q_shape[:-2]), q, e))
    rules.reads(key, (*key_leading, s, e))
    rules.reads(value, (*value_leading, s, f))
    if mask is not None:
        rules.reads(mask, rules.broadcast((*leading, q, s), arguments.shape("attn_mask")))
    num_queries = q_shape[-2]
    rest = {name: arguments[name] for name in ("dropout_p", "scale", "enable_gqa")}

    def localize(task: Task) -> Call:
        queries = interval_of(task, q, num_queries)
        if not arguments["is_causal"] or queries == Interval(0, num_queries):
            return Call(operator.target, operator.args, operator.kwargs)
        slots = tuple(Slot(slot) for slot in (query, key, value) if slot is not None)
        return Call(_causal_part, (*slots, queries.start, rest), {})

    linear = [(value,)] if arguments["dropout_p"] == 0 else []
    weights = {name for identifiers in (*leading, q, s) for name in identifiers}
    return rules.rule((*leading, q, f), linear=linear, localize=localize, multiplies=[weights | {*e}, weights | {*f}])


def _causal_part(q_BHQE: Tensor, k_BHSE: Tensor, v_BHSF: Tensor, first_query: int, rest: dict[str, Any]) -> Tensor:
    """Causal attention of queries that are not the first: they see the keys up to their own place, and no later one.

    Legend: B batch, H heads, Q queries of this part, S keys, E and F features.
    """
    num_queries, num_keys = q_BHQE.shape[-2], k_BHSE.shape[-2]
    seen = min(num_keys, first_query + num_queries)
    k_BHSE, v_BHSF = (aten.slice.Tensor(tensor, -2, 0, seen) for tensor in (k_BHSE, v_BHSF))
    if first_query == 0:
        first: Tensor = aten.scaled_dot_product_attention.default(q_BHQE, k_BHSE, v_BHSF, is_causal=True, **rest)
        return first
    places = aten.arange.start(first_query, first_query + num_queries, device=q_BHQE.device)
    keys = aten.arange.default(seen, device=q_BHQE.device)
    mask = aten.le.Tensor(aten.unsqueeze.default(keys, 0), aten.unsqueeze.default(places, 1))
    part: Tensor = aten.scaled_dot_product_attention.default(q_BHQE, k_BHSE, v_BHSF, mask, **rest)
    return part
