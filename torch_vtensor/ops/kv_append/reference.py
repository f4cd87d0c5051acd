"""kv_append token by token, as its definition reads."""

from __future__ import annotations

import torch

__all__ = ["kv_append"]


def kv_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    num_new: torch.Tensor | None = None,
) -> None:
    """keys[b, :, lengths[b] + t] = key[b, :, t] and values likewise, for every b and every t < num_new[b]."""
    batch, _, num_tokens, _ = key.shape
    for b in range(batch):
        for t in range(num_tokens if num_new is None else int(num_new[b])):
            keys[b, :, int(lengths[b]) + t] = key[b, :, t]
            values[b, :, int(lengths[b]) + t] = value[b, :, t]
