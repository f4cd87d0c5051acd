"""prefill_attention on Hopper: blocks of 128 query rows, by warps that each do one thing.

    producer, 1 warp               takes the next block, tells the others which it is, and has its tiles of keys and
                                   values copied into rings in shared memory, by TMA
    consumers, 2 x 4 warps         64 of the rows each: scores, softmax and weighted sum, from the rings

A consumer's step multiplies its queries with tile i's keys and tile i - 1's weights with its values, both under way on
the tensor cores together, and works out tile i's weights while the second product still runs:

    tensor cores   Q K(i)   P(i-1) V(i-1)          Q K(i+1)   P(i) V(i)
    other units             softmax(i)   rescale              softmax(i+1)   rescale

Programs stay: each takes blocks until none is left, so that the copies for one block begin while another ends. Tiles
go from the last to the first; the last ones, which some row does not see whole, are masked. Tensor maps are made on
the device, with a sequence's length as their extent: no copy goes beyond a sequence's last token.
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

__all__ = ["launch"]

_LOG2E = 1.4426950408889634
_BLOCK_M = 64
_BLOCK_T = 128
_STAGES = 2
_MAX_HEADS_TOGETHER = 8


@gluon.jit
def _block_of(
    number, num_blocks, num_heads, lengths, num_new, firsts, num_query,
    GROUP: gl.constexpr, ROWS: gl.constexpr, BLOCK_T: gl.constexpr, HEADS_TOGETHER: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_NUM_NEW: gl.constexpr, HAS_FIRSTS: gl.constexpr,
):  # fmt: skip
    """What there is to do for a block.

    Blocks go slot by slot and HEADS_TOGETHER heads at a time, and of these the last rows first: neighbours take about
    as long as each other, and read the same keys and values at about the same time.
    """
    per_heads = num_blocks * HEADS_TOGETHER
    heads = number // per_heads
    rest = number % per_heads
    block = num_blocks - 1 - rest // HEADS_TOGETHER
    per_slot = num_heads // HEADS_TOGETHER
    head = heads % per_slot * HEADS_TOGETHER + rest % HEADS_TOGETHER
    slot = heads // per_slot
    length = gl.load(lengths + slot).to(gl.int32)
    num_tokens = num_query
    if HAS_NUM_NEW:
        num_tokens = gl.load(num_new + slot).to(gl.int32)
    slot_first = 0
    if HAS_FIRSTS:
        slot_first = gl.load(firsts + slot).to(gl.int32)
    before = length - num_tokens  # tokens of the prefix
    earliest = block * ROWS // GROUP
    latest = gl.minimum((block * ROWS + ROWS - 1) // GROUP, num_tokens - 1)
    if CAUSAL:
        stop = before + latest + 1
        all_stop = before + earliest + 1
    else:
        stop = length
        all_stop = length
    extent = gl.maximum(stop - slot_first, 0)
    if earliest >= num_tokens:
        extent = 0
    num_tiles = gl.cdiv(extent, BLOCK_T)
    num_masked = num_tiles - gl.minimum(gl.maximum(all_stop - slot_first, 0), extent) // BLOCK_T
    return block, head, slot, slot_first, before, length, num_tokens, num_tiles, num_masked


@gluon.jit
def _row_pointers(
    tensor, block, head, slot, slot_stride, head_stride, token_stride,
    CONSUMER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where a consumer's rows of a block lie in queries or results [B, Hq, T, D], and which of the T they are."""
    rows = block * (2 * BLOCK_M) + CONSUMER * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    token = rows // GROUP
    query_head = (head * GROUP + rows % GROUP).to(gl.int64)
    pointers = tensor + slot.to(gl.int64) * slot_stride + (query_head * head_stride + token.to(gl.int64) * token_stride)
    return pointers[:, None] + d[None, :], token[:, None]


