"""VTensorCache: a transformers cache over virtual memory, for explicit use; needs no enable() and patches nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.generation import layers
from torch_vtensor.generation._transformers_compat import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from torch_vtensor.generation.enable import METHODS, replacement

__all__ = ["CacheMemory", "VTensorCache", "VTensorLayer", "VTensorSlidingWindowLayer", "memory"]


class CacheMemory(NamedTuple):
    """Where one cache's bytes are. ``written_bytes`` of tokens lie in ``committed_bytes`` of physical memory.

    ``shared_bytes`` of the committed ones are also another cache's; ``ordinary_bytes`` are in torch's own memory,
    because the cache, or a layer of it, is smaller than a page or is stock.
    """

    written_bytes: int
    committed_bytes: int
    shared_bytes: int
    reserved_bytes: int
    ordinary_bytes: int


class VTensorLayer(DynamicLayer):
    """A full-attention layer whose keys and values grow in place."""

    is_explicit = True


class VTensorSlidingWindowLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer whose keys and values grow in place; pages before the window go back."""

    is_explicit = True


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
            self.layer_class_to_replicate = VTensorLayer

    def fork(self) -> VTensorCache:
        """An independent cache with the same tokens that shares their pages until one of the two writes.

        Effects: copies less than a page a sequence.
        Raises:  OutOfPagesError, with this cache unchanged.
        """
        return copy.deepcopy(self)

    def memory(self) -> CacheMemory:
        """Where this cache's bytes are."""
        return memory(self)


def _explicit(kind: type[DynamicLayer], stock: type[DynamicLayer]) -> None:
    for owner, name, ours in METHODS:
        if issubclass(stock, owner) and (owner is stock or name not in stock.__dict__):
            setattr(kind, name, replacement(stock, name, ours))


_EXPLICIT = {DynamicLayer: VTensorLayer, DynamicSlidingWindowLayer: VTensorSlidingWindowLayer}
for _stock_class, _own_class in _EXPLICIT.items():
    _explicit(_own_class, _stock_class)
VTensorCache.update = replacement(Cache, "update", layers.cache_update)


def memory(cache: Cache) -> CacheMemory:
    """Where a cache's bytes are: any transformers cache, ours or, under ``enable()``, transformers' own."""
    written = ordinary = 0
    vtensors: dict[int, VTensor] = {}
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        for layer in getattr(part, "layers", ()):
            tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
            written += sum(tensor.nbytes for tensor in tensors)
            state = layers.state_of(layer) if isinstance(layer, DynamicLayer) else None
            if state is None:
                ordinary += sum(tensor.nbytes for tensor in tensors)
            elif state.column.store is None:
                ordinary += state.column.ordinary_bytes
            else:
                vtensors |= {id(vtensor): vtensor for vtensor in state.column.store.vtensors}
    return CacheMemory(
        written_bytes=written,
        committed_bytes=sum(vtensor.committed_bytes for vtensor in vtensors.values()),
        shared_bytes=sum(vtensor.shared_bytes for vtensor in vtensors.values()),
        reserved_bytes=sum(vtensor.reserved_bytes for vtensor in vtensors.values()),
        ordinary_bytes=ordinary,
    )
