"""skinny_linear for several rows on a GPU: tensor-core products that begin while the kernel before still runs.

A program owns some rows of a weight matrix, or a part of each of them where a matrix has too few for all
multiprocessors: reading all of the input for fewer rows would cost more than the weights. When a program has read its
last weights, one of the next kernel may take its place and wait for what is still computed. Parts are summed by one
program a row, in the same order every time, which also adds the residual and norms the sum for the products after it.
Above `MAX_ROWS` rows, and for 32-bit numbers, products are torch's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_vtensor.ops.attention_triton import can_begin_early
from torch_vtensor.ops.skinny_linear import MAX_ROWS, has_kernel
from torch_vtensor.ops.skinny_linear.triton import Norm, check_weights, choose, of_weights

__all__ = ["Config", "launch", "launch_gated", "launch_summed"]


@triton.jit
def _product(
    x,
    num_rows,
    weight,
    gate_weight,
    n,
    first,
    K: tl.constexpr,
    PART: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Weight rows n times x's rows, over PART of K elements from ``first`` on: [BLOCK_N, BLOCK_M] in fp32."""
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    begins = n.to(tl.int64) * K + first
    if EARLY:
        gdc_wait()
    tiles = weight + begins[:, None] + k[None, :]
    gate_tiles = gate_weight + begins[:, None] + k[None, :]
    columns = x + first + m[None, :] * K + k[:, None]
    is_row = (m < num_rows)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    gate_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        part = tl.load(columns + start, mask=is_row, other=0.0)
        acc = tl.dot(tl.load(tiles + start), part, acc)
        if HAS_GATE:
            gate_acc = tl.dot(tl.load(gate_tiles + start), part, gate_acc)
    if EARLY:
        gdc_launch_dependents()
    return acc, gate_acc


@triton.jit
def _linear(
    x,
    num_rows,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    width_0,
    width_1,
    width_2,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    HAS_BIAS_0: tl.constexpr,
    HAS_BIAS_1: tl.constexpr,
    HAS_BIAS_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    part = tl.program_id(1)
    block, weight, bias, out, width, has_bias = choose(
        weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, width_0, width_1, width_2,
        NUM_WEIGHTS, HAS_BIAS_0, HAS_BIAS_1, HAS_BIAS_2, BLOCK_N,
    )  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(n, width - 1)
    PART: tl.constexpr = K // PARTS
    acc, _ = _product(
        x, num_rows, weight, weight, inside, part * PART, K, PART, False,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EARLY,
    )  # fmt: skip
    if HAS_BIAS_0 or HAS_BIAS_1 or HAS_BIAS_2:
        acc += tl.load(bias + inside, mask=has_bias & (n < width), other=0.0).to(tl.float32)[:, None]
    m = tl.arange(0, BLOCK_M)
    to = out + (part * num_rows + m[None, :]) * width + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < num_rows)[None, :])


@triton.jit
def _gated_linear(
    x,
    gate_weight,
    up_weight,
    out,
    num_rows,
    width,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    up, gate = _product(
        x, num_rows, up_weight, gate_weight, tl.minimum(n, width - 1), 0, K, K, True,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EARLY,
    )  # fmt: skip
    result = gate / (1 + tl.exp(-gate)) * up
    m = tl.arange(0, BLOCK_M)
    to = out + m[None, :] * width + n[:, None]
    tl.store(to, result.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < num_rows)[None, :])


