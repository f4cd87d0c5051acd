"""prefill_attention on Hopper: a block of 128 query rows at a time, by warps that each do one thing.

    producer, 1 warp               takes the next block, says which to the others, and has its tiles of keys and values
                                   copied into rings in shared memory, by TMA
    consumers, 2 x 4 warps         64 of the rows each: scores, softmax and weighted sum, from the rings

A consumer's step multiplies its queries with tile i's keys and tile i - 1's weights with its values, both under way on
the tensor cores together, and works out tile i's weights while the second product still runs:

    tensor cores   Q K(i)   P(i-1) V(i-1)          Q K(i+1)   P(i) V(i)
    other units             softmax(i)   rescale              softmax(i+1)   rescale

Programs stay: each takes blocks until none is left, so that the copies and the queries of one block come while another
ends. Tiles go from the last to the first; those that some row does not see whole are masked. Tensor maps are made on
the device, with a sequence's length as their extent: no copy goes beyond a sequence's last token, wherever it lies.
"""

from __future__ import annotations

import contextvars
import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from torch_vtensor.ops.attention_triton import Rows
from torch_vtensor.ops.prefill_attention.gluon_blocks import (
    BLOCK_ROWS,
    FIELDS,
    RING,
    block_of,
    field,
    hear,
    say,
    slots_by_length,
)

__all__ = ["launch", "launch_rows"]

_LOG2E = 1.4426950408889634
_BLOCK_M = gl.constexpr(64)
"""Query rows of a consumer."""
_BLOCK_T = 128
_STAGES = 3
_MAX_HEADS_TOGETHER = 8


