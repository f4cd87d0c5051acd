"""decode_attention on a GPU: one launch whose programs share all tokens of all sequences evenly.

The tokens of every sequence and key/value head stand in one line, in granules of 16; program p takes the p-th part of
the line, whatever sequences it touches:

    sequence 0, head 0      | sequence 0, head 1      | sequence 1, head 0 | ...
    p0        p1        p2        p3        p4        p5 ...

So one long sequence among short ones keeps the whole device busy. What a program has of a sequence that others share
becomes a partial result, and the last of them to arrive merges these, in the order of the line: the outcome depends on
the lengths, not on who was last. With ``split_tokens`` every part is so long and starts at a multiple of it: then the
outcome of a sequence does not even depend on the others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_vtensor.ops._torch_compat import current_device, current_raw_stream, is_capturing
from torch_vtensor.ops.attention_triton import (
    Rows,
    attend,
    can_begin_early,
    finish,
    keep_part,
    slot_pointer,
)

__all__ = ["Again", "Prefix", "Workspace", "launch", "launch_rows", "make_workspace", "start"]

_LOG2E = 1.4426950408889634
_GRANULE_TOKENS = 16
_MAX_ROWS = 128
_ALIGNMENT_BYTES = 16  # of addresses that a kernel was compiled for
_MAX_PROGRAMS_PER_SM = 3


@triton.jit
def _segment(
    place,
    end,
    slots,
    ends,
    granules,
    all_lengths,
    all_starts,
    granule_tokens,
    HEADS: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
):
    """What lies at ``place`` in the line, up to ``end`` or the end of its sequence and head: tokens [start, stop)."""
    slot = tl.sum((ends <= place).to(tl.int32), 0)
    mine = slots == slot
    slot_granules = tl.sum(tl.where(mine, granules, 0), 0)
    length = tl.sum(tl.where(mine, all_lengths, 0), 0)
    slot_start = tl.sum(tl.where(mine, all_starts, 0), 0)
    slot_begin = tl.sum(tl.where(mine, ends, 0), 0) - slot_granules * HEADS
    head = (place - slot_begin) // tl.maximum(slot_granules, 1)
    head_begin = slot_begin + head * slot_granules
    from_granule = place - head_begin
    num_granules = tl.minimum(slot_granules - from_granule, end - place)
    if FIXED_SPLIT:
        num_granules = tl.minimum(num_granules, 1)
    start = slot_start + from_granule * granule_tokens
    stop = tl.minimum(start + num_granules * granule_tokens, length)
    return slot, head, head_begin, slot_granules, num_granules, start, stop, length


@triton.jit
def _rows_of(tensor, addresses, slot, head, slot_stride, head_stride, offset, HAS_ADDRESSES: tl.constexpr):
    """Where row 0 of a slot's head lies."""
    return slot_pointer(tensor, addresses, slot, slot_stride, offset, HAS_ADDRESSES) + head.to(tl.int64) * head_stride


