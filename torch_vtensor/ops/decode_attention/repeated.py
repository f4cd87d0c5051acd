"""decode_attention for the layers of one step: what their calls have in common is decided by the first of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torch_vtensor.ops.arguments import check_attention, check_no_gradient
from torch_vtensor.ops.decode_attention.cpu import decode_attention as decode_attention_cpu

__all__ = ["Again", "start"]

Again = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""``decode_attention(query, keys, values)`` with everything else as it was in the first call, for tensors of the same
shapes and dtypes: returns [B, Q, Hq, Dv], or None, with nothing done, where it has to be called as it was first."""


def start(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, Again | None]:
    """``decode_attention`` by our kernels, outside of torch's dispatcher; and how to do the like again, or None.

    Shapes:  as ``decode_attention``'s, but returns [B, Q, Hq, Dv].
    Effects: on a GPU ``again`` takes a fraction of the host's time: one launch, and no memory but for its result.
    Raises:  as ``decode_attention``.
    """
    check_attention(query, keys, values, lengths, first, window, None, softcap)
    check_no_gradient("decode_attention", "call it under torch.no_grad()", query, keys, values)
    if query.device.type == "cuda":
        from torch_vtensor.ops.decode_attention import triton

        if lengths is None:
            lengths = torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device)
        return triton.start(query, keys, values, lengths, first, scale, window, softcap)

    def again(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        return decode_attention_cpu(query, keys, values, lengths, first, scale, window, None, softcap).transpose(1, 2)

    result = again(query, keys, values)
    assert result is not None
    return result, again
