"""The public ``decode_attention``."""

from __future__ import annotations

import torch

from torch_vtensor.ops.arguments import check_attention, check_no_gradient, check_per_sequence

__all__ = ["decode_attention"]


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    split_tokens: int | None = None,
    implementation: str | None = None,
    groups: torch.Tensor | None = None,
    num_shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last Q tokens of every sequence, which are in keys and values already, over all of its tokens.

    Query i of sequence b is the token at position p = lengths[b] - Q + i and sees positions
    max(first[b], p - window + 1) to p. One that sees nothing (a sequence of length 0) gives 0.

    Args:
        lengths: tokens of each sequence, the Q new ones included. Read on the device, at most C. None says on the host
            already that all have C tokens, which more implementations can serve.
        first: first token of each sequence that counts (left padding); default 0.
        scale: of the dot products; default D ** -0.5.
        window: tokens that a query sees at most, itself included.
        sinks: a logit for each query head that takes part in the softmax's sum only.
        softcap: scaled scores s become softcap * tanh(s / softcap).
        split_tokens: work on parts of this many tokens, so that a sequence's result does not depend on the others in
            the batch; default: parts chosen for speed.
        implementation: the one to take, by its name in ``implementations("decode", ...)``; default: the fastest that
            can do the call.
        groups: slots whose first tokens are the same, a group a row, -1 behind its last; no slot is in two. Our kernels
            then read these tokens once, from the group's first slot, where there is no window and no ``split_tokens``.
        num_shared: for each slot how many; the same for a whole group, as ``first`` is, 0 outside of groups, at most
            lengths - Q.

    Shapes:  query [B, Hq, Q, D], Hq a multiple of H, Q small (``prefill_attention`` is made for many); keys
             [B, H, C, D], values [B, H, C, Dv]; any strides with a contiguous last dim; lengths, first [B], int32 or
             int64; sinks [Hq]; groups [G, K] and num_shared [B], int32; returns [B, Hq, Q, Dv], whose memory is
             [B, Q, Hq, Dv].
    Effects: reads no token outside a sequence's visible ones. Never waits for the device. bfloat16, float16 and float32
             are summed in float32, float64 (CPU) in float64.
    Raises:  ValueError, TypeError for arguments that do not fit (lengths outside [0, C]: on the CPU only), and for an
             ``implementation`` that cannot do the call; RuntimeError if a gradient is asked for.
    Source:  split softmax as in Flash-Decoding and online softmax as in FlashAttention (arXiv 2205.14135).
    """
    check_attention(query, keys, values, lengths, first, window, sinks, softcap)
    if split_tokens is not None and split_tokens < 1:
        raise ValueError(f"split_tokens is {split_tokens}; it must be at least 1, or None to have it chosen")
    if (groups is None) != (num_shared is None):
        raise ValueError("groups and num_shared belong together: give both, or neither")
    if groups is not None and num_shared is not None:
        check_per_sequence(num_shared, "num_shared", keys)
        if groups.dim() != 2 or groups.dtype is not torch.int32 or groups.device != keys.device:
            raise ValueError(
                f"groups have shape {list(groups.shape)}, {groups.dtype} on {groups.device}; they must be [G, K] slots "
                f"in torch.int32 on {keys.device}"
            )
    check_no_gradient(
        "decode_attention", "call it under torch.no_grad(), or train with prefill_attention", query, keys, values, sinks
    )
    out: torch.Tensor = torch.ops.torch_vtensor.decode_attention(
        query,
        keys,
        values,
        lengths,
        first,
        scale,
        window,
        sinks,
        softcap,
        split_tokens,
        implementation,
        groups,
        num_shared,
    )
    return out