@triton.jit
def _prefetch(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _decode(
    query,
    keys,
    values,
    key_addresses,
    value_addresses,
    new_keys,
    new_values,
    cos,
    sin,
    lengths,
    firsts,
    sinks,
    out,
    partials,
    arrivals,
    states,
    num_shared,
    num_slots,
    num_query,
    num_added,
    split_granules,
    scale_log2,
    softcap,
    window,
    query_slot_stride,
    query_head_stride,
    query_token_stride,
    out_slot_stride,
    out_head_stride,
    out_token_stride,
    new_key_slot_stride,
    new_key_head_stride,
    new_key_token_stride,
    new_value_slot_stride,
    new_value_head_stride,
    new_value_token_stride,
    rotation_slot_stride,
    rotation_token_stride,
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
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PARTIAL_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_ADDRESSES: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    row_blocks = tl.num_programs(1)
    row_block = tl.program_id(1)

    # The line: sequence b has granules[b] granules in each of its HEADS heads.
    slots = tl.arange(0, BLOCK_SLOTS)
    all_lengths = tl.load(lengths + slots, mask=slots < num_slots, other=0).to(tl.int32)
    all_lengths += num_added
    all_starts = tl.zeros([BLOCK_SLOTS], tl.int32)
    if HAS_FIRSTS:
        all_starts = tl.load(firsts + slots, mask=slots < num_slots, other=0).to(tl.int32)
    if HAS_WINDOW:
        all_starts = tl.maximum(all_starts, all_lengths - num_query + 1 - window)
    if HAS_PREFIX:
        all_starts = tl.maximum(all_starts, tl.load(num_shared + slots, mask=slots < num_slots, other=0).to(tl.int32))
    granules = tl.cdiv(tl.maximum(all_lengths - all_starts, 1), 16)
    if FIXED_SPLIT:
        granules = tl.cdiv(granules, split_granules)
    granules = tl.where(slots < num_slots, granules, 0)  # 2^31 of them are terabytes
    line = tl.sum(granules, 0) * HEADS
    if FIXED_SPLIT:
        part = tl.cdiv(line, tl.num_programs(0))
        granule_tokens = split_granules * 16
    else:
        part = tl.maximum(tl.cdiv(line, tl.num_programs(0)), split_granules)
        granule_tokens = 16
        longest = tl.max(granules, 0)
        if longest * num_slots * HEADS == line:
            # All as long: let parts begin where heads do, so that few of them have to be merged.
            if part >= longest:
                part = tl.cdiv(part, longest) * longest
            else:
                part = tl.cdiv(longest, longest // part)
                granules = tl.where(slots < num_slots, tl.cdiv(longest, part) * part, 0)
                line = tl.sum(granules, 0) * HEADS
    ends = tl.cumsum(granules, 0) * HEADS
    begin = program * part
    place = begin
    end = tl.minimum(begin + part, line)
    slot, head, head_begin, slot_granules, num_granules, start, stop, length = _segment(
        place, end, slots, ends, granules, all_lengths, all_starts, granule_tokens, HEADS, FIXED_SPLIT
    )
    slot = tl.minimum(slot, num_slots - 1)  # of a program that has nothing to do
    key_rows = _rows_of(keys, key_addresses, slot, head, key_slot_stride, key_head_stride, key_offset, HAS_ADDRESSES)
    value_rows = _rows_of(
        values, value_addresses, slot, head, value_slot_stride, value_head_stride, value_offset, HAS_ADDRESSES
    )
    if EARLY:
        if place < end:
            # What it reads first is on its way into the L2 cache before the kernel that it depends on is done.
            position = tl.minimum(start + tl.arange(0, BLOCK_T), tl.maximum(stop - num_added - 1, start)).to(tl.int64)
            line_elements: tl.constexpr = 128 * 8 // keys.dtype.element_ty.primitive_bitwidth
            num_key_lines: tl.constexpr = (BLOCK_D + line_elements - 1) // line_elements
            num_value_lines: tl.constexpr = (BLOCK_DV + line_elements - 1) // line_elements
            key_lines = tl.arange(0, num_key_lines) * line_elements
            value_lines = tl.arange(0, num_value_lines) * line_elements
            _prefetch(key_rows + position[:, None] * key_token_stride + key_lines[None, :])
            _prefetch(value_rows + position[:, None] * value_token_stride + value_lines[None, :])
        gdc_wait()

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
    rows = tl.arange(0, BLOCK_M)
    row = row_block * BLOCK_M + rows
    row_ok = row < num_query * GROUP
    row_query = row // GROUP
    row_member = row % GROUP
    merged_rows = tl.arange(0, PARTIAL_M)
    merged_row = row_block * BLOCK_M + merged_rows
    merged_ok = merged_row < num_query * GROUP
    merged_query = merged_row // GROUP
    merged_member = merged_row % GROUP
    while place < end:
        slot64 = slot.to(tl.int64)
        head64 = head.to(tl.int64)
        query_head = head64 * GROUP + row_member
        query_pointers = query + slot64 * query_slot_stride + query_head * query_head_stride
        query_pointers += row_query * query_token_stride
        q = tl.load(query_pointers[:, None] + d[None, :], mask=row_ok[:, None] & (d[None, :] < D), other=0.0)
        if HAS_ROTATION:
            q_partner = tl.load(
                query_pointers[:, None] + partner[None, :], mask=row_ok[:, None] & (d[None, :] < D), other=0.0
            )
            q_turns = slot64 * rotation_slot_stride + row_query[:, None] * rotation_token_stride + d[None, :]
            q = _rotated(q, q_partner, cos + q_turns, sin + q_turns, d, row_ok, D)
        if HAS_NEW:
            if stop > length - num_query:
                # The part that a new token falls in writes it, before it reads it like any other.
                new = tl.arange(0, BLOCK_Q)
                position = length - num_query + new
                is_mine = (new < num_query) & (position >= start) & (position < stop)
                new_key = tl.load(
                    (new_keys + slot64 * new_key_slot_stride + head64 * new_key_head_stride)
                    + new[:, None] * new_key_token_stride
                    + d[None, :],
                    mask=is_mine[:, None] & (d[None, :] < D),
                )
                if HAS_ROTATION:
                    other = tl.load(
                        (new_keys + slot64 * new_key_slot_stride + head64 * new_key_head_stride)
                        + new[:, None] * new_key_token_stride
                        + partner[None, :],
                        mask=is_mine[:, None] & (d[None, :] < D),
                    )
                    turns = slot64 * rotation_slot_stride + new[:, None] * rotation_token_stride + d[None, :]
                    new_key = _rotated(new_key, other, cos + turns, sin + turns, d, is_mine, D)
                new_value = tl.load(
                    (new_values + slot64 * new_value_slot_stride + head64 * new_value_head_stride)
                    + new[:, None] * new_value_token_stride
                    + dv[None, :],
                    mask=is_mine[:, None] & (dv[None, :] < DV),
                )
                row_offset = position.to(tl.int64)
                tl.store(
                    key_rows + row_offset[:, None] * key_token_stride + d[None, :],
                    new_key,
                    mask=is_mine[:, None] & (d[None, :] < D),
                )
                tl.store(
                    value_rows + row_offset[:, None] * value_token_stride + dv[None, :],
                    new_value,
                    mask=is_mine[:, None] & (dv[None, :] < DV),
                )
                tl.debug_barrier()
        row_last = length - num_query + row_query
        row_first = tl.zeros([BLOCK_M], tl.int32)
        if HAS_FIRSTS:
            row_first += tl.load(firsts + slot).to(tl.int32)
        if HAS_WINDOW:
            row_first = tl.maximum(row_first, row_last - window + 1)
        highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if HAS_PREFIX:
            # What begins a head goes on from what its prefix gave.
            goes_on = row_ok & (place == head_begin) & (tl.load(num_shared + slot) > 0)
            state = states + ((slot64 * HEADS + head) * (num_query * GROUP) + row) * (BLOCK_DV + 2)
            highest = tl.load(state, mask=goes_on, other=-1.0e30)
            total = tl.load(state + 1, mask=goes_on, other=0.0)
            acc = tl.load(state[:, None] + 2 + dv[None, :], mask=goes_on[:, None], other=0.0)
        highest, total, acc = attend(
            q,
            key_rows,
            value_rows,
            start,
            stop,
            row_first,
            row_last,
            key_token_stride,
            value_token_stride,
            scale_log2,
            softcap,
            highest,
            total,
            acc,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_T,
            STAGES,
            True,
            HAS_SOFTCAP,
            PRECISION,
        )
        out_slot = out + slot64 * out_slot_stride
        if num_granules == slot_granules:
            result = finish(highest, total, acc, sinks + query_head, row_ok, HAS_SINKS)
            pointers = out_slot + query_head * out_head_stride + row_query * out_token_stride
            tl.store(
                pointers[:, None] + dv[None, :],
                result.to(out.dtype.element_ty),
                mask=row_ok[:, None] & (dv[None, :] < DV),
            )
        else:
            # A program has at most two partial results: of what it begins in the middle of, and of what it ends in.
            if FIXED_SPLIT:
                partial = place
            else:
                partial = 2 * program + (place != begin).to(tl.int32)
            partial = partial * row_blocks + row_block
            keep_part(partials, partial, highest, total, acc, PARTIAL_M, BLOCK_M, BLOCK_DV)
            if FIXED_SPLIT:
                first_part = head_begin
                last_part = head_begin + slot_granules - 1
            else:
                first_part = head_begin // part
                last_part = (head_begin + slot_granules - 1) // part
            tl.debug_barrier()  # all of the program's stores come before its arrival
            counter = arrivals + (slot64 * HEADS + head) * row_blocks + row_block
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            num_parts = last_part - first_part + 1
            if arrived == num_parts - 1:
                tl.store(counter, 0)
                if FIXED_SPLIT:
                    before = 0
                else:
                    before = (head_begin != first_part * part).to(tl.int32)
                highest_1, total_1, acc_1 = _merged(
                    partials, first_part, before, num_parts, row_block, row_blocks,
                    PARTIAL_M, BLOCK_DV, MERGE, FIXED_SPLIT,
                )  # fmt: skip
                merged_head = head64 * GROUP + merged_member
                result = finish(highest_1, total_1, acc_1, sinks + merged_head, merged_ok, HAS_SINKS)
                pointers = out_slot + merged_head * out_head_stride + merged_query * out_token_stride
                tl.store(
                    pointers[:, None] + dv[None, :],
                    result.to(out.dtype.element_ty),
                    mask=merged_ok[:, None] & (dv[None, :] < DV),
                )
        place += num_granules
        if place < end:
            slot, head, head_begin, slot_granules, num_granules, start, stop, length = _segment(
                place, end, slots, ends, granules, all_lengths, all_starts, granule_tokens, HEADS, FIXED_SPLIT
            )
            key_rows = _rows_of(
                keys, key_addresses, slot, head, key_slot_stride, key_head_stride, key_offset, HAS_ADDRESSES
            )
            value_rows = _rows_of(
                values, value_addresses, slot, head, value_slot_stride, value_head_stride, value_offset, HAS_ADDRESSES
            )


@triton.jit
def _merged(
    partials, first_part, before, num_parts, row_block, row_blocks,
    PARTIAL_M: tl.constexpr, BLOCK_DV: tl.constexpr, MERGE: tl.constexpr, FIXED_SPLIT: tl.constexpr,
):  # fmt: skip
    """The running softmax of ``num_parts`` partial results, in their order.

    One program does it while the others are done: what counts is how few times it waits for memory. Sums of rows come
    first, some 64 parts at once; then the weighted rows, MERGE parts under way together, added up where they arrive.
    """
    rows = tl.arange(0, PARTIAL_M)
    dv = tl.arange(0, BLOCK_DV)
    each = tl.arange(0, 64)
    part_elements: tl.constexpr = PARTIAL_M * (BLOCK_DV + 2)
    highest = tl.full([PARTIAL_M], -1.0e30, tl.float32)
    total = tl.zeros([PARTIAL_M], tl.float32)
    for base in tl.range(0, num_parts, 64):
        ok = (base + each < num_parts)[:, None]
        source = _partial(partials, first_part, base + each, before, row_block, row_blocks, part_elements, FIXED_SPLIT)
        pointers = source[:, None] + rows[None, :]
        part_highest = tl.load(pointers, mask=ok, other=-1.0e30, cache_modifier=".cg")
        part_total = tl.load(pointers + PARTIAL_M, mask=ok, other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, tl.max(part_highest, 0))
        weighted = tl.sum(part_total * tl.exp2(part_highest - new_highest[None, :]), 0)
        total = total * tl.exp2(highest - new_highest) + weighted
        highest = new_highest
    acc = tl.zeros([PARTIAL_M, BLOCK_DV], tl.float32)
    for base in tl.range(0, num_parts, MERGE):
        for one in tl.static_range(MERGE):
            index = base + one
            ok = index < num_parts
            source = _partial(partials, first_part, index, before, row_block, row_blocks, part_elements, FIXED_SPLIT)
            part_highest = tl.load(source + rows, mask=ok, other=-1.0e30, cache_modifier=".cg")
            pointers = source + 2 * PARTIAL_M + rows[:, None] * BLOCK_DV + dv[None, :]
            part_acc = tl.load(pointers, mask=ok, other=0.0, cache_modifier=".cg")
            acc += part_acc * tl.exp2(part_highest - highest)[:, None]
    return highest, total, acc


@triton.jit
def _partial(
    partials, first_part, index, before, row_block, row_blocks, part_elements: tl.constexpr, FIXED_SPLIT: tl.constexpr
):  # fmt: skip
    """Where the ``index``-th partial result of a sequence and head lies."""
    which = first_part + index
    if not FIXED_SPLIT:  # the first one is what a program ends in, if it began before
        which = 2 * which + ((index == 0) & (before != 0)).to(tl.int32)
    return partials + (which.to(tl.int64) * row_blocks + row_block) * part_elements


@triton.jit
def _rotated(x, partner, cos, sin, d, row_ok, D: tl.constexpr):
    """Rotary embedding of rows x, whose element d pairs with element d +- D / 2."""
    mask = row_ok[:, None] & (d[None, :] < D)
    turned = tl.where(d[None, :] < D // 2, -partner, partner).to(tl.float32)
    result = x.to(tl.float32) * tl.load(cos, mask=mask, other=0.0).to(tl.float32)
    return (result + turned * tl.load(sin, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)


class _Config(NamedTuple):
    """How a case is run: tokens a step, warps, pipeline stages and programs a multiprocessor."""

    block_t: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


class Prefix(NamedTuple):
    """What the first tokens of each slot gave already, from prefix_triton: ``num_shared`` [B] of them, 0 for none."""

    states: torch.Tensor
    num_shared: torch.Tensor


class Workspace(NamedTuple):
    """Device memory for partial results. One that is used again and again must not be used by two streams at once.

    ``arrivals`` is zero before and after every use.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor


def make_workspace(batch: int, heads: int, value_dim: int, device: torch.device) -> Workspace:
    """A workspace for one query token of ``batch`` sequences with ``heads`` key/value heads, on any of its lengths."""
    row_elements = triton.next_power_of_2(value_dim) + 2
    num_partials = 2 * _MAX_PROGRAMS_PER_SM * _num_sms(device.index or 0)
    partials = torch.empty(num_partials * _MAX_ROWS * row_elements, dtype=torch.float32, device=device)
    return Workspace(partials, torch.zeros(batch * heads, dtype=torch.int32, device=device))


@functools.cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _config(dtype: torch.dtype, block_d: int, block_m: int) -> _Config:
    """Measured on an H200 (benchmarks/results): what keeps most bytes in flight without spilling."""
    row_bytes = block_d * dtype.itemsize
    if dtype is torch.float32:
        return _Config(32, 4, 2, 2) if row_bytes <= 512 else _Config(16, 4, 2, 1)
    if block_m > 32:
        return _Config(64, 8 if block_m > 64 else 4, 2, 1)
    if row_bytes > 256:
        return _Config(32, 4, 2, 1) if row_bytes > 512 else _Config(64, 4, 2, 1)
    # Many light programs: while one waits for its scores another one reads, and the kernels around them find room.
    return _Config(32, 4, 3, 3)


class Again:
    """A launch of `start` once more, with other tensors of the same shapes and dtypes, on the same stream.

    The arguments of the kernel are what they were, so Triton need not look at them again; lengths and the workspace,
    which the launches use in turn, need not be made again.
    """

    def __init__(self, started: Started, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._launch = started.kernel[started.grid]
        self._device_index = query.device.index or 0
        self._stream = current_raw_stream(self._device_index)
        self._strides = query.stride(), keys.stride(), values.stride()
        self._out_shape = started.out.transpose(1, 2).shape
        addresses = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in started.arguments]
        names = list(_decode.arg_names)
        # Those whose addresses follow. Of a call's own tensors none is kept: they would be somebody's view of a cache.
        counts, workspace = slice(names.index("lengths"), names.index("out")), slice(names.index("partials"), None)
        tensors = (*started.arguments[counts], *started.arguments[workspace])
        self._kept = [one for one in tensors if isinstance(one, torch.Tensor)]
        self._counts, self._rest = addresses[counts], addresses[workspace]
        self._placeholder = self._counts[0]

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        """The result [B, Q, Hq, Dv]; None, with nothing done, where the launch would have to be another one."""
        if (query.stride(), keys.stride(), values.stride()) != self._strides:
            return None
        index, stream = self._device_index, self._stream
        if not index == query.get_device() == keys.get_device() == values.get_device() == current_device():
            return None
        if current_raw_stream(index) != stream or is_capturing():
            return None
        out = query.new_empty(self._out_shape)
        q, k, v, o = query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr()
        if (q | k | v | o) % _ALIGNMENT_BYTES:
            return None
        none = self._placeholder
        self._launch(q, k, v, none, none, q, q, q, q, *self._counts, o, *self._rest, stream=stream)
        return out


def start(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, Again | None]:
    """`launch`, with its result as [B, Q, Hq, Dv]; and how to do the like again, or None."""
    batch, query_heads, num_query, _ = query.shape
    num_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    out = query.new_empty(batch, num_query, query_heads, value_dim)
    started = start_rows(
        query, keys, values, Rows.of(keys, values), lengths, num_heads, value_dim, capacity, first, scale, window,
        softcap=softcap, out=out.transpose(1, 2),
    )  # fmt: skip
    pointers = (one for one in started.arguments if isinstance(one, torch.Tensor))
    is_aligned = not any(pointer.data_ptr() % _ALIGNMENT_BYTES for pointer in pointers)
    # A captured launch is replayed when the workspace of this one may be gone.
    can_repeat = started.kernel is not None and is_aligned and not is_capturing()
    return out, Again(started, query, keys, values) if can_repeat else None


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    split_tokens: int | None = None,
) -> torch.Tensor:
    """``decode_attention`` on tensors."""
    rows = Rows.of(keys, values)
    batch, query_heads, num_query, _ = query.shape
    num_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    return launch_rows(
        query, keys, values, rows, lengths, num_heads, value_dim, capacity, first, scale, window, sinks, softcap,
        split_tokens, out=query.new_empty(batch, num_query, query_heads, value_dim).transpose(1, 2),
    )  # fmt: skip


def launch_rows(*arguments: Any, **options: Any) -> torch.Tensor:
    """``decode_attention`` on rows that lie anywhere: see `start_rows`."""
    return start_rows(*arguments, **options).out


def _power_of_2(number: int) -> int:
    """The least that is no smaller. Triton's own, made for kernels too, takes the host several microseconds."""
    return 1 << (number - 1).bit_length()


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


class Started(NamedTuple):
    """A launch: its result, what was launched (None in the interpreter), and all arguments in the kernel's order."""

    out: torch.Tensor
    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


def start_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    lengths: torch.Tensor,
    num_heads: int,
    value_dim: int,
    capacity: int,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    split_tokens: int | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
    early: bool = False,
    config: _Config | None = None,
    prefix: Prefix | None = None,
) -> Started:
    """``decode_attention`` on rows that lie anywhere.

    Args:
        query: [B, Hq, Q, D], any strides with a contiguous last dim.
        keys, values: tensors whose strides ``rows`` gives; only their dtype matters where it has addresses.
        lengths: [B], read on the device.
        capacity: no length is above it.
        new: keys [B, H, Q, D] and values [B, H, Q, Dv] of the query's tokens, which are written to their rows first;
            ``lengths`` are then those before them.
        rotation: cos and sin [B or 1, Q, D] of a rotary embedding that query and new keys still need.
        workspace: to use instead of new memory; from ``make_workspace``.
        early: start while the kernel before is still running, where the device can. ``lengths``, ``first`` and the
            addresses are then read before that kernel is done and must not be written by it.
        prefix: tokens that need not be read any more.
    """
    batch, query_heads, num_query, dim = query.shape
    group = query_heads // num_heads
    num_rows = num_query * group
    block_m = min(_MAX_ROWS, max(16, _power_of_2(num_rows)))
    row_blocks = _ceil_div(num_rows, block_m)
    partial_m = min(block_m, _power_of_2(num_rows))
    block_d, block_dv = _power_of_2(dim), _power_of_2(value_dim)
    num_sms = _num_sms(query.device.index or 0)
    config = config or _config(query.dtype, max(block_d, block_dv), block_m)
    num_programs = max(1, num_sms * config.programs_per_sm // row_blocks)
    if out is None:
        out = query.new_empty(batch, query_heads, num_query, value_dim)
    # A part shorter than two steps costs more to merge than it saves.
    split_granules = (
        _ceil_div(split_tokens, _GRANULE_TOKENS) if split_tokens else max(1, config.block_t // _GRANULE_TOKENS)
    )
    if workspace is None:
        num_partials = 2 * num_programs
        if split_tokens:
            num_partials = batch * num_heads * _ceil_div(capacity, split_granules * _GRANULE_TOKENS)
        num_partials *= row_blocks
        workspace = Workspace(
            query.new_empty(num_partials * partial_m * (block_dv + 2), dtype=torch.float32),
            query.new_zeros(batch * num_heads * row_blocks, dtype=torch.int32),
        )
    scale = dim**-0.5 if scale is None else scale
    key_slot, key_head, key_token = rows.key_strides
    value_slot, value_head, value_token = rows.value_strides
    early = early and can_begin_early(query.device.index or 0)
    placeholder = lengths
    new_keys, new_values = (query, query) if new is None else new
    cos, sin = (query, query) if rotation is None else rotation
    arguments = (
        query,
        keys,
        values,
        placeholder if rows.key_addresses is None else rows.key_addresses,
        placeholder if rows.value_addresses is None else rows.value_addresses,
        new_keys,
        new_values,
        cos,
        sin,
        lengths,
        placeholder if first is None else first,
        placeholder if sinks is None else sinks,
        out,
        workspace.partials,
        workspace.arrivals,
        workspace.partials if prefix is None else prefix.states,
        placeholder if prefix is None else prefix.num_shared,
        batch,
        num_query,
        0 if new is None else num_query,
        split_granules,
        scale * _LOG2E,
        0.0 if softcap is None else softcap * _LOG2E,
        window or 0,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        new_keys.stride(0),
        new_keys.stride(1),
        new_keys.stride(2),
        new_values.stride(0),
        new_values.stride(1),
        new_values.stride(2),
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1),
        rows.key_offset,
        rows.value_offset,
        key_slot,
        key_head,
        key_token,
        value_slot,
        value_head,
        value_token,
    )
    constants = {
        "HEADS": num_heads,
        "GROUP": group,
        "D": dim,
        "DV": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_SLOTS": max(2, _power_of_2(batch)),
        "BLOCK_M": block_m,
        "BLOCK_Q": _power_of_2(num_query),
        "PARTIAL_M": partial_m,
        "BLOCK_T": config.block_t,
        "MERGE": max(1, min(32, config.num_warps * 2048 // (partial_m * block_dv))),
        "STAGES": config.num_stages,
        "HAS_ADDRESSES": rows.key_addresses is not None,
        "HAS_NEW": new is not None,
        "HAS_ROTATION": rotation is not None,
        "HAS_FIRSTS": first is not None,
        "HAS_SINKS": sinks is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": window is not None,
        "HAS_PREFIX": prefix is not None,
        "FIXED_SPLIT": split_tokens is not None,
        "PRECISION": "ieee" if query.dtype is torch.float32 else "tf32",
        "EARLY": early,
    }
    grid = num_programs, row_blocks, 1
    options = {"launch_pdl": True} if early else {}
    kernel = _decode[grid](*arguments, **constants, num_warps=config.num_warps, **options)
    return Started(out, kernel, grid, (*arguments, *constants.values()))
