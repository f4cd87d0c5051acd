"""attention="fast": transformers' attention registry, attending by our operators wherever a call is one of theirs.

Two seams. Every model looks its attention function up in the registry, so what it finds there attends; and masks are
made by functions of a second registry, so what those make says what it means (attention_masks.py). The stock function
is at hand in every call: it attends, counted with the reason, whenever our operators have no arguments for the call.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from torch_vtensor.allocator.statistics import count_with
from torch_vtensor.generation import layers
from torch_vtensor.generation._torch_compat import is_observed, is_traced
from torch_vtensor.generation._transformers_compat import (
    AttentionInterface,
    AttentionMaskInterface,
    attentions_are_wanted,
    is_plain_eager,
)
from torch_vtensor.generation.attention_masks import Pattern, VisibleTokens, describing
from torch_vtensor.generation.kv_store import KVStore
from torch_vtensor.generation.layer_states import noting
from torch_vtensor.generation.shared_reads import SharedPrefix, SharedTables, shared_prefixes, tables_of
from torch_vtensor.ops import decode_attention, prefill_attention
from torch_vtensor.ops.decode_attention import repeated

__all__ = ["counters", "install", "remove", "what_layer_does"]

counters: Counter[str] = Counter()
"""How often attention was ours ("fast") and transformers' own, by reason."""
count_with("attention", lambda: counters)

Output = tuple[torch.Tensor, torch.Tensor | None]
_WIDEST = 576  # head dims that the kernels' blocks were made for
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "scaling", "sliding_window", "use_cache", "dropout", "softcap", "s_aux",
}  # fmt: skip
"""Arguments of an attention function that masks say already, or that are dealt with here."""
_COUNTED = {"dropout", "scaling", "softcap", "s_aux"}
"""Those of them that decide how to attend with one row."""
_tables: weakref.WeakKeyDictionary[KVStore, tuple[tuple[SharedPrefix, ...], SharedTables]] = weakref.WeakKeyDictionary()
_installed: list[Callable[[], None]] = []


class Turn:
    """How one layer attended with its newest token: the layers after it, whose calls look the same, do it again.

    A call looks the same if its tensors have the same shapes and dtypes, its mask is the same object, and its other
    arguments have the same values as far as they count.
    """

    __slots__ = (
        "__weakref__", "_again", "_checked", "_dtype", "_key_shape", "_mask", "_names", "_pattern", "_query_shape",
        "_value_shape",
    )  # fmt: skip

    def __init__(
        self,
        again: repeated.Again,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: VisibleTokens | None,
        kwargs: dict[str, Any],
    ) -> None:
        self._again = again
        self._query_shape, self._key_shape, self._value_shape = query.shape, key.shape, value.shape
        self._dtype, self._mask = query.dtype, mask
        self._pattern = None if mask is None else mask.pattern
        self._names = frozenset(kwargs)
        counted = [name for name in kwargs if name in _COUNTED or name not in _HARMLESS]
        self._checked = tuple((name, kwargs[name], type(kwargs[name])) for name in counted)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """[B, 1, Hq, Dv]; None, with nothing done, for a call that looks different."""
        if (
            mask is not self._mask
            or (mask is not None and mask.pattern is not self._pattern)  # a model has written to it
            or key.shape != self._key_shape
            or query.shape != self._query_shape
            or value.shape != self._value_shape
            or not query.dtype is key.dtype is value.dtype is self._dtype
            or not type(query) is type(key) is type(value) is torch.Tensor
            or query.stride(3) != 1
            or key.stride(3) != 1
            or value.stride(3) != 1
            or torch.is_grad_enabled()
            or is_traced()
            or is_observed()
            or kwargs.keys() != self._names
        ):
            return None
        for name, known, kind in self._checked:
            given = kwargs[name]
            if type(given) is not kind or given != known:
                return None
        return self._again(query, key, value)


class Turns(threading.local):
    """The last turns of a thread by the shapes of their keys: layers of several kinds take theirs by turns.

    A turn holds device memory, and ends with the layer that it began with, or with that layer's next one.
    """

    def __init__(self) -> None:
        self._turns: dict[torch.Size, weakref.ref[Turn]] = {}

    def find(self, key: torch.Tensor) -> Turn | None:
        """The turn in which a call with such keys may take part."""
        reference = self._turns.get(key.shape) if type(key) is torch.Tensor else None
        return None if reference is None else reference()

    def keep(self, key: torch.Tensor, turn: Turn) -> None:
        """Let the calls to come find ``turn``, if the keys that it began with are a cache's of ours."""
        state = layers.state_behind(key)
        if state is not None:
            state.turn = turn
            alive = {shape: known for shape, known in self._turns.items() if known() is not None}
            self._turns = {**alive, key.shape: weakref.ref(turn)}


