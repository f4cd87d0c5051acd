"""prefix_cache=True: a call of generate() begins with the longest prefix that an earlier call has left.

    generate()
      │ makes an empty cache                        noted: it is generate()'s own
      ▼
    _sample, _beam_search                           what is cached of every row, but its last token, is mapped into it;
      │ run the model on the rest of the prompt     the stock loop, and the compiled one, go on from there
      ▼
    the tokens                                      recorded, with the pages that their keys and values lie in

What is cached is a model's own, and is dropped with the model, or when its weights change. Where it is only in another
state, under autocast for example, what is pinned is kept for its return.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from torch_vtensor.allocator.prefix import Loan, Pin, PrefixTree
from torch_vtensor.allocator.statistics import count_with
from torch_vtensor.errors import OutOfPagesError, VTensorError
from torch_vtensor.generation import _torch_compat
from torch_vtensor.generation._transformers_compat import (
    CACHE_NAME,
    Cache,
    DynamicCache,
    continues_given_positions,
    with_cache,
)
from torch_vtensor.generation.cached_rows import (
    ROWS_BEHIND,
    CachedRows,
    StoreLayout,
    begin_with,
    is_plain,
    is_worth_pages,
    most_lendable,
    rows_of,
)
from torch_vtensor.generation.decode.support import (
    MODEL_INPUTS,
    is_spread,
    paddings_of,
    why_more_than_tokens,
)
from torch_vtensor.generation.kv_store import capacity_of
from torch_vtensor.generation.layers import why_no_driver
from torch_vtensor.generation.modules import has_foreign_hooks, modules_of
from torch_vtensor.generation.tenant import current_salt

__all__ = [
    "adapters_of",
    "begin",
    "check_keeps",
    "clear",
    "counters",
    "figures",
    "keep",
    "lend",
    "mark_of",
    "note_cache",
    "record",
    "reuse",
    "trees_of",
    "why_never",
]

_log = logging.getLogger(__name__)
counters: Counter[str] = Counter()
"""How many tokens of prompts were reused and run, how many were recorded, and why calls did not, by reason."""

_LEAST_TOKENS = 16  # fewer are computed about as fast as they are mapped
_KINDS_OF_WEIGHTS = (torch.Tensor, torch.nn.Parameter)
_CHANGES_DO_NOT_SHOW = "weights whose changes do not show: of a tensor subclass, or made under inference_mode"
_LOOP_ARGUMENTS = {"streamer", "synced_gpus"}
_made_by_generate: weakref.WeakSet[Cache] = weakref.WeakSet()
_lock = threading.Lock()


class Mark(NamedTuple):
    """What tells a model as it is from what it was: its weights' places and versions, and what does not change them."""

    weights: tuple[Any, ...]
    state: tuple[Any, ...]
    """Its adapters, precision and attention: it can come back to what these were."""


class _Kept(NamedTuple):
    """What one model left: in the state that ``mark`` tells from others, in stores laid out like this."""

    mark: Mark
    layouts: tuple[StoreLayout, ...]
    tree: PrefixTree


_kept: weakref.WeakKeyDictionary[Any, list[_Kept]] = weakref.WeakKeyDictionary()


class _Request(NamedTuple):
    """The prompts of one call: their tokens without padding, and how much of it is in front."""

    tokens: list[list[int]]
    paddings: list[int]


