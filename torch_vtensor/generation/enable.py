"""enable() and disable(): the seams by which every generate() loop gets growable memory.

Nothing is patched at import. enable() replaces a few methods of transformers' own cache layers, keeping their classes
(``type(layer)``, exports and checks stay as they are), and disable() puts exactly the stock functions back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch_vtensor.allocator.pools import set_default_budget
from torch_vtensor.generation import asked, in_use, layers
from torch_vtensor.generation import attention as fast_attention
from torch_vtensor.generation import prefix_cache as prefixes
from torch_vtensor.generation._transformers_compat import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    GenerationMixin,
)
from torch_vtensor.settings import load_settings

__all__ = ["REPLACEMENTS", "disable", "enable", "enabled", "is_enabled", "keeps_prefixes", "stop_batching"]

_METHODS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (Cache, "update", layers.cache_update),
    (Cache, "batch_select_indices", layers.change_batch),
    (Cache, "batch_repeat_interleave", layers.change_batch),
    (EncoderDecoderCache, "batch_select_indices", layers.change_batch),
    (EncoderDecoderCache, "batch_repeat_interleave", layers.change_batch),
    (DynamicLayer, "update", layers.update),
    (DynamicSlidingWindowLayer, "update", layers.update_window),
    (DynamicLayer, "reorder_cache", layers.reorder_cache),
    (DynamicLayer, "batch_select_indices", layers.batch_select_indices),
    (DynamicLayer, "batch_repeat_interleave", layers.batch_repeat_interleave),
    (DynamicLayer, "reset", layers.reset),
    (DynamicLayer, "__deepcopy__", layers.deepcopy),
    (DynamicLayer, "__getstate__", layers.getstate),
)

_SWITCH = object()  # stands for enable(), as each enabled() block has an object of its own
_lock = threading.RLock()
_switched_on = False
_blocks: set[object] = set()
_compiles: set[object] = set()  # who of those asked for compiled decoding
_attends: set[object] = set()  # who of those asked for fast attention
_reuses: set[object] = set()  # who of those asked for prefixes to be reused
_budgets: dict[object, int | str] = {}  # the budgets that they asked for, the latest last
_managers: weakref.WeakSet[Any] = weakref.WeakSet()  # of continuous batching, those over our memory
_stock: list[tuple[type, str, Any]] = []  # what was replaced; None where the class had no method of its own


def _replacement(owner: type, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` as a method of ``owner``, given the stock method that it stands for."""
    if name in ("__deepcopy__", "__getstate__"):
        return ours
    stock = getattr(owner, name)
    if ours is layers.cache_update:  # runs for every layer of every step: without another call around it
        return layers.cache_update(stock)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(stock, self, *args, **kwargs)

    return method


_BATCHING = "init_continuous_batching"
_BATCHES = next(owner for owner in GenerationMixin.__mro__ if _BATCHING in vars(owner))

REPLACEMENTS = {(owner, name): _replacement(owner, name, ours) for owner, name, ours in _METHODS}
"""The method that stands for each one of transformers', made while transformers' own are in place."""


def enable(
    *,
    compile: bool = False,
    attention: str | None = None,
    prefix_cache: bool = False,
    budget_bytes: int | str | None = None,
) -> None:
    """Give every HuggingFace ``generate()`` loop in this process growable KV memory, without changing its results.

    From now on the layers of every ``DynamicCache``, existing ones included, append in place, and ``generate_batch()``
    runs over such memory. Calling it again only changes the settings. ``explain(model)`` says what each layer of a
    model will do; ``stats()`` what they did.

    Args:
        compile: decode by captured graphs of the compiled model wherever that is possible: greedy search and sampling
            of decoder-only models. The first call for a model and batch size compiles, which takes about half a minute.
            Sums are rounded in another order than by the stock kernels.
        attention: "fast" lets every model of transformers' attention registry attend by ``torch_vtensor.ops``, in
            forwards without gradients, wherever a mask or a model asks for nothing that those lack; ``stats()`` counts
            where they did, and why not. Sums are rounded in another order. Default: transformers' own attention.
        prefix_cache: let every call begin with the longest prefix of its prompts that an earlier call of the same model
            has left, shared with it by pages: only the rest is run, whose sums may be rounded in another order. Calls
            that bring a cache of their own are left alone. ``stats()`` counts how much was reused, and why not;
            ``prefix_salt`` keeps tenants apart. What is kept gives way to other caches, and ends with the model, with
            a change of its weights (other than through ``parameter.data``), or with ``disable()``.
        budget_bytes: the most physical memory a device may hold for caches, explicit ones included, in bytes or as a
            text such as "8GiB"; of several budgets asked for the latest holds. Default: as before, at first
            TORCH_VTENSOR_BUDGET_BYTES or what the device has.

    Raises: ValueError for a budget of less than one byte or a text that is no size, or another ``attention``.
    """
    global _switched_on
    _check_attention(attention)
    if compile:
        _load_sample()
    with _lock:
        _set_budget(_SWITCH, budget_bytes)
        _install()
        _switched_on = True
        _set_compile(_SWITCH, compile)
        _set_attention(_SWITCH, attention)
        _set_reuse(_SWITCH, prefix_cache)


def disable() -> None:
    """Put transformers' own methods back, also inside ``enabled()`` blocks; running caches go on as stock ones.

    Effects: the tokens of running caches are copied to ordinary memory. Running managers of continuous batching go on
        to their end.
    """
    global _switched_on
    with _lock:
        _switched_on = False
        _blocks.clear()
        _compiles.clear()
        _set_attention(None, None)
        _set_reuse(None, False)
        for who in list(_budgets):
            _drop_budget(who)
        _remove()


