"""decode_attention and prefill_attention on a GPU: the chosen implementation, called.

A result's memory is [B, T, Hq, Dv] whoever made it: what models go on with, and what a compiler was told.
"""

from __future__ import annotations

import torch

from torch_vtensor.ops._torch_compat import cudnn_attention, flash_attention
from torch_vtensor.ops.attention_choice import Case, choose

__all__ = ["decode_attention", "prefill_attention"]


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
    """See the public function."""
    case = Case.of(
        "decode", query, keys, values, lengths, first=first, window=window, sinks=sinks, softcap=softcap,
        split_tokens=split_tokens,
    )  # fmt: skip
    shares = groups is not None and groups.numel() > 0 and window is None and split_tokens is None
    name = choose(case, "triton" if shares and implementation is None else implementation)
    if name != "triton":
        return _run(name, query, keys, values, scale, causal=True)
    from torch_vtensor.ops.decode_attention import prefix_triton
    from torch_vtensor.ops.decode_attention.triton import launch

    lengths = _lengths(keys) if lengths is None else lengths
    if shares and groups is not None and num_shared is not None:
        return prefix_triton.launch(query, keys, values, lengths, groups, num_shared, first, scale, sinks, softcap)
    return launch(query, keys, values, lengths, first, scale, window, sinks, softcap, split_tokens)


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
    case = Case.of(
        "prefill", query, keys, values, lengths, num_new=num_new, first=first, window=window, sinks=sinks,
        softcap=softcap, causal=causal,
    )  # fmt: skip
    name = choose(case, implementation)
    if name not in ("triton", "gluon"):
        return _run(name, query, keys, values, scale, causal)
    lengths = _lengths(keys) if lengths is None else lengths
    if name == "gluon":
        from torch_vtensor.ops.prefill_attention import gluon

        return gluon.launch(query, keys, values, lengths, num_new, first, scale, window, sinks, causal)
    from torch_vtensor.ops.prefill_attention.triton import launch

    return launch(query, keys, values, lengths, num_new, first, scale, window, sinks, softcap, causal)


def _lengths(keys: torch.Tensor) -> torch.Tensor:
    return torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device)


def _run(
    name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, causal: bool
) -> torch.Tensor:
    """Attention of all tokens; causal rows are the last of them."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    causal = causal and query.shape[2] > 1  # the last token sees all
    out: torch.Tensor
    if name == "fa3":
        from flash_attn_interface import flash_attn_func

        rows = (tensor.transpose(1, 2) for tensor in (query, keys, values))
        out = flash_attn_func(*rows, softmax_scale=scale, causal=causal)
        out = (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # some releases add the log-sum-exp
    else:
        out = (cudnn_attention if name == "cudnn" else flash_attention)(query, keys, values, causal, scale)
    if out.transpose(1, 2).is_contiguous():
        return out
    return out.transpose(1, 2).contiguous().transpose(1, 2)
