"""decode_attention where sequences share their first tokens: those are read once for all, not once for each.

Two launches. The first packs the query rows of all members of a group into blocks and takes them over the group's
prefix, in parts that fill the device; the last part of a block to arrive merges them into one running softmax for each
row. The second is decode_attention's own, which begins each member behind its prefix, with what that gave:

    group's prefix   [0, num_shared)           rows of members 0, 1, 2 ...    -> (highest, total, acc) a row
    each member      [num_shared, length)      its own rows, from there on    -> out
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torch_vtensor.ops.attention_triton import Rows, attend, keep_part, slot_pointer
from torch_vtensor.ops.decode_attention import triton as decode

__all__ = ["launch", "launch_rows"]

_LOG2E = 1.4426950408889634
_MAX_ROWS = 128


@triton.jit
def _prefix(
    query,
    keys,
    values,
    key_addresses,
    value_addresses,
    groups,
    num_shared,
    firsts,
    states,
    partials,
    arrivals,
    max_members,
    num_query,
    scale_log2,
    softcap,
    query_slot_stride,
    query_head_stride,
    query_token_stride,
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
    STAGES: tl.constexpr,
    HAS_ADDRESSES: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows_per_slot = num_query * GROUP
    row_blocks = tl.cdiv(max_members * rows_per_slot, BLOCK_M)
    block = tl.program_id(2)
    group = (block // row_blocks).to(tl.int64)
    packed = block % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    member = packed // rows_per_slot
    row = packed % rows_per_slot
    slot = tl.load(groups + group * max_members + member, mask=member < max_members, other=-1).to(tl.int64)
    row_ok = slot >= 0
    leader = tl.load(groups + group * max_members).to(tl.int64)
    shared = tl.load(num_shared + leader, mask=leader >= 0, other=0).to(tl.int32)
    begin = tl.zeros([], tl.int32)
    if HAS_FIRSTS:
        begin = tl.minimum(tl.load(firsts + leader, mask=leader >= 0, other=0).to(tl.int32), shared)
    part_tokens = tl.maximum(tl.cdiv(tl.cdiv(shared - begin, tl.num_programs(0)), BLOCK_T), 2) * BLOCK_T
    num_parts = tl.maximum(tl.cdiv(shared - begin, part_tokens), 1)
    if (part < num_parts) & (tl.max(slot, 0) >= 0):
        d = tl.arange(0, BLOCK_D)
        dv = tl.arange(0, BLOCK_DV)
        query_rows = slot * query_slot_stride + (head * GROUP + row % GROUP) * query_head_stride
        query_rows += row // GROUP * query_token_stride
        q = tl.load(query + query_rows[:, None] + d[None, :], mask=row_ok[:, None] & (d[None, :] < D), other=0.0)
        key_rows = slot_pointer(keys, key_addresses, leader, key_slot_stride, key_offset, HAS_ADDRESSES)
        value_rows = slot_pointer(values, value_addresses, leader, value_slot_stride, value_offset, HAS_ADDRESSES)
        key_rows += head * key_head_stride
        value_rows += head * value_head_stride
        start = begin + part * part_tokens
        stop = tl.minimum(start + part_tokens, shared)
        whole = start + (stop - start) // BLOCK_T * BLOCK_T
        row_first = tl.zeros([BLOCK_M], tl.int32)
        row_last = tl.zeros([BLOCK_M], tl.int32) + shared
        highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        highest, total, acc = attend(
            q, key_rows, value_rows, start, whole, row_first, row_last, key_token_stride, value_token_stride,
            scale_log2, softcap, highest, total, acc,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, STAGES, False, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        highest, total, acc = attend(
            q, key_rows, value_rows, whole, stop, row_first, row_last, key_token_stride, value_token_stride,
            scale_log2, softcap, highest, total, acc,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, STAGES, True, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        is_last = num_parts == 1
        if num_parts > 1:
            rows = tl.arange(0, BLOCK_M)
            line = (block.to(tl.int64) * HEADS + head) * tl.num_programs(0)
            keep_part(partials, line + part, highest, total, acc, BLOCK_M, BLOCK_M, BLOCK_DV)
            tl.debug_barrier()  # all of the program's stores come before its arrival
            counter = arrivals + block * HEADS + head
            is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1
            if is_last:
                highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                for other in tl.range(0, num_parts):
                    theirs = partials + (line + other) * BLOCK_M * (BLOCK_DV + 2)
                    part_highest = tl.load(theirs + rows, cache_modifier=".cg")
                    new_highest = tl.maximum(highest, part_highest)
                    shrink = tl.exp2(highest - new_highest)
                    factor = tl.exp2(part_highest - new_highest)
                    total = total * shrink + tl.load(theirs + BLOCK_M + rows, cache_modifier=".cg") * factor
                    part_acc = tl.load(
                        theirs + 2 * BLOCK_M + rows[:, None] * BLOCK_DV + dv[None, :], cache_modifier=".cg"
                    )
                    acc = acc * shrink[:, None] + part_acc * factor[:, None]
                    highest = new_highest
        if is_last:
            state = states + ((slot * HEADS + head) * rows_per_slot + row) * (BLOCK_DV + 2)
            tl.store(state, highest, mask=row_ok)
            tl.store(state + 1, total, mask=row_ok)
            tl.store(state[:, None] + 2 + dv[None, :], acc, mask=row_ok[:, None])


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    groups: torch.Tensor,
    num_shared: torch.Tensor,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """``decode_attention`` on tensors, with ``groups`` and ``num_shared``."""
    batch, query_heads, num_query, _ = query.shape
    num_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    out = query.new_empty(batch, num_query, query_heads, value_dim).transpose(1, 2)
    return launch_rows(
        query, keys, values, Rows.of(keys, values), lengths, groups, num_shared, num_heads, value_dim, capacity, first,
        scale, sinks, softcap, out=out,
    )  # fmt: skip


def launch_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    lengths: torch.Tensor,
    groups: torch.Tensor,
    num_shared: torch.Tensor,
    num_heads: int,
    value_dim: int,
    capacity: int,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    workspace: decode.Workspace | None = None,
    out: torch.Tensor | None = None,
    num_used: int | None = None,
) -> torch.Tensor:
    """``decode_attention`` with ``groups`` and ``num_shared`` on rows that lie anywhere: see ``decode.launch_rows``.

    Args:
        num_used: how many of the rows of ``groups`` are expected to be in use, among which the device is divided up;
            default: all.
    """
    batch, query_heads, num_query, dim = query.shape
    num_groups, max_members = groups.shape
    rows_per_slot = query_heads // num_heads * num_query
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    block_t, most_rows, num_warps, num_stages = _config(query.dtype, max(block_d, block_dv))
    block_m = min(most_rows, max(16, triton.next_power_of_2(max_members * rows_per_slot)))
    row_blocks = triton.cdiv(max_members * rows_per_slot, block_m)
    num_blocks = num_groups * row_blocks
    num_sms = torch.cuda.get_device_properties(query.device).multi_processor_count
    num_parts = max(1, num_sms // (num_heads * row_blocks * (num_used or num_groups)))
    states = query.new_empty(batch * num_heads * rows_per_slot * (block_dv + 2), dtype=torch.float32)
    partials = query.new_empty(num_blocks * num_heads * num_parts * block_m * (block_dv + 2), dtype=torch.float32)
    scale = dim**-0.5 if scale is None else scale
    _prefix[(num_parts, num_heads, num_blocks)](
        query,
        keys,
        values,
        num_shared if rows.key_addresses is None else rows.key_addresses,
        num_shared if rows.value_addresses is None else rows.value_addresses,
        groups,
        num_shared,
        num_shared if first is None else first,
        states,
        partials,
        query.new_zeros(num_blocks * num_heads, dtype=torch.int32),
        max_members,
        num_query,
        scale * _LOG2E,
        0.0 if softcap is None else softcap * _LOG2E,
        *query.stride()[:3],
        rows.key_offset,
        rows.value_offset,
        *rows.key_strides,
        *rows.value_strides,
        HEADS=num_heads,
        GROUP=query_heads // num_heads,
        D=dim,
        DV=value_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
        STAGES=num_stages,
        HAS_ADDRESSES=rows.key_addresses is not None,
        HAS_FIRSTS=first is not None,
        HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        num_warps=num_warps if block_m > 64 else 4,
    )
    return decode.launch_rows(
        query, keys, values, rows, lengths, num_heads, value_dim, capacity, first, scale, sinks=sinks, softcap=softcap,
        new=new, workspace=workspace, out=out, prefix=decode.Prefix(states, num_shared),
    )  # fmt: skip


def _config(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Tokens a step, most rows a block, warps and pipeline stages: what shared memory and registers hold."""
    row_bytes = block_d * dtype.itemsize
    if dtype is torch.float32:
        return (32, 32, 4, 2) if row_bytes <= 512 else (16, 16, 4, 1)
    if row_bytes <= 256:
        return 64, _MAX_ROWS, 8, 3
    return (32, 64, 4, 2) if row_bytes <= 512 else (16, 32, 4, 1)
