"""The private torch APIs that the operators use. Checked on torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import torch

__all__ = ["flash_attention_cpu"]


def flash_attention_cpu(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What scaled_dot_product_attention runs on a CPU, and each row's log-sum-exp, which the public function drops.

    Shapes: query [B, H, T, D]; keys, values [B, H, N, D], any strides with a contiguous last dim, 0 too; mask [T, N],
            added to the scores, in the query's dtype; ``is_causal`` aligns upper left. Returns [B, H, T, D] and
            [B, H, T] in float32 (float64 for float64).
    """
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, logsumexp
