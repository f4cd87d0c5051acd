"""decode_attention on the CPU."""

from __future__ import annotations

import torch

from torch_vtensor.ops import attention_cpu
from torch_vtensor.ops.attention_choice import Case, choose

__all__ = ["decode_attention"]


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
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
    """See the public function.

    ``split_tokens`` gives each sequence calls of its own, whatever its batch; ``groups`` change nothing.
    """
    if implementation is not None:
        choose(Case.of("decode", query, keys, values, lengths, first=first), implementation)
    scoring = attention_cpu.scoring(query, keys, scale, window, sinks, softcap)
    return attention_cpu.attend(query, keys, values, lengths, None, first, scoring, split_tokens is not None)
