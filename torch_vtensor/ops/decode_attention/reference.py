"""decode_attention's mathematics."""

from __future__ import annotations

import torch

from torch_vtensor.ops.attention_reference import attention, visible_tokens

__all__ = ["decode_attention"]


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Query i of sequence b, at p = lengths[b] - Q + i, sees max(first[b], p - window + 1) <= j <= p."""
    num_query = query.shape[2]
    positions = lengths[:, None] - num_query + torch.arange(num_query, device=query.device)
    visible = visible_tokens(positions, keys.shape[2], lengths, first, window, causal=True)
    return attention(query, keys, values, visible, scale, sinks, softcap)
