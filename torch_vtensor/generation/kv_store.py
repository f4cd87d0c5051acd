"""KVStore: where the keys and values of one or more layers lie in virtual memory.

Two layouts, chosen per device (measured: benchmarks/results):

    CPU   [slot, head | token, dim]                    one layer a store, keys and values apart
    CUDA  [slot | token, layer, keys and values, head, dim]   all layers of a kind in one store

``|`` ends the strip: what is left of it has an address range part of its own, what is right of it one row a token.
CPU kernels read rows of one head fastest. CUDA's pages are 2 MiB: with all layers of a token side by side, a
sequence of a Llama-3-8B wastes less than 16 tokens, where a strip per layer and head would waste 1,024.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch

from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.generation.tenant import current_salt

__all__ = ["KVShape", "KVStore", "Place", "Written", "capacity_of", "is_token_major", "paging_tokens"]

_CUDA_CAPACITY_TOKENS = 128 * 1024
_CPU_CAPACITY_TOKENS = 1024
_COPIED_WHILE_MAPPING_BYTES = {"cpu": 128 * 1024, "cuda": 64 * 2**20}  # in about the time that one page is mapped


class KVShape(NamedTuple):
    """What one layer keeps: keys [B, H, T, key_dim] and values [B, H, T, value_dim]."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor) -> KVShape:
        """The shape that a store for these new keys and values has."""
        batch, heads, _, key_dim = key.shape
        return cls(batch, heads, key_dim, value.shape[3], key.dtype, key.device)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence in one layer."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Place(NamedTuple):
    """Where one layer's keys or values lie: which VTensor, and their [B, H, T, D] strides and offset in elements."""

    vtensor: int
    sizes: tuple[int, int, int]  # B, H, D
    strides: tuple[int, int, int, int]
    offset: int


TOKEN_MAJOR_DEVICES = {"cuda"}
"""Device types whose stores keep all layers of a token side by side."""


def is_token_major(device: torch.device) -> bool:
    """Whether stores on this device keep all layers of a token side by side."""
    return device.type in TOKEN_MAJOR_DEVICES


