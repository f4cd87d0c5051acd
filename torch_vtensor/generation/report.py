"""explain(): what each layer of a model's cache will do, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch_vtensor.generation import attention, layers, prefix_cache
from torch_vtensor.generation._transformers_compat import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from torch_vtensor.generation.cached_rows import is_plain
from torch_vtensor.generation.serving import support as serving

__all__ = ["Explanation", "LayerExplanation", "explain", "why_all_stock"]


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
