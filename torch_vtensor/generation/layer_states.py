"""LayerState: what is kept beside a cache's layer; and the step that looks like the one before, which most are.

Everything that a step has to decide was decided by an earlier one: which stays true as long as the layer's keys and
values are the views published last, and the new ones fit the memory behind them, which the copy itself finds out.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from torch_vtensor.allocator.statistics import count_with
from torch_vtensor.generation._torch_compat import functorch_is_active, jit_is_tracing, num_dispatch_modes
from torch_vtensor.generation._transformers_compat import DynamicLayer
from torch_vtensor.generation.layer_column import LayerColumn

__all__ = [
    "ALL",
    "NEVER",
    "WINDOW",
    "KeysValues",
    "LayerState",
    "LayerStates",
    "calling",
    "counters",
    "layers_on",
    "states",
    "take_step",
]

KeysValues = tuple[torch.Tensor, torch.Tensor]

calling = threading.local()
"""Of each thread: the ``cache`` whose method is running, a reference to the layer that ``appended`` last, and the
``devices`` of its caches' layers."""


@contextmanager
def layers_on(devices: Mapping[int, torch.device]) -> Iterator[None]:
    """A block in which this thread's caches have layers on these devices, by index; on one, where none are named."""
    before = getattr(calling, "devices", None)
    calling.devices = devices
    try:
        yield
    finally:
        calling.devices = before


class Noting:
    """Whether anybody asks which layer ``appended`` last; a thread's own variables cost every append."""

    __slots__ = ("appended",)

    def __init__(self) -> None:
        self.appended = False


noting = Noting()

counters: Counter[str] = Counter()
"""How often layers appended in place ("zero-copy"), by copy ("import"), and by the stock method, by reason."""
count_with("appends", lambda: counters)

NEVER, ALL, WINDOW = range(3)
"""What `LayerState.repeats` says: steps need their checks; they go on as the last one did, keeping all or a window."""

_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled


class LayerState:
    """What we keep beside a layer: its column, and the tokens [first, stop) that its published views show."""

    __slots__ = ("before", "column", "first", "group", "keys", "layer", "lock", "repeats", "stop", "turn", "values")

    def __init__(self, column: LayerColumn) -> None:
        self.column = column
        self.layer: weakref.ref[DynamicLayer] | None = None  # whose state this is, from `LayerStates`
        self.group = column.group
        self.lock = column.group.lock
        self.first = 0
        self.stop = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.before = (0, 0)  # a sliding layer's first and stop before the last append
        self.turn: object = None  # of attention: kept as long as the layer
        self.repeats = NEVER  # whether an append needs no other checks than those of `take_step`

    def publish(
        self, layer: DynamicLayer, first: int, stop: int, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> None:
        """Make ``keys`` and ``values``, which show tokens [first, stop), the layer's own."""
        self.first, self.stop, self.keys, self.values = first, stop, keys, values
        layer.keys, layer.values = keys, values

    def is_of(self, layer: DynamicLayer) -> bool:
        """Whether the layer's keys and values are the views published last."""
        return self.keys is layer.keys and self.values is layer.values


class LayerStates:
    """The states of layers, which it does not keep alive. Beside them, as exporters flatten a layer's ``__dict__``."""

    def __init__(self) -> None:
        self.by_id: dict[int, LayerState] = {}
        """By ``id(layer)``: an entry goes before its layer's id can be another object's."""

    def get(self, layer: Any) -> LayerState | None:
        """The layer's state."""
        return self.by_id.get(id(layer))

    def __contains__(self, layer: object) -> bool:
        return id(layer) in self.by_id

    def __setitem__(self, layer: DynamicLayer, state: LayerState) -> None:
        key, by_id = id(layer), self.by_id
        state.layer = weakref.ref(layer, lambda _: by_id.pop(key, None))
        by_id[key] = state

    def discard(self, layer: DynamicLayer) -> None:
        """Forget the layer's state, if it has one."""
        self.by_id.pop(id(layer), None)

    def layers(self) -> Iterator[DynamicLayer]:
        """The layers that have states now."""
        for state in list(self.by_id.values()):  # copied at once: other threads go on generating
            layer = state.layer() if state.layer is not None else None
            if layer is not None:
                yield layer


states = LayerStates()


def take_step(state: LayerState, layer: Any, key: torch.Tensor, value: torch.Tensor) -> KeysValues | None:
    """Append as the step before did; None, with nothing changed, where this one has to be looked at.

    Raises: DriverError, with the layer as it was.
    """
    with state.lock:
        if (
            not state.repeats
            or state.keys is not layer.keys
            or state.values is not layer.values
            or type(key) is not _Tensor
            or type(value) is not _Tensor
            or _is_grad_enabled()
        ):
            return None
        column, first, stop, group = state.column, state.first, state.stop, state.group
        if group.seen_from != stop:  # a step's layers come from the same stop, and the first asks for all
            if jit_is_tracing() or functorch_is_active() or num_dispatch_modes():
                return None
            group.seen_from = stop
        window = 0
        if state.repeats == WINDOW:
            window = layer.sliding_window
            if window < 2 or getattr(layer, "record_past", False):
                return None
        num_new = column.append_next(key, value, first, stop)
        if not num_new:
            return None
        new_stop = stop + num_new
        keys, values = views = column.views(first, new_stop)
        kept = first
        if window:
            kept = max(first, new_stop - window + 1)
            if kept > first:
                keys, values = column.views(kept, new_stop)
            state.before = first, stop
            layer.cumulative_length += num_new
        state.first, state.stop, state.keys, state.values = kept, new_stop, keys, values
        layer.keys, layer.values = keys, values
        if first:
            column.keep(first)  # not from ``kept`` on: the step may have to be taken back
        counters["zero-copy"] += 1
        if noting.appended:
            calling.appended = state.layer
        return views


# In a child made by fork() the memory is the parent's: its layers' tokens are imported by copy at their next append.
os.register_at_fork(after_in_child=states.by_id.clear)
