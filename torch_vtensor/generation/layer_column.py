"""LayerColumn: one layer's keys and values, which grow in place; ordinary memory while small, pages from then on.

key, value [B, H, T, D] of the new tokens
      │ one copy                   (the common step: no allocation, no copy of old tokens; one call, on CUDA one launch)
      ▼
[first, stop) written │ [stop, committed) has memory │ ... addresses
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torch_vtensor.allocator._torch_compat import num_storage_users
from torch_vtensor.allocator.row_copy import CAPTURED, NOT_COPIED, row_copier
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation._torch_compat import is_observed
from torch_vtensor.generation.kv_store import KVShape, KVStore, Written, paging_tokens
from torch_vtensor.generation.slot_history import SlotHistory

__all__ = ["LayerColumn", "LayerGroup"]

_IN_ORDINARY_MEMORY = nullcontext()
_AHEAD_TOKENS = 2
_NEVER = sys.maxsize
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
        self.lock = threading.Lock()
        """Held by who changes one of the layers: another thread may call disable()."""
        self.seen_from: int | None = None
        """The stop at which the first layer of the running step found that no tracer is at work, for the others too."""
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
        self._view_of: tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], int, int]  # for as_strided()
        self._written = Written()  # the store's, once there is one
        self.store: KVStore | None = None
        self._lease: AbstractContextManager[Any] = _IN_ORDINARY_MEMORY
        self._keys: torch.Tensor | None = None  # rows [_origin, _end) of the layer
        self._values: torch.Tensor | None = None
        self._origin = 0
        self._end = 0
        self._seen = 0  # a view published earlier may show tokens below this
        self._asked_ahead = 0
        self._ahead_from = _NEVER  # a stop from which on more memory is asked for ahead
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
            with self._lease:
                if store is not None and store.pool.is_tiered:
                    store.use()
                if stop < self._seen:
                    self._make_writable(stop)
                if new_stop > self._end:
                    self._grow(first, stop, new_stop)
                if self.store is store:  # otherwise once more, with the rows where they are now held in place
                    self._write(key, value, first, stop)
                    return self.views(first, new_stop)

    def append_next(self, key: torch.Tensor, value: torch.Tensor, first: int, stop: int) -> int:
        """`append`, if all there is to do is to write rows that nobody sees to memory that is there; else nothing.

        Returns: T, or 0 where there is more to do. The caller makes the views.
        Raises:  DriverError, with everything written before intact.
        """
        keys, values, store = self._keys, self._values, self.store
        if keys is None or values is None or stop < self._seen:
            return 0
        with self._lease:
            if store is not None and store.pool.is_tiered:
                return 0
            # Nobody's view shows the rows written here (_make_writable), so no one misses a bump of version counters.
            num_new = self._copier.write(keys, values, stop - self._origin, key, value)
            return self._note_written(num_new, first, stop) if num_new != NOT_COPIED else 0

    def _write(self, key: torch.Tensor, value: torch.Tensor, first: int, stop: int) -> None:
        """Write rows that nobody sees to memory that is there, while the lease is held."""
        keys, values, position = self._keys, self._values, stop - self._origin
        assert keys is not None and values is not None
        num_new = NOT_COPIED if is_observed() else self._copier.write(keys, values, position, key, value)
        if by_torch := num_new == NOT_COPIED:
            num_new = key.shape[2]
            keys.narrow(2, position, num_new).copy_(key)
            values.narrow(2, position, num_new).copy_(value)
        self._note_written(num_new, first, stop, may_be_captured=by_torch)

    def _note_written(self, num_new: int, first: int, stop: int, *, may_be_captured: bool = False) -> int:
        """Take up new tokens at ``stop``, T or T | CAPTURED of them; returns T."""
        if num_new >= CAPTURED:
            num_new -= CAPTURED
            may_be_captured = True
        if may_be_captured and self.store is not None:
            self.store.retain_in_capture()
        stop += num_new
        written = self._written
        written.first, written.stop = first, stop
        written.num_writes += 1
        self._seen = stop
        if stop >= self._ahead_from and self.store is not None:
            self._ahead_from, self._asked_ahead = _NEVER, self._end
            self.store.commit_ahead()
        return num_new

    def in_place(self) -> AbstractContextManager[Any]:
        """A block during which no other thread moves the rows that the column has now."""
        return self._lease

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
        if self.store is not None and first >= self.store.next_first:
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

    @property
    def rows(self) -> torch.Tensor | None:
        """The keys in the memory that `views` show now; another tensor once that is other memory, or more of it."""
        return self._keys

    def renew(self) -> None:
        """Let go of memory before the first token that the store still has."""
        assert self.store is not None
        self._view(self.store)

    def views(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of tokens [``first``, ``stop``)."""
        keys, values, start = self._keys, self._values, first - self._origin
        assert keys is not None and values is not None and 0 <= start <= start + stop - first <= keys.shape[2]
        batch, heads, key_dim, value_dim, key_strides, value_strides, key_offset, value_offset = self._view_of
        num_tokens = stop - first  # what follows is narrow() in fewer steps
        key_size, value_size = (batch, heads, num_tokens, key_dim), (batch, heads, num_tokens, value_dim)
        if not start:
            return keys.as_strided(key_size, key_strides), values.as_strided(value_size, value_strides)
        return (
            keys.as_strided(key_size, key_strides, key_offset + start * key_strides[2]),
            values.as_strided(value_size, value_strides, value_offset + start * value_strides[2]),
        )

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
        self._origin, self._end = first, first + tokens
        self._use(keys, values)

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
        keys, values = store.views(self.index)
        self._origin = store.first
        self._end = self._origin + keys.shape[2]
        self._use(keys, values)
        if self.store is not None:
            self.store.viewers.discard(self)
        store.viewers.add(self)
        self.store, self._lease = store, store.lease
        self.shape = store.shape
        self._written = store.written[self.index]
        asks = self.index == 0 and self._asked_ahead != self._end
        self._ahead_from = self._end - _AHEAD_TOKENS + 1 if asks else _NEVER

    def _use(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = keys, values
        batch, heads, _, key_dim = keys.shape
        self._view_of = (
            batch, heads, key_dim, values.shape[3], keys.stride(), values.stride(), int(keys.storage_offset()),
            int(values.storage_offset()),
        )  # fmt: skip
