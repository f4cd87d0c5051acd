"""What goes on around a call of generate(): others do not move memory under it, and what it leaves is idle at once."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch_vtensor.allocator import tiers
from torch_vtensor.allocator.pools import all_schedulers
from torch_vtensor.errors import DriverError
from torch_vtensor.generation._transformers_compat import CACHE_NAME, Cache
from torch_vtensor.generation.layer_states import layers_on
from torch_vtensor.generation.modules import devices_of_layers

__all__ = ["call_with", "generate", "in_use"]

# Not the leases of its tensors: while a cache grows it exchanges them, and attention reads between two appends.
_locks: weakref.WeakKeyDictionary[Cache, threading.RLock] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def _start_afresh_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _locks.clear()


os.register_at_fork(after_in_child=_start_afresh_in_child)


def in_use(cache: Cache) -> AbstractContextManager[Any]:
    """A block during which no other thread offloads the cache, or brings it back: they wait for its end."""
    with _lock:
        return _locks.setdefault(cache, threading.RLock())


@contextmanager
def call_with(cache: Any) -> Iterator[None]:
    """A block for a call of generate() on a cache, or on one of its own: offload, prefetch and sleep wait for its end.

    Effects: memory that it leaves is parked, behind the device's work.
    """
    try:
        with in_use(cache) if isinstance(cache, Cache) else nullcontext(), tiers.call():
            yield
    finally:
        for scheduler in all_schedulers().values():
            try:
                scheduler.reap()
            except (DriverError, RuntimeError) as error:  # whatever becomes of the call matters more
                _log.info("what a call left on %s is parked later: %s", scheduler.pool.device, error)


def generate(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``, during which nobody moves the memory that it uses."""
    with call_with(kwargs.get(CACHE_NAME)), layers_on(devices_of_layers(model)):
        return stock(model, *args, **kwargs)
