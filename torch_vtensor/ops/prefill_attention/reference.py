"""prefill_attention's mathematics."""

from __future__ import annotations

import torch

from torch_vtensor.ops.attention_reference import attention, visible_tokens

__all__ = ["prefill_attention"]


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    num_new: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Row i < num_new[b] of sequence b, at p = lengths[b] - num_new[b] + i, sees tokens j with

    max(first[b], p - window + 1) <= j <= p, or without ``causal`` first[b] <= j < lengths[b]. Other rows see nothing.
    """
    num_rows = query.shape[2]
    row = torch.arange(num_rows, device=query.device)
    counts = torch.full_like(lengths, num_rows) if num_new is None else num_new
    positions = (lengths - counts)[:, None] + row
    visible = visible_tokens(positions, keys.shape[2], lengths, first, window, causal)
    visible = visible & (row < counts[:, None])[:, :, None]
    return attention(query, keys, values, visible, scale, sinks, softcap)
