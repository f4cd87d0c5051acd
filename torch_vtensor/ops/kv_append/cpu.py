"""kv_append on the CPU: slices where sequences agree, one indexed write where they do not."""

from __future__ import annotations

import torch

__all__ = ["kv_append"]

_FEW_TOKENS = 8  # below, one indexed write for all sequences costs less than two calls for each; a long one costs more


def kv_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    num_new: torch.Tensor | None = None,
) -> None:
    """Write the new tokens; see the public function."""
    batch, _, num_tokens, _ = key.shape
    starts = lengths.tolist()
    counts = [num_tokens] * batch if num_new is None else num_new.tolist()
    _check_room(starts, counts, num_tokens, keys.shape[2])
    if len(set(starts)) == 1 and len(set(counts)) == 1:
        start, count = starts[0], counts[0]
        keys[:, :, start : start + count].copy_(key[:, :, :count])
        values[:, :, start : start + count].copy_(value[:, :, :count])
    elif num_new is None and num_tokens < _FEW_TOKENS:
        sequence = torch.arange(batch)[:, None]
        position = lengths[:, None] + torch.arange(num_tokens)
        keys.transpose(1, 2)[sequence, position] = key.transpose(1, 2)
        values.transpose(1, 2)[sequence, position] = value.transpose(1, 2)
    else:
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            keys[b, :, start : start + count].copy_(key[b, :, :count])
            values[b, :, start : start + count].copy_(value[b, :, :count])


def _check_room(starts: list[int], counts: list[int], num_tokens: int, capacity: int) -> None:
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if not 0 <= count <= num_tokens:
            raise ValueError(f"num_new[{b}] is {count}; key and value hold {num_tokens} tokens: pass 0 to {num_tokens}")
        if start < 0 or start + count > capacity:
            raise ValueError(
                f"sequence {b} has {start} tokens and gets {count} more; keys and values have room for {capacity}: "
                "commit more room first. Nothing was written"
            )
