"""enable() and disable(): the seams by which every generate() loop gets growable memory.

Nothing is patched at import. enable() replaces a few methods of transformers' own cache layers, keeping their classes
(``type(layer)``, exports and checks stay as they are), and disable() puts exactly the stock functions back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch_vtensor.allocator.pools import set_default_budget
from torch_vtensor.generation import layers
from torch_vtensor.generation._transformers_compat import Cache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["METHODS", "disable", "enable", "enabled", "is_enabled", "replacement"]

METHODS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (Cache, "update", layers.cache_update),
    (DynamicLayer, "update", layers.update),
    (DynamicSlidingWindowLayer, "update", layers.update),
    (DynamicLayer, "reorder_cache", layers.reorder_cache),
    (DynamicLayer, "batch_select_indices", layers.batch_select_indices),
    (DynamicLayer, "batch_repeat_interleave", layers.batch_repeat_interleave),
    (DynamicLayer, "reset", layers.reset),
    (DynamicLayer, "__deepcopy__", layers.deepcopy),
    (DynamicLayer, "__getstate__", layers.getstate),
)
"""Which method of which class is replaced by what."""

_lock = threading.RLock()
_switched_on = False
_num_blocks = 0
_stock: list[tuple[type, str, Any]] = []  # what was replaced; None where the class had no method of its own


def replacement(owner: type, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` as a method of ``owner``, given the stock method that it stands for."""
    if name in ("__deepcopy__", "__getstate__"):
        return ours
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(stock, self, *args, **kwargs)

    return method


_REPLACEMENTS = {(owner, name): replacement(owner, name, ours) for owner, name, ours in METHODS}


def enable(*, budget_bytes: int | None = None) -> None:
    """Give every HuggingFace ``generate()`` loop in this process growable KV memory, without changing its results.

    From now on the layers of every ``DynamicCache``, existing ones included, append in place. Calling it again only
    changes the budget. ``explain(model)`` says what each layer of a model will do; ``stats()`` what they did.

    Args:
        budget_bytes: the most physical memory a device may hold for caches; default: TORCH_VTENSOR_BUDGET_BYTES, or
            what the device has.

    Raises: ValueError for a budget of less than one byte.
    """
    global _switched_on
    if budget_bytes is not None:
        set_default_budget(budget_bytes)
    with _lock:
        _switched_on = True
        _install()


def disable() -> None:
    """Put transformers' own methods back, also inside ``enabled()`` blocks; running caches go on as stock ones.

    Effects: the tokens of running caches are copied to ordinary memory.
    """
    global _switched_on, _num_blocks
    with _lock:
        _switched_on, _num_blocks = False, 0
        _remove()


@contextmanager
def enabled(*, budget_bytes: int | None = None) -> Iterator[None]:
    """``enable()`` for a block. Blocks may nest and overlap between threads; the last one out puts things back."""
    global _num_blocks
    if budget_bytes is not None:
        set_default_budget(budget_bytes)
    with _lock:
        _num_blocks += 1
        _install()
    try:
        yield
    finally:
        with _lock:
            _num_blocks = max(_num_blocks - 1, 0)
            if _num_blocks == 0 and not _switched_on:
                _remove()


def is_enabled() -> bool:
    """Whether transformers' cache layers are over virtual memory right now."""
    return bool(_stock)


def _install() -> None:
    if _stock:
        return
    for owner, name in _REPLACEMENTS:
        _stock.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, _REPLACEMENTS[owner, name])


def _remove() -> None:
    while _stock:
        owner, name, stock = _stock.pop()
        if stock is None:
            delattr(owner, name)
        else:
            setattr(owner, name, stock)
        if not _stock:
            layers.leave_all(lambda layer: not getattr(layer, "is_explicit", False))