def paging_tokens(shape: KVShape, num_layers: int) -> int:
    """The number of tokens from which pages waste less than they hold; below it ordinary memory serves better."""
    page_bytes = default_scheduler(shape.device).pool.page_bytes
    if is_token_major(shape.device):
        return -(-page_bytes // (shape.token_bytes * num_layers))
    return -(-page_bytes // (max(shape.key_dim, shape.value_dim) * shape.dtype.itemsize))


class Written:
    """What a layer of a store holds: tokens [first, stop), none before its first write; and how often it wrote."""

    __slots__ = ("first", "num_writes", "stop")

    def __init__(self, first: int = 0, stop: int = 0) -> None:
        self.first = first
        self.stop = stop
        self.num_writes = 0


class Viewer(Protocol):
    """What holds the newest views of a store."""

    def renew(self) -> None:
        """Make new views of the store: the ones held may keep memory alive that nobody needs."""


class KVStore:
    """Keys and values of ``num_layers`` layers of one shape, for ``shape.batch`` slots, over VTensors.

    Args:
        shape: of every layer in it.
        num_layers: layers that share the store's pages; 1 where the device keeps layers apart.
        tokens: how many tokens are about to be written.
        capacity: tokens of addresses to reserve; default: what suits so many tokens.

    Units:   tokens; every position is a token's absolute one.
    Effects: reserves addresses; takes memory with ``commit``.
    """

    def __init__(self, shape: KVShape, num_layers: int, tokens: int, capacity: int | None = None) -> None:
        capacity, salt = capacity or capacity_of(tokens, shape.device), current_salt()
        if is_token_major(shape.device):
            row_elements = shape.heads * (shape.key_dim + shape.value_dim) * num_layers
            rows: list[tuple[tuple[int, ...], int]] = [((shape.batch,), row_elements)]
        else:
            rows = [((shape.batch, shape.heads), dim) for dim in (shape.key_dim, shape.value_dim)]
        vtensors = [
            VTensor(
                (row_elements,),
                outer_shape=outer,
                capacity=capacity,
                dtype=shape.dtype,
                device=shape.device,
                first_rows=tokens,
                salt=salt,
            )
            for outer, row_elements in rows
        ]
        self._start(shape, [Written() for _ in range(num_layers)], vtensors)

    @classmethod
    def over(cls, vtensors: list[VTensor], shape: KVShape, num_layers: int, tokens: int) -> KVStore:
        """A store over VTensors that hold the first ``tokens`` of all of its layers."""
        store = cls.__new__(cls)
        store._start(shape, [Written(0, tokens) for _ in range(num_layers)], vtensors)
        return store

    def _start(self, shape: KVShape, written: list[Written], vtensors: list[VTensor]) -> None:
        self.shape = shape
        self.num_layers = len(written)
        self.written = written
        self.vtensors = vtensors
        for vtensor in vtensors[1:]:
            vtensor.stay_with(vtensors[0])
        self.lease = vtensors[0].in_place()
        """A lock: while a thread holds it, no other one moves these rows; see ``VTensor.in_place``."""
        self.pool = vtensors[0].scheduler.pool
        self.viewers: weakref.WeakSet[Viewer] = weakref.WeakSet()
        self._derived: weakref.WeakValueDictionary[Hashable, KVStore] = weakref.WeakValueDictionary()
        self._num_writes_before: list[int] = []  # of the store that this one was derived from
        self._places: dict[int, tuple[Place, Place]] = {}
        self._note_head()

    @property
    def committed(self) -> int:
        """Tokens that have memory."""
        return min(vtensor.committed for vtensor in self.vtensors)

    @property
    def committed_bytes(self) -> int:
        """Physical bytes behind this store, shared pages included."""
        return sum(vtensor.committed_bytes for vtensor in self.vtensors)

    @property
    def capacity(self) -> int:
        """Tokens that have addresses."""
        return min(vtensor.capacity for vtensor in self.vtensors)

    def commit(self, tokens: int) -> None:
        """Give tokens [first, ``tokens``) memory.

        Raises: OutOfPagesError or DriverError; what was committed before stays usable.
        """
        for vtensor in self.vtensors:
            vtensor.commit(tokens)

    def use(self) -> None:
        """What every use begins with: rows that were offloaded come back, if there is room.

        Raises: AsleepError between ``sleep`` and ``wake``.
        """
        for vtensor in self.vtensors:
            vtensor.use()

    def commit_ahead(self) -> None:
        """Have one more page a strip mapped in the background."""
        for vtensor in self.vtensors:
            vtensor.commit_ahead(vtensor.committed + 1)

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, committed, D] of one layer, over torch storages of their own.

        Position 0 of the views is token ``first(layer)``'s: the first that still has memory.
        """
        first, committed = self.first, self.committed  # before the storages: the scheduler may commit more meanwhile
        storages = [vtensor.storage() for vtensor in self.vtensors]
        views = []
        for place in self.places(layer):
            storage = storages[place.vtensor].untyped_storage()
            head_elements = self.vtensors[place.vtensor].head_bytes // self.shape.dtype.itemsize
            offset = place.offset + first * place.strides[2] - head_elements
            batch, heads, dim = place.sizes
            # Not views of another tensor, which they would keep alive: users of the storage are counted.
            with torch.inference_mode(False):
                view = torch.empty(0, dtype=self.shape.dtype, device=self.shape.device)
            views.append(view.set_(storage, offset, (batch, heads, committed - first, dim), place.strides))
        return views[0], views[1]

    def places(self, layer: int) -> tuple[Place, Place]:
        """Where one layer's keys and values lie."""
        if layer not in self._places:
            self._places[layer] = self._place(layer)
        return self._places[layer]

    def slot_addresses(self, place: Place) -> list[int]:
        """The address of every slot's token 0, without the layer's offset; tokens before ``first`` have no memory."""
        slot_bytes = place.strides[0] * self.shape.dtype.itemsize
        base = self.vtensors[place.vtensor].data_ptr
        return [base + slot * slot_bytes for slot in range(self.shape.batch)]

    def shared_prefixes(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """Slots whose first tokens lie in the same pages, and how many tokens; where layers lie side by side."""
        return self.vtensors[0].common_prefixes() if is_token_major(self.shape.device) else ()

    @property
    def first(self) -> int:
        """The first token that still has memory."""
        return max(vtensor.first_row for vtensor in self.vtensors)

    def has_older_views(self) -> bool:
        """Whether storages are alive that are not the newest of one of ``viewers``: somebody kept an older view."""
        return max(vtensor.num_storages() for vtensor in self.vtensors) > len(self.viewers)

    def wrote(self, layer: int, first: int, stop: int) -> None:
        """Record that ``layer`` has just written up to token ``stop`` and holds tokens [``first``, ``stop``)."""
        written = self.written[layer]
        written.first, written.stop = first, stop
        written.num_writes += 1

    def keep_from(self, layer: int, first: int) -> None:
        """Record that ``layer`` needs no token before ``first``; pages that no layer needs any more go back."""
        written = self.written[layer]
        written.first = first
        if first >= self.next_first and layer == self._last_layer():
            needed = min(used.first for used in self.written if used.stop)
            for vtensor in self.vtensors:
                vtensor.length = written.stop
                vtensor.drop_head(needed)
            for viewer in list(self.viewers):
                viewer.renew()
            self._note_head()

    def derive(self, layer: int, request: Hashable, make: Callable[[], KVStore]) -> KVStore:
        """The store that ``make`` makes from this one, made once for all layers that come with the same request.

        Layers arrive one by one; one that has written here since the store was derived gets a newer one.
        """
        derived = self._derived.get(request)
        if derived is None or derived._num_writes_before[layer] != self.written[layer].num_writes:
            self._derived[request] = derived = make()
            derived._num_writes_before = [written.num_writes for written in self.written]
        return derived

    def fork(self, select: Sequence[int] | None = None, *, share: int | None = None, capacity: int = 0) -> KVStore:
        """A store with the same tokens that shares whole pages; slot i is this store's slot ``select[i]``.

        Args:
            select: source slots, repeats allowed; default: all of them.
            share: pages of tokens before this one are shared, later ones copied; at most, and by default, as many as
                every layer has written, so that both stores can go on appending.
            capacity: tokens of addresses to reserve; default: this store's.

        Raises: OutOfPagesError, with this store unchanged.
        """
        stops = [used.stop for used in self.written if used.stop]
        share = min(stops) if share is None else min(share, *stops)
        vtensors = []
        for vtensor in self.vtensors:
            vtensor.length = max(stops)
            vtensors.append(vtensor.fork(select, share_rows=share, capacity=max(capacity, self.capacity)))
        forked = KVStore.__new__(KVStore)
        written = [Written(used.first, used.stop) for used in self.written]
        forked._start(self.shape._replace(batch=vtensors[0].outer_shape[0]), written, vtensors)
        return forked

    @property
    def writable_from(self) -> int:
        """The first token whose memory is surely no other store's."""
        return max(vtensor.writable_from for vtensor in self.vtensors)

    def maps_faster_than_copies(self, tokens: int) -> bool:
        """Whether ``fork`` takes less time than copying so many tokens of one slot would take in every layer."""
        copied_bytes = tokens * self.shape.token_bytes * self.num_layers
        num_pages = sum(vtensor.num_pages for vtensor in self.vtensors)
        return copied_bytes > num_pages * _COPIED_WHILE_MAPPING_BYTES[self.shape.device.type]

    def retain_in_capture(self) -> None:
        """Keep this store's memory alive for a graph that the current stream is being captured into."""
        for vtensor in self.vtensors:
            vtensor.retain_in_capture()

    def _last_layer(self) -> int:
        return max(layer for layer, used in enumerate(self.written) if used.stop)

    def _note_head(self) -> None:
        head = self.vtensors[0]
        self.next_first = -(-(head.head_bytes + head.scheduler.pool.page_bytes) // head.row_bytes)
        """From which first token on another page can be given back."""

    def _place(self, layer: int) -> tuple[Place, Place]:
        shape = self.shape
        places = []
        offset = layer * shape.heads * (shape.key_dim + shape.value_dim)
        for index, dim in enumerate((shape.key_dim, shape.value_dim)):
            sizes = (shape.batch, shape.heads, dim)
            if is_token_major(shape.device):
                slot, token, _ = self.vtensors[0].strides()
                places.append(Place(0, sizes, (slot, dim, token, 1), offset))
                offset += shape.heads * dim
            else:
                slot, head, token, _ = self.vtensors[index].strides()
                places.append(Place(index, sizes, (slot, head, token, 1), 0))
        return places[0], places[1]


def capacity_of(tokens: int, device: torch.device) -> int:
    """Tokens to reserve: on CUDA so many that addresses never change; on the CPU, where one storage spans the strips
    of every head and may be read whole, at most a few times what is used. A store that outgrows it is mapped anew."""
    if device.type == "cuda":
        return max(_CUDA_CAPACITY_TOKENS, 1 << math.ceil(math.log2(2 * tokens)))
    return max(_CPU_CAPACITY_TOKENS, 1 << math.ceil(math.log2(2 * tokens)))
