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
from torch_vtensor.settings import load_settings

__all__ = ["REPLACEMENTS", "disable", "enable", "enabled", "is_enabled"]

_METHODS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (Cache, "update", layers.cache_update),
    (DynamicLayer, "update", layers.update),
    (DynamicSlidingWindowLayer, "update", layers.update_window),
    (DynamicLayer, "reorder_cache", layers.reorder_cache),
    (DynamicLayer, "batch_select_indices", layers.batch_select_indices),
    (DynamicLayer, "batch_repeat_interleave", layers.batch_repeat_interleave),
    (DynamicLayer, "reset", layers.reset),
    (DynamicLayer, "__deepcopy__", layers.deepcopy),
    (DynamicLayer, "__getstate__", layers.getstate),
)

_lock = threading.RLock()
_switched_on = False
_blocks: set[object] = set()
_has_own_budget = False
_stock: list[tuple[type, str, Any]] = []  # what was replaced; None where the class had no method of its own


def _replacement(owner: type, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` as a method of ``owner``, given the stock method that it stands for."""
    if name in ("__deepcopy__", "__getstate__"):
        return ours
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(stock, self, *args, **kwargs)

    return method


REPLACEMENTS = {(owner, name): _replacement(owner, name, ours) for owner, name, ours in _METHODS}
"""The method that stands for each one of transformers', made while transformers' own are in place."""


def enable(*, budget_bytes: int | None = None) -> None:
    """Give every HuggingFace ``generate()`` loop in this process growable KV memory, without changing its results.

    From now on the layers of every ``DynamicCache``, existing ones included, append in place. Calling it again only
    changes the budget. ``explain(model)`` says what each layer of a model will do; ``stats()`` what they did.

    Args:
        budget_bytes: the most physical memory a device may hold for caches, explicit ones included, until nothing is
            enabled any more; default: TORCH_VTENSOR_BUDGET_BYTES, or what the device has.

    Raises: ValueError for a budget of less than one byte.
    """
    global _switched_on
    with _lock:
        _install(budget_bytes)
        _switched_on = True


def disable() -> None:
    """Put transformers' own methods back, also inside ``enabled()`` blocks; running caches go on as stock ones.

    Effects: the tokens of running caches are copied to ordinary memory.
    """
    global _switched_on
    with _lock:
        _switched_on = False
        _blocks.clear()
        _remove()


@contextmanager
def enabled(*, budget_bytes: int | None = None) -> Iterator[None]:
    """``enable()`` for a block. Blocks may nest and overlap between threads; the last one out puts things back."""
    block = object()
    with _lock:
        _install(budget_bytes)
        _blocks.add(block)
    try:
        yield
    finally:
        with _lock:
            _blocks.discard(block)  # disable() may have ended it
            if not _blocks and not _switched_on:
                _remove()


def is_enabled() -> bool:
    """Whether transformers' cache layers are over virtual memory right now."""
    return bool(_stock)


def _install(budget_bytes: int | None) -> None:
    global _has_own_budget
    if budget_bytes is not None:
        set_default_budget(budget_bytes)
        _has_own_budget = True
    if not _stock:
        for (owner, name), method in REPLACEMENTS.items():
            _stock.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, method)


def _remove() -> None:
    global _has_own_budget
    if _has_own_budget:
        set_default_budget(load_settings().budget_bytes)
        _has_own_budget = False
    if not _stock:
        return
    while _stock:
        owner, name, stock = _stock.pop()
        if stock is None:
            delattr(owner, name)
        else:
            setattr(owner, name, stock)
    layers.leave_all(lambda layer: not getattr(layer, "is_explicit", False))
