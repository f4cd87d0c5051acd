"""What goes on around a call of generate(): others do not move the memory of its cache; what it leaves goes back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch_vtensor.allocator.pools import all_schedulers
from torch_vtensor.generation._transformers_compat import CACHE_NAME, Cache

__all__ = ["generate", "in_use"]

# Not the leases of its tensors: while a cache grows it exchanges them, and attention reads between two appends.
_locks: weakref.WeakKeyDictionary[Cache, threading.RLock] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def in_use(cache: Cache) -> AbstractContextManager[Any]:
    """A block during which no other thread offloads the cache, or brings it back: they wait for its end."""
    with _lock:
        return _locks.setdefault(cache, threading.RLock())


def generate(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``, which uses the cache that it is given; one of its own is idle memory when it has ended."""
    cache = kwargs.get(CACHE_NAME)
    try:
        with in_use(cache) if isinstance(cache, Cache) else nullcontext():
            return stock(model, *args, **kwargs)
    finally:
        for scheduler in all_schedulers().values():
            scheduler.reap()
