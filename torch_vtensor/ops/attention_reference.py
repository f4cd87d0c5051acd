"""The attention operators' mathematics, with every score in memory and in the dtype of the arguments."""

from __future__ import annotations

import torch

__all__ = ["attention", "visible_tokens"]


def visible_tokens(
    positions: torch.Tensor,
    capacity: int,
    lengths: torch.Tensor,
    first: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """Which tokens [B, T, C] the queries at ``positions`` [B, T] see."""
    token = torch.arange(capacity, device=positions.device)
    position = positions[:, :, None]
    visible = (token < lengths[:, None, None]).expand(-1, positions.shape[1], -1)
    if first is not None:
        visible = visible & (token >= first[:, None, None])
    if causal:
        visible = visible & (token <= position)
    if window is not None:
        visible = visible & (token > position - window)
    return visible


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """out[b, h, t] = sum over visible j of w_j * values[b, g, j], and 0 where nothing is visible, with

    w_j = exp(s_j) / (exp(sinks[h]) + sum over visible i of exp(s_i)), s_j = scale * query[b, h, t] · keys[b, g, j]
    (capped: softcap * tanh(s_j / softcap)) and g = h // (Hq // H).
    """
    group = query.shape[1] // keys.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    # What is not visible may be anything, NaN too, and 0 * NaN is not 0.
    seen = visible.any(1)[:, None, :, None]
    keys, values = (torch.where(seen, rows, 0.0).repeat_interleave(group, dim=1) for rows in (keys, values))
    scores = scale * (query @ keys.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    sink = scores.new_full(query.shape[1:2], float("-inf")) if sinks is None else sinks.to(scores.dtype)
    with_sink = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    weights = torch.softmax(with_sink, dim=3)[..., :-1]
    return torch.where(visible.any(2)[:, None, :, None], weights, 0.0) @ values
