"""The private torch APIs that generation uses. Checked on torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import torch

__all__ = ["is_traced"]

_functorch_is_active = torch._C._are_functorch_transforms_active
_jit_is_tracing = torch._C._is_tracing


def is_traced() -> bool:
    """Whether a torch.func transform or torch.jit.trace is running, in which tensors are not what they seem."""
    return _functorch_is_active() or _jit_is_tracing()