@triton.jit
def _sum(
    parts,
    bias,
    residual,
    norm,
    norm_eps,
    out,
    normed,
    width,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row: the sum of its parts and the residual is stored, and stored once more RMS-normed."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    ok = n < width
    place = row * width + n
    if EARLY:
        gdc_wait()
    if PARTS > 0:
        total = tl.zeros([BLOCK_N], tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(parts + part * tl.num_programs(0) * width + place, mask=ok, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
        result = total.to(out.dtype.element_ty)
        result += tl.load(residual + place, mask=ok, other=0.0)
        tl.store(out + place, result, mask=ok)
    else:
        result = tl.load(residual + place, mask=ok, other=0.0)
    if HAS_NORM:
        scale = tl.load(norm + n, mask=ok, other=0.0)
        wide = result.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + norm_eps)
        tl.store(normed + place, (wide * factor).to(normed.dtype.element_ty) * scale, mask=ok)


class Config(NamedTuple):
    """How a product is cut: weight rows a program, elements a step, steps under way, parts of a row, warps."""

    block_n: int
    block_k: int
    stages: int
    parts: int
    num_warps: int


def _config(width: int, k: int, may_split: bool) -> Config:
    """Measured on an H100: benchmarks/bench_products.py."""
    parts = 4 if may_split and width < 6144 and k % 512 == 0 else 1
    return Config(64 if parts > 1 or width >= 4096 else 32, 64 if k % 128 else 128, 4, parts, 4)


def _gated_config(k: int) -> Config:
    return Config(64, 64 if k % 128 else 128, 3, 1, 4)


def _fitting(config: Config, x: Tensor, num_tiles: int) -> Config:
    """The same in fewer or shorter steps where a multiprocessor has too little shared memory."""
    room = _shared_bytes(x.device.index or 0)
    while (num_tiles * config.block_n + _block_m(x)) * config.block_k * config.stages * x.itemsize > room:
        if config.stages > 2:
            config = config._replace(stages=config.stages - 1)
        else:
            config = config._replace(block_k=config.block_k // 2)
    return config


@functools.cache
def _shared_bytes(device_index: int) -> int:
    driver: Any = triton.runtime.driver.active
    return int(driver.utils.get_device_properties(device_index)["max_shared_mem"])


def _block_m(x: Tensor) -> int:
    return max(16, int(triton.next_power_of_2(len(x))))


def launch(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    early: bool = True,
    config: Config | None = None,
) -> list[Tensor]:
    """``[norm(x) @ weight.T + bias + residual ...]`` of up to `MAX_WEIGHTS` weights and x [M, K], contiguous.

    Args:
        residual: [M, N] of the only weight.
        early: begin while the kernel before still runs, where the device can; it must not be writing the weights.
    """
    check_weights(weights)
    x = _normed(x, norm, early)
    if residual is not None:
        return [launch_summed(x, weights[0], biases[0], residual, None, early, config)[0]]
    if not _has_kernel(x):
        return [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    width = sum(weight.shape[0] for weight in weights)
    return _products(x, weights, biases, early, config or _config(width, x.shape[1], may_split=False))


def launch_summed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Norm | None = None,
    early: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``x @ weight.T + bias + residual`` [M, N], and the same normed if there is a norm."""
    if not _has_kernel(x):
        return _sum_rows(functional.linear(x, weight)[None], bias, residual, norm, early)
    config = config or _config(weight.shape[0], x.shape[1], may_split=True)
    # What is one part is rounded: the bias belongs inside.
    inside, bias = (bias, None) if config.parts == 1 else (None, bias)
    parts = _products(x, [weight], [inside], early, config)[0]
    return _sum_rows(parts.view(-1, *residual.shape), bias, residual, norm, early)


def launch_gated(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    norm: Norm | None = None,
    early: bool = True,
    config: Config | None = None,
) -> Tensor:
    """``silu(norm(x) @ gate_weight.T) * (norm(x) @ up_weight.T)``."""
    x = _normed(x, norm, early)
    if not _has_kernel(x):
        return functional.silu(functional.linear(x, gate_weight)) * functional.linear(x, up_weight)
    num_rows, k = x.shape
    width = gate_weight.shape[0]
    config = _fitting(config or _gated_config(k), x, num_tiles=2)
    out = x.new_empty(num_rows, width)
    _gated_linear[(triton.cdiv(width, config.block_n),)](
        x, gate_weight, up_weight, out, num_rows, width, K=k, **_options(config, x, early)
    )
    return out


def _products(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], early: bool, config: Config
) -> list[Tensor]:
    """Of every weight [M, N], or, of several parts, [parts, M, N] in fp32."""
    num_rows, k = x.shape
    config = _fitting(config, x, num_tiles=1)
    shape, dtype = ((config.parts, num_rows), torch.float32) if config.parts > 1 else ((num_rows,), x.dtype)
    outs = [x.new_empty(*shape, weight.shape[0], dtype=dtype) for weight in weights]
    widths, arguments, flags = of_weights(weights, biases, outs)
    _linear[(sum(triton.cdiv(width, config.block_n) for width in widths), config.parts)](
        x, num_rows, *arguments, K=k, PARTS=config.parts, **flags, **_options(config, x, early)
    )
    return outs


def _has_kernel(x: Tensor) -> bool:
    return len(x) <= MAX_ROWS and has_kernel(x)


def _normed(x: Tensor, norm: Norm | None, early: bool) -> Tensor:
    return x if norm is None else _sum_rows(None, None, x, norm, early)[1]


def _sum_rows(
    parts: Tensor | None, bias: Tensor | None, residual: Tensor, norm: Norm | None, early: bool
) -> tuple[Tensor, Tensor]:
    """The sum of parts [parts, M, N], bias [N] and residual [M, N], and the same normed."""
    num_rows, width = residual.shape
    out = residual if parts is None else torch.empty_like(residual)
    normed = out if norm is None else torch.empty_like(residual)
    early = early and can_begin_early(residual.device.index or 0)
    block_n = triton.next_power_of_2(width)
    _sum[(num_rows,)](
        residual if parts is None else parts,
        residual if bias is None else bias,
        residual,
        residual if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        out,
        normed,
        width,
        PARTS=0 if parts is None else len(parts),
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        BLOCK_N=block_n,
        EARLY=early,
        num_warps=max(1, min(16, block_n // 512)),
        **({"launch_pdl": True} if early else {}),
    )
    return out, normed


def _options(config: Config, x: Tensor, early: bool) -> dict[str, Any]:
    early = early and can_begin_early(x.device.index or 0)
    return {
        "BLOCK_M": _block_m(x),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "EARLY": early,
        "num_warps": config.num_warps,
        **({"launch_pdl": True} if early else {}),
    }