@contextmanager
def enabled(
    *,
    compile: bool = False,
    attention: str | None = None,
    prefix_cache: bool = False,
    budget_bytes: int | str | None = None,
) -> Iterator[None]:
    """``enable()`` for a block. Blocks may nest and overlap between threads; the last one out puts things back."""
    block = object()
    _check_attention(attention)
    if compile:
        _load_sample()
    try:
        with _lock:
            _set_budget(block, budget_bytes)
            _blocks.add(block)
            _install()
            _set_compile(block, compile)
            _set_attention(block, attention)
            _set_reuse(block, prefix_cache)
        yield
    finally:
        with _lock:
            _blocks.discard(block)  # disable() may have ended it
            _compiles.discard(block)
            _set_attention(block, None)
            _set_reuse(block, False)
            _drop_budget(block)
            if not _blocks and not _switched_on:
                _remove()


def keeps_prefixes() -> bool:
    """Whether anybody wants calls of generate() to leave their sequences to later ones."""
    return bool(_reuses)


def stop_batching() -> None:
    """End every manager of continuous batching that is over our memory; requests that still wait fail."""
    for manager in list(_managers):
        if manager.is_running():
            manager.stop(block=True, hard_stop=True)


def is_enabled() -> bool:
    """Whether transformers' cache layers are over virtual memory right now."""
    return bool(_stock)


def _load_sample() -> Callable[..., Any]:
    """Compiled decoding's loop. Loaded only for who asks for it, as it registers operators, and before any change."""
    from torch_vtensor.generation.decode.loop import sample

    return sample


def _set_compile(who: object, wanted: bool) -> None:
    """Note that ``who`` wants compiled decoding or not."""
    if not wanted:
        _compiles.discard(who)
        return
    _compiles.add(who)
    _install_loop("_sample", _sample)
    _install_loop("_prepare_generation_config", _prepare_config)


def _set_reuse(who: object, wanted: bool) -> None:
    """Note that ``who`` (None: everybody) wants prefixes to be reused or not; they are kept as long as anybody does."""
    if wanted:
        _reuses.add(who)
        _install_loop("_sample", _sample)
        _install_loop("_beam_search", _beam_search)
        _install_loop("_prepare_cache_for_generation", _prepare_cache)
        return
    if who is None:
        _reuses.clear()
    _reuses.discard(who)
    if not _reuses:
        for manager in list(_managers):
            manager.keep_no_prefixes()
        prefixes.clear()


def _install_loop(name: str, ours: Callable[..., Any], owner: type = GenerationMixin) -> None:
    """Have ``ours`` stand for a method of generate()'s, given the stock one, until everything is put back."""
    if any((other, known) == (owner, name) for other, known, _ in _stock):
        return
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(stock, self, *args, **kwargs)

    _stock.append((owner, name, stock))
    setattr(owner, name, method)


def _sample(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    run = functools.partial(_load_sample(), stock) if _compiles else stock
    return prefixes.reuse(run, model, *args, answers_too=True, **kwargs) if _reuses else run(model, *args, **kwargs)


def _prepare_config(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    # Where nothing is compiled a call takes so long that this does not show.
    return asked.prepare_config(stock, model, *args, **kwargs) if _compiles else stock(model, *args, **kwargs)


def _beam_search(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    if not _reuses:
        return stock(model, *args, **kwargs)
    return prefixes.reuse(stock, model, *args, answers_too=False, **kwargs)


def _prepare_cache(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    return prefixes.note_cache(stock, model, *args, **kwargs) if _reuses else stock(model, *args, **kwargs)


def _init_batching(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    # Loaded only for who batches, as it registers operators.
    from torch_vtensor.generation.serving.manager import BatchingManager, init_batching

    manager = init_batching(stock, model, *args, **kwargs)
    if isinstance(manager, BatchingManager):
        with _lock:  # as whatever is switched off meanwhile is meant for it too
            manager.configure(bool(_compiles), bool(_reuses))
            _managers.add(manager)
    return manager


def _check_attention(attention: str | None) -> None:
    if attention not in (None, "fast"):
        raise ValueError(f"attention is {attention!r}; it is 'fast', or None for transformers' own")


def _set_attention(who: object, attention: str | None) -> None:
    """Note that ``who`` (None: everybody) wants this attention, and have it as long as anybody does."""
    if attention is not None:
        _attends.add(who)
        fast_attention.install()
        return
    if who is None:
        _attends.clear()
    _attends.discard(who)
    if not _attends:
        fast_attention.remove()


def _set_budget(who: object, budget_bytes: int | str | None) -> None:
    if budget_bytes is not None:
        set_default_budget(budget_bytes)
        _budgets.pop(who, None)
        _budgets[who] = budget_bytes


def _drop_budget(who: object) -> None:
    if _budgets.pop(who, None) is not None:
        set_default_budget(next(reversed(_budgets.values()), load_settings().budget_bytes))


def _install() -> None:
    if not _stock:
        for (owner, name), method in REPLACEMENTS.items():
            _stock.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, method)
        _install_loop(_BATCHING, _init_batching, _BATCHES)
        _install_loop("generate", in_use.generate)


def _remove() -> None:
    if not _stock:
        return
    for manager in list(_managers):
        manager.forget()
    with layers.leaving(lambda layer: not getattr(layer, "is_explicit", False)):
        while _stock:
            owner, name, stock = _stock.pop()
            if stock is None:
                delattr(owner, name)
            else:
                setattr(owner, name, stock)
