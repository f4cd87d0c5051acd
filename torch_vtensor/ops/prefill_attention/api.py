"""The public ``prefill_attention``."""

from __future__ import annotations

import torch

from torch_vtensor.ops.arguments import check_attention, check_per_sequence

__all__ = ["prefill_attention"]


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    num_new: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> torch.Tensor:
    """Attend with many new tokens of every sequence, in keys and values already, over its prefix and themselves.

    Row i < num_new[b] of sequence b is the token at position p = lengths[b] - num_new[b] + i and sees positions
    max(first[b], p - window + 1) to p. Rows that see nothing, and rows from num_new[b] on, give 0.

    Args:
        lengths: tokens of each sequence, the new ones included. Read on the device, at most C. None says on the host
            already that all have C tokens, which more implementations can serve.
        num_new: how many of the T rows are tokens of the sequence; default: all.
        first: first token of each sequence that counts (left padding); default 0.
        scale: of the dot products; default D ** -0.5.
        window: tokens that a row sees at most, itself included.
        sinks: a logit for each query head that takes part in the softmax's sum only.
        softcap: scaled scores s become softcap * tanh(s / softcap).
        causal: False lets every row see all of [first[b], lengths[b]).
        implementation: the one to take, by its name in ``implementations("prefill", ...)``; default: the fastest that
            can do the call.

    Shapes:  query [B, Hq, T, D], Hq a multiple of H; keys [B, H, C, D], values [B, H, C, Dv]; any strides with a
             contiguous last dim; lengths, num_new, first [B], int32 or int64; sinks [Hq]; returns [B, Hq, T, Dv],
             whose memory is [B, T, Hq, Dv].
    Effects: reads no token outside a sequence's visible ones. Never waits for the device. bfloat16, float16 and float32
             are summed in float32, float64 (CPU) in float64. Where the new tokens are all that there is (C = T, no
             num_new), query, keys, values and sinks get gradients.
    Raises:  ValueError, TypeError for arguments that do not fit (lengths outside [0, C], num_new outside [0, T]: on the
             CPU only), or an ``implementation`` that cannot do the call; RuntimeError for a gradient in any other case.
    Source:  online softmax as in FlashAttention (arXiv 2205.14135); rows that do not fill a GPU cut the tokens they see
             into parts, as in Flash-Decoding.
    """
    check_attention(query, keys, values, lengths, first, window, sinks, softcap)
    if num_new is not None:
        check_per_sequence(num_new, "num_new", keys)
    if window is not None and not causal:
        raise ValueError(f"window is {window} with causal=False; a window ends at the row itself: drop one of the two")
    out: torch.Tensor = torch.ops.torch_vtensor.prefill_attention(
        query, keys, values, lengths, num_new, first, scale, window, sinks, softcap, causal, implementation
    )
    return out
