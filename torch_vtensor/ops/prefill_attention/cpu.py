"""prefill_attention on the CPU."""

from __future__ import annotations

import torch

from torch_vtensor.ops import attention_cpu

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
    """See the public function."""
    scoring = attention_cpu.scoring(query, keys, scale, window, sinks, softcap, causal)
    return attention_cpu.attend(query, keys, values, lengths, num_new, first, scoring)
