"""Between a transformers cache and a prefix tree: which VTensors its layers lie in, and layers over lent ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch_vtensor.allocator.prefix import Lane
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation import layers as cache_layers
from torch_vtensor.generation._transformers_compat import DynamicLayer, DynamicSlidingWindowLayer
from torch_vtensor.generation.kv_store import KVShape, KVStore
from torch_vtensor.generation.layer_column import LayerColumn, LayerGroup

__all__ = [
    "ROWS_BEHIND",
    "CachedRows",
    "Checkpoint",
    "StoreLayout",
    "begin_with",
    "checkpoint_of",
    "is_plain",
    "is_worth_pages",
    "most_lendable",
    "rows_of",
    "shorten",
]

ROWS_BEHIND = range(-1, 2)
"""How many rows more than tokens a cache may hold after generate(): a loop's last token is not in it, as a rule; one
that asks late whether to stop takes more."""


class StoreLayout(NamedTuple):
    """One store of a cache: its shape for a single slot, its lanes, and (index in the cache, index in it) by layer."""

    shape: KVShape
    num_layers: int
    lanes: tuple[Lane, ...]
    members: tuple[tuple[int, int], ...]


class CachedRows(NamedTuple):
    """Where the tokens of a cache's slots lie."""

    layouts: tuple[StoreLayout, ...]
    vtensors: list[VTensor]


def is_plain(kind: Any) -> bool:
    """Whether layers of this class keep keys and values and nothing else, all of them or a window's."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return kind in plain or (getattr(kind, "is_explicit", False) and kind.__mro__[1] in plain)


def most_lendable(cache: Any, num_rows: int) -> int:
    """How many rows every layer of a cache can begin with: no more than a sliding window keeps."""
    windows: list[int | None] = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    return min([num_rows, *(window - 1 for window in windows if window is not None)])


def rows_of(cache: Any, num_rows: int) -> CachedRows | str:
    """The VTensors behind the first ``num_rows`` tokens of a cache, or why they do not lie in such.

    Effects: layers that are still in ordinary memory move to pages.
    Raises:  OutOfPagesError or DriverError, with the cache intact.
    """
    found: dict[int, tuple[KVStore, list[tuple[int, int]]]] = {}
    for index, layer in enumerate(cache.layers):
        state = cache_layers.state_of(layer) if isinstance(layer, DynamicLayer) else None
        if state is None:
            return "a layer is in stock memory"
        if state.first > 0 or state.stop != layer.get_seq_length():
            return "a sliding window has dropped its first tokens"
        if state.stop < num_rows:
            return "a layer has fewer tokens"
        with state.lock:
            if not state.is_of(layer):
                return "a layer is in stock memory"
            if state.column.store is None:
                state.column.reach(0, state.stop, 0, state.stop)
                state.column.extended(0, state.stop)
                state.publish(layer, 0, state.stop, *state.column.views(0, state.stop))
            store = state.column.store
        assert store is not None
        found.setdefault(id(store), (store, []))[1].append((index, state.column.index))
    if len({store.vtensors[0].scheduler for store, _ in found.values()}) > 1:
        return "layers on several devices"
    layouts, vtensors = [], []
    for store, members in found.values():
        stop = max(used.stop for used in store.written)
        for vtensor in store.vtensors:
            vtensor.length = stop
        lanes = tuple(Lane.of(vtensor) for vtensor in store.vtensors)
        layouts.append(StoreLayout(store.shape._replace(batch=1), store.num_layers, lanes, tuple(members)))
        vtensors += store.vtensors
    return CachedRows(tuple(layouts), vtensors)


def is_worth_pages(cache: Any, num_rows: int) -> bool:
    """Whether the first ``num_rows`` tokens of a cache lie in pages, or would fill half of one at least."""
    states = [cache_layers.state_of(layer) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return all(
        state is None or state.column.store is not None or 2 * num_rows >= state.column.group.paging_tokens
        for state in states
    )


def begin_with(cache: Any, layouts: Sequence[StoreLayout], vtensors: Sequence[VTensor], num_rows: int) -> None:
    """Give an empty cache the rows [0, ``num_rows``) of VTensors that were made for its layers, in their order."""
    waiting = iter(vtensors)
    for layout in layouts:
        own = [next(waiting) for _ in layout.lanes]
        shape = layout.shape._replace(batch=own[0].outer_shape[0])
        store = KVStore.over(own, shape, layout.num_layers, num_rows)
        group = LayerGroup(shape, layout.num_layers)
        for index, member in layout.members:
            cache_layers.begin_with(cache.layers[index], LayerColumn.over(store, group, member, num_rows), num_rows)


class Checkpoint(NamedTuple):
    """What a cache's sliding windows held at an earlier length, in layers that share the cache's pages."""

    num_tokens: int
    windows: dict[int, DynamicSlidingWindowLayer]


def checkpoint_of(cache: Any) -> Checkpoint:
    """What `shorten` needs to take a cache back to its present length after its sliding windows have moved on.

    Effects: less than a page a slot and layer kind is copied; without sliding windows nothing.
    Raises: OutOfPagesError.
    """
    memo: dict[int, Any] = {}
    windows = [(i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicSlidingWindowLayer)]
    return Checkpoint(cache.get_seq_length(), {i: copy.deepcopy(layer, memo) for i, layer in windows})


def shorten(cache: Any, num_tokens: int, checkpoint: Checkpoint | None) -> int:
    """Take the tokens from ``num_tokens`` on out of a cache; returns how many it holds afterwards, which may be fewer.

    A sliding window that has dropped what would be in it then is put back to the checkpoint. 0 says that there was
    none so early, or no memory for it, and that nothing was changed.
    """
    if any(_has_dropped(layer) and layer.get_seq_length() > num_tokens for layer in cache.layers):
        if checkpoint is None or checkpoint.num_tokens > num_tokens:
            return 0
        memo: dict[int, Any] = {}
        try:
            windows = {i: copy.deepcopy(layer, memo) for i, layer in checkpoint.windows.items()}
        except OutOfPagesError:
            return 0
        num_tokens = checkpoint.num_tokens
        for index, window in windows.items():
            cache.layers[index] = window
    for layer in cache.layers:
        num_over = layer.get_seq_length() - num_tokens
        if num_over > 0:
            layer.keys, layer.values = layer.keys[:, :, :-num_over], layer.values[:, :, :-num_over]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = num_tokens
    return num_tokens


def _has_dropped(layer: Any) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() > (
        layer.keys.shape[2] if layer.is_initialized else 0
    )