@gluon.jit
def _copy(
    key_map, value_map, head, token, step, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have a tile's keys and values copied, once its places are free; rows outside of the sequence become 0."""
    stage = step % STAGES
    is_reused = (step // STAGES & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), is_reused)
    mbarrier.expect(k_full.index(stage), key_map.block_type.nbytes)
    tma.async_copy_global_to_shared(
        key_map, [head, token, 0], k_full.index(stage), k_ring.index(stage).reshape([1, BLOCK_T, D])
    )
    mbarrier.wait(v_empty.index(stage), is_reused)
    mbarrier.expect(v_full.index(stage), value_map.block_type.nbytes)
    tma.async_copy_global_to_shared(
        value_map, [head, token, 0], v_full.index(stage), v_ring.index(stage).reshape([1, BLOCK_T, D])
    )


@gluon.jit
def _produce(
    slots, ring, said, done, keys, values, key_addresses, value_addresses,
    k_ring, v_ring, k_full, k_empty, v_full, v_empty, lengths, num_new, firsts,
    num_query, num_blocks, num_heads, total_blocks, window, key_offset, value_offset,
    key_slot_stride, key_head_stride, key_token_stride, value_slot_stride, value_head_stride, value_token_stride,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, HEADS_TOGETHER: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_ADDRESSES: gl.constexpr, ADDS_NEW: gl.constexpr, HAS_NUM_NEW: gl.constexpr,
    HAS_FIRSTS: gl.constexpr, HAS_WINDOW: gl.constexpr, IS_PLANNED: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_T, D], keys.dtype.element_ty)
    num_programs = gl.num_programs(0)
    per_slot = num_blocks * num_heads
    number = gl.program_id(0)
    turn = 0
    step = 0
    block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left = block_of(
        number, total_blocks, num_blocks, num_heads, slots, lengths, num_new, firsts, num_query, window,
        GROUP, BLOCK_T, HEADS_TOGETHER, CAUSAL, ADDS_NEW, HAS_NUM_NEW, HAS_FIRSTS, HAS_WINDOW, IS_PLANNED,
    )  # fmt: skip
    say(ring, said, done, 0, True, block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left)
    while number < total_blocks:
        length = gl.load(lengths + slot).to(gl.int32)
        if ADDS_NEW:
            length += num_tokens
        if HAS_ADDRESSES:
            key_rows = gl.load(key_addresses + slot).to(keys.dtype) + key_offset
            value_rows = gl.load(value_addresses + slot).to(values.dtype) + value_offset
        else:
            key_rows = keys + slot.to(gl.int64) * key_slot_stride
            value_rows = values + slot.to(gl.int64) * value_slot_stride
        if HAS_FIRSTS:
            slot_first = gl.load(firsts + slot).to(gl.int32)
            length -= slot_first
            key_rows += slot_first.to(gl.int64) * key_token_stride
            value_rows += slot_first.to(gl.int64) * value_token_stride
        # The maps lie where those of the slot before do: the copies that read these must have ended.
        for back in gl.static_range(1, STAGES + 1):
            one = gl.maximum(step - back, 0)
            mbarrier.wait(k_full.index(one % STAGES), one // STAGES & 1, pred=step >= back)
            mbarrier.wait(v_full.index(one % STAGES), one // STAGES & 1, pred=step >= back)
        rows = gl.maximum(length, 1)  # a map has no empty extent; nothing is copied then
        key_map = tma.make_tensor_descriptor(
            key_rows, [num_heads, rows, D], [key_head_stride, key_token_stride, 1], [1, BLOCK_T, D], layout
        )
        value_map = tma.make_tensor_descriptor(
            value_rows, [num_heads, rows, D], [value_head_stride, value_token_stride, 1], [1, BLOCK_T, D], layout
        )
        slot_stop = (number // per_slot + 1) * per_slot
        while number < gl.minimum(slot_stop, total_blocks):
            this_head = head
            this_start = start
            this_tiles = num_tiles
            if this_tiles > 0:
                _copy(
                    key_map, value_map, this_head, this_start + (this_tiles - 1) * BLOCK_T, step,
                    k_ring, v_ring, k_full, k_empty, v_full, v_empty, D, BLOCK_T, STAGES,
                )  # fmt: skip
            # The next block is found out while this one's first tile is on its way.
            if IS_PLANNED:
                number = gl.atomic_add(slots, 1, sem="relaxed") + num_programs
            else:
                number += num_programs
            block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left = block_of(
                number, total_blocks, num_blocks, num_heads, slots, lengths, num_new, firsts, num_query, window,
                GROUP, BLOCK_T, HEADS_TOGETHER, CAUSAL, ADDS_NEW, HAS_NUM_NEW, HAS_FIRSTS, HAS_WINDOW, IS_PLANNED,
            )  # fmt: skip
            turn += 1
            say(
                ring, said, done, turn, number < total_blocks,
                block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left,
            )  # fmt: skip
            for i in range(1, this_tiles):
                _copy(
                    key_map, value_map, this_head, this_start + (this_tiles - 1 - i) * BLOCK_T, step + i,
                    k_ring, v_ring, k_full, k_empty, v_full, v_empty, D, BLOCK_T, STAGES,
                )  # fmt: skip
            step += this_tiles


@gluon.jit
def _row_pointers(
    tensor, block, head, slot, slot_stride, head_stride, token_stride,
    CONSUMER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where a consumer's rows of a block lie in queries or results [B, Hq, T, D], and which tokens they are."""
    rows = block * BLOCK_ROWS + CONSUMER * _BLOCK_M + gl.arange(0, _BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    token = rows // GROUP
    query_head = (head * GROUP + rows % GROUP).to(gl.int64)
    pointers = tensor + slot.to(gl.int64) * slot_stride + (query_head * head_stride + token.to(gl.int64) * token_stride)
    return pointers[:, None] + d[None, :], token[:, None]


@gluon.jit
def _softmax(s, highest, total, scale_log2, position, row_last, window, MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """Take a tile's scores into the running softmax (highest, total) of every row, in base 2."""
    if MASKED:
        is_seen = position[None, :] <= row_last[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (position[None, :] > row_last[:, None] - window)
        s = gl.where(is_seen, s, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - new_highest[:, None])
    shrink = gl.exp2(highest - new_highest)
    return p, new_highest, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, ring, said, done, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    query, out, sinks, num_query, scale_log2, window,
    query_slot_stride, query_head_stride, query_token_stride, out_slot_stride, out_head_stride, out_token_stride,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_SINKS: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_tiles.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_T, 16]
    )
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores)
    sum_rows: gl.constexpr = gl.SliceLayout(1, sums)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_tile = q_tiles.index(CONSUMER)
    t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, scores))
    none = gl.zeros([_BLOCK_M, BLOCK_T], gl.float32, layout=scores)

    turn = 0
    step = 0
    block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left = hear(ring, said, 0)
    pointers, token = _row_pointers(
        query, block, head, slot, query_slot_stride, query_head_stride, query_token_stride, CONSUMER, GROUP, D, wide
    )
    q = gl.load(pointers, mask=token < num_tokens, other=0.0)
    while block >= 0:
        q_tile.store(q)
        fence_async_shared()
        gl.thread_barrier()
        row_last = gl.zeros([_BLOCK_M], gl.int32, layout=score_rows) + last
        if CAUSAL:
            row_last += (block * BLOCK_ROWS + CONSUMER * _BLOCK_M + gl.arange(0, _BLOCK_M, layout=score_rows)) // GROUP
        highest = gl.full([_BLOCK_M], -1.0e30, gl.float32, layout=score_rows)
        total = gl.zeros([_BLOCK_M], gl.float32, layout=score_rows)
        acc = gl.zeros([_BLOCK_M, D], gl.float32, layout=sums)
        p = none
        last_tile = start + (num_tiles - 1) * BLOCK_T
        if num_tiles > 0:
            mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1)
            s = warpgroup_mma(q_tile, k_ring.index(step % STAGES).permute((1, 0)), none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
            p, highest, total, shrink = _softmax(
                s, highest, total, scale_log2, t + last_tile, row_last, window, True, HAS_WINDOW
            )
            mbarrier.wait(k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=num_tiles > 1)
            # [1, right) some rows do not see yet, [right, left) all see, [left, num_tiles) some do not see any more
            right = gl.minimum(gl.maximum(num_masked, 1), num_tiles)
            left = num_tiles
            if HAS_WINDOW:
                left = gl.maximum(num_tiles - num_left, right)
            for part in gl.static_range(3 if HAS_WINDOW else 2):
                if part == 0:
                    begin = 1
                    end = right
                elif part == 1:
                    begin = right
                    end = left
                else:
                    begin = left
                    end = num_tiles
                for i in range(begin, end):
                    k_stage = (step + i) % STAGES
                    v_stage = (step + i - 1) % STAGES
                    s = warpgroup_mma(q_tile, k_ring.index(k_stage).permute((1, 0)), none, use_acc=False, is_async=True)
                    p_low = gl.convert_layout(p.to(dtype), weights)
                    mbarrier.wait(v_full.index(v_stage), (step + i - 1) // STAGES & 1)
                    acc_later = warpgroup_mma(p_low, v_ring.index(v_stage), acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    mbarrier.arrive(k_empty.index(k_stage), count=1)
                    p, highest, total, shrink = _softmax(
                        s, highest, total, scale_log2, t + (last_tile - i * BLOCK_T), row_last, window,
                        part != 1, HAS_WINDOW,
                    )  # fmt: skip
                    # Waiting for the next keys here and not where they are used keeps ptxas from moving the wait for
                    # the values' product up before the softmax.
                    next_step = step + i + 1
                    mbarrier.wait(k_full.index(next_step % STAGES), next_step // STAGES & 1, pred=i + 1 < num_tiles)
                    acc = warpgroup_mma_wait(0, deps=(acc_later,))
                    mbarrier.arrive(v_empty.index(v_stage), count=1)
                    acc = acc * gl.convert_layout(shrink, sum_rows)[:, None]

        # What this block is, is read again: to know it all along takes more registers than there are.
        entry = turn % RING
        out_block = field(ring, entry, 0)
        out_head = field(ring, entry, 1)
        out_slot = field(ring, entry, 2)
        out_tokens = field(ring, entry, 3)
        mbarrier.arrive(done.index(entry), count=1)
        # The next block's queries are on their way before this one's results leave.
        last_step = step + num_tiles - 1
        has_tiles = num_tiles > 0
        step += num_tiles
        turn += 1
        block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left = hear(ring, said, turn)
        pointers, token = _row_pointers(
            query, block, head, slot, query_slot_stride, query_head_stride, query_token_stride, CONSUMER, GROUP, D, wide
        )
        q = gl.load(pointers, mask=(token < num_tokens) & (block >= 0), other=0.0)
        if has_tiles:
            stage = last_step % STAGES
            p_low = gl.convert_layout(p.to(dtype), weights)
            mbarrier.wait(v_full.index(stage), last_step // STAGES & 1)
            acc_later = warpgroup_mma(p_low, v_ring.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_later,))
            mbarrier.arrive(v_empty.index(stage), count=1)

        if HAS_SINKS:  # a score that takes part in the sum alone
            rows = out_block * BLOCK_ROWS + CONSUMER * _BLOCK_M + gl.arange(0, _BLOCK_M, layout=score_rows)
            sink = gl.load(sinks + out_head * GROUP + rows % GROUP).to(gl.float32) * 1.4426950408889634
            with_sink = gl.maximum(highest, sink)
            shrink = gl.exp2(highest - with_sink)
            total = total * shrink + gl.exp2(sink - with_sink)
            acc = acc * gl.convert_layout(shrink, sum_rows)[:, None]
        total = gl.convert_layout(total, sum_rows)
        result = acc * (1.0 / gl.where(total > 0, total, 1.0))[:, None]
        q_tile.store(result.to(dtype))  # by way of shared memory to rows that leave whole
        gl.thread_barrier()
        out_pointers, out_token = _row_pointers(
            out, out_block, out_head, out_slot, out_slot_stride, out_head_stride, out_token_stride,
            CONSUMER, GROUP, D, wide,
        )  # fmt: skip
        result_rows = gl.where(out_token < out_tokens, q_tile.load(wide), 0.0).to(dtype)
        gl.store(out_pointers, result_rows, mask=out_token < num_query)
        gl.thread_barrier()


@gluon.jit(do_not_specialize=["num_query", "num_blocks", "num_heads", "total_blocks"])  # one kernel for all prompts
def _prefill(
    slots, query, keys, values, key_addresses, value_addresses, lengths, num_new, firsts, sinks, out,
    num_query, num_blocks, num_heads, total_blocks, scale_log2, window,
    query_slot_stride, query_head_stride, query_token_stride, out_slot_stride, out_head_stride, out_token_stride,
    key_offset, value_offset,
    key_slot_stride, key_head_stride, key_token_stride, value_slot_stride, value_head_stride, value_token_stride,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, HEADS_TOGETHER: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_ADDRESSES: gl.constexpr, ADDS_NEW: gl.constexpr, HAS_NUM_NEW: gl.constexpr,
    HAS_FIRSTS: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_WINDOW: gl.constexpr, IS_PLANNED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BLOCK_M, D], dtype)
    ring_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, _BLOCK_M, D], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, D], ring_layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, D], ring_layout)
    ring = gl.allocate_shared_memory(gl.int32, [RING * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    said = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    for entry in gl.static_range(RING):
        mbarrier.init(said.index(entry), count=1)
        mbarrier.init(done.index(entry), count=2)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (
                first, ring, said, done, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                query, out, sinks, num_query, scale_log2, window,
                query_slot_stride, query_head_stride, query_token_stride,
                out_slot_stride, out_head_stride, out_token_stride,
                GROUP, D, BLOCK_T, STAGES, CAUSAL, HAS_SINKS, HAS_WINDOW,
            )),
            (_consume, (
                second, ring, said, done, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                query, out, sinks, num_query, scale_log2, window,
                query_slot_stride, query_head_stride, query_token_stride,
                out_slot_stride, out_head_stride, out_token_stride,
                GROUP, D, BLOCK_T, STAGES, CAUSAL, HAS_SINKS, HAS_WINDOW,
            )),
            (_produce, (
                slots, ring, said, done, keys, values, key_addresses, value_addresses,
                k_ring, v_ring, k_full, k_empty, v_full, v_empty, lengths, num_new, firsts,
                num_query, num_blocks, num_heads, total_blocks, window, key_offset, value_offset,
                key_slot_stride, key_head_stride, key_token_stride,
                value_slot_stride, value_head_stride, value_token_stride,
                GROUP, D, BLOCK_T, STAGES, HEADS_TOGETHER, CAUSAL, HAS_ADDRESSES, ADDS_NEW, HAS_NUM_NEW,
                HAS_FIRSTS, HAS_WINDOW, IS_PLANNED,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer,
        [240, 24],  # and the registers of their threads; the first consumer gets what is left, 240
    )  # fmt: skip


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
    causal: bool = True,
) -> torch.Tensor:
    """``prefill_attention`` on tensors, of a case that ``attention_choice`` says this can do."""
    rows = Rows.of(keys, values)
    return launch_rows(query, keys, values, rows, lengths, keys.shape[1], num_new, first, scale, window, sinks, causal)


def launch_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    lengths: torch.Tensor,
    num_heads: int,
    num_new: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    counts_new: bool = False,
) -> torch.Tensor:
    """``prefill_attention`` on rows that lie anywhere, the new ones among them.

    Args:
        keys, values: tensors whose strides ``rows`` gives; only their dtype matters where it has addresses.
        counts_new: whether the new tokens, all or ``num_new``, come on top of ``lengths``.
    """
    batch, query_heads, num_query, dim = query.shape
    group = query_heads // num_heads
    scale = dim**-0.5 if scale is None else scale
    if scale <= 0:  # the running maximum is taken of the products: the scale must keep their order
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    out = query.new_empty(batch, num_query, query_heads, dim).transpose(1, 2)
    num_blocks = triton.cdiv(num_query * group, BLOCK_ROWS.value)
    total_blocks = num_blocks * num_heads * batch
    num_programs = min(torch.cuda.get_device_properties(query.device).multi_processor_count, total_blocks)
    is_planned = total_blocks > num_programs
    slots = slots_by_length(lengths, num_new, counts_new, is_planned)

    def run() -> None:
        triton.set_allocator(functools.partial(_tensor_maps, query.device))
        _prefill[(num_programs,)](
            slots,
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
            num_blocks,
            num_heads,
            total_blocks,
            scale * _LOG2E,
            window or 0,
            *query.stride()[:3],
            *out.stride()[:3],
            rows.key_offset,
            rows.value_offset,
            *rows.key_strides,
            *rows.value_strides,
            GROUP=group,
            D=dim,
            BLOCK_T=_BLOCK_T,
            STAGES=_STAGES,
            HEADS_TOGETHER=max(count for count in range(1, _MAX_HEADS_TOGETHER + 1) if num_heads % count == 0),
            CAUSAL=causal,
            HAS_ADDRESSES=rows.key_addresses is not None,
            ADDS_NEW=counts_new,
            HAS_NUM_NEW=num_new is not None,
            HAS_FIRSTS=first is not None,
            HAS_SINKS=sinks is not None,
            HAS_WINDOW=window is not None,
            IS_PLANNED=is_planned,
            num_warps=4,
            maxnreg=168,
        )

    contextvars.copy_context().run(run)  # Triton's allocator is the context's: the caller's stays what it is
    return out


def _tensor_maps(device: torch.device, nbytes: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the tensor maps of a launch; torch's is aligned to 512 bytes and used by one stream after another."""
    return torch.empty(nbytes, dtype=torch.int8, device=device)
