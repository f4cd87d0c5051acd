"""LayerColumn: one layer's keys and values, which grow in place; ordinary memory while small, pages from then on.

key, value [B, H, T, D] of the new tokens
      │ narrow + copy_             (the common step: no driver call, no allocation, no copy of old tokens)
      ▼
[first, stop) written │ [stop, committed) has memory │ ... addresses
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch

from torch_vtensor.allocator._torch_compat import num_storage_users
from torch_vtensor.generation.kv_store import KVShape, KVStore, paging_tokens

__all__ = ["LayerColumn", "LayerGroup"]

_AHEAD_TOKENS = 2


class LayerGroup:
    """The layers of one cache that share a store.

    Args:
        shape: what each of the layers keeps.
        num_layers: how many layers there will be; 1 where the device's layout keeps layers apart.
    """

    def __init__(self, shape: KVShape, num_layers: int) -> None:
        self.shape = shape
        self.num_layers = num_layers
        self.paging_tokens = paging_tokens(shape, num_layers)
        self._store: weakref.ref[KVStore] | None = None

    def store(self, tokens: int) -> KVStore:
        """The store that the group's layers move to, made when the first of them has enough tokens."""
        store = self._store() if self._store else None
        if store is None:
            store = KVStore(self.shape, self.num_layers, tokens)
            self._store = weakref.ref(store)
        return store


class LayerColumn:
    """Keys and values of one layer as full-length views that are written behind the last token.

    Args:
        group: the layers it shares a store with.
        index: its place in the group.
    """

    def __init__(self, group: LayerGroup, index: int) -> None:
        self.group = group
        self.index = index
        self.shape = group.shape
        self.store: KVStore | None = None
        self._keys: torch.Tensor | None = None  # rows [_origin, _end) of the layer
        self._values: torch.Tensor | None = None
        self._origin = 0
        self._end = 0
        self._seen = 0  # a view published earlier may show tokens below this
        self._asked_ahead = 0

    def append(
        self, key: torch.Tensor, value: torch.Tensor, first: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens at ``stop`` and return views of tokens [``first``, ``stop`` + T).

        Shapes:  key, value [B, H, T, D] as the column's shape says.
        Effects: may call the driver on the host, never waits for the device.
        Raises:  OutOfPagesError or DriverError, with everything written before intact.
        """
        num_new = key.shape[2]
        new_stop = stop + num_new
        if stop < self._seen:
            self._make_writable(stop)
        if new_stop > self._end:
            self._grow(first, stop, new_stop)
        keys, values, origin = self._keys, self._values, self._origin
        assert keys is not None and values is not None
        keys.narrow(2, stop - origin, num_new).copy_(key)
        values.narrow(2, stop - origin, num_new).copy_(value)
        self._seen = new_stop
        if self.store is not None:
            self.store.wrote(self.index, first, new_stop)
            if self.index == 0 and self._end - new_stop < _AHEAD_TOKENS and self._asked_ahead != self._end:
                self._asked_ahead = self._end
                self.store.commit_ahead()
        return keys.narrow(2, first - origin, new_stop - first), values.narrow(2, first - origin, new_stop - first)

    def keep(self, first: int) -> None:
        """Say that tokens before ``first`` are not needed any more (a sliding window)."""
        if self.store is not None:
            self.store.keep_from(self.index, first)

    def select(self, slots: Sequence[int]) -> LayerColumn | None:
        """A column whose slot i holds this one's slot ``slots[i]``, sharing pages; None if it is not on pages."""
        return self._derive(("select", tuple(slots)), slots)

    def fork(self, request: Hashable) -> LayerColumn | None:
        """An independent column with the same tokens, sharing pages; None if it is not on pages.

        Layers of one group that fork with the same ``request`` stay together.
        """
        return self._derive(("fork", request), None)

    def _derive(self, request: Hashable, slots: Sequence[int] | None) -> LayerColumn | None:
        store = self.store
        if store is None:
            return None
        derived = LayerColumn.__new__(LayerColumn)
        derived.group, derived.index = self.group, self.index
        derived.store, derived._seen, derived._asked_ahead = None, self._seen, 0
        derived._view(store.derive(self.index, request, lambda: store.fork(slots)))
        return derived

    def views(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of tokens [``first``, ``stop``)."""
        assert self._keys is not None and self._values is not None
        start, length = first - self._origin, stop - first
        return self._keys.narrow(2, start, length), self._values.narrow(2, start, length)

    @property
    def ordinary_bytes(self) -> int:
        """Bytes of ordinary torch memory that this column holds: all it has until it moves to pages."""
        if self.store is not None or self._keys is None or self._values is None:
            return 0
        return self._keys.nbytes + self._values.nbytes

    def _make_writable(self, stop: int) -> None:
        """Before tokens from ``stop`` on are overwritten: move away from whatever else can see them."""
        store = self.store
        if store is None:
            if self._has_live_views():
                self._end = 0  # the next growth copies what is kept to new memory
        elif store.writable_from > stop or self._has_live_views() or store.has_older_views():
            self._view(store.derive(self.index, ("relocate", stop), lambda: store.fork(share=stop)))
        self._seen = stop

    def _has_live_views(self) -> bool:
        """Whether anyone but this column, and the two tensors the layer holds, uses its storages."""
        assert self._keys is not None and self._values is not None
        one_storage = self._keys.untyped_storage().data_ptr() == self._values.untyped_storage().data_ptr()
        own = 4 if one_storage else 2
        return max(num_storage_users(self._keys), num_storage_users(self._values)) > own

    def _grow(self, first: int, stop: int, new_stop: int) -> None:
        if self.store is None and new_stop < self.group.paging_tokens:
            self._grow_small(first, stop, new_stop)
        elif self.store is None:
            self._move_to_pages(first, stop, new_stop)
        else:
            store = old = self.store
            if new_stop > store.capacity:
                store = store.derive(self.index, ("capacity", new_stop), lambda: old.fork(capacity=2 * new_stop))
            store.commit(new_stop)
            self._view(store)

    def _grow_small(self, first: int, stop: int, new_stop: int) -> None:
        tokens = min(2 * (new_stop - first), self.group.paging_tokens)
        shape = self.shape
        with torch.inference_mode(False):
            keys = torch.empty(shape.batch, shape.heads, tokens, shape.key_dim, dtype=shape.dtype, device=shape.device)
            values = keys.new_empty(shape.batch, shape.heads, tokens, shape.value_dim)
        self._copy_kept(keys, values, first, stop)
        self._keys, self._values, self._origin, self._end = keys, values, first, first + tokens

    def _move_to_pages(self, first: int, stop: int, new_stop: int) -> None:
        store = self.group.store(new_stop)
        store.commit(new_stop)
        keys, values = store.views(self.index)
        self._copy_kept(keys.narrow(2, first, stop - first), values.narrow(2, first, stop - first), first, stop)
        self._view(store)

    def _copy_kept(self, keys: torch.Tensor, values: torch.Tensor, first: int, stop: int) -> None:
        if self._keys is not None and stop > first:
            old_keys, old_values = self.views(first, stop)
            keys.narrow(2, 0, stop - first).copy_(old_keys)
            values.narrow(2, 0, stop - first).copy_(old_values)

    def _view(self, store: KVStore) -> None:
        """Use ``store`` from now on, as far as it is committed now."""
        self._keys, self._values = store.views(self.index)
        self._origin = store.first
        self._end = self._origin + self._keys.shape[2]
        if self.store is not None:
            self.store.viewers.discard(self)
        store.viewers.add(self)
        self.store = store
        self.shape = store.shape
