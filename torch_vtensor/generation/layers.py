"""The methods of a transformers cache layer, over virtual memory: what enable() installs and VTensorCache's layers use.

Each takes the layer and the stock method it stands for. The stock method runs, counted with the reason, wherever
zero-copy would be wrong or is impossible, so a layer is always in a state that transformers itself could have made.

The adopt rule. Before each append the layer's ``keys`` and ``values`` are compared with the views published last:
the same objects: append behind them; a part of our own views (``crop``): append behind that part; anything else
(assigned by the user, offloaded, reordered by stock code): import it by copy.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torch_vtensor.allocator.pools import DEVICE_TYPES
from torch_vtensor.errors import DriverError, ForkedProcessError, OutOfPagesError
from torch_vtensor.generation._torch_compat import is_traced
from torch_vtensor.generation._transformers_compat import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    initialize,
    recording_shows_window_only,
)
from torch_vtensor.generation.kv_store import KVShape, KVStore, is_token_major
from torch_vtensor.generation.layer_column import LayerColumn, LayerGroup
from torch_vtensor.generation.layer_states import (
    ALL,
    NEVER,
    WINDOW,
    KeysValues,
    LayerState,
    calling,
    counters,
    states,
    take_step,
)

__all__ = [
    "LayerState",
    "batch_repeat_interleave",
    "batch_select_indices",
    "begin_with",
    "cache_update",
    "change_batch",
    "counters",
    "deepcopy",
    "getstate",
    "leaving",
    "reorder_cache",
    "reset",
    "start_empty",
    "state_behind",
    "state_of",
    "store_behind",
    "update",
    "update_window",
    "why_no_driver",
]


@functools.cache
def why_no_driver(device_type: str) -> str | None:
    """Why caches on these devices stay in ordinary memory, or None."""
    if device_type not in DEVICE_TYPES:
        return f"no memory driver for {device_type}"
    if device_type == "cuda":
        try:
            found = importlib.util.find_spec("cuda.bindings")
        except ModuleNotFoundError:
            found = None
        if found is None:
            return "no memory driver for cuda: it needs cuda-python (pip install 'torch-vtensor[cuda]')"
    return None


_FORK = "torch_vtensor.fork"

_members: weakref.WeakKeyDictionary[DynamicLayer, tuple[LayerGroup, int]] = weakref.WeakKeyDictionary()
_leaves: Callable[[DynamicLayer], bool] | None = None  # while disable() runs: the layers that may not come to us


def state_of(layer: DynamicLayer) -> LayerState | None:
    """The layer's state if its keys and values are our views, or a part of them (``crop``), which is then adopted.

    None if the layer is stock, or its keys and values came from elsewhere.
    """
    state = states.get(layer)
    if state is None or state.is_of(layer):
        return state
    part = _part_of(layer.keys, state.keys)
    if part is None or part != _part_of(layer.values, state.values):
        states.discard(layer)
        return None
    state.publish(layer, state.first + part.start, state.first + part.stop, layer.keys, layer.values)
    return state


def start_empty(cache: Cache, layer: DynamicLayer, shape: KVShape) -> LayerState | None:
    """The state of a layer of ``cache`` that has no tokens yet and is about to get such; None if it must stay stock."""
    size = shape.batch, shape.heads, 0
    key, value = (
        torch.empty(*size, dim, dtype=shape.dtype, device=shape.device) for dim in (shape.key_dim, shape.value_dim)
    )
    calling.cache = cache
    try:
        return _adopt(layer, key, value)
    finally:
        calling.cache = None


def begin_with(layer: DynamicLayer, column: LayerColumn, stop: int) -> None:
    """Have a layer without tokens begin with the tokens [0, ``stop``) that a column holds."""
    if not layer.is_initialized:
        initialize(layer, *column.views(0, 0))
    _publish(layer, column, 0, stop)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = stop


def cache_update(stock: Callable[..., KeysValues]) -> Callable[..., KeysValues]:
    """``Cache.update``: one more step like the last at once, everything else by the stock method.

    The stock method calls ``update`` below, which learns here which layers the one that appends grows together with.
    """
    find, is_compiling = states.by_id.get, torch.compiler.is_dynamo_compiling

    @functools.wraps(stock)
    def update(
        self: Cache, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysValues:
        if is_compiling():
            return stock(self, key_states, value_states, layer_idx, *args, **kwargs)
        try:
            layer = self.layers[layer_idx]
            state = find(id(layer))
            if state is not None:
                views = take_step(state, layer, key_states, value_states)
                if views is not None:
                    return views
        except (IndexError, DriverError):
            pass  # a layer that is still to be made; or below it happens again, and is dealt with
        calling.cache = self
        try:
            return stock(self, key_states, value_states, layer_idx, *args, **kwargs)
        finally:
            calling.cache = None

    return update


def update(
    stock: Callable[..., KeysValues],
    layer: DynamicLayer,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    *args: Any,
    **kw: Any,
) -> KeysValues:
    """``DynamicLayer.update``: append in place, return views of everything.

    Shapes: key_states, value_states [B, H, T, D]; returns keys, values [B, H, length + T, D], as the stock method does.
    Raises: OutOfPagesError, with the layer, and those of its cache that had gone one step ahead of it, as they were.
    """
    return _update(_append, stock, layer, key_states, value_states, *args, **kw)


def update_window(
    stock: Callable[..., KeysValues],
    layer: DynamicSlidingWindowLayer,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    *args: Any,
    **kw: Any,
) -> KeysValues:
    """``DynamicSlidingWindowLayer.update``: as ``update``, keeping the window; pages before it go back."""
    return _update(_append_window, stock, layer, key_states, value_states, *args, **kw)


def _update(
    append: Callable[..., KeysValues],
    stock: Callable[..., KeysValues],
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kw: Any,
) -> KeysValues:
    if torch.compiler.is_compiling():
        return stock(layer, key, value, *args, **kw)
    _ask_anew(states.get(layer))
    reason = _why_stock(key, value)
    if reason is None and _leaves is not None and _leaves(layer):
        reason = "disabled meanwhile"
    try:
        state = _adopt(layer, key, value) if reason is None else None
        if state is not None:
            with state.lock:
                if state.is_of(layer):
                    views = append(layer, state, key, value)
                    # A subclass may do more in an update() of its own: then every step has to go through that.
                    if getattr(type(layer).update, "__wrapped__", None) is stock:
                        state.repeats = ALL if append is _append else WINDOW
                    return views
            reason = "disabled meanwhile"
    except OutOfPagesError:
        _take_back_step(layer, key.shape[2])
        raise
    except (DriverError, ForkedProcessError) as error:
        reason = f"memory driver: {type(error).__name__}"
    counters[f"stock: {reason or 'keys and values do not fit the tokens before them'}"] += 1
    state = states.get(layer)
    if state is not None:
        with state.lock:  # not while disable() copies its tokens
            states.discard(layer)
    return stock(layer, key, value, *args, **kw)


def _ask_anew(state: LayerState | None) -> None:
    """Have the next layer of the group ask whether a tracer is at work: not every layer goes on from the same stop."""
    if state is not None:
        state.group.seen_from = None


def reorder_cache(stock: Callable[..., None], layer: DynamicLayer, beam_idx: torch.Tensor) -> None:
    """``DynamicLayer.reorder_cache``: slot i gets slot ``beam_idx[i]``'s tokens, by sharing their pages."""
    if layer.get_seq_length() <= 0 or not _select(layer, beam_idx):  # less than 0: a window cropped by more than it has
        stock(layer, beam_idx)


