"""The private torch APIs that generation uses. Checked on torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import torch

__all__ = ["has_global_hooks", "is_traced"]

_global_hooks = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
_functorch_is_active = torch._C._are_functorch_transforms_active
_jit_is_tracing = torch._C._is_tracing


def is_traced() -> bool:
    """Whether a torch.func transform or torch.jit.trace is running, in which tensors are not what they seem."""
    return _functorch_is_active() or _jit_is_tracing()


def has_global_hooks() -> bool:
    """Whether hooks run in the forward passes of every module."""
    return any(_global_hooks)