def install() -> None:
    """Put our functions into transformers' registries; calling it again changes nothing."""
    if _installed:
        return
    noting.appended = True
    functions: dict[str, Any] = AttentionInterface._global_mapping
    masks: dict[str, Any] = AttentionMaskInterface._global_mapping
    _replace(functions, "sdpa", _routed(functions["sdpa"], False))
    _replace(masks, "sdpa", describing(masks["sdpa"], False))
    stock = getattr(AttentionInterface, "get_interface", None)
    if stock is None:  # early versions do not look eager functions up
        return
    _replace(masks, "eager", describing(masks["eager"], True))

    @functools.wraps(stock)
    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        found: Callable[..., Any] = stock(self, name, default)
        if name != "eager" or found is not default or torch.compiler.is_compiling():
            return found
        return _routed(found, True)

    AttentionInterface.get_interface = get_interface
    _installed.append(functools.partial(setattr, AttentionInterface, "get_interface", stock))


def remove() -> None:
    """Put transformers' own functions back."""
    noting.appended = False
    while _installed:
        _installed.pop()()


def _replace(mapping: dict[str, Any], name: str, ours: Any) -> None:
    stock = mapping[name]
    mapping[name] = ours

    def put_back() -> None:
        if mapping.get(name) is ours:  # somebody may have registered another one meanwhile
            mapping[name] = stock

    _installed.append(put_back)


@functools.cache
def _routed(stock: Callable[..., Output], is_eager: bool) -> Callable[..., Output]:
    """An attention function for transformers that is ours where it can be, and else ``stock``."""
    turns = Turns()
    is_compiling = torch.compiler.is_dynamo_compiling

    @functools.wraps(stock)
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Output:
        if not is_compiling() and not args:
            turn = turns.find(key)
            if turn is not None and (again := turn.attend(query, key, value, attention_mask, kwargs)) is not None:
                counters["fast"] += 1
                return again, None
        given = module, query, key, value
        if torch.compiler.is_compiling():
            return stock(*given, attention_mask, *args, **kwargs)
        reason = "positional arguments" if args else _why_stock(stock, is_eager, *given, attention_mask, kwargs)
        if reason is None:
            counters["fast"] += 1
            out, turn = _attend(*given, attention_mask, is_eager, kwargs)
            if turn is not None:
                turns.keep(key, turn)
            return out, None
        counters[f"stock: {reason}"] += 1
        mask = attention_mask.as_stock() if isinstance(attention_mask, VisibleTokens) else attention_mask
        return stock(*given, mask, *args, **kwargs)

    return attention