def batch_select_indices(stock: Callable[..., None], layer: DynamicLayer, indices: Any) -> None:
    """``DynamicLayer.batch_select_indices``: keep only some slots, by sharing their pages."""
    if not _select(layer, indices):
        stock(layer, indices)


def batch_repeat_interleave(stock: Callable[..., None], layer: DynamicLayer, repeats: Any) -> None:
    """``DynamicLayer.batch_repeat_interleave``: each slot ``repeats`` times, sharing pages."""
    state = state_of(layer)
    batch = state.column.shape.batch if state else 0
    slots = [slot for slot in range(batch) for _ in range(repeats)] if isinstance(repeats, int) else []
    if not _select(layer, slots):
        stock(layer, repeats)


def change_batch(stock: Callable[..., None], cache: Any, *args: Any, **kw: Any) -> None:
    """``batch_select_indices`` and ``batch_repeat_interleave`` of a whole cache: all of its layers change, or none.

    Raises: OutOfPagesError, with every layer as it was.
    """
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for part in (cache, *parts) for layer in getattr(part, "layers", ())]
    if not any(layer in states for layer in layers if isinstance(layer, DynamicLayer)):
        return stock(cache, *args, **kw)
    rewinders = [_rewinder(layer) for layer in layers]
    try:
        stock(cache, *args, **kw)
    except BaseException:
        for rewind in rewinders:
            rewind()
        raise
    return None


