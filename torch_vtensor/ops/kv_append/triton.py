"""kv_append on a GPU: one launch for the new keys and values of all sequences, each at its own length."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torch_vtensor.ops.attention_triton import Rows, slot_pointer

__all__ = ["launch", "launch_rows"]

_NO_CAPACITY = 2**31 - 1


@triton.jit
def _append(
    keys,
    values,
    key_addresses,
    value_addresses,
    new_keys,
    new_values,
    lengths,
    num_new,
    num_tokens,
    num_heads,
    capacity,
    key_offset,
    value_offset,
    key_slot_stride,
    key_head_stride,
    key_token_stride,
    value_slot_stride,
    value_head_stride,
    value_token_stride,
    new_key_slot_stride,
    new_key_head_stride,
    new_key_token_stride,
    new_value_slot_stride,
    new_value_head_stride,
    new_value_token_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_ADDRESSES: tl.constexpr,
    HAS_NUM_NEW: tl.constexpr,
):
    """One token of one sequence a program."""
    slot = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    if HAS_NUM_NEW:
        num_tokens = tl.load(num_new + slot).to(tl.int32)
    position = tl.load(lengths + slot).to(tl.int64) + token
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    key_rows = slot_pointer(keys, key_addresses, slot, key_slot_stride, key_offset, HAS_ADDRESSES)
    value_rows = slot_pointer(values, value_addresses, slot, value_slot_stride, value_offset, HAS_ADDRESSES)
    for first_head in range(0, num_heads, BLOCK_H):
        head = (first_head + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
        is_there = (head < num_heads) & (token < num_tokens) & (position < capacity)
        key = tl.load(
            new_keys
            + slot * new_key_slot_stride
            + token * new_key_token_stride
            + head * new_key_head_stride
            + d[None, :],
            mask=is_there & (d[None, :] < D),
        )
        value = tl.load(
            new_values
            + slot * new_value_slot_stride
            + token * new_value_token_stride
            + head * new_value_head_stride
            + dv[None, :],
            mask=is_there & (dv[None, :] < DV),
        )
        tl.store(
            key_rows + position * key_token_stride + head * key_head_stride + d[None, :],
            key,
            mask=is_there & (d[None, :] < D),
        )
        tl.store(
            value_rows + position * value_token_stride + head * value_head_stride + dv[None, :],
            value,
            mask=is_there & (dv[None, :] < DV),
        )


def launch(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    num_new: torch.Tensor | None = None,
) -> None:
    """``kv_append`` on tensors."""
    launch_rows(keys, values, Rows.of(keys, values), key, value, lengths, num_new, keys.shape[2])


def launch_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    num_new: torch.Tensor | None = None,
    capacity: int = _NO_CAPACITY,
) -> None:
    """``kv_append`` on rows that lie anywhere: of ``keys`` and ``values`` only the dtype matters then."""
    batch, num_heads, num_tokens, dim = key.shape
    value_dim = value.shape[3]
    if key.numel() == 0:
        return
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    _append[(batch * num_tokens,)](
        keys,
        values,
        lengths if rows.key_addresses is None else rows.key_addresses,
        lengths if rows.value_addresses is None else rows.value_addresses,
        key,
        value,
        lengths,
        lengths if num_new is None else num_new,
        num_tokens,
        num_heads,
        capacity,
        rows.key_offset,
        rows.value_offset,
        *rows.key_strides,
        *rows.value_strides,
        *key.stride()[:3],
        *value.stride()[:3],
        D=dim,
        DV=value_dim,
        BLOCK_H=min(triton.next_power_of_2(num_heads), max(1, 2048 // max(block_d, block_dv))),
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        HAS_ADDRESSES=rows.key_addresses is not None,
        HAS_NUM_NEW=num_new is not None,
    )
