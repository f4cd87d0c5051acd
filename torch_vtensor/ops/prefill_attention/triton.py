"""prefill_attention on a GPU: a block of query rows a program, the last rows first.

The rows of all query heads of a key/value head stand in one block, so their keys and values are read once. Where the
blocks of all heads and sequences do not fill the device's multiprocessors, as with few new tokens over long prefixes,
the tokens that a block sees are cut into parts of a program each, which parts_triton shares out and merges. The host
chooses how many programs there are, by the shapes alone, so a captured graph stays right while lengths grow: as many as
run at once, if that gives four to a block or more, else twice as many. The lengths, read on the device, decide how many
parts a block has; a block that sees few tokens stays whole.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from torch_vtensor.ops.attention_triton import Rows, attend, can_begin_early, finish, keep_part, slot_pointer
from torch_vtensor.ops.kv_append import triton as append
from torch_vtensor.ops.prefill_attention.parts_triton import merge, seen, share_out

__all__ = ["launch", "launch_rows"]

_LOG2E = 1.4426950408889634
_ROWS_MERGED = 4


@triton.jit(do_not_specialize=["num_slots", "num_query", "num_blocks", "window", "num_at_once", "num_programs"])
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
    partials,
    num_slots,
    num_query,
    num_blocks,
    window,
    num_at_once,
    num_programs,
    scale_log2,
    softcap,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_ADDRESSES: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NUM_NEW: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    if HAS_PARTS:
        parts, ends = share_out(
            lengths, num_new, firsts, num_slots, num_query, num_blocks, window, num_at_once, num_programs,
            HEADS, GROUP, BLOCK_M, BLOCK_T, BLOCK_LINES, CAUSAL, HAS_NEW, HAS_NUM_NEW, HAS_FIRSTS, HAS_WINDOW,
        )  # fmt: skip
        program = tl.program_id(0)
        line = tl.sum((ends <= program).to(tl.int32), 0)
        if line >= num_slots * num_blocks:
            return
        is_line = tl.arange(0, BLOCK_LINES) == line
        num_parts = tl.sum(tl.where(is_line, parts, 0), 0)
        place = program - (tl.sum(tl.where(is_line, ends, 0), 0) - num_parts * HEADS)
        part = place % num_parts
        head = (place // num_parts).to(tl.int64)
        slot = (line // num_blocks).to(tl.int64)
        block = line % num_blocks
    else:
        block = num_blocks - 1 - tl.program_id(0)  # causal: the last rows see most
        head = tl.program_id(1).to(tl.int64)
        slot = tl.program_id(2).to(tl.int64)
    start, stop, length, num_tokens, slot_first, earliest, latest = seen(
        lengths, num_new, firsts, slot, block, num_query, window,
        GROUP, BLOCK_M, CAUSAL, HAS_NEW, HAS_NUM_NEW, HAS_FIRSTS, HAS_WINDOW,
    )  # fmt: skip

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_query = rows // GROUP
    query_head = head * GROUP + rows % GROUP
    is_output = row_query < num_query
    row_ok = row_query < num_tokens
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    before = length - num_tokens  # tokens of the prefix
    row_first = tl.zeros([BLOCK_M], tl.int32) + slot_first
    all_first = slot_first
    if HAS_WINDOW:
        row_first = tl.maximum(row_first, before + row_query - window + 1)
        all_first = tl.maximum(slot_first, before + latest - window + 1)
    if CAUSAL:
        row_last = before + row_query
        all_last = before + earliest
    else:
        row_last = tl.zeros([BLOCK_M], tl.int32) + length - 1
        all_last = length - 1

    # [start, left) some rows do not see yet, [left, right) all see, [right, stop) some do not see any more
    left = tl.minimum(start + tl.cdiv(all_first - start, BLOCK_T) * BLOCK_T, stop)
    right = left + tl.maximum(tl.minimum(all_last + 1, stop) - left, 0) // BLOCK_T * BLOCK_T
    if HAS_PARTS:
        steps = tl.maximum(tl.cdiv(stop - start, BLOCK_T), 1)
        stop = tl.minimum(start + (part + 1) * steps // num_parts * BLOCK_T, stop)
        start += part * steps // num_parts * BLOCK_T
        left = tl.minimum(tl.maximum(left, start), stop)
        right = tl.minimum(tl.maximum(right, start), stop)

    q = tl.load(
        query
        + slot * query_slot_stride
        + (query_head * query_head_stride + row_query.to(tl.int64) * query_token_stride)[:, None]
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
    is_whole = True
    if HAS_PARTS:
        is_whole = num_parts == 1
        if num_parts > 1:
            keep_part(partials, program, highest, total, acc, BLOCK_M, BLOCK_M, BLOCK_DV)
    if is_whole:
        result = finish(highest, total, acc, sinks + query_head, row_ok, HAS_SINKS)
        pointers = (
            out + slot * out_slot_stride + query_head * out_head_stride + row_query.to(tl.int64) * out_token_stride
        )
        tl.store(
            pointers[:, None] + dv[None, :],
            tl.where(row_ok[:, None], result, 0.0).to(out.dtype.element_ty),
            mask=is_output[:, None] & (dv[None, :] < DV),
        )


class _Config(NamedTuple):
    """How a case is run: rows of a block, tokens a step, warps, pipeline stages and programs a multiprocessor."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


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
    num_sms: int | None = None,
    config: _Config | None = None,
) -> torch.Tensor:
    """``prefill_attention`` on rows that lie anywhere.

    Args:
        keys, values: tensors whose strides ``rows`` gives; only their dtype matters where it has addresses.
        num_new: [B], how many of the T rows are tokens; default: all. The others' outputs are 0, or, with ``new``,
            unspecified.
        new: keys [B, H, T, D] and values [B, H, T, Dv] of the query's tokens, which are written to their rows first;
            ``lengths`` are then those before them.
        num_sms: multiprocessors to fill; default: the device's. With 0 no block is cut into parts.
    """
    batch, query_heads, num_query, dim = query.shape
    group = query_heads // num_heads
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    out = query.new_empty(batch, num_query, query_heads, value_dim).transpose(1, 2)
    if out.numel() == 0:
        return out
    if new is not None:
        append.launch_rows(keys, values, rows, *new, lengths, num_new)
    num_rows = num_query * group
    config = config or _config(query.dtype, max(block_d, block_dv), num_rows)
    num_blocks = triton.cdiv(num_rows, config.block_m)
    device = query.device.index or 0
    num_sms = _num_sms(device) if num_sms is None else num_sms
    num_at_once = num_sms * config.programs_per_sm
    num_programs = _num_programs(batch * num_heads * num_blocks, num_sms, num_at_once)
    partials = out
    if num_programs:
        partials = query.new_empty(num_programs * config.block_m * (block_dv + 2), dtype=torch.float32)
    early = num_programs > 0 and query.is_cuda and can_begin_early(device)
    counts = (lengths, lengths if num_new is None else num_new, lengths if first is None else first)
    sinks_or_none = lengths if sinks is None else sinks
    sizes = (batch, num_query, num_blocks, window or 0, num_at_once, num_programs)
    shared = {
        "HEADS": num_heads,
        "GROUP": group,
        "DV": value_dim,
        "BLOCK_DV": block_dv,
        "BLOCK_M": config.block_m,
        "BLOCK_T": config.block_t,
        "BLOCK_LINES": max(16, triton.next_power_of_2(batch * num_blocks)) if num_programs else 1,
        "CAUSAL": causal,
        "HAS_NEW": new is not None,
        "HAS_NUM_NEW": num_new is not None,
        "HAS_FIRSTS": first is not None,
        "HAS_SINKS": sinks is not None,
        "HAS_WINDOW": window is not None,
        "EARLY": early,
    }
    _prefill[(num_programs,) if num_programs else (num_blocks, num_heads, batch)](
        query,
        keys,
        values,
        lengths if rows.key_addresses is None else rows.key_addresses,
        lengths if rows.value_addresses is None else rows.value_addresses,
        *counts,
        sinks_or_none,
        out,
        partials,
        *sizes,
        (dim**-0.5 if scale is None else scale) * _LOG2E,
        0.0 if softcap is None else softcap * _LOG2E,
        *query.stride()[:3],
        *out.stride()[:3],
        rows.key_offset,
        rows.value_offset,
        *rows.key_strides,
        *rows.value_strides,
        D=dim,
        BLOCK_D=block_d,
        STAGES=config.num_stages,
        HAS_ADDRESSES=rows.key_addresses is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_PARTS=num_programs > 0,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        num_warps=config.num_warps,
        **shared,
    )
    if num_programs:
        merge[(triton.cdiv(num_rows, _ROWS_MERGED), num_heads, batch)](
            partials,
            *counts,
            sinks_or_none,
            out,
            *sizes,
            *out.stride()[:3],
            ROWS=_ROWS_MERGED,
            PARTS=max(1, min(8, 1024 // block_dv)),
            **shared,
            **({"launch_pdl": True} if early else {}),
        )
    return out


@functools.cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _num_programs(num_whole: int, num_sms: int, num_at_once: int) -> int:
    """Programs that share out the parts of ``num_whole`` blocks, two to a block or more; 0 where these stay whole."""
    if num_whole >= num_sms:
        return 0
    return num_at_once if 4 * num_whole <= num_at_once else 2 * num_at_once


def _config(dtype: torch.dtype, block_d: int, num_rows: int) -> _Config:
    """What shared memory and registers hold; of four warps two programs, so that one multiplies while one waits."""
    row_bytes = block_d * dtype.itemsize
    block_m = max(16, triton.next_power_of_2(num_rows))
    if dtype is torch.float32:
        return _Config(min(block_m, 32), 32, 4, 2, 1) if row_bytes <= 512 else _Config(16, 16, 4, 1, 1)
    if row_bytes <= 256:
        if block_m > 64 and row_bytes > 128:
            return _Config(128, 64, 8, 3, 1)
        return _Config(min(block_m, 128), 64, 4, 3, 2)
    return _Config(min(block_m, 64), 32, 4, 2, 2) if row_bytes <= 512 else _Config(min(block_m, 32), 16, 4, 2, 1)
