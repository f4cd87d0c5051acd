"""The attention kernels' common part in Triton: query rows against the tokens of one sequence, read from its memory.

A program holds up to BLOCK_M query rows of one key/value head: row r is query ``r // G`` of query head ``r % G`` in
the head's group, so a token's keys are read once for the whole group. Rows have their own visible interval of
positions; loads beyond the interval that any row sees are masked, and a masked load touches no memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["Rows", "attend", "can_begin_early", "finish", "keep_part", "slot_pointer"]


class Rows(NamedTuple):
    """Where keys and values lie, in elements: strides of slots, heads and tokens, and for tables the rows' offsets.

    The addresses are None for tensors; else int64 tensors [B] of each slot's address, 16-byte aligned, to which
    ``key_offset`` and ``value_offset`` are added, and slot strides mean nothing.
    """

    key_strides: tuple[int, int, int]
    value_strides: tuple[int, int, int]
    key_addresses: torch.Tensor | None = None
    value_addresses: torch.Tensor | None = None
    key_offset: int = 0
    value_offset: int = 0

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Rows:
        """Of tensors [B, H, C, D] and [B, H, C, Dv]."""
        return cls(_strides(keys), _strides(values))


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


@functools.cache
def can_begin_early(device_index: int) -> bool:
    """Whether a kernel may begin while the one before still runs: NVIDIA GPUs from Hopper on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index) >= (9, 0)


@triton.jit
def slot_pointer(tensor, addresses, slot, stride, offset, HAS_ADDRESSES: tl.constexpr):
    """Where a slot's row 0 lies: in a strided tensor, or at an address from a table."""
    if HAS_ADDRESSES:
        # Without the hint the compiler neither vectorises nor pipelines loads through an address that it loaded.
        pointer = tl.load(addresses + slot).to(tensor.dtype)
        return tl.multiple_of(pointer, 16) + offset
    return tensor + slot.to(tl.int64) * stride


@triton.jit
def attend(
    q,
    keys,
    values,
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
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take tokens [start, stop) into the running softmax (highest, total, acc) of every row, in base 2.

    Row r sees positions row_first[r] to row_last[r], both included.
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    t = tl.arange(0, BLOCK_T)
    for begin in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        position = begin + t
        offset = position.to(tl.int64)
        key_pointers = keys + offset[None, :] * key_token_stride + d[:, None]
        value_pointers = values + offset[:, None] * value_token_stride + dv[None, :]
        if MASKED:
            there = position < stop
            k = tl.load(key_pointers, mask=there[None, :] & (d[:, None] < D), other=0.0)
            v = tl.load(value_pointers, mask=there[:, None] & (dv[None, :] < DV), other=0.0)
        elif BLOCK_D == D and BLOCK_DV == DV:
            k = tl.load(key_pointers)
            v = tl.load(value_pointers)
        else:
            k = tl.load(key_pointers, mask=d[:, None] < D, other=0.0)
            v = tl.load(value_pointers, mask=dv[None, :] < DV, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        if HAS_SOFTCAP:
            # tanh; scores and softcap both carry the factor log2(e), which cancels in the quotient
            scores = softcap * (1 - 2 / (1 + tl.exp2(scores / softcap * 2.8853900817779268)))
        if MASKED:
            visible = (position[None, :] >= row_first[:, None]) & (position[None, :] <= row_last[:, None])
            scores = tl.where(visible & there[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest
    return highest, total, acc


@triton.jit
def finish(highest, total, acc, sink_pointers, row_ok, HAS_SINKS: tl.constexpr):
    """The rows' outputs; a row that saw nothing is 0. A sink is a score that takes part in the sum alone."""
    if HAS_SINKS:
        sink = tl.load(sink_pointers, mask=row_ok, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        with_sink = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - with_sink)
        total = total * shrink + tl.exp2(sink - with_sink)
        acc = acc * shrink[:, None]
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def keep_part(
    partials, index, highest, total, acc, PARTIAL_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Write the running softmax of the first PARTIAL_M of BLOCK_M rows as partial result ``index``."""
    rows = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    into = partials + index.to(tl.int64) * (PARTIAL_M * (BLOCK_DV + 2))
    is_kept = rows < PARTIAL_M
    tl.store(into + rows, highest, mask=is_kept)
    tl.store(into + PARTIAL_M + rows, total, mask=is_kept)
    tl.store(into + 2 * PARTIAL_M + rows[:, None] * BLOCK_DV + dv[None, :], acc, mask=is_kept[:, None])