def _rewinder(layer: Any) -> Callable[[], None]:
    """What puts a layer, stock or ours, back to what it is now, if only its batch has changed."""
    attributes = {name: copy.copy(it) if type(it) in (list, dict) else it for name, it in vars(layer).items()}
    state = state_of(layer) if isinstance(layer, DynamicLayer) else None
    if state is None:
        return lambda: vars(layer).update(attributes)
    rewind_column, first, stop, repeats = state.column.rewinder(), state.first, state.stop, state.repeats

    def rewind() -> None:
        with state.lock:
            rewind_column()
            vars(layer).update(attributes)
            state.publish(layer, first, stop, layer.keys, layer.values)
            state.repeats = repeats
            states[layer] = state

    return rewind


def reset(stock: Callable[..., None], layer: DynamicLayer) -> None:
    """``DynamicLayer.reset``: leaves our memory first, because the stock method may write zeros into its tensors."""
    _leave(layer)
    stock(layer)


def deepcopy(layer: DynamicLayer, memo: dict[Any, Any]) -> DynamicLayer:
    """``copy.deepcopy`` of a layer: an independent layer that shares pages until one of them writes.

    Raises: OutOfPagesError, with the layer unchanged. Where the driver maps no more, the tokens are copied instead.
    """
    state = state_of(layer)
    try:
        # One object a deepcopy, so that the layers of one cache fork their common store once, and twice for two copies.
        column = state.column.fork(memo.setdefault(_FORK, object())) if state else None
    except DriverError as error:
        counters[f"stock: memory driver: {type(error).__name__}"] += 1
        column = None
    new: DynamicLayer = object.__new__(type(layer))
    memo[id(layer)] = new
    for name, attribute in layer.__dict__.items():
        if state is None or name not in ("keys", "values"):
            new.__dict__[name] = copy.deepcopy(attribute, memo)
        elif column is None:
            new.__dict__[name] = attribute.clone()
    if state is not None and column is not None:
        _publish(new, column, state.first, state.stop)
    return new


def getstate(layer: DynamicLayer) -> dict[str, Any]:
    """What pickle, ``torch.save`` and ``copy.copy`` see: the tokens alone, not the address range they lie in."""
    attributes: dict[str, Any] = layer.__dict__.copy()
    state = state_of(layer)
    if state is not None:
        with state.column.in_place():
            attributes["keys"], attributes["values"] = layer.keys.clone(), layer.values.clone()
    return attributes


@contextmanager
def leaving(leaves: Callable[[DynamicLayer], bool]) -> Iterator[None]:
    """Copy the tokens of every layer for which ``leaves`` is true to ordinary memory, and forget the layer.

    Inside the block no such layer comes back, so that the stock methods can be installed while other threads generate.
    """
    global _leaves
    _leaves = leaves
    try:
        for layer in states.layers():
            if leaves(layer):
                _leave(layer)
        yield
    finally:
        _leaves = None


def _leave(layer: DynamicLayer) -> None:
    state = states.get(layer)
    if state is not None:
        with state.lock, state.column.in_place():
            if state_of(layer) is state:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            states.discard(layer)


def _append(layer: DynamicLayer, state: LayerState, key: torch.Tensor, value: torch.Tensor) -> KeysValues:
    keys, values = state.column.append(key, value, state.first, state.stop)
    counters["zero-copy"] += 1
    state.publish(layer, state.first, state.stop + key.shape[2], keys, values)
    calling.appended = state.layer
    return keys, values


def state_behind(keys: torch.Tensor) -> LayerState | None:
    """The state of the layer that this thread appended to last, if ``keys`` are in its memory."""
    reference = getattr(calling, "appended", None)
    layer = None if reference is None else reference()
    state = None if layer is None else states.get(layer)
    if state is None or state.keys is None or state.keys is keys:
        return state
    is_same = state.keys.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    return state if is_same else None


