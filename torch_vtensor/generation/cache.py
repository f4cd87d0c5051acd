"""VTensorCache: a transformers cache over virtual memory, for explicit use; needs no enable() and patches nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.generation import layers
from torch_vtensor.generation._transformers_compat import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    growing_layers,
)
from torch_vtensor.generation.enable import REPLACEMENTS
from torch_vtensor.generation.in_use import in_use

__all__ = [
    "CacheMemory",
    "VTensorCache",
    "VTensorLayer",
    "VTensorSlidingWindowLayer",
    "memory",
    "offload",
    "prefetch",
]


class CacheMemory(NamedTuple):
    """Where one cache's bytes are. ``written_bytes`` of tokens lie in ``committed_bytes`` of physical memory.

    ``shared_bytes`` of the committed ones are also another cache's, and ``offloaded_bytes`` of them lie outside the
    device; ``ordinary_bytes`` are in torch's own memory,
    because the cache, or a layer of it, is smaller than a page or is stock.
    """

    written_bytes: int
    committed_bytes: int
    shared_bytes: int
    reserved_bytes: int
    ordinary_bytes: int
    offloaded_bytes: int


def _explicit(stock: type[DynamicLayer]) -> type[DynamicLayer]:
    """``stock`` with the methods that enable() would give it, but for those that it or a class in between overrides."""
    methods: dict[str, Any] = {
        "__doc__": f"``{stock.__name__}`` whose keys and values grow in place.",
        "__module__": __name__,
        "is_explicit": True,
    }
    for (owner, name), method in REPLACEMENTS.items():
        if owner in stock.__mro__ and not any(
            name in kind.__dict__ for kind in stock.__mro__[: stock.__mro__.index(owner)]
        ):
            methods[name] = method
    return type(f"VTensor{stock.__name__.removeprefix('Dynamic')}", (stock,), methods)


_EXPLICIT = {stock: _explicit(stock) for stock in growing_layers()}
# Pickle finds a class by its name.
globals().update({explicit.__name__: explicit for explicit in _EXPLICIT.values()})
VTensorLayer: type[DynamicLayer] = _EXPLICIT[DynamicLayer]
VTensorSlidingWindowLayer: type[DynamicLayer] = _EXPLICIT[DynamicSlidingWindowLayer]


class VTensorCache(DynamicCache):
    """A ``DynamicCache`` whose address never moves and whose growth copies nothing: pass it as ``past_key_values``.

    Args:
        ddp_cache_data, config, **kwargs: as for ``DynamicCache``. With the model's config the layers' kinds are known;
            layers that keep something else than keys and values (recurrent states) stay transformers' own.

    Source: vTensor (arXiv 2407.15309) section 4; here a drop-in for transformers' own cache.
    """

    def __init__(
        self, ddp_cache_data: Iterable[tuple[torch.Tensor | None, ...]] | None = None, config: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(ddp_cache_data, config=config, **kwargs)
        for layer in self.layers:
            layer.__class__ = _EXPLICIT.get(type(layer), type(layer))
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate: type = VTensorLayer

    def fork(self) -> VTensorCache:
        """An independent cache with the same tokens that shares their pages until one of the two writes.

        Effects: copies less than a page a sequence.
        Raises:  OutOfPagesError, with this cache unchanged.
        """
        return copy.deepcopy(self)

    def memory(self) -> CacheMemory:
        """Where this cache's bytes are."""
        return memory(self)

    def offload(self, *, when_needed: bool = False) -> int:
        """Let the device have this cache's memory for others until its next token; see ``offload``."""
        return offload(self, when_needed=when_needed)

    def prefetch(self) -> int:
        """Bring this cache's tokens back to the device before they are needed; see ``prefetch``."""
        return prefetch(self)


for (_owner, _name), _method in REPLACEMENTS.items():
    if _owner is Cache:
        setattr(VTensorCache, _name, _method)


def memory(cache: Cache) -> CacheMemory:
    """Where a cache's bytes are: any transformers cache, ours or, under ``enable()``, transformers' own."""
    written = ordinary = 0
    for layer in _layers_of(cache):
        tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        written += sum(tensor.nbytes for tensor in tensors)
        state = layers.state_of(layer) if isinstance(layer, DynamicLayer) else None
        if state is None:
            ordinary += sum(tensor.nbytes for tensor in tensors)
        elif state.column.store is None:
            ordinary += state.column.ordinary_bytes
    vtensors = _vtensors_of(cache)
    return CacheMemory(
        written_bytes=written,
        committed_bytes=sum(vtensor.committed_bytes for vtensor in vtensors),
        shared_bytes=sum(vtensor.shared_bytes for vtensor in vtensors),
        reserved_bytes=sum(vtensor.reserved_bytes for vtensor in vtensors),
        ordinary_bytes=ordinary,
        offloaded_bytes=sum(vtensor.offloaded_bytes for vtensor in vtensors),
    )


def offload(cache: Cache, *, when_needed: bool = False) -> int:
    """Let the device have the memory of an idle cache for others; returns the bytes that left it.

    Its tokens move to outside the device, at the same addresses, and stay readable. They come back with the next token,
    or before by ``prefetch``. A cache in ordinary memory stays where it is.

    Args:
        cache: any transformers cache, ours or, under ``enable()``, transformers' own.
        when_needed: move nothing now, but when another cache would find no memory otherwise; of several caches, the one
            that is idle the longest moves first.

    Effects: waits for the device, and for a call of generate() in another thread that uses the cache, if it was made
        under ``enable()`` or by a ``Session``; for calls of the model itself, only for what they are writing. Pages
        that a cache shares with one that is not idle stay.
    Raises:  OffloadLimitError or DriverError, with all tokens as they were, or outside the device.
    """
    with in_use(cache):
        return sum(vtensor.offload(when_needed=when_needed) for vtensor in _vtensors_of(cache))


def prefetch(cache: Cache) -> int:
    """Bring the tokens of a cache back to the device, where they stay; returns the bytes that came.

    Effects: waits for the device, and for others as ``offload`` does.
    Raises:  OutOfPagesError or DriverError, with all tokens where they were, or on the device.
    """
    with in_use(cache):
        return sum(vtensor.prefetch() for vtensor in _vtensors_of(cache))


def _layers_of(cache: Cache) -> Iterator[Any]:
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        yield from getattr(part, "layers", ())


def _vtensors_of(cache: Cache) -> list[VTensor]:
    """Those that layers lie in, each once."""
    vtensors: dict[int, VTensor] = {}
    for layer in _layers_of(cache):
        state = layers.state_of(layer) if isinstance(layer, DynamicLayer) else None
        if state is not None and state.column.store is not None:
            vtensors |= {id(vtensor): vtensor for vtensor in state.column.store.vtensors}
    return list(vtensors.values())
