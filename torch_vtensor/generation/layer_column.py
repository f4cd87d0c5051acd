"""LayerColumn: one layer's keys and values, which grow in place; ordinary memory while small, pages from then on.

key, value [B, H, T, D] of the new tokens
      │ one copy                   (the common step: no allocation, no copy of old tokens; on CUDA one launch)
      ▼
[first, stop) written │ [stop, committed) has memory │ ... addresses
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torch_vtensor.allocator._torch_compat import num_storage_users
from torch_vtensor.allocator.row_copy import COPIED, NOT_COPIED, row_copier
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation.kv_store import KVShape, KVStore, paging_tokens
from torch_vtensor.generation.slot_history import SlotHistory

__all__ = ["LayerColumn", "LayerGroup"]

_IN_ORDINARY_MEMORY = nullcontext()
_AHEAD_TOKENS = 2
_SHARED_ANEW_PART = 8  # slots are merged anew when another eighth of their tokens is the same


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
        self.copier = row_copier(shape.device)
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
        self._copier = group.copier
        self.store: KVStore | None = None
        self._keys: torch.Tensor | None = None  # rows [_origin, _end) of the layer
        self._values: torch.Tensor | None = None
        self._origin = 0
        self._end = 0
        self._seen = 0  # a view published earlier may show tokens below this
        self._asked_ahead = 0
        self._history = SlotHistory.unknown(group.shape.batch)
        self._merged = 0  # slots that have tokens before this in common have them in common pages

    @classmethod
    def over(cls, store: KVStore, group: LayerGroup, index: int, stop: int) -> LayerColumn:
        """The column of a layer whose tokens [0, ``stop``) lie in ``store``."""
        column = cls(group, index)
        column._seen = stop
        column._view(store)
        return column

    def append(
        self, key: torch.Tensor, value: torch.Tensor, first: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens at ``stop`` and return views of tokens [``first``, ``stop`` + T).

        Shapes:  key, value [B, H, T, D] as the column's shape says.
        Effects: may call the driver on the host, never waits for the device. A graph that the current stream is being
            captured into keeps the memory.
        Raises:  OutOfPagesError or DriverError, with everything written before intact.
        """
        new_stop = stop + key.shape[2]
        while True:
            store = self.store
            with self.in_place():
                if store is not None and store.pool.is_tiered:
                    store.use()
                if stop < self._seen:
                    self._make_writable(stop)
                if new_stop > self._end:
                    self._grow(first, stop, new_stop)
                if self.store is store:  # otherwise once more, with the rows where they are now held in place
                    return self._write(key, value, first, stop)

    def _write(
        self, key: torch.Tensor, value: torch.Tensor, first: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_new = key.shape[2]
        new_stop = stop + num_new
        keys, values, origin, store = self._keys, self._values, self._origin, self.store
        assert keys is not None and values is not None
        # Nobody's view shows the rows written here (_make_writable), so no one misses a bump of version counters.
        copied = self._copier.copy(keys, values, stop - origin, key, value) if self._copier else NOT_COPIED
        if copied == NOT_COPIED:
            keys.narrow(2, stop - origin, num_new).copy_(key)
            values.narrow(2, stop - origin, num_new).copy_(value)
        self._seen = new_stop
        if store is not None:
            store.wrote(self.index, first, new_stop)
            if copied != COPIED:  # that answer says as well that nothing is being captured
                store.retain_in_capture()
            if self.index == 0 and self._end - new_stop < _AHEAD_TOKENS and self._asked_ahead != self._end:
                self._asked_ahead = self._end
                store.commit_ahead()
        return keys.narrow(2, first - origin, new_stop - first), values.narrow(2, first - origin, new_stop - first)

    def in_place(self) -> AbstractContextManager[Any]:
        """A block during which no other thread moves the rows that the column has now."""
        return _IN_ORDINARY_MEMORY if self.store is None else self.store.lease

    def reach(self, first: int, stop: int, num_new: int, capacity: int) -> KVStore:
        """Make the rows from ``stop`` on this column's own, with addresses up to ``capacity``, for others to write.

        Args:
            num_new: how many rows will be written soon.

        Effects: the column is on pages from now on. Views made before may show other memory.
        Raises: OutOfPagesError or DriverError, with the column intact.
        """
        if self.store is None:
            self._move_to_pages(first, stop, stop + num_new)
        else:
            self.store.use()
            if stop < self._seen:
                self._make_writable(stop)
        store = old = self.store
        assert store is not None and old is not None
        if capacity > store.capacity:
            store = store.derive(self.index, ("capacity", capacity), lambda: old.fork(capacity=2 * capacity))
            self._view(store)
        return store

    def extended(self, first: int, stop: int) -> None:
        """Take up tokens before ``stop`` that somebody else wrote to the rows."""
        store = self.store
        assert store is not None
        self._view(store)
        self._seen = stop
        store.wrote(self.index, first, stop)

    def keep(self, first: int) -> None:
        """Say that tokens before ``first`` are not needed any more (a sliding window)."""
        if self.store is not None:
            self.store.keep_from(self.index, first)

    def select(self, slots: tuple[int, ...], index: torch.Tensor, first: int, stop: int) -> None:
        """Give slot i the tokens [``first``, ``stop``) of slot ``slots[i]``.

        Only the tokens in which the two differ are copied, in place where nobody else can see it. Where that would copy
        much, or slots have come to have much in common, their pages are shared instead.

        Args:
            slots: source slots, repeats allowed.
            index: the same as a tensor on any device.
            first, stop: the tokens to keep. The caller holds no views of them, or they count as somebody else's.

        Raises: OutOfPagesError or DriverError, with the column unchanged.
        """
        history = self._history.moved(slots, stop)
        start = max(history.differs_from, first)
        in_place = len(slots) == self.shape.batch and self._is_mine_from(start)
        try:
            if not in_place or self._sharing_pays(history, start, stop):
                self._select_anew(slots, index, history, first, stop)
            else:
                self._select_in_place(index, first, start, stop)
        except OutOfPagesError:
            if not in_place:
                raise
            self._select_in_place(index, first, start, stop)
        self._history = history

    def fork(self, request: Hashable) -> LayerColumn | None:
        """An independent column with the same tokens, sharing pages; None if it is not on pages.

        Layers of one group that fork with the same ``request`` stay together.
        """
        store = self.store
        if store is None:
            return None
        forked = LayerColumn(self.group, self.index)
        forked._seen, forked._history, forked._merged = self._seen, self._history, self._merged
        forked._view(store.derive(self.index, ("fork", request), store.fork))
        return forked

    def rewinder(self) -> Callable[[], None]:
        """What puts this column back to where it is now, if `select` has moved it and nothing was written since.

        It keeps the memory alive, and counts as somebody who can see it.
        """
        before = vars(self).copy()

        def rewind() -> None:
            if self.store is not None:
                self.store.viewers.discard(self)
            vars(self).update(before)
            if self.store is not None:
                self.store.viewers.add(self)

        return rewind

    def renew(self) -> None:
        """Let go of memory before the first token that the store still has."""
        assert self.store is not None
        self._view(self.store)

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
        if not self._is_mine_from(stop, published=True):
            if store is None:
                self._end = 0  # the next growth copies what is kept to new memory
            else:
                self._view(store.derive(self.index, ("relocate", stop), lambda: store.fork(share=stop)))
        self._seen = stop
        self._history, self._merged = self._history.shortened(stop), min(self._merged, stop)

    def _is_mine_from(self, token: int, *, published: bool = False) -> bool:
        """Whether nobody else can see the memory of the tokens from ``token`` on.

        Args:
            published: the layer holds one view of the keys and one of the values, which do not count.
        """
        keys, values, store = self._keys, self._values, self.store
        assert keys is not None and values is not None
        own = 2 if published else 1
        if keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
            own *= 2
        if max(num_storage_users(keys), num_storage_users(values)) > own:
            return False
        return store is None or (store.writable_from <= token and not store.has_older_views())

    def _sharing_pays(self, history: SlotHistory, start: int, stop: int) -> bool:
        """Whether to map pages anew rather than to copy tokens [``start``, ``stop``) of every slot in place."""
        if self.store is None:
            return False
        page_tokens = self.group.paging_tokens
        num_newly_shared = history.num_donated - self._merged if len(set(history.donors)) < len(history.donors) else 0
        saves_memory = num_newly_shared >= max(page_tokens, stop // _SHARED_ANEW_PART)
        return saves_memory or self.store.maps_faster_than_copies(self.shape.batch * (stop - start))

    def _select_in_place(self, index: torch.Tensor, first: int, start: int, stop: int) -> None:
        if start < stop:
            for tensor in self.views(start, stop):
                tensor.copy_(tensor.index_select(0, index.to(tensor.device)))
            if self.store is not None:
                self.store.wrote(self.index, first, stop)

    def _select_anew(
        self, slots: tuple[int, ...], index: torch.Tensor, history: SlotHistory, first: int, stop: int
    ) -> None:
        """Make the new slots in other memory: pages from each slot's donor, and its own tokens where it differs."""
        store, old_keys, old_values = self.store, *self.views(first, stop)
        if store is None:
            self._grow_small(first, first, stop + 1)
            start = first
        else:
            sources = tuple(slots[donor] for donor in history.donors)
            share = None if sources == slots else history.num_donated
            self._view(store.derive(self.index, ("select", sources, share), lambda: store.fork(sources, share=share)))
            start = stop if share is None else max(first, share)
            if len(set(sources)) < len(sources):
                self._merged = history.num_donated
        if start == stop:
            return
        with self.in_place():
            if self.store is not None:
                self.store.use()
            for tensor, old in zip(self.views(start, stop), (old_keys, old_values), strict=True):
                tensor.copy_(old.narrow(2, start - first, stop - start).index_select(0, index.to(old.device)))

    def _grow(self, first: int, stop: int, new_stop: int) -> None:
        if self.store is None and new_stop - first < self.group.paging_tokens:
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
        if stop > first:
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
