"""Which program of the Hopper prompt kernel does what: blocks of 128 query rows, handed out one by one.

slots      the slots, the longest first, so that none of the long ones begins last; how many blocks were taken
block_of  what a block is: which rows of which heads of which slot, and which tiles of tokens they see
say       the producer's warp tells the consumers' what the next block is, through a ring in shared memory;
hear      they need not find out themselves, for which they have neither the time nor the registers
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["BLOCK_ROWS", "FIELDS", "RING", "block_of", "field", "hear", "say", "slots_by_length"]

BLOCK_ROWS = gl.constexpr(128)
"""Query rows of a block."""
RING = gl.constexpr(4)
"""Blocks that may be said and not done."""
FIELDS = gl.constexpr(9)
"""Numbers that say what a block is."""
_SLOTS_A_PROGRAM = 16


def slots_by_length(
    lengths: torch.Tensor, num_new: torch.Tensor | None, counts_new: bool, is_used: bool
) -> torch.Tensor:
    """Behind a count of blocks taken, zero: the slots [B] in the order of their lengths, the longest first.

    Args:
        counts_new: whether ``num_new`` is to be added to ``lengths``.
        is_used: False for a kernel that looks at none of it, which is then not written.
    """
    batch = len(lengths)
    slots = lengths.new_empty(1 + batch, dtype=torch.int32)
    if is_used:
        _plan[(triton.cdiv(batch, _SLOTS_A_PROGRAM),)](
            slots,
            lengths,
            lengths if num_new is None else num_new,
            batch,
            BLOCK=max(_SLOTS_A_PROGRAM, triton.next_power_of_2(batch)),
            SLOTS=_SLOTS_A_PROGRAM,
            ADDS_NEW=counts_new and num_new is not None,
        )
    return slots


@triton.jit(do_not_specialize=["num_slots"])
def _plan(slots, lengths, num_new, num_slots, BLOCK: tl.constexpr, SLOTS: tl.constexpr, ADDS_NEW: tl.constexpr):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    other = tl.arange(0, BLOCK)
    length = tl.load(lengths + slot, mask=slot < num_slots, other=0).to(tl.int32)
    other_length = tl.load(lengths + other, mask=other < num_slots, other=0).to(tl.int32)
    if ADDS_NEW:
        length += tl.load(num_new + slot, mask=slot < num_slots, other=0).to(tl.int32)
        other_length += tl.load(num_new + other, mask=other < num_slots, other=0).to(tl.int32)
    comes_before = (other_length[None, :] > length[:, None]) | (
        (other_length[None, :] == length[:, None]) & (other[None, :] < slot[:, None])
    )
    rank = tl.sum((comes_before & (other < num_slots)[None, :]).to(tl.int32), 1)
    tl.store(slots + 1 + rank, slot, mask=slot < num_slots)
    if tl.program_id(0) == 0:
        tl.store(slots, 0)


@gluon.jit
def block_of(
    number, total_blocks, num_blocks, num_heads, slots, lengths, num_new, firsts, num_query, window,
    GROUP: gl.constexpr, BLOCK_T: gl.constexpr, HEADS_TOGETHER: gl.constexpr, CAUSAL: gl.constexpr,
    ADDS_NEW: gl.constexpr, HAS_NUM_NEW: gl.constexpr, HAS_FIRSTS: gl.constexpr, HAS_WINDOW: gl.constexpr,
    IS_PLANNED: gl.constexpr,
):  # fmt: skip
    """What there is to do for a block; tokens are counted from the slot's first that counts.

    Blocks go slot by slot and HEADS_TOGETHER heads at a time, and of these the last rows first: neighbours take about
    as long as each other, and read the same keys and values at about the same time.

    Returns block, head, slot, num_tokens: of the slot's rows; last: the position that the first of these sees last;
    start: of the first tile; num_tiles; num_masked: how many from the last on some row does not see whole; num_left:
    how many from the first on some row's window begins after.
    """
    per_heads = num_blocks * HEADS_TOGETHER
    number = gl.minimum(number, total_blocks - 1)
    heads = number // per_heads
    number = number % per_heads
    block = num_blocks - 1 - number // HEADS_TOGETHER
    head = heads % (num_heads // HEADS_TOGETHER) * HEADS_TOGETHER + number % HEADS_TOGETHER
    slot = heads // (num_heads // HEADS_TOGETHER)
    if IS_PLANNED:
        slot = gl.load(slots + 1 + slot)
    length = gl.load(lengths + slot).to(gl.int32)
    num_tokens = num_query
    if HAS_NUM_NEW:
        num_tokens = gl.load(num_new + slot).to(gl.int32)
    if ADDS_NEW:
        length += num_tokens
    if HAS_FIRSTS:
        length -= gl.load(firsts + slot).to(gl.int32)
    before = length - num_tokens
    earliest = block * BLOCK_ROWS // GROUP
    latest = gl.minimum((block * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP, num_tokens - 1)
    if CAUSAL:
        stop = before + latest + 1
        all_stop = before + earliest + 1
        last = before
    else:
        stop = length
        all_stop = length
        last = length - 1
    start = 0
    num_left = 0
    if HAS_WINDOW:
        start = gl.maximum(before + earliest - window + 1, 0)
        num_left = gl.cdiv(gl.maximum(before + latest - window + 1 - start, 0), BLOCK_T)
    if earliest >= num_tokens:
        stop = start
    extent = gl.maximum(stop - start, 0)
    num_tiles = gl.cdiv(extent, BLOCK_T)
    num_masked = num_tiles - gl.minimum(gl.maximum(all_stop - start, 0), extent) // BLOCK_T
    return block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left


@gluon.jit
def say(
    ring, full, empty, turn, is_block, block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left
):  # fmt: skip
    """Tell the consumers what the ``turn``-th block of this program is, once there is room; -1 is the end."""
    zero = gl.full([1], 0, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    entry = turn % RING
    mbarrier.wait(empty.index(entry), (turn // RING & 1) ^ 1)
    ring.index(entry * FIELDS).store(zero + gl.where(is_block, block, -1))
    ring.index(entry * FIELDS + 1).store(zero + head)
    ring.index(entry * FIELDS + 2).store(zero + slot)
    ring.index(entry * FIELDS + 3).store(zero + num_tokens)
    ring.index(entry * FIELDS + 4).store(zero + last)
    ring.index(entry * FIELDS + 5).store(zero + start)
    ring.index(entry * FIELDS + 6).store(zero + num_tiles)
    ring.index(entry * FIELDS + 7).store(zero + num_masked)
    ring.index(entry * FIELDS + 8).store(zero + num_left)
    mbarrier.arrive(full.index(entry), count=1)


@gluon.jit
def field(ring, entry, number: gl.constexpr):
    """One of the numbers of a block that was said, for four warps."""
    return gl.max(ring.index(entry * FIELDS + number).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def hear(ring, full, turn):
    """Wait for the ``turn``-th block; it stays in the ring until each consumer has arrived at its ``empty``."""
    entry = turn % RING
    mbarrier.wait(full.index(entry), turn // RING & 1)
    block = field(ring, entry, 0)
    head = field(ring, entry, 1)
    slot = field(ring, entry, 2)
    num_tokens = field(ring, entry, 3)
    last = field(ring, entry, 4)
    start = field(ring, entry, 5)
    num_tiles = field(ring, entry, 6)
    num_masked = field(ring, entry, 7)
    num_left = field(ring, entry, 8)
    return block, head, slot, num_tokens, last, start, num_tiles, num_masked, num_left
