"""Which models and settings our loop serves; every other manager is transformers' own, with the reason."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from torch_vtensor.allocator.statistics import count_with
from torch_vtensor.errors import DriverError
from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.decode.support import why_never as why_no_step
from torch_vtensor.generation.decode.support import windows_of
from torch_vtensor.generation.modules import has_foreign_hooks
from torch_vtensor.generation.serving._transformers_compat import why_other_interface

__all__ = ["counters", "is_out_of_memory", "log", "why_never", "why_stock"]

log = logging.getLogger(__name__)
counters: Counter[str] = Counter()
"""What was served since the process began, and why managers were left to transformers, by reason."""
count_with("serving", lambda: counters)

_OF_PAGED_CACHES = {
    "num_blocks": "a paged cache of a given size is asked for (num_blocks): set a budget instead",
    "max_memory_percent": "a paged cache of a given size is asked for (max_memory_percent): set a budget instead",
    "cpu_offload_space": "offloading to the host is asked for (cpu_offload_space)",
    "return_logprobs": "log probabilities are asked for (return_logprobs)",
}
_SCHEDULERS = ("fifo", "prefill_first")


def why_never(model: Any) -> str | None:
    """Why batches of this model are always left to transformers, or None."""
    if (reason := why_other_interface() or why_no_step(model) or prefix_cache.why_never(model)) is not None:
        return reason
    if windows_of(model) is None:
        return "attention that is neither full nor to a sliding window"
    if model.config.get_text_config(decoder=True) is not model.config:
        return "a model of more than text"
    if getattr(model, "_device_mesh", None) is not None:
        return "the model is spread over several devices"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether physical memory, of whichever allocator, or the addresses for it have run out."""
    if isinstance(error, DriverError):
        return error.is_out_of_memory
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in said or "can't allocate memory" in said


def why_stock(model: Any, config: Any) -> str | None:
    """Why a manager with this continuous batching configuration is left to transformers, if the model is not."""
    if has_foreign_hooks(model.modules()):
        return "the model has forward hooks"
    for name, reason in _OF_PAGED_CACHES.items():
        if getattr(config, name, None):
            return reason
    scheduler = getattr(config, "scheduler_type", "fifo")
    return None if scheduler in _SCHEDULERS else f"another scheduler is asked for ({scheduler})"
