"""The private torch APIs that the operators use. Checked on torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import torch

__all__ = [
    "cudnn_attention",
    "current_device",
    "current_raw_stream",
    "flash_attention",
    "flash_attention_cpu",
    "is_capturing",
]


def current_device() -> int:
    """The index of the calling thread's CUDA device."""
    index: int = torch._C._cuda_getDevice()
    return index


def current_raw_stream(device_index: int) -> int:
    """The address of the calling thread's stream on a CUDA device."""
    stream: int = torch._C._cuda_getCurrentRawStream(device_index)
    return stream


def is_capturing() -> bool:
    """Whether the calling thread's CUDA stream is being captured into a graph."""
    captures: bool = torch._C._cuda_isCurrentStreamCapturing()
    return captures


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


def flash_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_causal: bool, scale: float
) -> torch.Tensor:
    """The flash kernel of scaled_dot_product_attention on CUDA, whatever backends are allowed or preferred.

    Shapes: query [B, Hq, T, D]; keys, values [B, H, N, D]; ``is_causal`` aligns lower right. Returns [B, Hq, T, D].
    """
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, is_causal, return_debug_mask=False, scale=scale
    )[0]
    return out


def cudnn_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_causal: bool, scale: float
) -> torch.Tensor:
    """The cuDNN kernel of scaled_dot_product_attention, whatever backends are allowed or preferred.

    Shapes: as ``flash_attention``'s, but ``is_causal`` aligns upper left.
    """
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, keys, values, None, False, 0.0, is_causal, return_debug_mask=False, scale=scale
    )[0]
    return out