@gluon.jit
def _produce(
    num_taken, next_ring, next_full, next_empty, keys, values, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    lengths, num_new, firsts, num_query, num_blocks, num_heads, total_blocks,
    key_slot_stride, key_head_stride, key_token_stride, value_slot_stride, value_head_stride, value_token_stride,
    GROUP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr, CAUSAL: gl.constexpr, HAS_NUM_NEW: gl.constexpr, HAS_FIRSTS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_T, D], keys.dtype.element_ty)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_programs = gl.num_programs(0)
    number = gl.program_id(0)
    step = 0
    turn = 0
    per_slot = num_blocks * num_heads
    while number < total_blocks:
        slot = number // per_slot
        length = gl.load(lengths + slot).to(gl.int32)
        key_rows = keys + slot.to(gl.int64) * key_slot_stride
        value_rows = values + slot.to(gl.int64) * value_slot_stride
        if HAS_FIRSTS:
            slot_first = gl.load(firsts + slot).to(gl.int32)
            key_rows += slot_first.to(gl.int64) * key_token_stride
            value_rows += slot_first.to(gl.int64) * value_token_stride
            length -= slot_first
        # The maps lie where those of the slot before lay: the copies that read these must have ended.
        for back in gl.static_range(STAGES):
            last = gl.maximum(step - 1 - back, 0)
            mbarrier.wait(k_full.index(last % STAGES), (last // STAGES) & 1, pred=step - 1 - back >= 0)
            mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1, pred=step - 1 - back >= 0)
        rows = gl.maximum(length, 1)  # a map has no empty extent; nothing is copied by it then
        key_map = tma.make_tensor_descriptor(
            key_rows, [num_heads, rows, D], [key_head_stride, key_token_stride, 1], [1, BLOCK_T, D], layout
        )
        value_map = tma.make_tensor_descriptor(
            value_rows, [num_heads, rows, D], [value_head_stride, value_token_stride, 1], [1, BLOCK_T, D], layout
        )
        slot_stop = gl.minimum((slot + 1) * per_slot, total_blocks)
        while number < slot_stop:
            next_number = gl.atomic_add(num_taken, 1, sem="relaxed") + num_programs
            mbarrier.wait(next_empty.index(turn % 2), (turn // 2 & 1) ^ 1)
            next_ring.index(turn % 2).store(gl.full([1], 0, gl.int32, layout=one) + next_number)
            mbarrier.arrive(next_full.index(turn % 2), count=1)
            _, head, _, _, _, _, _, num_tiles, _ = _block_of(
                number, num_blocks, num_heads, lengths, num_new, firsts, num_query,
                GROUP, ROWS, BLOCK_T, HEADS_TOGETHER, CAUSAL, HAS_NUM_NEW, HAS_FIRSTS,
            )  # fmt: skip
            for i in range(num_tiles):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                token = (num_tiles - 1 - i) * BLOCK_T
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), key_map.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    key_map, [head, token, 0], k_full.index(stage), k_ring.index(stage).reshape([1, BLOCK_T, D])
                )
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), value_map.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    value_map, [head, token, 0], v_full.index(stage), v_ring.index(stage).reshape([1, BLOCK_T, D])
                )
                step += 1
            turn += 1
            number = next_number


