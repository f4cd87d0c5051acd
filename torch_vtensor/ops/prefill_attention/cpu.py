"""prefill_attention on the CPU."""

from __future__ import annotations

import torch

from torch_vtensor.ops import attention_cpu
from torch_vtensor.ops.attention_choice import Case, choose

__all__ = ["prefill_attention"]


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    num_new: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> torch.Tensor:
    """See the public function."""
    if implementation is not None:
        choose(Case.of("prefill", query, keys, values, lengths, first=first), implementation)
    scoring = attention_cpu.scoring(query, keys, scale, window, sinks, softcap, causal)
    return attention_cpu.attend(query, keys, values, lengths, num_new, first, scoring)