def _why_stock(
    stock: Callable[..., Output],
    is_eager: bool,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call is transformers' own function's, or None."""
    if torch.is_grad_enabled():
        return "gradients are enabled (use torch.no_grad())"
    if is_traced() or any(type(tensor) is not torch.Tensor for tensor in (query, key, value)):
        return "traced or transformed, or a tensor subclass"
    if kwargs.get("dropout"):
        return "dropout"
    if is_eager and (reason := _why_eager(stock, module, kwargs)):
        return reason
    if not is_eager and kwargs.get("s_aux") is not None:
        return "sinks, which the sdpa implementation leaves out"
    if unknown := sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS):
        return f"an argument of the model's own ({', '.join(unknown)})"
    if mask is not None:
        if not isinstance(mask, VisibleTokens) or mask.pattern is None:
            return "a mask that is more than padding, a window or packed sequences"
        if (query.shape[2], key.shape[2]) != mask.shape[2:] or query.shape[0] != mask.shape[0]:
            return "a mask for other tokens"
    return _why_not_shapes(query, key, value)


def _why_eager(stock: Callable[..., Output], module: Any, kwargs: dict[str, Any]) -> str | None:
    """Why an eager attention function has to run itself, or None."""
    if not is_plain_eager(stock):
        return "eager attention of the model's own"
    if kwargs.get("output_attentions") or attentions_are_wanted():
        return "attention weights are asked for"
    names = stock.__code__.co_varnames + stock.__code__.co_names
    if kwargs.get("softcap") is not None and "softcap" not in names:
        return "a soft-cap that the model's eager attention leaves out"
    if (kwargs.get("s_aux") is not None) != ("sinks" in names):
        return "sinks that are not where they are expected"
    return "no scale is given" if kwargs.get("scaling") is None and hasattr(module, "head_dim") else None


def _why_not_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        return "not [batch, heads, tokens, dim]"
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        return "queries and keys that do not fit each other"
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        return "queries, keys and values differ in dtype"
    if not query.device == key.device == value.device or 0 in query.shape or 0 in key.shape:
        return "queries and keys on different devices, or empty"
    if max(query.shape[3], value.shape[3]) > _WIDEST:
        return f"head dims above {_WIDEST}"
    return _why_not_device(query.device.type, query.dtype)


@functools.cache
def _why_not_device(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type == "cpu":
        return None
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return f"no kernels for {device_type} here"
    return f"no kernels for {dtype}" if dtype.itemsize not in (2, 4) else None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: VisibleTokens | None,
    is_eager: bool,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, Turn | None]:
    """The call, by our operators: [B, T, Hq, Dv]; and how the next layers' calls can go."""
    num_rows = query.shape[2]
    pattern = mask.pattern if mask is not None else None
    if pattern is None:
        is_causal = kwargs.get("is_causal")
        causal = (
            not is_eager and num_rows > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        )
        if causal:  # without a mask the stock function aligns rows with the first token
            key, value = key[:, :, :num_rows], value[:, :, :num_rows]
        pattern = Pattern(causal, None, None, None, None)
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    options = {"scale": kwargs.get("scaling"), "sinks": kwargs.get("s_aux"), "softcap": kwargs.get("softcap")}
    if pattern.segments is not None:
        return _attend_segments(query, key, value, pattern, options).transpose(1, 2), None
    options |= {"first": pattern.first, "window": pattern.window}
    if num_rows > 1:
        out = prefill_attention(query, key, value, pattern.stop, causal=pattern.causal, **options)
        return out.transpose(1, 2), None
    shared = _shared(key) if pattern.window is None and pattern.first is None else {}
    if shared or is_eager or kwargs.get("s_aux") is not None or is_observed():
        return decode_attention(query, key, value, pattern.stop, **options, **shared).transpose(1, 2), None
    del options["sinks"]
    out, again = repeated.start(query, key, value, pattern.stop, **options)
    return out, None if again is None else Turn(again, query, key, value, mask, kwargs)


def _shared(key: torch.Tensor) -> dict[str, Any]:
    """Which slots have their first tokens in the same pages, for decode_attention, where reading them once saves much.

    Effects: copies a table to the device when pages were shared anew or written apart; no wait for it.
    """
    store = layers.store_behind(key)
    prefixes = () if store is None else shared_prefixes(store, key.shape[2] - 1)
    if store is None or not prefixes:
        return {}
    known = _tables.get(store)
    if known is None or known[0] != prefixes:
        tables = SharedTables(*(table.to(key.device) for table in tables_of(prefixes, key.shape[0])))
        known = _tables[store] = prefixes, tables
    return known[1]._asdict()


def _attend_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, options: dict[str, Any]
) -> torch.Tensor:
    """Each packed sequence by itself."""
    assert pattern.segments is not None
    batch, query_heads, num_rows, _ = query.shape
    out = query.new_empty(batch, num_rows, query_heads, value.shape[3]).transpose(1, 2)
    for slot, segments in enumerate(pattern.segments):
        for start, stop in segments:
            part = slice(slot, slot + 1), slice(None), slice(start, stop)
            out[part] = prefill_attention(
                query[part], key[part], value[part], causal=pattern.causal, window=pattern.window, **options
            )
    return out


def what_layer_does(model: Any, layer_type: str | None) -> str:
    """How a model's layer will attend, as far as it can be told beforehand: "fast", "stock" or "stock: " and why."""
    if not _installed:
        return "stock"
    reason = _why_layer_stock(model, layer_type)
    return f"stock: {reason}" if reason else "fast"


def _why_layer_stock(model: Any, layer_type: str | None) -> str | None:
    name = getattr(model, "config", model).get_text_config(decoder=True)._attn_implementation
    if layer_type is not None and layer_type not in ("full_attention", "sliding_attention"):
        return f"{layer_type} has a mask of its own"
    if name == "eager":
        if getattr(AttentionInterface, "get_interface", None) is None:
            return "this version of transformers looks no eager attention up"
    elif name != "sdpa":
        return f"attn_implementation is {name!r}"
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    homes = [vars(sys.modules[type(module).__module__]) for module in modules if "Attention" in type(module).__name__]
    if homes and not any("ALL_ATTENTION_FUNCTIONS" in home for home in homes):
        return "the model's attention is not in transformers' registry"
    eager = [home["eager_attention_forward"] for home in homes if "eager_attention_forward" in home]
    if name == "eager" and eager and not all(map(is_plain_eager, eager)):
        return "eager attention of the model's own"
    return None
