"""Growable KV memory for HuggingFace generate(), and compiled parallel training, as a PyTorch plugin."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_vtensor.settings import load_settings

__version__ = "0.1.0"

# Imported on first use: importing the package loads neither transformers nor a driver, and touches no GPU.
_HOME = {
    "Session": "generation.session",
    "VTensor": "allocator.vtensor",
    "VTensorCache": "generation.cache",
    "memory": "generation.cache",
    "offload": "generation.cache",
    "prefetch": "generation.cache",
    "memory_map": "allocator.memory_map",
    "memory_pool": "allocator.torch_pool",
    "record_memory": "allocator.memory_map",
    "metrics": "allocator.metrics",
    "sleep": "allocator.sleeping",
    "wake": "allocator.sleeping",
    "enable": "generation.enable",
    "enabled": "generation.enable",
    "disable": "generation.enable",
    "is_enabled": "generation.enable",
    "explain": "generation.report",
    "stats": "allocator.statistics",
    "trim": "allocator.statistics",
    "empty_cache": "allocator.statistics",
    "prefix_salt": "generation.tenant",
    "AsleepError": "errors",
    "CapacityError": "errors",
    "OffloadLimitError": "errors",
    "OutOfPagesError": "errors",
    "VTensorError": "errors",
}
__all__ = [
    "AsleepError",
    "CapacityError",
    "OffloadLimitError",
    "OutOfPagesError",
    "Session",
    "VTensor",
    "VTensorCache",
    "VTensorError",
    "__version__",
    "disable",
    "empty_cache",
    "enable",
    "enabled",
    "explain",
    "is_enabled",
    "memory",
    "memory_map",
    "memory_pool",
    "metrics",
    "offload",
    "prefetch",
    "prefix_salt",
    "record_memory",
    "sleep",
    "stats",
    "trim",
    "wake",
]

if TYPE_CHECKING:
    from torch_vtensor.allocator.memory_map import memory_map, record_memory
    from torch_vtensor.allocator.metrics import metrics
    from torch_vtensor.allocator.sleeping import sleep, wake
    from torch_vtensor.allocator.statistics import empty_cache, stats, trim
    from torch_vtensor.allocator.torch_pool import memory_pool
    from torch_vtensor.allocator.vtensor import VTensor
    from torch_vtensor.errors import (
        AsleepError,
        CapacityError,
        OffloadLimitError,
        OutOfPagesError,
        VTensorError,
    )
    from torch_vtensor.generation.cache import VTensorCache, memory, offload, prefetch
    from torch_vtensor.generation.enable import disable, enable, enabled, is_enabled
    from torch_vtensor.generation.report import explain
    from torch_vtensor.generation.session import Session
    from torch_vtensor.generation.tenant import prefix_salt


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"torch_vtensor has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)


def _is_command() -> bool:
    """Whether it is `torch-vtensor` or `python -m torch_vtensor` that imports the package, and no program."""
    started = sys.argv[0] if sys.argv else ""  # "-m" as long as Python looks for the module to run
    return Path(started).name == "torch-vtensor" or (started == "-m" and "torch_vtensor" in sys.orig_argv)


try:
    _settings = load_settings()
except ValueError as error:
    if not _is_command():
        raise
    sys.stderr.write(f"{error}\n")  # a traceback would show how commands are found
    sys.exit(2)
logging.getLogger(__name__).setLevel(_settings.log_level)
if _settings.enable:  # this, and only this, makes importing the package import transformers
    importlib.import_module(f"{__name__}.generation.enable").enable()
