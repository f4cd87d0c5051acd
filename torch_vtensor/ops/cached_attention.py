"""cached_attention: one step of attention over rows that lie anywhere, new tokens written on the way.

An operator for captured graphs: where keys and values lie and how many there are it reads from device memory, so one
graph serves every cache, and caches grow under it. It changes memory that no tensor of the graph stands for. That is
sound where its own results are the only way to see that memory, as in a decoding step.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_vtensor.ops.attention_choice import Case, are_aligned, choose

if TYPE_CHECKING:
    from torch_vtensor.ops.attention_triton import Rows

__all__ = ["cached_attention"]

_library = torch.library.Library("torch_vtensor", "FRAGMENT")
_library.define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor key_addresses, Tensor value_addresses,"
    " Tensor lengths, Tensor firsts, Tensor? sinks, Tensor partials, Tensor arrivals, int key_offset, int value_offset,"
    " int key_head_stride, int key_token_stride, int value_head_stride, int value_token_stride, float scale,"
    " int? window, float? softcap, Tensor? cos=None, Tensor? sin=None, Tensor? num_new=None, Tensor? groups=None,"
    " Tensor? num_shared=None) -> Tensor"
)

cached_attention = torch.ops.torch_vtensor.cached_attention
"""Write ``key`` and ``value`` behind each sequence's tokens, and attend to all up to them.

Shapes:  query [B, Hq, Q, D]; key [B, H, Q, D], value [B, H, Q, Dv]; addresses [B] int64: of each slot's first token's
    keys and values in the tensors' dtype, 16-byte aligned, offsets and strides in elements; lengths [B] int32: tokens
    before these; firsts [B] int32: the first real token (left padding); sinks [Hq]; partials, arrivals: the workspace,
    which Q = 1 uses; cos, sin [B or 1, Q, D]: a rotary embedding for query and key, whose halves make the pairs;
    num_new [B] int32: how many of the Q are tokens of the sequence, default all; groups [G, K] and num_shared [B]
    int32: as in ``decode_attention``, at most ``lengths``, without a window, looked at where Q = 1; G may be 0. Returns
    [B, Hq, Q, Dv], of which rows from ``num_new`` on mean nothing.
