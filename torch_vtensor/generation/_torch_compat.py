"""The private torch APIs that generation uses. Checked on torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import torch

__all__ = [
    "functorch_is_active",
    "has_global_hooks",
    "is_observed",
    "is_traced",
    "jit_is_tracing",
    "mark_any_size",
    "num_dispatch_modes",
]

_global_hooks = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
functorch_is_active = torch._C._are_functorch_transforms_active
jit_is_tracing = torch._C._is_tracing
num_dispatch_modes = torch._C._len_torch_dispatch_stack


def is_traced() -> bool:
    """Whether a torch.func transform or torch.jit.trace is running, in which tensors are not what they seem."""
    return functorch_is_active() or jit_is_tracing()


def is_observed() -> bool:
    """Whether a dispatch mode sees torch's operators, and nothing else of what happens to tensors."""
    return num_dispatch_modes() > 0


def has_global_hooks() -> bool:
    """Whether hooks run in the forward passes of every module."""
    return any(_global_hooks)


def mark_any_size(tensor: torch.Tensor, dim: int, from_zero: bool = False) -> None:
    """Have torch.compile take the size of this dim for any number, of two and more or ``from_zero``."""
    from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic

    (mark_unbacked if from_zero else maybe_mark_dynamic)(tensor, dim)