def store_behind(keys: torch.Tensor) -> KVStore | None:
    """The pages that ``keys`` show from the first token on, if they are what this thread's last append returned."""
    state = state_behind(keys)
    return state.column.store if state is not None and state.keys is keys and state.first == 0 else None


def _append_window(
    layer: DynamicSlidingWindowLayer, state: LayerState, key: torch.Tensor, value: torch.Tensor
) -> KeysValues:
    num_new, window = key.shape[2], layer.sliding_window
    recording = getattr(layer, "record_past", False)
    before = state.first, state.stop
    if state.stop == 0 and num_new >= window > 1 and not recording:
        # A prompt longer than the window: attention sees all of it once, the cache keeps its end.
        kept = window - 1
        state.publish(layer, 0, kept, *state.column.append(key[:, :, -kept:], value[:, :, -kept:], 0, 0))
        keys, values = key, value
    else:
        keys, values = state.column.append(key, value, state.first, state.stop)
        stop = state.stop + num_new
        if recording:
            state.publish(layer, state.first, stop, keys, values)
            if recording_shows_window_only():
                keys, values = keys[:, :, -(window - 1 + num_new) :], values[:, :, -(window - 1 + num_new) :]
        else:
            kept_keys, kept_values = keys[:, :, -window + 1 :], values[:, :, -window + 1 :]
            state.publish(layer, stop - kept_keys.shape[2], stop, kept_keys, kept_values)
        # Not to state.first: the step may have to be taken back.
        state.column.keep(before[0])
    counters["zero-copy"] += 1
    calling.appended = state.layer
    layer.cumulative_length += num_new
    state.before = before
    return keys, values


def _take_back_step(layer: DynamicLayer, num_new: int) -> None:
    """Let the layers before ``layer`` that have appended ``num_new`` tokens more than it forget them again.

    The model's step fails as a whole: without this, trying it again would append to those layers twice.
    """
    cache, length = getattr(calling, "cache", None), layer.get_seq_length()
    for other in cache.layers if cache is not None else ():
        if other is layer:
            return
        state = state_of(other) if isinstance(other, DynamicLayer) else None
        if state is None or other.get_seq_length() != length + num_new:
            continue
        with state.lock:
            if not state.is_of(other):
                continue
            _ask_anew(state)
            first, stop = state.first, state.stop - num_new
            if isinstance(other, DynamicSlidingWindowLayer):
                first, stop = state.before
                other.cumulative_length -= num_new
            state.publish(other, first, stop, *state.column.views(first, stop))