Effects: writes ``num_new`` rows a head; rows from ``lengths`` + ``num_new`` on are neither read nor written.
"""


def _result(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    batch, query_heads, num_query, _ = query.shape
    return query.new_empty(batch, num_query, query_heads, value.shape[3]).transpose(1, 2)


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_addresses: Tensor,
    value_addresses: Tensor,
    lengths: Tensor,
    firsts: Tensor,
    sinks: Tensor | None,
    partials: Tensor,
    arrivals: Tensor,
    key_offset: int,
    value_offset: int,
    key_head_stride: int,
    key_token_stride: int,
    value_head_stride: int,
    value_token_stride: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    num_new: Tensor | None = None,
    groups: Tensor | None = None,
    num_shared: Tensor | None = None,
) -> Tensor:
    from torch_vtensor.ops.attention_triton import Rows
    from torch_vtensor.ops.decode_attention import triton

    rows = Rows(
        (0, key_head_stride, key_token_stride),
        (0, value_head_stride, value_token_stride),
        key_addresses,
        value_addresses,
        key_offset,
        value_offset,
    )
    rotation = None if cos is None or sin is None else (cos, sin)
    is_prompt = query.shape[2] > 1
    shares = groups is not None and len(groups) > 0 and window is None and not is_prompt
    if rotation is not None and (is_prompt or shares):
        query, key, rotation = _rotated(query, *rotation), _rotated(key, *rotation), None
    num_heads, value_dim, new = key.shape[1], value.shape[3], (key, value)
    if is_prompt:
        if choose(_case_of(query, key, value, rows, window, sinks, softcap)) == "gluon":
            from torch_vtensor.ops.kv_append import triton as append
            from torch_vtensor.ops.prefill_attention import gluon

            append.launch_rows(query, query, rows, key, value, lengths, num_new)
            return gluon.launch_rows(
                query, query, query, rows, lengths, num_heads, num_new, firsts, scale, window, sinks, counts_new=True
            )
        from torch_vtensor.ops.prefill_attention import triton as prefill

        return prefill.launch_rows(
            query, query, query, rows, lengths, num_heads, value_dim, num_new, firsts, scale, window, sinks, softcap,
            new=new,
        )  # fmt: skip
    workspace, out = triton.Workspace(partials, arrivals), _result(query, key, value)
    if shares:
        from torch_vtensor.ops.decode_attention import prefix_triton

        assert groups is not None and num_shared is not None
        return prefix_triton.launch_rows(
            query, query, query, rows, lengths, groups, num_shared, num_heads, value_dim, 0, firsts, scale, sinks,
            softcap, new, workspace, out, num_used=1,
        )  # fmt: skip
    return triton.launch_rows(
        query, query, query, rows, lengths, num_heads, value_dim, 0, firsts, scale, window, sinks, softcap, new=new,
        rotation=rotation, workspace=workspace, out=out, early=True,
    )  # fmt: skip


def _case_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Case:
    """A prompt's case; how many tokens are before it only the device knows."""
    itemsize, num_rows = key.dtype.itemsize, query.shape[2]
    is_aligned = are_aligned(itemsize, rows.key_offset, rows.key_strides) and are_aligned(
        itemsize, rows.value_offset, rows.value_strides
    )
    case = Case.of("prefill", query, key, value, window=window, sinks=sinks, softcap=softcap)
    return case._replace(num_tokens=num_rows + 1, has_counts=True, is_aligned=is_aligned)


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_addresses: Tensor,
    value_addresses: Tensor,
    lengths: Tensor,
    firsts: Tensor,
    sinks: Tensor | None,
    partials: Tensor,
    arrivals: Tensor,
    key_offset: int,
    value_offset: int,
    key_head_stride: int,
    key_token_stride: int,
    value_head_stride: int,
    value_token_stride: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    num_new: Tensor | None = None,
    groups: Tensor | None = None,
    num_shared: Tensor | None = None,
) -> Tensor:
    from torch_vtensor.ops.prefill_attention.cpu import prefill_attention

    if cos is not None and sin is not None:
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    counts = [query.shape[2]] * len(lengths) if num_new is None else num_new.tolist()
    out = _result(query, key, value).zero_()
    for slot, (length, first, count) in enumerate(zip(lengths.tolist(), firsts.tolist(), counts, strict=True)):
        stop = length + count
        keys = _rows(key_addresses, slot, key_offset, key[slot], stop, key_head_stride, key_token_stride)
        values = _rows(value_addresses, slot, value_offset, value[slot], stop, value_head_stride, value_token_stride)
        keys[:, length:].copy_(key[slot, :, :count])
        values[:, length:].copy_(value[slot, :, :count])
        stops, starts = torch.tensor([[stop], [first]], device="cpu")
        one = slice(slot, slot + 1)
        out[one, :, :count] = prefill_attention(
            query[one, :, :count], keys[None], values[None], stops, None, starts, scale, window, sinks, softcap
        )
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _rows(addresses: Tensor, slot: int, offset: int, like: Tensor, stop: int, head: int, token: int) -> Tensor:
    """Tokens [0, stop) of one slot, [H, stop, D]."""
    heads, _, dim = like.shape
    num_elements = (heads - 1) * head + (stop - 1) * token + dim
    address = int(addresses[slot]) + offset * like.dtype.itemsize
    memory = (ctypes.c_byte * (num_elements * like.dtype.itemsize)).from_address(address)
    flat = torch.frombuffer(memory, dtype=like.dtype)
    return flat.as_strided((heads, stop, dim), (head, token, 1))


_library.impl("cached_attention", _result, "Meta")
_library.impl("cached_attention", _cuda, "CUDA")
_library.impl("cached_attention", _cpu, "CPU")
