"""skinny_linear: a few rows times several weight matrices in one launch, at the speed at which weights can be read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["MAX_WEIGHTS", "skinny_gated_linear", "skinny_linear"]

MAX_WEIGHTS = 3
"""How many weight matrices one call takes."""

_library = torch.library.Library("torch_vtensor", "FRAGMENT")
_library.define(
    "skinny_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm, float eps, Tensor? residual) -> Tensor[]"
)
_library.define("skinny_gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? norm, float eps) -> Tensor")

skinny_linear = torch.ops.torch_vtensor.skinny_linear
"""``[weight @ x + bias for ...]``, with x RMS-normed before and a residual added behind, every weight read once.

Shapes:  x [..., K], on CUDA one row; weights, 1 to 3 of them, [N_i, K]; biases [N_i] or None; norm [K], the norm's
    weight; residual [..., N], if there is one weight. Returns [..., N_i] each.
Numerics: the norm, products and sums in fp32; rounded once, and once more with a residual.
"""
skinny_gated_linear = torch.ops.torch_vtensor.skinny_gated_linear
"""``silu(gate @ x) * (up @ x)``, with x RMS-normed before.

Shapes:  x [..., K], on CUDA one row; gate, up [N, K]; norm [K]. Returns [..., N].
"""


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
    from torch_vtensor.ops.skinny_linear import triton

    return triton.launch(x, weights, biases, None if norm is None else triton.Norm(norm, 0.0, eps), residual)


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


def _gated_fake(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate.shape[0])


def _gated_cuda(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    from torch_vtensor.ops.skinny_linear import triton

    return triton.launch_gated(x, gate, up, None if norm is None else triton.Norm(norm, 0.0, eps))


def _gated_cpu(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    x = _normed(x, norm, eps)
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return x if norm is None else functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * norm


_library.impl("skinny_linear", _fake, "Meta")
_library.impl("skinny_linear", _cuda, "CUDA")
_library.impl("skinny_linear", _cpu, "CPU")
_library.impl("skinny_gated_linear", _gated_fake, "Meta")
_library.impl("skinny_gated_linear", _gated_cuda, "CUDA")
_library.impl("skinny_gated_linear", _gated_cpu, "CPU")
