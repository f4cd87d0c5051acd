"""Gradients of prefill_attention where the new tokens are all that there is: keys and values of exactly the rows.

With P the weights, s the scaled scores and c = softcap * tanh(s / softcap) (or s), for every row:

    dV = Pᵀ dO        dc = P * (dO Vᵀ - delta)        delta = dO · O = sum over j of P_j (dO Vᵀ)_j
    ds = dc * (1 - (c / softcap)²)        dQ = scale ds K        dK = scale dsᵀ Q        dsink = -(1 - sum P) delta

Scores are computed again, some rows at a time, so that no [T, T] matrix is kept. Plain torch, so on every device.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_vtensor.ops.attention_reference import visible_tokens

__all__ = ["backward", "backward_of_call", "empty_sinks_grad", "save_call"]

_SCORE_ELEMENTS = 2**24  # bounds the temporaries: 64 MiB each in float32


def save_call(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what ``backward_of_call`` needs.

    Raises: RuntimeError where the call has a prefix or padding rows, for which no gradient is defined.
    """
    query, keys, values, lengths, num_new, first, scale, window, sinks, softcap, causal, _ = inputs
    if num_new is not None or keys.shape[2] != query.shape[2]:
        raise RuntimeError(
            f"prefill_attention has no gradient with {keys.shape[2]} tokens of room, {query.shape[2]} rows and num_new "
            f"{'absent' if num_new is None else 'given'}: pass keys and values of the rows alone and no num_new, or "
            "call it under torch.no_grad()"
        )
    ctx.save_for_backward(query, keys, values, lengths, first, sinks)
    ctx.options = scale, window, softcap, causal


def backward_of_call(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, keys, values and sinks; None for every other argument."""
    query, keys, values, lengths, first, sinks = ctx.saved_tensors
    scale, window, softcap, causal = ctx.options
    grads = torch.ops.torch_vtensor.prefill_attention_backward(
        grad, query, keys, values, lengths, first, scale, window, sinks, softcap, causal
    )
    grad_sinks = None if sinks is None else grads[3].to(sinks.dtype)
    return *grads[:3], None, None, None, None, None, grad_sinks, None, None, None


def empty_sinks_grad(query: torch.Tensor) -> torch.Tensor:
    """A tensor for the gradient of the sinks: [Hq], in the dtype that sums are in."""
    return query.new_empty(query.shape[1], dtype=_accumulate(query.dtype))


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, keys, values and sinks (zeros without sinks)."""
    batch, query_heads, num_rows, dim = query.shape
    heads, num_tokens, dtype = keys.shape[1], keys.shape[2], _accumulate(query.dtype)
    group = query_heads // heads
    scale = dim**-0.5 if scale is None else scale
    if lengths is None:
        lengths = torch.full((batch,), num_tokens, device=query.device)
    # Tokens that no row sees, and rows that see no token, may hold anything: NaN times 0 would spoil the sums.
    token_N = torch.arange(num_tokens, device=query.device)
    unused_BN = token_N >= lengths[:, None]
    if first is not None:
        unused_BN = unused_BN | (token_N < first[:, None])
    keys_BHND, values_BHND = (rows.to(dtype).masked_fill(unused_BN[:, None, :, None], 0.0) for rows in (keys, values))
    query_BHGTD, grad_BHGTD = query.unflatten(1, (heads, -1)), grad.unflatten(1, (heads, -1))
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_query_BHGTD = grad_query.unflatten(1, (heads, -1))
    grad_keys, grad_values = keys_BHND.new_zeros(keys.shape), values_BHND.new_zeros(values.shape)
    grad_sinks = empty_sinks_grad(query).zero_()
    sink_HG1 = None if sinks is None else sinks.to(dtype).unflatten(0, (heads, -1))[:, :, None]
    rows_at_once = max(1, _SCORE_ELEMENTS // max(1, batch * query_heads * num_tokens))
    for row in range(0, num_rows, rows_at_once):
        end = min(row + rows_at_once, num_rows)
        position_BT = lengths[:, None] - num_rows + torch.arange(row, end, device=query.device)
        visible_BTN = visible_tokens(position_BT, num_tokens, lengths, first, window, causal)
        blind_BT = ~visible_BTN.any(2)
        shape = (group, end - row)
        query_BHRD, grad_BHRD = (
            rows[:, :, :, row:end].to(dtype).masked_fill(blind_BT[:, None, None, :, None], 0.0).flatten(2, 3)
            for rows in (query_BHGTD, grad_BHGTD)
        )

        scores_BHRN = (query_BHRD @ keys_BHND.mT).mul_(scale)
        if softcap is not None:
            scores_BHRN.div_(softcap).tanh_().mul_(softcap)
        scores_BHGTN = scores_BHRN.unflatten(2, shape)
        weights_BHGTN = _weights(scores_BHGTN.masked_fill(~visible_BTN[:, None, None], float("-inf")), sink_HG1)
        weights_BHRN = weights_BHGTN.flatten(2, 3)

        grad_values += weights_BHRN.mT @ grad_BHRD
        grad_weights_BHRN = grad_BHRD @ values_BHND.mT
        delta_BHR1 = (weights_BHRN * grad_weights_BHRN).sum(3, keepdim=True)
        if sinks is not None:
            share_BHR1 = 1 - weights_BHRN.sum(3, keepdim=True)  # delta is 0 where a row sees nothing
            grad_sinks -= (share_BHR1 * delta_BHR1).unflatten(2, shape).sum((0, 3, 4)).flatten()
        grad_scores_BHRN = weights_BHRN * (grad_weights_BHRN - delta_BHR1) * scale
        if softcap is not None:
            grad_scores_BHRN *= 1 - (scores_BHRN / softcap) ** 2
        grad_query_BHGTD[:, :, :, row:end] = (grad_scores_BHRN @ keys_BHND).unflatten(2, shape).to(query.dtype)
        grad_keys += grad_scores_BHRN.mT @ query_BHRD
    return grad_query, grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_sinks


def _weights(scores_BHGTN: torch.Tensor, sink_HG1: torch.Tensor | None) -> torch.Tensor:
    """The softmax over what is visible and the sink; 0 where nothing is."""
    lowest = torch.finfo(scores_BHGTN.dtype).min
    highest = scores_BHGTN.amax(4, keepdim=True).clamp_(min=lowest)
    if sink_HG1 is not None:
        highest = torch.maximum(highest, sink_HG1[..., None])
    weights = (scores_BHGTN - highest).exp_()
    total = weights.sum(4, keepdim=True)
    if sink_HG1 is not None:
        total = total + torch.exp(sink_HG1[..., None] - highest)
    return weights / total.masked_fill(total == 0, 1.0)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
