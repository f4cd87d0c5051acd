"""skinny_linear: a few rows times several weight matrices in one launch, at the speed at which weights can be read.

The operators take any number of rows; `takes` tells where they are worth it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["MAX_ROWS", "MAX_WEIGHTS", "skinny_gated_linear", "skinny_linear", "skinny_linear_normed", "takes"]

MAX_WEIGHTS = 3
"""How many weight matrices one call takes."""
MAX_ROWS = 64
"""Up to how many rows these operators are faster than torch's."""

_library = torch.library.Library("torch_vtensor", "FRAGMENT")
_library.define(
    "skinny_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm, float eps, Tensor? residual) -> Tensor[]"
)
_library.define(
    "skinny_linear_normed(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm, float eps) "
    "-> (Tensor, Tensor)"
)
_library.define("skinny_gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? norm, float eps) -> Tensor")

skinny_linear = torch.ops.torch_vtensor.skinny_linear
"""``[x @ weight.T + bias for ...]``, with x RMS-normed before and a residual added behind, every weight read once.

Shapes:  x [..., K]; weights, 1 to 3 of them, [N_i, K]; biases [N_i] or None; norm [K],
    the norm's weight; residual [..., N], if there is one weight. Returns [..., N_i] each.
Numerics: the norm, products and sums in fp32; rounded once, and once more with a residual. The norm of several rows is
    rounded before and after it is multiplied by its weight, as transformers' models do.
"""
skinny_linear_normed = torch.ops.torch_vtensor.skinny_linear_normed
"""``sum = x @ weight.T + bias + residual``, and ``sum`` RMS-normed: what a block's products hand on to the next ones.

For several rows, whose norm is better computed once than by every program of the products after it.

Shapes:  x [..., K]; weight [N, K]; bias [N] or None; residual [..., N]; norm [N]. Returns [..., N] twice.
"""
skinny_gated_linear = torch.ops.torch_vtensor.skinny_gated_linear
"""``silu(x @ gate.T) * (x @ up.T)``, with x RMS-normed before.

Shapes:  x [..., K]; gate, up [N, K]; norm [K]. Returns [..., N].
"""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether these products are for x [..., K] and weight [N, K]: one row, or on a GPU up to 64 in 16 bits.

    A number of rows that is not known yet counts as one of those.
    """
    k = x.shape[-1]
    num_rows = x.numel() // k if k else 0
    if x.dtype is not weight.dtype or not weight.is_contiguous():
        return False
    if not isinstance(num_rows, torch.SymInt):
        if not 1 <= num_rows <= MAX_ROWS:
            return False
        if num_rows == 1:
            return True
    return x.device.type != "cuda" or has_kernel(x)


def has_kernel(x: Tensor) -> bool:
    """Whether there is a kernel for several rows like these, on a GPU."""
    return x.dtype.itemsize == 2 and x.shape[-1] % 64 == 0 and _has_tensor_cores(x.device.index or 0)


@functools.cache
def _has_tensor_cores(device_index: int) -> bool:
    """Of the kind that takes both 16-bit dtypes."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device_index) >= (8, 0)


def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _cuda(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> list[Tensor]:
    from torch_vtensor.ops.skinny_linear import rows_triton, triton

    if len(weights) > 1 and any(weight.data_ptr() % 16 for weight in weights):  # where one launch counts on it
        pairs = zip(weights, biases, strict=True)
        return [_cuda(x, [weight], [bias], norm, eps, None)[0] for weight, bias in pairs]
    normed = None if norm is None else triton.Norm(norm, 0.0, eps)
    if x.numel() == x.shape[-1]:
        return triton.launch(x, weights, biases, normed, residual)
    outs = rows_triton.launch(_rows(x), weights, biases, normed, None if residual is None else _rows(residual))
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


def _cpu(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> list[Tensor]:
    x = _normed(x, norm, eps)
    outs = [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return outs if residual is None else [residual + outs[0]]


def _normed_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def _normed_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from torch_vtensor.ops.skinny_linear import rows_triton
    from torch_vtensor.ops.skinny_linear.triton import Norm

    total, normed = rows_triton.launch_summed(_rows(x), weight, bias, _rows(residual), Norm(norm, 0.0, eps))
    return total.view(residual.shape), normed.view(residual.shape)


def _normed_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + functional.linear(x, weight, bias)
    return total, _normed(total, norm, eps)


def _gated_fake(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate.shape[0])


def _gated_cuda(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    from torch_vtensor.ops.skinny_linear import rows_triton, triton

    normed = None if norm is None else triton.Norm(norm, 0.0, eps)
    if x.numel() == x.shape[-1]:
        return triton.launch_gated(x, gate, up, normed)
    return rows_triton.launch_gated(_rows(x), gate, up, normed).view(*x.shape[:-1], gate.shape[0])


def _gated_cpu(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    x = _normed(x, norm, eps)
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).contiguous()


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return x if norm is None else functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * norm


_library.impl("skinny_linear", _fake, "Meta")
_library.impl("skinny_linear", _cuda, "CUDA")
_library.impl("skinny_linear", _cpu, "CPU")
_library.impl("skinny_linear_normed", _normed_fake, "Meta")
_library.impl("skinny_linear_normed", _normed_cuda, "CUDA")
_library.impl("skinny_linear_normed", _normed_cpu, "CPU")
_library.impl("skinny_gated_linear", _gated_fake, "Meta")
_library.impl("skinny_gated_linear", _gated_cuda, "CUDA")
_library.impl("skinny_gated_linear", _gated_cpu, "CPU")
