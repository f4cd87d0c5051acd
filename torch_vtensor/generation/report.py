"""What the memory is doing and why: stats(), explain(), trim()."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torch_vtensor.allocator.page_pool import PoolStats
from torch_vtensor.allocator.pools import all_schedulers
from torch_vtensor.allocator.torch_pool import release_idle
from torch_vtensor.generation import attention, layers, prefix_cache
from torch_vtensor.generation._transformers_compat import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from torch_vtensor.generation.cached_rows import is_plain
from torch_vtensor.generation.serving import support as serving
from torch_vtensor.settings import format_bytes

__all__ = ["Explanation", "LayerExplanation", "Stats", "empty_cache", "explain", "stats", "trim", "why_all_stock"]


class Stats(NamedTuple):
    """Every device's memory, and how many appends of cache layers were zero-copy or stock, by reason.

    ``attention`` counts the calls of attention while attention="fast" was on, in the same way; ``prefixes`` what calls
    of generate() reused while prefix_cache=True was, in tokens, and how often calls did not, by reason; ``serving``
    what continuous batching did, and how often it was left to transformers, by reason.
    """

    devices: dict[torch.device, PoolStats]
    appends: dict[str, int]
    attention: dict[str, int]
    prefixes: dict[str, int]
    serving: dict[str, int]

    def __str__(self) -> str:
        lines = []
        for device, pool in self.devices.items():
            names = ("committed", "live", "shared", "prefix", "parked", "pooled", "torch", "offloaded", "reserved")
            sizes = ", ".join(f"{name} {format_bytes(getattr(pool, name + '_bytes'))}" for name in names)
            lines.append(f"{device}: {sizes}; {pool.num_driver_calls} driver calls, {pool.num_device_waits} waits")
            lines += [
                f"  {name:<11} {call.count:>7} calls, p50 {call.p50_us:.1f} us, p99 {call.p99_us:.1f} us"
                for name, call in pool.driver_calls.items()
            ]
        lines += [f"appends {reason}: {count}" for reason, count in self.appends.items()]
        lines += [f"attention {reason}: {count}" for reason, count in self.attention.items()]
        lines += [f"prefixes {reason}: {count}" for reason, count in self.prefixes.items()]
        lines += [f"serving {reason}: {count}" for reason, count in self.serving.items()]
        return "\n".join(lines) or "nothing was allocated yet"


class LayerExplanation(NamedTuple):
    """What one layer of a model's cache will do; its attention will be "fast", "stock", or "stock: " and why.

    ``prefix`` says up to where its tokens can be reused by later calls under prefix_cache=True, or why they cannot;
    ``batching`` whether generate_batch() of the model is "ours", or "stock: " and why.
    """

    layer: int
    kind: str
    zero_copy: bool
    reason: str
    attention: str
    prefix: str
    batching: str


class Explanation(tuple[LayerExplanation, ...]):
    """One entry a layer; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [
            f"{entry.layer:>5}  {'zero-copy' if entry.zero_copy else 'stock':<9}  "
            f"{entry.attention.partition(':')[0]:<9}  {entry.kind}: {entry.reason}"
            for entry in self
        ]
        reasons = dict.fromkeys(f"attention {entry.attention}" for entry in self if ":" in entry.attention)
        return "\n".join(["layer  memory     attention  kind", *rows, *reasons])


def stats() -> Stats:
    """Exact figures of this process's memory, by device, and of what the cache layers did."""
    return Stats(
        {device: scheduler.stats() for device, scheduler in all_schedulers().items()},
        dict(layers.counters),
        dict(attention.counters),
        prefix_cache.figures(),
        dict(serving.counters),
    )


def trim(device: torch.device | str | None = None) -> int:
    """Give all memory that no live tensor uses back to the system; may wait for the device.

    Args:
        device: only this one; without an index, all of its type; default: all.

    Returns: bytes of physical memory given back.
    Raises:  ValueError for a device type without a memory driver.
    """
    wanted = None if device is None else torch.device(device)
    if wanted is not None and wanted.type not in layers.DEVICE_TYPES:
        known_types = " and ".join(map(repr, layers.DEVICE_TYPES))
        raise ValueError(
            f"device is '{wanted}', which has no memory driver: give one of {known_types}, or none for all."
        )
    freed_bytes = 0
    for known, scheduler in all_schedulers().items():
        if wanted is None or (known.type == wanted.type and wanted.index in (None, known.index or 0)):
            if known.type == "cuda":
                release_idle(known)
            freed_bytes += scheduler.trim()
    return freed_bytes


def empty_cache() -> None:
    """``trim()`` under the name that torch.cuda's users know."""
    trim()


def explain(model: Any) -> Explanation:
    """Say for each layer of ``model``'s cache whether it will be zero-copy or stock, and why; and so its attention.

    Args:
        model: a transformers model, or its config.

    Raises: TypeError for anything else.
    """
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"explain takes a transformers model or config, not a {type(model).__name__}")
    batching = _who_batches(model)
    if reason := why_all_stock(model):
        attends = attention.what_layer_does(model, None)
        entry = LayerExplanation(0, type(model).__name__, False, reason, attends, f"not reused: {reason}", batching)
        return Explanation([entry])
    entries, never = [], prefix_cache.why_never(model)
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    for index, layer in enumerate(DynamicCache(config=config).layers):
        kind = type(layer).__name__
        attends = attention.what_layer_does(model, kinds[index] if index < len(kinds) else None)
        prefix = _what_is_reused(layer) if never is None else f"not reused: {never}"
        if not isinstance(layer, DynamicLayer):
            reason = "keeps no keys and values that grow"
            entries.append(LayerExplanation(index, kind, False, reason, attends, prefix, batching))
        elif _owner_of_update(type(layer)) not in (DynamicLayer, DynamicSlidingWindowLayer):
            reason = "has an update() of its own"
            entries.append(LayerExplanation(index, kind, False, reason, attends, prefix, batching))
        else:
            window = getattr(layer, "sliding_window", None)
            more = f"; pages before the window of {window} go back" if window else ""
            entries.append(LayerExplanation(index, kind, True, f"appends in place{more}", attends, prefix, batching))
    return Explanation(entries)


def _who_batches(model: Any) -> str:
    reason = serving.why_never(model) if hasattr(model, "config") else "a configuration alone does not tell"
    return "ours" if reason is None else f"stock: {reason}"


def _what_is_reused(layer: Any) -> str:
    if not is_plain(type(layer)):
        return "not reused: a layer that keeps something else than keys and values"
    window = getattr(layer, "sliding_window", None)
    return "reused" if window is None else f"reused by and from sequences shorter than the window of {window}"


def why_all_stock(model: Any) -> str | None:
    """Why no layer of a model's caches will be in our memory, or None."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if callable(supports) and not supports():
        return "the model brings a cache class of its own, which stays as it is"
    implementation = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if implementation is not None and not implementation.startswith("dynamic"):
        return f"generation_config.cache_implementation is {implementation!r}, whose layers stay as they are"
    device = getattr(model, "device", None)
    return layers.why_no_driver(device.type) if device is not None else None


def _owner_of_update(kind: type) -> type:
    return next(owner for owner in kind.__mro__ if "update" in owner.__dict__)
