"""Where the keys and values of one sequence lie: stores of one slot, whose addresses stay while they grow by pages."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.prefix import Lane
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.generation.cached_rows import CachedRows, StoreLayout
from torch_vtensor.generation.decode.step import LayerRows, LayerShape
from torch_vtensor.generation.kv_store import KVShape, KVStore, is_token_major
from torch_vtensor.generation.serving.sharing import Beginning, shared_beginnings
from torch_vtensor.generation.shared_reads import SharedPrefix, shares_reads, worth_sharing

__all__ = ["Need", "RowsLayout", "SequenceRows", "shared_by"]

_AHEAD_TOKENS = 64


class _Kind(NamedTuple):
    """Layers that share a store: their shape for one slot, how many tokens they attend to, and which they are."""

    shape: KVShape
    window: int | None
    layers: tuple[int, ...]


class Need(NamedTuple):
    """Memory of one sequence."""

    nbytes: int
    num_mappings: int


class RowsLayout:
    """How every sequence of a model lies in memory: alike, so that one program serves all of them.

    Args:
        shapes, windows: of each layer.
        capacity: tokens of addresses of every sequence.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], windows: Sequence[int | None], device: torch.device, capacity: int
    ) -> None:
        found: dict[Hashable, list[int]] = {}
        for index, (shape, window) in enumerate(zip(shapes, windows, strict=True)):
            found.setdefault((shape, window) if is_token_major(device) else index, []).append(index)
        self.kinds = [
            _Kind(KVShape(1, *shapes[layers[0]], device), windows[layers[0]], tuple(layers))
            for layers in found.values()
        ]
        self.num_layers = len(shapes)
        self.capacity = capacity
        self.shortest_window = min((kind.window for kind in self.kinds if kind.window is not None), default=None)

    def layer_rows(self, rows: SequenceRows) -> tuple[LayerRows, ...]:
        """Where each layer lies in its group; the same for all sequences as for this one."""
        found: dict[int, LayerRows] = {}
        for group, (kind, store) in enumerate(zip(self.kinds, rows.stores, strict=True)):
            for place, layer in enumerate(kind.layers):
                key, value = store.places(place)
                found[layer] = LayerRows(
                    group,
                    key.offset,
                    value.offset,
                    (key.strides[1], key.strides[2]),
                    (value.strides[1], value.strides[2]),
                    kind.window,
                    *kind.shape[1:5],
                )
        return tuple(found[layer] for layer in range(self.num_layers))


