"""The public ``kv_append``."""

from __future__ import annotations

import torch

from torch_vtensor.ops.arguments import check_cache, check_no_gradient, check_per_sequence

__all__ = ["kv_append"]


def kv_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    *,
    num_new: torch.Tensor | None = None,
) -> None:
    """Write new tokens behind every sequence's last one: ``key[b, :, t]`` to ``keys[b, :, lengths[b] + t]``.

    Args:
        lengths: tokens of each sequence before the append. Not changed: add the new tokens yourself, when all layers
            have written theirs.
        num_new: how many of the T tokens of each sequence to write; default: all.

    Shapes:  keys [B, H, C, D], values [B, H, C, Dv], any strides with a contiguous last dim; key [B, H, T, D],
             value [B, H, T, Dv]; lengths, num_new [B], int32 or int64.
    Effects: writes keys and values in place, nothing else of them. Reads lengths on the device: no wait for it.
    Raises:  ValueError, TypeError for arguments that do not fit; RuntimeError if a gradient is asked for. A sequence
             that has no room for its tokens is a ValueError on the CPU, with nothing written; on CUDA, where the host
             does not know the lengths, tokens past C are dropped.
    """
    check_cache(keys, values)
    batch, heads, _, dim = keys.shape
    value_dim = values.shape[3]
    num_tokens = key.shape[2] if key.dim() == 4 else 0
    if key.shape != (batch, heads, num_tokens, dim) or value.shape != (batch, heads, num_tokens, value_dim):
        raise ValueError(
            f"key has shape {list(key.shape)} and value {list(value.shape)}; for these keys and values they must be "
            f"[{batch}, {heads}, T, {dim}] and [{batch}, {heads}, T, {value_dim}]"
        )
    for new, name in ((key, "key"), (value, "value")):
        if new.dtype != keys.dtype or new.device != keys.device:
            raise TypeError(
                f"{name} is {new.dtype} on {new.device}; keys and values are {keys.dtype} on {keys.device}: convert it"
            )
    check_per_sequence(lengths, "lengths", keys)
    if num_new is not None:
        check_per_sequence(num_new, "num_new", keys)
    check_no_gradient("kv_append", "call it under torch.no_grad() or detach key and value", keys, values, key, value)
    torch.ops.torch_vtensor.kv_append(keys, values, key, value, lengths, num_new)
