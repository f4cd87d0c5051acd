"""Clipping gradients by their norm over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from torch_vtensor.compile.sharded_tensor import ShardedTensor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a model that is under a plan: the norm is that of one process.

    Every element counts once, however many ranks keep it. Every rank has to call it, with the same parameters.

    Returns the norm before clipping.

    Raises:  RuntimeError for a norm that is not finite, if asked to.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, ShardedTensor)]
    # What is whole on every rank is the same on each: it is added up here alone.
    whole = [gradient for gradient in gradients if not isinstance(gradient, ShardedTensor)]
    power = _power(whole, norm_type)
    if any(isinstance(parameter, ShardedTensor) for parameter in given):
        mine = _power([part for gradient in sharded for part in _counted_here(gradient)], norm_type)
        mine = mine.to(given[0].device)
        is_largest = math.isinf(norm_type)
        dist.all_reduce(mine, dist.ReduceOp.MAX if is_largest else dist.ReduceOp.SUM)
        power = torch.maximum(power.to(mine.device), mine) if is_largest else power.to(mine.device) + mine
    norm = power if math.isinf(norm_type) else power ** (1 / norm_type)
    norm = norm.to(gradients[0].dtype) if gradients else norm
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {norm.item()}, and they cannot be clipped to another. "
            f"Skip this step, or pass error_if_nonfinite=False."
        )
    torch.nn.utils.clip_grads_with_norm_(given, max_norm, norm, foreach)
    return norm


def _counted_here(gradient: ShardedTensor) -> Iterable[Tensor]:
    """The elements that this rank counts."""
    layout = gradient.keeps
    for rank, box in layout.counted():
        if rank == layout.rank:
            yield gradient.local[box.within(layout.parts[rank])]


def _power(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The norm to the power of its order, or the largest element."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = [
        torch.linalg.vector_norm(tensor, norm_type, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]
    together = torch.stack([norm.to(norms[0].device) for norm in norms]).double()
    norm: Tensor = torch.linalg.vector_norm(together, norm_type)
    return norm if math.isinf(norm_type) else norm**norm_type
