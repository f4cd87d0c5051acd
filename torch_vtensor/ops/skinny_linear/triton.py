"""skinny_linear for one row on a GPU: matrix-vector products that keep memory busy from their first cycle.

A program owns a few rows of a weight matrix. Weights depend on no kernel before, so the first part of them is read
before waiting for the input: while the kernel before still runs, this one's memory traffic has begun. What comes before
and after a product in a transformer block costs a kernel each if done apart, and next to nothing here: the norm of the
input (a program reads all of the input anyway), the gate, the residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_vtensor.ops.attention_triton import can_begin_early
from torch_vtensor.ops.skinny_linear import MAX_WEIGHTS

__all__ = ["Config", "Norm", "check_weights", "choose", "launch", "launch_gated", "of_weights"]


@triton.jit
def _product(
    x,
    norm,
    norm_offset,
    norm_eps,
    weight,
    gate_weight,
    row_ok,
    n,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows n of weight @ x and of gate_weight @ x, in fp32."""
    k = tl.arange(0, BLOCK_K)
    offsets = n.to(tl.int64)[:, None] * K + k[None, :]
    mask = row_ok[:, None] & (k[None, :] < K)
    tile = tl.load(weight + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    gate_tile = tile
    if HAS_GATE:
        gate_tile = tl.load(gate_weight + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gate_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        ok = start + k < K
        if start > 0:
            mask = row_ok[:, None] & ok[None, :]
            tile = tl.load(weight + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
            if HAS_GATE:
                gate_tile = tl.load(gate_weight + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
        row = tl.load(x + start + k, mask=ok, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += row * row
            row *= tl.load(norm + start + k, mask=ok, other=0.0).to(tl.float32) + norm_offset
        acc += tile.to(tl.float32) * row[None, :]
        if HAS_GATE:
            gate_acc += gate_tile.to(tl.float32) * row[None, :]
    result = tl.sum(acc, 1)
    gate = result
    if HAS_GATE:
        gate = tl.sum(gate_acc, 1)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + norm_eps)
        result *= factor
        gate *= factor
    return result, gate


@triton.jit
def choose(
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    num_rows_0,
    num_rows_1,
    num_rows_2,
    NUM_WEIGHTS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    HAS_BIAS_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The program's block of one of the weights, which stand one behind the other, and what belongs to that."""
    block = tl.program_id(0)
    blocks_0 = tl.cdiv(num_rows_0, BLOCK_N)
    weight = weight_0
    bias = bias_0
    out = out_0
    num_rows = num_rows_0
    has_bias = HAS_BIAS_0
    if NUM_WEIGHTS > 1:
        blocks_1 = tl.cdiv(num_rows_1, BLOCK_N)
        if block >= blocks_0:
            weight = weight_1
            bias = bias_1
            out = out_1
            num_rows = num_rows_1
            has_bias = HAS_BIAS_1
            if NUM_WEIGHTS > 2:
                if block >= blocks_0 + blocks_1:
                    weight = weight_2
                    bias = bias_2
                    out = out_2
                    num_rows = num_rows_2
                    has_bias = HAS_BIAS_2
                    block -= blocks_1
            block -= blocks_0
        weight = tl.multiple_of(weight, 16)
    return block, weight, bias, out, num_rows, has_bias


@triton.jit
def _linear(
    x,
    norm,
    norm_offset,
    norm_eps,
    residual,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    num_rows_0,
    num_rows_1,
    num_rows_2,
    K: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    HAS_BIAS_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    block, weight, bias, out, num_rows, has_bias = choose(
        weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, num_rows_0, num_rows_1, num_rows_2,
        NUM_WEIGHTS, HAS_BIAS_0, HAS_BIAS_1, HAS_BIAS_2, BLOCK_N,
    )  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = n < num_rows
    result, _ = _product(
        x, norm, norm_offset, norm_eps, weight, weight, row_ok, n, K, HAS_NORM, False, BLOCK_N, BLOCK_K, EARLY
    )
    if HAS_BIAS_0 or HAS_BIAS_1 or HAS_BIAS_2:
        result += tl.load(bias + n, mask=row_ok & has_bias, other=0.0).to(tl.float32)
    result = result.to(out.dtype.element_ty)
    if HAS_RESIDUAL:
        result += tl.load(residual + n, mask=row_ok)
    tl.store(out + n, result, mask=row_ok)


@triton.jit
def _gated_linear(
    x,
    norm,
    norm_offset,
    norm_eps,
    gate_weight,
    up_weight,
    out,
    num_rows,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = n < num_rows
    up, gate = _product(
        x, norm, norm_offset, norm_eps, up_weight, gate_weight, row_ok, n, K, HAS_NORM, True, BLOCK_N, BLOCK_K, EARLY
    )
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + n, result.to(out.dtype.element_ty), mask=row_ok)


class Config(NamedTuple):
    """How a product is cut: rows of the matrix a program, elements a step, warps."""

    block_n: int
    block_k: int
    num_warps: int


def _block_k(k: int) -> int:
    """A whole row at once as long as that fits into registers."""
    block_k: int = triton.next_power_of_2(k) if k <= 4096 else 2048
    return block_k


def _config(k: int, has_norm: bool) -> Config:
    """Measured on an H200 (benchmarks/results). Every program sums a norm, so there are fewer of them then."""
    block_k = _block_k(k)
    if has_norm:
        return Config(4, block_k, 8 if block_k > 2048 else 4)
    return Config(2 if k <= 4096 else 4, min(block_k, 2048), 4)


def _gated_config(k: int) -> Config:
    return Config(2, _block_k(k), 4)


class Norm(NamedTuple):
    """RMS norm of the input: scale by (weight + offset) over the root of the mean square plus eps."""

    weight: Tensor
    offset: float
    eps: float


def launch(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    early: bool = True,
    config: Config | None = None,
) -> list[Tensor]:
    """``[weight @ norm(x) + bias + residual ...]`` for one row x and up to `MAX_WEIGHTS` weights.

    Args:
        residual: a row as long as the only weight has rows.
        early: begin while the kernel before still runs, where the device can; it must not be writing the weights.
    """
    k = _check(x, weights)
    config = config or _config(k, norm is not None)
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    num_rows, arguments, flags = of_weights(weights, biases, outs)
    _linear[(sum(triton.cdiv(n, config.block_n) for n in num_rows),)](
        x,
        *_norm_arguments(x, norm),
        x if residual is None else residual,
        *arguments,
        K=k,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        **flags,
        **_options(config, early and can_begin_early(x.device.index or 0)),
    )
    return outs


def launch_gated(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    norm: Norm | None = None,
    early: bool = True,
    config: Config | None = None,
) -> Tensor:
    """``silu(gate_weight @ norm(x)) * (up_weight @ norm(x))`` for one row x."""
    k = _check(x, [gate_weight, up_weight])
    config = config or _gated_config(k)
    num_rows = gate_weight.shape[0]
    out = x.new_empty(*x.shape[:-1], num_rows)
    _gated_linear[(triton.cdiv(num_rows, config.block_n),)](
        x,
        *_norm_arguments(x, norm),
        gate_weight,
        up_weight,
        out,
        num_rows,
        K=k,
        HAS_NORM=norm is not None,
        **_options(config, early and can_begin_early(x.device.index or 0)),
    )
    return out


def _check(x: Tensor, weights: list[Tensor]) -> int:
    k = x.shape[-1]
    if x.numel() != k or not x.is_contiguous():
        raise ValueError(f"x is {tuple(x.shape)} with strides {x.stride()}; on CUDA it is one contiguous row")
    check_weights(weights)
    return k


def of_weights(
    weights: list[Tensor], biases: list[Tensor | None], outs: list[Tensor]
) -> tuple[list[int], list[Any], dict[str, Any]]:
    """How many rows each weight has, and what `choose` takes: its arguments, filled up, and what is told by name."""
    num_rows = [weight.shape[0] for weight in weights]
    given = [weight if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
    padding = MAX_WEIGHTS - len(weights)
    arguments = [it for several in (weights, given, outs, num_rows) for it in (*several, *[several[0]] * padding)]
    has_bias = [bias is not None for bias in biases] + [False] * padding
    flags = {f"HAS_BIAS_{index}": has for index, has in enumerate(has_bias)}
    return num_rows, arguments, {"NUM_WEIGHTS": len(weights), **flags}


def check_weights(weights: list[Tensor]) -> None:
    """Raise a ValueError for more weights than one launch takes."""
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"{len(weights)} weights were given; one launch takes 1 to {MAX_WEIGHTS}")


def _norm_arguments(x: Tensor, norm: Norm | None) -> tuple[Any, ...]:
    return (x, 0.0, 0.0) if norm is None else (norm.weight, float(norm.offset), norm.eps)


def _options(config: Config, early: bool) -> dict[str, Any]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EARLY": early,
        "num_warps": config.num_warps,
        **({"launch_pdl": True} if early else {}),
    }
