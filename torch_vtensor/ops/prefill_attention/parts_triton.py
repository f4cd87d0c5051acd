"""How few blocks of rows over many tokens fill a device: the tokens that a block sees are cut into parts.

The host knows the blocks of rows, not the lengths: it starts ``num_programs`` programs. Every one of them reads all
lengths, comes to the same division, and takes one part; those for which none is left end at once. ``merge`` makes one
result of a block's parts, in their order: the outcome depends on the lengths, not on who was first.

    block 0, head 0     | block 0, head 1     | block 1, head 0 ...
    p0      p1      p2  | p3      p4      p5  | p6
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from torch_vtensor.ops.attention_triton import finish

__all__ = ["merge", "seen", "share_out"]


@triton.jit
def seen(
    lengths,
    num_new,
    firsts,
    slot,
    block,
    num_query,
    window,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NUM_NEW: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """What blocks of rows see: tokens [start, stop), some of them not by every row.

    Also: tokens of the sequence, how many of these are rows, the first that counts, and the block's first and last row.
    """
    length = tl.load(lengths + slot).to(tl.int32)
    num_tokens = tl.zeros_like(length) + num_query
    if HAS_NUM_NEW:
        num_tokens = tl.load(num_new + slot).to(tl.int32)
    if HAS_NEW:
        length += num_tokens
    first = tl.zeros_like(length)
    if HAS_FIRSTS:
        first = tl.load(firsts + slot).to(tl.int32)
    # Rows stand in the order of their positions, so the first and the last row bound what all and what any of them see.
    earliest = block * BLOCK_M // GROUP
    latest = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_tokens - 1)
    start = first
    if HAS_WINDOW:
        start = tl.maximum(start, length - num_tokens + earliest - window + 1)
    stop = length
    if CAUSAL:
        stop = length - num_tokens + latest + 1
    stop = tl.where(earliest < num_tokens, stop, start)
    return start, stop, length, num_tokens, first, earliest, latest


@triton.jit
def share_out(
    lengths,
    num_new,
    firsts,
    num_slots,
    num_query,
    num_blocks,
    window,
    num_at_once,
    num_programs,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NUM_NEW: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Into how many parts each line, a slot's block of rows, is cut in every head, and where its programs end.

    Of 32 lengths of parts it takes the one that is done first, by counting steps of BLOCK_T tokens: as often as the
    device must be filled for all parts, the longest part's steps. The shortest length tried gives every program the
    same share; at twice that there are programs enough, if there are two a block and head.
    """
    lines = tl.arange(0, BLOCK_LINES)
    slot = tl.minimum(lines // num_blocks, num_slots - 1)
    start, stop, _, _, _, _, _ = seen(
        lengths, num_new, firsts, slot, lines % num_blocks, num_query, window,
        GROUP, BLOCK_M, CAUSAL, HAS_NEW, HAS_NUM_NEW, HAS_FIRSTS, HAS_WINDOW,
    )  # fmt: skip
    steps = tl.where(lines < num_slots * num_blocks, tl.maximum(tl.cdiv(stop - start, BLOCK_T), 1), 0)
    shortest = tl.maximum(tl.cdiv(tl.sum(steps, 0) * HEADS, num_programs), 2)
    trial = tl.arange(0, 32)
    part_steps = shortest + tl.cdiv(3 * shortest * trial, 31)
    parts = tl.cdiv(steps[:, None], part_steps[None, :])
    num_parts = tl.sum(parts, 0) * HEADS
    longest = tl.max(tl.cdiv(steps[:, None], tl.maximum(parts, 1)), 0)
    most = tl.max(parts, 0)
    # Beside its steps, a part costs about two for its beginning and end; merging costs two, and one for eight parts.
    time = tl.cdiv(num_parts, num_at_once) * (longest + 2) + tl.where(most > 1, 2 + tl.cdiv(most, 8), 0)
    time = tl.where(num_parts <= num_programs, time, 2**24)
    best = tl.min(time * 32 + trial, 0) % 32
    parts = tl.cdiv(steps, shortest + tl.cdiv(3 * shortest * best, 31))
    return parts, tl.cumsum(parts, 0) * HEADS


@triton.jit(do_not_specialize=["num_slots", "num_query", "num_blocks", "window", "num_at_once", "num_programs"])
def merge(
    partials,
    lengths,
    num_new,
    firsts,
    sinks,
    out,
    num_slots,
    num_query,
    num_blocks,
    window,
    num_at_once,
    num_programs,
    out_slot_stride,
    out_head_stride,
    out_token_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NUM_NEW: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Make results of the partial ones, which lie in the order of programs: ROWS rows of a head, PARTS at a time."""
    parts, ends = share_out(
        lengths, num_new, firsts, num_slots, num_query, num_blocks, window, num_at_once, num_programs,
        HEADS, GROUP, BLOCK_M, BLOCK_T, BLOCK_LINES, CAUSAL, HAS_NEW, HAS_NUM_NEW, HAS_FIRSTS, HAS_WINDOW,
    )  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    slot = tl.program_id(2).to(tl.int64)
    is_line = tl.arange(0, BLOCK_LINES) == slot * num_blocks + first_row // BLOCK_M
    num_parts = tl.sum(tl.where(is_line, parts, 0), 0)
    begin = tl.sum(tl.where(is_line, ends, 0), 0) - num_parts * (HEADS - head)
    num_tokens = num_query
    if HAS_NUM_NEW:
        num_tokens = tl.load(num_new + slot).to(tl.int32)
    if EARLY:
        gdc_wait()
    if num_parts > 1:
        rows = first_row % BLOCK_M + tl.arange(0, ROWS)
        highest = tl.full([ROWS], -1.0e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        for base in tl.range(0, num_parts, PARTS):
            part = base + tl.arange(0, PARTS)
            highest, total, acc = _take_parts(
                partials, begin + part, part < num_parts, rows, highest, total, acc, BLOCK_M, BLOCK_DV
            )
        row = first_row + tl.arange(0, ROWS)
        token = row // GROUP
        query_head = (head * GROUP + row % GROUP).to(tl.int64)
        row_ok = token < num_tokens
        result = finish(highest, total, acc, sinks + query_head, row_ok, HAS_SINKS)
        dv = tl.arange(0, BLOCK_DV)
        pointers = out + slot * out_slot_stride + query_head * out_head_stride + token.to(tl.int64) * out_token_stride
        tl.store(
            pointers[:, None] + dv[None, :],
            tl.where(row_ok[:, None], result, 0.0).to(out.dtype.element_ty),
            mask=(token < num_query)[:, None] & (dv[None, :] < DV),
        )


@triton.jit
def _take_parts(partials, indices, is_part, rows, highest, total, acc, PARTIAL_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Merge ``rows`` of the partial results ``indices`` that are parts into the running softmax of these rows."""
    dv = tl.arange(0, BLOCK_DV)
    source = partials + indices.to(tl.int64) * (PARTIAL_M * (BLOCK_DV + 2))
    each = source[:, None] + rows[None, :]
    is_part = is_part[:, None]
    part_highest = tl.load(each, mask=is_part, other=-1.0e30, cache_modifier=".cg")
    part_total = tl.load(each + PARTIAL_M, mask=is_part, other=0.0, cache_modifier=".cg")
    part_acc = tl.load(
        source[:, None, None] + 2 * PARTIAL_M + rows[None, :, None] * BLOCK_DV + dv[None, None, :],
        mask=is_part[:, :, None],
        other=0.0,
        cache_modifier=".cg",
    )
    new_highest = tl.maximum(highest, tl.max(part_highest, 0))
    shrink = tl.exp2(highest - new_highest)
    factor = tl.exp2(part_highest - new_highest[None, :])
    total = total * shrink + tl.sum(part_total * factor, 0)
    acc = acc * shrink[:, None] + tl.sum(part_acc * factor[:, :, None], 0)
    return new_highest, total, acc