def _why_stock(key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why these tokens must go through the stock method, or None."""
    cache = getattr(calling, "cache", None)
    if torch.is_grad_enabled():
        return "gradients are enabled (use torch.no_grad())"
    if type(key) is not torch.Tensor or type(value) is not torch.Tensor:
        return "a tensor subclass"
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3] or 0 in key.shape or 0 in value.shape:
        return "empty, or not [batch, heads, tokens, dim]"
    if key.device != value.device or key.dtype != value.dtype:
        return "keys and values differ in dtype or device"
    if (reason := why_no_driver(key.device.type)) is not None:
        return reason
    if is_traced():
        return "traced or transformed"
    if cache is not None and getattr(cache, "offloading", False):
        return "the cache offloads its layers"
    return None


def _adopt(layer: DynamicLayer, key: torch.Tensor, value: torch.Tensor) -> LayerState | None:
    """The layer's state, brought up to what its keys and values are now; None if the new tokens do not fit them."""
    if not layer.is_initialized:
        initialize(layer, key, value)
    shape = KVShape.of(key, value)
    state = state_of(layer)
    if state is not None:
        return state if state.column.shape == shape else None
    length = layer.keys.shape[2] if layer.keys is not None and layer.keys.numel() else 0
    state = LayerState(LayerColumn(*_group_of(layer, shape)))
    if length:
        keys, values = layer.keys, layer.values
        if _why_stock(keys, values) is not None or KVShape.of(keys, values) != shape:
            return None
        state.publish(layer, 0, length, *state.column.append(keys, values, 0, 0))
        counters["import"] += 1
    else:
        state.keys, state.values = layer.keys, layer.values
    states[layer] = state
    return state


def _part_of(part: Any, whole: torch.Tensor | None) -> range | None:
    """Which run of the tokens of ``whole`` the tensor ``part`` shows; None if it does not."""
    if not isinstance(part, torch.Tensor) or whole is None or part.dim() != 4 or part.dtype != whole.dtype:
        return None
    same_rows = part.shape[:2] == whole.shape[:2] and part.shape[3] == whole.shape[3]
    if not same_rows or part.stride() != whole.stride():
        return None
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    shift, remainder = divmod(int(part.storage_offset()) - int(whole.storage_offset()), whole.stride(2))
    if remainder or shift < 0 or shift + part.shape[2] > whole.shape[2]:
        return None
    return range(shift, shift + part.shape[2])


def _group_of(layer: DynamicLayer, shape: KVShape) -> tuple[LayerGroup, int]:
    """The group that a layer without tokens in it belongs to, and its place there."""
    group, index = _members.pop(layer, (None, 0))
    if group is not None and group.shape == shape:
        return group, index
    cache = getattr(calling, "cache", None) if is_token_major(shape.device) else None
    siblings = [layer] if cache is None else _beside(layer, cache, shape.device)
    siblings = [other for other in siblings if _kind(other) == _kind(layer)]
    siblings = [other for other in siblings if other is layer or state_of(other) is None]
    group = LayerGroup(shape, len(siblings))
    for place, sibling in enumerate(siblings):
        if sibling is layer:
            index = place
        else:
            _members[sibling] = (group, place)
    return group, index


def _beside(layer: DynamicLayer, cache: Any, device: torch.device) -> list[Any]:
    """A layer on a device, and the cache's others but for those that are known to be on another device of its kind."""
    devices = getattr(calling, "devices", None)
    if not devices:
        return list(cache.layers)
    places = (devices.get(index, device) for index in range(len(cache.layers)))
    is_here = (place == device or place.type != device.type for place in places)
    return [other for other, here in zip(cache.layers, is_here, strict=True) if here or other is layer]


def _kind(layer: Any) -> tuple[type, int | None]:
    return type(layer), getattr(layer, "sliding_window", None)


def _select(layer: DynamicLayer, indices: torch.Tensor | Sequence[int]) -> bool:
    """Give the layer's slots the tokens of others, sharing pages; False if only the stock method can."""
    state = state_of(layer)
    if state is None or state.first == state.stop:
        return False
    with state.lock, state.column.in_place():
        is_done = state.is_of(layer) and _select_slots(layer, state, indices)
        if not is_done:
            states.discard(layer)  # the stock method makes other tensors
    return is_done


def _select_slots(layer: DynamicLayer, state: LayerState, indices: torch.Tensor | Sequence[int]) -> bool:
    column, first, stop, batch = state.column, state.first, state.stop, state.column.shape.batch
    slots = _slots(indices, batch)
    if slots is None or (len(slots) != batch and column.store is None):
        return False
    if slots != tuple(range(batch)):
        index = indices if isinstance(indices, torch.Tensor) else torch.tensor(slots, device="cpu")
        state.publish(layer, first, stop, None, None)  # so that views that are still alive are somebody else's
        try:
            column.select(slots, index, first, stop)
        except DriverError as error:
            counters[f"stock: memory driver: {type(error).__name__}"] += 1
            return False
        finally:
            state.publish(layer, first, stop, *column.views(first, stop))
        if len(slots) != batch:
            state.repeats = NEVER
        counters["reordered"] += 1
    return True


def _slots(indices: Any, batch: int) -> tuple[int, ...] | None:
    """Indices into the batch; None if they are not plain ones. A cache's layers come one by one with the same tensor.

    Effects: reads the tensor, which waits for the device, once for all layers: which pages are shared is for the host
        to say. The loops that reorder wait for the device at every step in any case, to see which beams have ended.
    """
    if isinstance(indices, torch.Tensor):
        if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
            return None
        version = -1 if indices.is_inference() else indices._version
        known = getattr(calling, "slots", None)
        if known is None or known[0]() is not indices or known[1] != version or version < 0:
            known = calling.slots = (weakref.ref(indices), version, indices.tolist())
        indices = known[2]
    if not isinstance(indices, (list, tuple)) or not indices:
        return None
    if not all(type(index) is int and 0 <= index < batch for index in indices):
        return None
    return tuple(indices)


def _publish(layer: DynamicLayer, column: LayerColumn, first: int, stop: int) -> None:
    state = LayerState(column)
    state.publish(layer, first, stop, *column.views(first, stop))
    states[layer] = state
