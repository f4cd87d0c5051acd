"""prefill_attention on a GPU: a block of query rows a program, the last rows of the longest sequences first.

Few new tokens over long prefixes do not fill a device with blocks of rows; then the prefixes are cut as well, by
decode_attention's kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torch_vtensor.ops.attention_triton import Rows, attend, finish, slot_pointer
from torch_vtensor.ops.decode_attention import triton as decode
from torch_vtensor.ops.kv_append import triton as append

__all__ = ["launch", "launch_rows"]

_LOG2E = 1.4426950408889634
_MAX_SPLIT_TOKENS = 128


@triton.jit
def _prefill(
    query,
    keys,
    values,
    key_addresses,
    value_addresses,
    lengths,
    num_new,
    firsts,
    sinks,
    out,
    num_query,
    scale_log2,
    softcap,
    window,
    query_slot_stride,
    query_head_stride,
    query_token_stride,
    out_slot_stride,
    out_head_stride,
    out_token_stride,
    key_offset,
    value_offset,
    key_slot_stride,
    key_head_stride,
    key_token_stride,
    value_slot_stride,
    value_head_stride,
    value_token_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_ADDRESSES: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NUM_NEW: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the last rows see most
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + slot).to(tl.int32)
    num_tokens = num_query
    if HAS_NUM_NEW:
        num_tokens = tl.load(num_new + slot).to(tl.int32)
    if HAS_NEW:
        length += num_tokens
    slot_first = 0
    if HAS_FIRSTS:
        slot_first = tl.load(firsts + slot).to(tl.int32)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_query = rows // GROUP
    query_head = head * GROUP + rows % GROUP
    is_output = row_query < num_query
    row_ok = row_query < num_tokens
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    # Rows stand in the order of their positions, so the first and the last row bound what all and what any of them see.
    earliest = block * BLOCK_M // GROUP
    latest = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_tokens - 1)
    before = length - num_tokens  # tokens of the prefix
    row_last = before + row_query
    all_last = before + earliest
    any_last = before + latest
    if not CAUSAL:
        row_last = tl.zeros([BLOCK_M], tl.int32) + length - 1
        all_last = length - 1
        any_last = length - 1
    row_first = tl.zeros([BLOCK_M], tl.int32) + slot_first
    start = slot_first
    all_first = slot_first
    if HAS_WINDOW:
        row_first = tl.maximum(row_first, before + row_query - window + 1)
        start = tl.maximum(start, before + earliest - window + 1)
        all_first = tl.maximum(slot_first, before + latest - window + 1)
    stop = any_last + 1
    if earliest >= num_tokens:
        stop = start

    # [start, left) some rows do not see yet, [left, right) all see, [right, stop) some do not see any more
    left = tl.minimum(start + tl.cdiv(all_first - start, BLOCK_T) * BLOCK_T, stop)
    right = left + tl.maximum(tl.minimum(all_last + 1, stop) - left, 0) // BLOCK_T * BLOCK_T

    q = tl.load(
        query
        + slot * query_slot_stride
        + (query_head * query_head_stride + row_query * query_token_stride)[:, None]
        + d[None, :],
        mask=row_ok[:, None] & (d[None, :] < D),
        other=0.0,
    )
    key_rows = slot_pointer(keys, key_addresses, slot, key_slot_stride, key_offset, HAS_ADDRESSES)
    value_rows = slot_pointer(values, value_addresses, slot, value_slot_stride, value_offset, HAS_ADDRESSES)
    key_rows += head * key_head_stride
    value_rows += head * value_head_stride
    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if HAS_WINDOW:
        highest, total, acc = attend(
            q, key_rows, value_rows, start, left, row_first, row_last, key_token_stride, value_token_stride,
            scale_log2, softcap, highest, total, acc,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, STAGES, True, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    highest, total, acc = attend(
        q, key_rows, value_rows, left, right, row_first, row_last, key_token_stride, value_token_stride,
        scale_log2, softcap, highest, total, acc,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, STAGES, False, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    highest, total, acc = attend(
        q, key_rows, value_rows, right, stop, row_first, row_last, key_token_stride, value_token_stride,
        scale_log2, softcap, highest, total, acc,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, STAGES, True, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    result = finish(highest, total, acc, sinks + query_head, row_ok, HAS_SINKS)
    pointers = out + slot * out_slot_stride + query_head * out_head_stride + row_query * out_token_stride
    tl.store(
        pointers[:, None] + dv[None, :],
        tl.where(row_ok[:, None], result, 0.0).to(out.dtype.element_ty),
        mask=is_output[:, None] & (dv[None, :] < DV),
    )


def launch(
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
    """``prefill_attention`` on tensors."""
    rows = Rows.of(keys, values)
    return launch_rows(
        query, keys, values, rows, lengths, keys.shape[1], values.shape[3], num_new, first, scale, window, sinks,
        softcap, causal,
    )  # fmt: skip


def launch_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    lengths: torch.Tensor,
    num_heads: int,
    value_dim: int,
    num_new: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``prefill_attention`` on rows that lie anywhere.

    Args:
        keys, values: tensors whose strides ``rows`` gives; only their dtype matters where it has addresses.
        num_new: [B], how many of the T rows are tokens; default: all. The others' outputs are 0, or, with ``new``,
            unspecified.
        new: keys [B, H, T, D] and values [B, H, T, Dv] of the query's tokens, which are written to their rows first;
            ``lengths`` are then those before them.
    """
    batch, query_heads, num_query, dim = query.shape
    group = query_heads // num_heads
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    block_m, block_t, num_warps, num_stages = _config(query.dtype, max(block_d, block_dv))
    num_blocks = triton.cdiv(num_query * group, block_m)
    out = query.new_empty(batch, num_query, query_heads, value_dim).transpose(1, 2)
    if causal and (num_new is None or new is not None) and num_query <= _MAX_SPLIT_TOKENS:
        num_programs = batch * num_heads * num_blocks
        if num_programs < torch.cuda.get_device_properties(query.device).multi_processor_count:
            if new is not None and first is not None:  # that kernel writes only what its rows see
                append.launch_rows(keys, values, rows, *new, lengths, num_new)
            return decode.launch_rows(
                query, keys, values, rows, lengths, num_heads, value_dim, 0, first, scale, window, sinks, softcap,
                new=new, num_new=num_new, out=out,
            )  # fmt: skip
    if out.numel() == 0:
        return out
    if new is not None:
        append.launch_rows(keys, values, rows, *new, lengths, num_new)
    _prefill[(num_blocks, num_heads, batch)](
        query,
        keys,
        values,
        lengths if rows.key_addresses is None else rows.key_addresses,
        lengths if rows.value_addresses is None else rows.value_addresses,
        lengths,
        lengths if num_new is None else num_new,
        lengths if first is None else first,
        lengths if sinks is None else sinks,
        out,
        num_query,
        (dim**-0.5 if scale is None else scale) * _LOG2E,
        0.0 if softcap is None else softcap * _LOG2E,
        window or 0,
        *query.stride()[:3],
        *out.stride()[:3],
        rows.key_offset,
        rows.value_offset,
        *rows.key_strides,
        *rows.value_strides,
        GROUP=group,
        D=dim,
        DV=value_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
        STAGES=num_stages,
        CAUSAL=causal,
        HAS_ADDRESSES=rows.key_addresses is not None,
        HAS_NEW=new is not None,
        HAS_NUM_NEW=num_new is not None,
        HAS_FIRSTS=first is not None,
        HAS_SINKS=sinks is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        num_warps=num_warps,
    )
    return out


def _config(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Rows and tokens a block, warps and pipeline stages: what shared memory and registers hold."""
    row_bytes = block_d * dtype.itemsize
    if dtype is torch.float32:
        return (32, 32, 4, 2) if row_bytes <= 512 else (16, 16, 4, 1)
    if row_bytes <= 256:
        return 128, 64, 8 if row_bytes > 128 else 4, 3
    return (64, 32, 4, 2) if row_bytes <= 512 else (32, 16, 4, 2)
