"""Rotary embeddings of prompts on a GPU: queries and keys turned in one launch, each read and written once.

What inductor makes of the same for any number of tokens divides by that number for each element, and takes three times
as long. Steps turn theirs inside of attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["rotate"]

_BLOCK_H = 8


@triton.jit
def _turn(x, out, heads, d, mask, cos_low, cos_high, sin_low, sin_high, half, stride_h):
    low = x + heads.to(tl.int64)[:, None] * stride_h + d[None, :]
    first = tl.load(low, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(low + half, mask=mask, other=0.0).to(tl.float32)
    to = out + heads[:, None] * (2 * half) + d[None, :]
    tl.store(to, first * cos_low[None, :] - second * sin_low[None, :], mask=mask)
    tl.store(to + half, second * cos_high[None, :] + first * sin_high[None, :], mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate(
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    num_tokens,
    query_slot_stride,
    query_head_stride,
    query_token_stride,
    key_slot_stride,
    key_head_stride,
    key_token_stride,
    cos_slot_stride,
    cos_token_stride,
    sin_slot_stride,
    sin_token_stride,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, token = row // num_tokens, row % num_tokens
    d = tl.arange(0, BLOCK_D)
    ok = d < HALF
    cos += slot * cos_slot_stride + token * cos_token_stride + d
    sin += slot * sin_slot_stride + token * sin_token_stride + d
    cos_low = tl.load(cos, mask=ok, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + HALF, mask=ok, other=0.0).to(tl.float32)
    sin_low = tl.load(sin, mask=ok, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + HALF, mask=ok, other=0.0).to(tl.float32)
    query_blocks: tl.constexpr = (QUERY_HEADS + BLOCK_H - 1) // BLOCK_H
    if block < query_blocks:
        heads = block * BLOCK_H + tl.arange(0, BLOCK_H)
        query += slot * query_slot_stride + token * query_token_stride
        query_out += row * (QUERY_HEADS * 2 * HALF)
        mask = (heads < QUERY_HEADS)[:, None] & ok[None, :]
        _turn(query, query_out, heads, d, mask, cos_low, cos_high, sin_low, sin_high, HALF, query_head_stride)
    else:
        heads = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        key += slot * key_slot_stride + token * key_token_stride
        key_out += row * (KEY_HEADS * 2 * HALF)
        mask = (heads < KEY_HEADS)[:, None] & ok[None, :]
        _turn(key, key_out, heads, d, mask, cos_low, cos_high, sin_low, sin_high, HALF, key_head_stride)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, Hq, T, D] and keys [B, H, T, D], each half turned against the other by cos and sin [B or 1, T, D].

    Computed in float32 and rounded once. Results lie token by token, as [B, T, H, D].

    Args:
        query, key: on one GPU, of any strides but the last one's, which is 1.
    """
    batch, query_heads, num_tokens, dim = query.shape
    key_heads = key.shape[1]
    query_out = query.new_empty(batch, num_tokens, query_heads, dim)
    key_out = key.new_empty(batch, num_tokens, key_heads, dim)
    if batch * num_tokens == 0:
        return query_out.transpose(1, 2), key_out.transpose(1, 2)
    blocks = triton.cdiv(query_heads, _BLOCK_H) + triton.cdiv(key_heads, _BLOCK_H)
    with torch.cuda.device(query.device):
        _rotate[batch * num_tokens, blocks](
            query,
            key,
            cos,
            sin,
            query_out,
            key_out,
            num_tokens,
            *query.stride()[:3],
            *key.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            sin.stride(0) if sin.shape[0] > 1 else 0,
            sin.stride(1),
            query_heads,
            key_heads,
            dim // 2,
            _BLOCK_H,
            triton.next_power_of_2(dim // 2),
            num_warps=4,
        )
    return query_out.transpose(1, 2), key_out.transpose(1, 2)