@gluon.jit
def _softmax(s, highest, total, scale_log2, position, row_last, MASKED: gl.constexpr):
    """Take a tile's products into the running softmax (highest, total) of every row, in base 2."""
    if MASKED:
        s = gl.where(position[None, :] <= row_last[:, None], s, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(s, 1) * scale_log2)
    weights = gl.exp2(s * scale_log2 - new_highest[:, None])
    shrink = gl.exp2(highest - new_highest)
    total = total * shrink + gl.sum(weights, 1)
    return weights, new_highest, total, shrink


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, next_ring, next_full, next_empty, q_tiles, k_ring, v_ring,
    k_full, k_empty, v_full, v_empty, query, out, lengths, num_new, firsts,
    num_query, num_blocks, num_heads, total_blocks, scale_log2,
    query_slot_stride, query_head_stride, query_token_stride, out_slot_stride, out_head_stride, out_token_stride,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr, HEADS_TOGETHER: gl.constexpr, CAUSAL: gl.constexpr, HAS_NUM_NEW: gl.constexpr,
    HAS_FIRSTS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    q_tile = q_tiles.index(CONSUMER)
    t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, s_layout))
    none = gl.zeros([BLOCK_M, BLOCK_T], gl.float32, layout=s_layout)

    number = gl.program_id(0)
    block, head, slot, slot_first, before, length, num_tokens, num_tiles, num_masked = _block_of(
        number, num_blocks, num_heads, lengths, num_new, firsts, num_query,
        GROUP, ROWS, BLOCK_T, HEADS_TOGETHER, CAUSAL, HAS_NUM_NEW, HAS_FIRSTS,
    )  # fmt: skip
    pointers, token = _row_pointers(
        query, block, head, slot, query_slot_stride, query_head_stride, query_token_stride,
        CONSUMER, GROUP, D, BLOCK_M, row_layout,
    )  # fmt: skip
    q = gl.load(pointers, mask=token < num_tokens, other=0.0)
    step = 0
    turn = 0
    while number < total_blocks:
        q_tile.store(q)
        fence_async_shared()
        gl.thread_barrier()
        # Tokens are counted from the slot's first that counts, as the tiles are.
        if CAUSAL:
            rows = block * ROWS + CONSUMER * BLOCK_M + gl.arange(0, BLOCK_M, layout=s_rows)
            row_last = before + rows // GROUP - slot_first
        else:
            row_last = gl.full([BLOCK_M], 0, gl.int32, layout=s_rows) + (length - 1 - slot_first)
        highest = gl.full([BLOCK_M], -1.0e30, gl.float32, layout=s_rows)
        total = gl.zeros([BLOCK_M], gl.float32, layout=s_rows)
        acc = gl.zeros([BLOCK_M, D], gl.float32, layout=acc_layout)
        if num_tiles > 0:
            mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
            s = warpgroup_mma(q_tile, k_ring.index(step % STAGES).permute((1, 0)), none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
            p, highest, total, shrink = _softmax(
                s, highest, total, scale_log2, t + (num_tiles - 1) * BLOCK_T, row_last, True
            )
            mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=1 < num_tiles)
            for part in gl.static_range(2):
                if part == 0:
                    begin = 1
                    end = num_masked
                else:
                    begin = gl.maximum(num_masked, 1)
                    end = num_tiles
                for i in range(begin, end):
                    k_step = step + i
                    k_stage = k_step % STAGES
                    v_stage = (k_step - 1) % STAGES
                    v_phase = ((k_step - 1) // STAGES) & 1
                    s = warpgroup_mma(q_tile, k_ring.index(k_stage).permute((1, 0)), none, use_acc=False, is_async=True)
                    p_low = gl.convert_layout(p.to(dtype), p_layout)
                    mbarrier.wait(v_full.index(v_stage), v_phase)
                    acc_later = warpgroup_mma(p_low, v_ring.index(v_stage), acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    mbarrier.arrive(k_empty.index(k_stage), count=1)
                    p, highest, total, shrink = _softmax(
                        s, highest, total, scale_log2, t + (num_tiles - 1 - i) * BLOCK_T, row_last, part == 0
                    )
                    # Waiting for the next keys here and not where they are used keeps ptxas from moving the wait for
                    # the product with the values up before the softmax.
                    k_next = k_step + 1
                    mbarrier.wait(k_full.index(k_next % STAGES), (k_next // STAGES) & 1, pred=i + 1 < num_tiles)
                    acc = warpgroup_mma_wait(0, deps=(acc_later,))
                    mbarrier.arrive(v_empty.index(v_stage), count=1)
                    acc = acc * gl.convert_layout(shrink, acc_rows)[:, None]
            v_step = step + num_tiles - 1
            p_low = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(v_full.index(v_step % STAGES), (v_step // STAGES) & 1)
            acc_later = warpgroup_mma(p_low, v_ring.index(v_step % STAGES), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_later,))
            mbarrier.arrive(v_empty.index(v_step % STAGES), count=1)
        step += num_tiles

        # The next block's queries are on their way before this one's results leave.
        out_block = block
        out_head = head
        out_slot = slot
        out_tokens = num_tokens
        mbarrier.wait(next_full.index(turn % 2), turn // 2 & 1)
        number = gl.max(next_ring.index(turn % 2).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(next_empty.index(turn % 2), count=1)
        turn += 1
        block, head, slot, slot_first, before, length, num_tokens, num_tiles, num_masked = _block_of(
            gl.minimum(number, total_blocks - 1), num_blocks, num_heads, lengths, num_new, firsts, num_query,
            GROUP, ROWS, BLOCK_T, HEADS_TOGETHER, CAUSAL, HAS_NUM_NEW, HAS_FIRSTS,
        )  # fmt: skip
        pointers, token = _row_pointers(
            query, block, head, slot, query_slot_stride, query_head_stride, query_token_stride,
            CONSUMER, GROUP, D, BLOCK_M, row_layout,
        )  # fmt: skip
        q = gl.load(pointers, mask=(token < num_tokens) & (number < total_blocks), other=0.0)

        total = gl.convert_layout(total, acc_rows)
        q_tile.store((acc * (1.0 / gl.where(total > 0, total, 1.0))[:, None]).to(dtype))
        gl.thread_barrier()
        result = q_tile.load(row_layout)  # by way of shared memory, rows leave whole
        pointers, token = _row_pointers(
            out, out_block, out_head, out_slot, out_slot_stride, out_head_stride, out_token_stride,
            CONSUMER, GROUP, D, BLOCK_M, row_layout,
        )  # fmt: skip
        gl.store(pointers, gl.where(token < out_tokens, result, 0.0).to(dtype), mask=token < num_query)
        gl.thread_barrier()


@gluon.jit(do_not_specialize=["num_query", "num_blocks", "num_heads", "total_blocks"])  # one kernel for all prompts
def _prefill(
    num_taken, query, keys, values, lengths, num_new, firsts, out,
    num_query, num_blocks, num_heads, total_blocks, scale_log2,
    query_slot_stride, query_head_stride, query_token_stride, out_slot_stride, out_head_stride, out_token_stride,
    key_slot_stride, key_head_stride, key_token_stride, value_slot_stride, value_head_stride, value_token_stride,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr, CAUSAL: gl.constexpr, HAS_NUM_NEW: gl.constexpr, HAS_FIRSTS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query.dtype.element_ty
    ROWS: gl.constexpr = 2 * BLOCK_M
    ring_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, D], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    next_ring = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    next_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    next_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for entry in gl.static_range(2):
        mbarrier.init(next_full.index(entry), count=1)
        mbarrier.init(next_empty.index(entry), count=2)
    q_tiles = gl.allocate_shared_memory(dtype, [2, BLOCK_M, D], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, D], ring_layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, D], ring_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), next_ring, next_full, next_empty, q_tiles, k_ring, v_ring,
                k_full, k_empty, v_full, v_empty, query, out, lengths, num_new, firsts,
                num_query, num_blocks, num_heads, total_blocks, scale_log2,
                query_slot_stride, query_head_stride, query_token_stride,
                out_slot_stride, out_head_stride, out_token_stride,
                GROUP, D, BLOCK_M, ROWS, BLOCK_T, STAGES, HEADS_TOGETHER, CAUSAL, HAS_NUM_NEW, HAS_FIRSTS,
            )),
            (_consume, (
                gl.constexpr(1), next_ring, next_full, next_empty, q_tiles, k_ring, v_ring,
                k_full, k_empty, v_full, v_empty, query, out, lengths, num_new, firsts,
                num_query, num_blocks, num_heads, total_blocks, scale_log2,
                query_slot_stride, query_head_stride, query_token_stride,
                out_slot_stride, out_head_stride, out_token_stride,
                GROUP, D, BLOCK_M, ROWS, BLOCK_T, STAGES, HEADS_TOGETHER, CAUSAL, HAS_NUM_NEW, HAS_FIRSTS,
            )),
            (_produce, (
                num_taken, next_ring, next_full, next_empty, keys, values, k_ring, v_ring,
                k_full, k_empty, v_full, v_empty, lengths, num_new, firsts,
                num_query, num_blocks, num_heads, total_blocks,
                key_slot_stride, key_head_stride, key_token_stride,
                value_slot_stride, value_head_stride, value_token_stride,
                GROUP, D, ROWS, BLOCK_T, STAGES, HEADS_TOGETHER, CAUSAL, HAS_NUM_NEW, HAS_FIRSTS,
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
    causal: bool = True,
) -> torch.Tensor:
    """``prefill_attention`` on tensors, of a case that ``attention_choice`` says this can do."""
    batch, query_heads, num_query, dim = query.shape
    num_heads = keys.shape[1]
    group = query_heads // num_heads
    scale = dim**-0.5 if scale is None else scale
    if scale <= 0:  # the running maximum is taken of the products: the scale must keep their order
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    rows = Rows.of(keys, values)
    out = query.new_empty(batch, num_query, query_heads, dim).transpose(1, 2)
    num_blocks = triton.cdiv(num_query * group, 2 * _BLOCK_M)
    total_blocks = num_blocks * num_heads * batch
    num_programs = min(torch.cuda.get_device_properties(query.device).multi_processor_count, total_blocks)

    def run() -> None:
        triton.set_allocator(functools.partial(_tensor_maps, query.device))
        _prefill[(num_programs,)](
            lengths.new_zeros(1, dtype=torch.int32),
            query,
            keys,
            values,
            lengths,
            lengths if num_new is None else num_new,
            lengths if first is None else first,
            out,
            num_query,
            num_blocks,
            num_heads,
            total_blocks,
            scale * _LOG2E,
            *query.stride()[:3],
            *out.stride()[:3],
            *rows.key_strides,
            *rows.value_strides,
            GROUP=group,
            D=dim,
            BLOCK_M=_BLOCK_M,
            BLOCK_T=_BLOCK_T,
            STAGES=_STAGES,
            HEADS_TOGETHER=max(count for count in range(1, _MAX_HEADS_TOGETHER + 1) if num_heads % count == 0),
            CAUSAL=causal,
            HAS_NUM_NEW=num_new is not None,
            HAS_FIRSTS=first is not None,
            num_warps=4,
            maxnreg=168,
        )

    contextvars.copy_context().run(run)  # Triton's allocator is the context's: the caller's stays what it is
    return out


def _tensor_maps(device: torch.device, nbytes: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the tensor maps of a launch; torch's is aligned to 512 bytes and used by one stream after another."""
    return torch.empty(nbytes, dtype=torch.int8, device=device)