class SequenceRows:
    """The rows of one sequence, [0, ``num_rows``) of them written or about to be by work that was launched.

    Args:
        tokens: how many rows will be written soon.
        vtensors: what the sequence begins with ``num_rows`` rows of, in the order of the layout; default: nothing.

    Effects: reserves addresses; takes memory with ``commit``.
    """

    def __init__(
        self, layout: RowsLayout, tokens: int, vtensors: Sequence[VTensor] | None = None, num_rows: int = 0
    ) -> None:
        waiting = iter(vtensors or ())
        self.layout = layout
        self.num_rows = num_rows
        self.most_rows = layout.capacity
        """There will be no more: none is mapped ahead for them."""
        self.stores = []
        for kind in layout.kinds:
            if vtensors is None:
                store = KVStore(kind.shape, len(kind.layers), tokens, layout.capacity)
            else:
                num_lanes = 1 if is_token_major(kind.shape.device) else 2
                own = [next(waiting) for _ in range(num_lanes)]
                store = KVStore.over(own, kind.shape, len(kind.layers), num_rows)
            self.stores.append(store)
        self._committed = 0
        self._asked_ahead = 0
        self._dropped = 0
        self._next_drop = [0] * len(self.stores)
        self._beginnings: tuple[Beginning | None, ...] | None = None

    def need(self, num_rows: int) -> Need:
        """What rows [0, ``num_rows``) take if nothing of them is shared."""
        num_pages, nbytes = 0, 0
        for store in self.stores:
            for vtensor in store.vtensors:
                sizes = vtensor.scheduler.pool.page_plan(num_rows * vtensor.row_bytes)
                num_strips = math.prod(vtensor.outer_shape)
                num_pages += num_strips * len(sizes)
                nbytes += num_strips * sum(sizes)
        return Need(nbytes, num_pages)

    @property
    def committed_bytes(self) -> int:
        """The memory of these rows, shared pages included."""
        return sum(vtensor.committed_bytes for store in self.stores for vtensor in store.vtensors)

    @property
    def is_asleep(self) -> bool:
        """Whether any of their memory sleeps."""
        return any(vtensor.is_asleep for store in self.stores for vtensor in store.vtensors)

    @property
    def scheduler(self) -> GrowthScheduler:
        """Where their memory comes from."""
        return self.stores[0].vtensors[0].scheduler

    def addresses(self) -> list[int]:
        """Of each group the address of token 0's keys, and of its values."""
        return [
            address for store in self.stores for place in store.places(0) for address in store.slot_addresses(place)
        ]

    @property
    def has_room(self) -> bool:
        """Whether the next row has memory, and the ones after it for a while."""
        return min(self.num_rows + 1 + _AHEAD_TOKENS, self.most_rows) <= self._committed

    def commit(self, num_rows: int) -> None:
        """Give rows [0, ``num_rows``) memory, and have more mapped in the background where they soon need it.

        Raises: CapacityError, OutOfPagesError or DriverError, with the rows intact.
        """
        self._committed = min(store.committed for store in self.stores)
        if num_rows > self._committed:
            for store in self.stores:
                store.commit(num_rows)
            self._committed = min(store.committed for store in self.stores)
        if min(num_rows + _AHEAD_TOKENS, self.most_rows) > self._committed and self._asked_ahead != self._committed:
            self._asked_ahead = self._committed
            for store in self.stores:
                store.commit_ahead()

    def wrote(self, num_rows: int) -> None:
        """Note that the rows before ``num_rows`` are written; pages that windows have left behind go back."""
        self.num_rows = num_rows
        if self.layout.shortest_window is None or num_rows < self.layout.shortest_window:
            return
        for index, (kind, store) in enumerate(zip(self.layout.kinds, self.stores, strict=True)):
            if kind.window is None:
                continue
            first = num_rows - kind.window + 1
            if first < max(self._next_drop[index], 1):
                continue
            for vtensor in store.vtensors:
                vtensor.length = num_rows
                vtensor.drop_head(first)
            head_bytes = store.vtensors[0].head_bytes
            page_bytes = store.vtensors[0].scheduler.pool.page_bytes
            self._next_drop[index] = (head_bytes + page_bytes) // store.vtensors[0].row_bytes
            self._dropped = max(self._dropped, store.first)

    def cached(self, num_rows: int) -> CachedRows | str:
        """The first ``num_rows`` rows as a prefix tree takes them, or why it cannot."""
        if self._dropped:
            return "a sliding window has dropped its first tokens"
        layouts, vtensors = [], []
        for kind, store in zip(self.layout.kinds, self.stores, strict=True):
            for vtensor in store.vtensors:
                vtensor.length = max(num_rows, vtensor.length)
            lanes = tuple(Lane.of(vtensor) for vtensor in store.vtensors)
            members = tuple((layer, place) for place, layer in enumerate(kind.layers))
            layouts.append(StoreLayout(kind.shape, len(kind.layers), lanes, members))
            vtensors += store.vtensors
        return CachedRows(tuple(layouts), vtensors)

    def beginnings(self) -> tuple[Beginning | None, ...]:
        """Of each group, the pages that its rows begin with, as they were when this was first asked.

        None for layers that do not attend to their first tokens for good, or lie in strips of their own.
        """
        if self._beginnings is None:
            self._beginnings = tuple(
                Beginning.of(store.vtensors[0].whole_pages(self.num_rows), store.vtensors[0].row_bytes)
                if kind.window is None and is_token_major(kind.shape.device)
                else None
                for kind, store in zip(self.layout.kinds, self.stores, strict=True)
            )
        return self._beginnings

    def close(self) -> None:
        """Give the memory back, behind the device's work."""
        for store in self.stores:
            for vtensor in store.vtensors:
                vtensor.close()


def shared_by(several: Sequence[SequenceRows]) -> list[tuple[SharedPrefix, ...]]:
    """Of each group of layers, what of these sequences' rows is worth being read once for more than one of them."""
    layout = several[0].layout
    found: list[tuple[SharedPrefix, ...]] = []
    for group, kind in enumerate(layout.kinds):
        beginnings = [beginning for rows in several if (beginning := rows.beginnings()[group]) is not None]
        is_known = len(beginnings) == len(several) and shares_reads(kind.shape.device)
        prefixes = shared_beginnings(beginnings) if is_known else []
        found.append(worth_sharing(prefixes, kind.shape.token_bytes))
    return found