def note_cache(
    stock: Callable[..., Any], model: Any, config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """``GenerationMixin._prepare_cache_for_generation``, which tells a cache of generate()'s own from the caller's."""
    given = model_kwargs.get(CACHE_NAME)
    result = stock(model, config, model_kwargs, *args, **kwargs)
    if isinstance(given, Cache):
        _made_by_generate.discard(given)  # a cache that an earlier call returned
    elif given is None and isinstance(model_kwargs.get(CACHE_NAME), Cache):
        _made_by_generate.add(model_kwargs[CACHE_NAME])
    return result


def reuse(
    run: Callable[..., Any],
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    answers_too: bool,
    **kwargs: Any,
) -> Any:
    """``run``, one of generate()'s loops, over a cache that holds already what is known of the prompt.

    Args:
        answers_too: whether slot i of the cache ends up with the tokens of sequence i that the loop returns. Otherwise
            only prompts are recorded.
    """
    is_given = kwargs.get(CACHE_NAME) is not None and kwargs[CACHE_NAME] not in _made_by_generate
    inputs = with_cache(model, kwargs) if model._supports_default_dynamic_cache() else kwargs
    reason = "the call brings a cache of its own" if is_given else _why_not(model, input_ids, generation_config, inputs)
    mark = mark_of(model) if reason is None else reason
    request = mark if isinstance(mark, str) else _request_of(model, input_ids, inputs)
    if isinstance(mark, str) or isinstance(request, str):
        counters[f"not reused: {request}"] += 1
        return run(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
    cache = inputs[CACHE_NAME]
    num_reused = _begin(model, mark, cache, request, input_ids.shape[1], generation_config.max_length)
    num_asked = sum(map(len, request.tokens))
    counters["tokens reused"] += sum(max(num_reused - padding, 0) for padding in request.paddings)
    counters["tokens of prompts"] += num_asked
    try:
        output = run(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs)
    except OutOfPagesError:
        raise
    except torch.OutOfMemoryError:
        _give_way(model)  # to torch's own tensors, whose allocator does not ask
        raise
    sequences = getattr(output, "sequences", output) if answers_too else input_ids
    pad_token = getattr(generation_config, "_pad_token_tensor", None)
    _record(model, mark, cache, request, sequences, pad_token, answers_too)
    return output


def trees_of(model: Any) -> list[PrefixTree]:
    """What is kept of a model's sequences: a tree a state that it was in."""
    return [kept.tree for kept in _kept.get(model, ())]


def clear() -> None:
    """Forget every sequence of every model but those that are pinned; pages that nobody else uses are free again."""
    with _lock:
        for model in list(_kept):
            _forget(model, lambda kept: True)


def _forget(model: Any, is_past: Callable[[_Kept], bool]) -> int:
    """Evict what is past, but for what is pinned; returns how many trees are gone. Under the lock."""
    kept = _kept.get(model, [])
    for each in filter(is_past, kept):
        each.tree.evict()
    staying = [each for each in kept if not is_past(each) or each.tree.stats().num_nodes > 0]
    if staying:
        _kept[model] = staying
    else:
        _kept.pop(model, None)
    return len(kept) - len(staying)


def begin(model: Any, cache: Any, tokens: list[int]) -> int:
    """Give an empty cache what is kept of the beginning of ``tokens``, but for the last; returns how many those are."""
    if not trees_of(model):
        return 0
    mark = mark_of(model)
    if isinstance(mark, str):
        return 0
    return _begin(model, mark, cache, _Request([tokens], [0]), len(tokens), None)


def keep(model: Any, cache: Any, tokens: list[int]) -> Pin:
    """Keep what a cache's only slot holds of ``tokens``, all of which it does, until the pin is released.

    Effects: moves the cache to pages.
    Raises: ValueError, with the reason, where later calls could not begin with them; OutOfPagesError.
    """
    mark = check_keeps(model)
    rows = rows_of(cache, len(tokens))
    if isinstance(rows, str):
        raise ValueError(f"what {type(model).__name__} computes cannot be kept for others: {rows}")
    with _lock:
        return _tree_for(model, mark, rows).keep(tokens, rows.vtensors, 0, current_salt())


def check_keeps(model: Any) -> Mark:
    """The model's mark; a ValueError, with the reason, where what it computes cannot be kept for others."""
    mark = mark_of(model)
    if isinstance(mark, str):
        raise ValueError(f"what {type(model).__name__} computes cannot be kept for others: {mark}")
    return mark


def figures() -> dict[str, int]:
    """The counters, and what the trees of the models that are alive hold and did."""
    with _lock:
        found = [each.tree.stats() for kept in _kept.values() for each in kept]
    sums = {
        "tokens held": sum(tree.num_tokens for tree in found),
        "bytes held": sum(tree.held_bytes for tree in found),
        "tokens evicted": sum(tree.num_evicted_tokens for tree in found),
        "copied, for want of mappings": sum(tree.num_copies_for_mappings for tree in found),
    }
    return dict(counters) | {name: count for name, count in sums.items() if count}


count_with("prefixes", figures)


def why_never(model: Any) -> str | None:
    """Why no call of a model, or of one with this config, can begin with a prefix of another; None if some can."""
    config = getattr(model, "config", model)
    return _why_never(config) or _why_layers_never(DynamicCache(config=config.get_text_config(decoder=True)))


def _why_never(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    kinds = _rope_kinds(config.get_text_config(decoder=True))
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return "rotary frequencies that depend on the length"
    return None


def _why_layers_never(cache: Any) -> str | None:
    if not all(is_plain(type(layer)) for layer in cache.layers):
        return "layers that keep something else than keys and values"
    return None


def _why_not(model: Any, input_ids: torch.Tensor, config: Any, inputs: dict[str, Any]) -> str | None:
    """Why this call cannot begin with a prefix of another, or None."""
    cache = inputs.get(CACHE_NAME)
    if cache is None or inputs.get("use_cache") is False:
        return "no cache"
    if (reason := _why_never(model.config)) is not None:
        return reason
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"a cache of another kind ({type(cache).__name__})"
    if (reason := _why_layers_never(cache)) is not None:
        return reason
    if not cache.layers or cache.get_seq_length() > 0:
        return "a cache whose layers are not known before the first step, or that holds tokens"
    if is_spread(model) or why_no_driver(model.device.type):
        return "the model is on several devices, or on one without a memory driver"
    if "prepare_inputs_for_generation" in vars(model) or model.config.model_type == "cpmant":
        return "something is put in front of the tokens"
    if torch.is_grad_enabled():
        return "gradients are enabled (use torch.no_grad())"
    if inputs.get("synced_gpus") or getattr(config, "is_assistant", False):
        return "steps are synchronised with another process or model"
    if getattr(config, "prefill_chunk_size", None) is not None:
        return "prefill_chunk_size is set"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of the prompt are asked for"
    if (reason := why_more_than_tokens(inputs, MODEL_INPUTS | _LOOP_ARGUMENTS)) is not None:
        return reason
    if input_ids.dim() != 2:
        return "tokens of several dimensions"
    return None


def _rope_kinds(config: Any) -> Iterator[str]:
    """The kinds of rotary embedding that a config names, for all layers or for some."""
    waiting = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += found.values()
            yield from (str(found[name]) for name in ("rope_type", "type") if found.get(name) is not None)


def _request_of(model: Any, input_ids: torch.Tensor, inputs: dict[str, Any]) -> _Request | str:
    """The prompts, read from the device; a string that says why they do not tell all that there is to know."""
    batch, length = input_ids.shape
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
        return "a mask that is not one of the prompt's tokens"
    if positions is not None and not continues_given_positions():
        return "positions of the caller's own"
    if positions is not None and positions.shape not in ((batch, length), (1, length)):
        return "positions of several dimensions"
    firsts_B = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
    is_left_B = are_counted_B = firsts_B == 0
    if mask is not None:
        firsts_B, is_left_B = paddings_of(mask)
    if positions is not None:
        counted_BT = torch.arange(length, device=input_ids.device) - firsts_B[:, None]
        are_counted_B = ((positions == counted_BT) | (counted_BT < 0)).all(1)
    told = torch.cat([input_ids, *(each[:, None] for each in (firsts_B, is_left_B, are_counted_B))], 1)
    rows = told.tolist()  # the one time that the device is waited for
    if not all(row[-2] for row in rows):
        return "an attention mask with holes"
    if not all(row[-1] for row in rows):
        return "positions of the caller's own"
    paddings = [row[-3] for row in rows]
    if any(paddings) and "position_ids" not in inspect.signature(model.forward).parameters:
        return "padding in front, which the model's positions count"
    return _Request([row[padding:-3] for row, padding in zip(rows, paddings, strict=True)], paddings)


def _give_way(model: Any) -> None:
    for tree in trees_of(model):
        tree.evict()
        tree.scheduler.trim()


def lend(model: Any, mark: Mark, tokens: list[int], capacity: int) -> tuple[tuple[StoreLayout, ...], Loan] | None:
    """The rows of the longest prefix that is known of one prompt, but for its last token, in stores laid out like this.

    Args:
        mark: of the model as it is, by ``mark_of``.
        capacity: tokens of addresses of the new rows.
    """
    return _lend(model, mark, _Request([tokens], [0]), len(tokens) - 1, capacity)


def record(model: Any, mark: Mark, tokens: list[int], rows: CachedRows) -> None:
    """Keep what ``rows`` hold of the one sequence ``tokens``; failing to is no error.

    Args:
        mark: of the model as it was when their first token was computed.
    """
    if len(tokens) < _LEAST_TOKENS:
        counters["not recorded: fewer tokens than are worth it"] += 1
        return
    if mark != mark_of(model):
        counters["not recorded: the model has changed"] += 1
        return
    try:
        with _lock:
            tree = _tree_for(model, mark, rows)
            counters["tokens recorded"] += tree.record(tokens, rows.vtensors, 0, current_salt())
    except Exception as error:  # the answer is there, whatever becomes of the record
        counters[f"not recorded: {type(error).__name__}"] += 1
        _log.info("what %s has answered is not recorded", type(model).__name__, exc_info=error)


def _begin(model: Any, mark: Mark, cache: Any, request: _Request, length: int, max_length: int | None) -> int:
    """Give the cache what is known of every prompt; returns how many rows that are, padding included."""
    at_most = most_lendable(cache, length - 1)  # one token has to be run, for its logits
    if at_most < length - 1 and trees_of(model):
        counters["limited: a sliding window keeps no more"] += 1
    lent = _lend(model, mark, request, at_most, capacity_of(max(length + 1, max_length or 0), model.device))
    if lent is None:
        return 0
    layouts, loan = lent
    begin_with(cache, layouts, loan.vtensors, loan.num_rows)
    return loan.num_rows


def _lend(
    model: Any, mark: Mark, request: _Request, at_most: int, capacity: int
) -> tuple[tuple[StoreLayout, ...], Loan] | None:
    """What is known of every prompt, ``at_most`` rows with padding, in new tensors of so much capacity."""
    salt = current_salt()
    with _lock:
        if num_dropped := _forget_past(model, mark):
            counters["dropped: the model has changed"] += num_dropped
        found = [kept for kept in _kept.get(model, ()) if kept.mark == mark]
    if not found:
        return None
    kept = max(found, key=lambda each: each.tree.match(request.tokens[0], salt)) if len(found) > 1 else found[0]
    try:
        loan = kept.tree.fork(
            request.tokens,
            capacity=capacity,
            paddings=request.paddings,
            at_least=_LEAST_TOKENS,
            at_most=at_most,
            salt=salt,
        )
    except VTensorError as error:
        counters[f"not reused: {type(error).__name__}"] += 1
        return None
    return None if loan is None else (kept.layouts, loan)


def _record(
    model: Any,
    mark: Mark,
    cache: Any,
    request: _Request,
    sequences: torch.Tensor,
    pad_token: Any,
    answers_too: bool,
) -> None:
    """Keep what slot i of the cache holds of ``sequences[i]``, for those without padding in front."""
    if answers_too and cache.get_seq_length() - sequences.shape[1] not in ROWS_BEHIND:
        counters["not recorded: the cache holds another number of tokens"] += 1
        return
    num_rows = min(cache.get_seq_length(), sequences.shape[1])
    if num_rows < _LEAST_TOKENS or not is_worth_pages(cache, num_rows):
        counters["not recorded: fewer tokens than are worth it"] += 1
        return
    try:
        rows = rows_of(cache, num_rows)
        if isinstance(rows, str):
            counters[f"not recorded: {rows}"] += 1
            return
        salt, answers = current_salt(), _answers(sequences, request, num_rows, pad_token)
        with _lock:
            tree = _tree_for(model, mark, rows)
            for slot, (tokens, answer) in enumerate(zip(request.tokens, answers, strict=True)):
                if request.paddings[slot]:
                    counters["not recorded: padding in front"] += 1
                    continue
                counters["tokens recorded"] += tree.record((tokens + answer)[:num_rows], rows.vtensors, slot, salt)
    except Exception as error:  # the answer is there, whatever becomes of the record
        counters[f"not recorded: {type(error).__name__}"] += 1
        _log.info("what %s has answered is not recorded", type(model).__name__, exc_info=error)


def _tree_for(model: Any, mark: Mark, rows: CachedRows) -> PrefixTree:
    """The tree of the model as it is now, which may be new. Under the lock, as what is done with the tree."""
    scheduler = rows.vtensors[0].scheduler
    _forget_past(model, mark)
    for kept in _kept.get(model, ()):
        if (kept.mark, kept.layouts, kept.tree.scheduler) == (mark, rows.layouts, scheduler):
            return kept.tree
    _forget(model, lambda kept: True)  # of another layout
    lanes = [lane for layout in rows.layouts for lane in layout.lanes]
    tree = PrefixTree(lanes, scheduler=scheduler)
    _kept.setdefault(model, []).append(_Kept(mark, rows.layouts, tree))
    return tree


def _forget_past(model: Any, mark: Mark) -> int:
    """Drop what other weights computed, pinned or not, and of other states what is not pinned. Under the lock."""
    kept = _kept.get(model, [])
    if all(each.mark == mark for each in kept):
        return 0
    _kept[model] = [each for each in kept if each.mark.weights == mark.weights]
    num_dropped = len(kept) - len(_kept[model])
    return num_dropped + _forget(model, lambda each: each.mark != mark)


def _answers(sequences: torch.Tensor, request: _Request, num_rows: int, pad_token: Any) -> list[list[int]]:
    """What follows each prompt in its first ``num_rows`` tokens, without what stands behind its end."""
    num_prompt = len(request.tokens[0]) + request.paddings[0]
    if num_rows <= num_prompt:
        return [[] for _ in request.tokens]
    answers = sequences[:, num_prompt:num_rows]
    if pad_token is None:
        told: list[list[int]] = answers.tolist()
        return told
    padded = torch.cat([answers, pad_token.to(answers).reshape(1, 1).expand(len(answers), 1)], 1)
    told = padded.tolist()
    for answer in told:
        pad = answer[-1]
        while answer and answer[-1] == pad:
            answer.pop()  # the sequence ended before the others of its batch
    return told


def mark_of(model: Any) -> Mark | str:
    """What tells the model as it is from what it was.

    Writing through ``parameter.data`` is the one change that it does not see: torch counts no version there.

    Returns: a string that says why, where calls of this model cannot share what they compute.
    """
    if _torch_compat.has_global_hooks():
        return "hooks run in forward"
    weights, modules = [], modules_of(model)
    for module in modules:
        if module.training:
            return "the model is in training mode (call model.eval())"
        if (module._forward_hooks or module._forward_pre_hooks) and has_foreign_hooks((module,)):
            return "hooks run in forward"
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values() if tensors else ():
                if tensor is None:
                    continue
                if type(tensor) not in _KINDS_OF_WEIGHTS:
                    return _CHANGES_DO_NOT_SHOW
                try:
                    weights.append((id(tensor), tensor.data_ptr(), tensor._version, tensor.dtype))
                except RuntimeError:  # inference tensors have no version
                    return _CHANGES_DO_NOT_SHOW
    device_type = model.device.type
    precision = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    attention = getattr(model.config, "_attn_implementation", None)
    return Mark(tuple(weights), (adapters_of(modules), precision, attention))


def adapters_of(modules: Iterable[Any]) -> tuple[Any, ...]:
    """Of every layer of PEFT's: the adapters that are active, merged and scaled how."""
    return tuple(
        (
            tuple(module.active_adapters),
            tuple(getattr(module, "merged_adapters", ())),
            bool(getattr(module, "disable_adapters", False)),
            str(module.scaling),
        )
        for module in modules
        if "scaling" in vars(module) and hasattr(module, "active_adapters")
    )


def _start_afresh_in_child() -> None:
    # The pages are the parent's, and another thread may have held the lock.
    global _lock
    _lock = threading.Lock()
    _kept.clear()


os.register_at_fork(after_in_child=_start_afresh_in_child)
