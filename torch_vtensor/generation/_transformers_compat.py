"""What differs between transformers' versions, and what of it is private. Checked on 4.57.6, 5.0, 5.17, 5.23, 5.24."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    GenerationMixin,
    cache_utils,
    masking_utils,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.generation import GenerateDecoderOnlyOutput

__all__ = [
    "CACHE_NAME",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EncoderDecoderCache",
    "GenerationConfig",
    "GenerationMixin",
    "MaskParts",
    "attentions_are_wanted",
    "continues_given_positions",
    "decoder_output",
    "effective_settings",
    "first_row_of",
    "growing_layers",
    "initialize",
    "is_plain_eager",
    "mask_device",
    "mask_parts",
    "recording_shows_window_only",
    "with_cache",
]

CACHE_NAME = "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"
"""The name under which generate() hands the cache to models, and returns it: ``cache`` from 5.24 on."""


def initialize(layer: DynamicLayer, key: torch.Tensor, value: torch.Tensor) -> None:
    """Call ``layer.lazy_initialization`` with the arguments that this version's takes."""
    if _initialization_takes_value():
        layer.lazy_initialization(key, value)
    else:
        layer.lazy_initialization(key)


def with_cache(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What generate() hands to the model, with the cache that 5.0 leaves to the model's first step to make."""
    is_left_to_model = inputs.get(CACHE_NAME) is None and bool(inputs.get("use_cache"))
    if not is_left_to_model or model.config.is_encoder_decoder:
        return inputs
    if CACHE_NAME not in inspect.signature(model.forward).parameters:
        return inputs
    return inputs | {CACHE_NAME: DynamicCache(config=model.config.get_text_config(decoder=True))}


class Settings(NamedTuple):
    """What a call of generate() goes by: its config, how it decodes, and what it hands to the model."""

    config: GenerationConfig
    decodes_by: str
    model_kwargs: dict[str, Any]


def effective_settings(model: Any, generate_kwargs: dict[str, Any]) -> Settings:
    """What ``model.generate(**generate_kwargs)`` would go by: a given config, filled up from the model's, and kwargs.

    Raises: ValueError, as generate() does, for settings that contradict each other and for names that nobody takes.
    """
    rest = dict(generate_kwargs)
    config, assistant = rest.pop("generation_config", None), rest.get("assistant_model")
    model._extract_generation_mode_kwargs(rest.get("custom_generate"), rest, None, assistant, None)
    for name in _of_generate_alone(type(model)._prepare_generation_config):
        rest.pop(name, None)
    effective, model_kwargs = model._prepare_generation_config(config, **rest)
    model._validate_model_kwargs(dict(model_kwargs))
    return Settings(effective, effective.get_generation_mode(assistant).value, model_kwargs)


@cache
def _of_generate_alone(prepare: Callable[..., Any]) -> frozenset[str]:
    """The arguments of generate() that what prepares its config does not take."""
    of_generate = inspect.signature(GenerationMixin.generate).parameters.keys() | {"trust_remote_code"}
    return frozenset(of_generate - inspect.signature(prepare).parameters.keys())


def decoder_output(sequences: torch.Tensor, cache: Cache) -> Any:
    """What generate() returns for a decoder-only model if a dictionary is asked for."""
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})


def growing_layers() -> list[type[DynamicLayer]]:
    """The layer classes that grow by the ``update`` of full or sliding-window attention, whatever else they keep."""
    names = (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "DynamicIndexedLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )
    return [getattr(cache_utils, name) for name in names if hasattr(cache_utils, name)]


@cache
def _initialization_takes_value() -> bool:
    return len(inspect.signature(DynamicLayer.lazy_initialization).parameters) > 2


@cache
def continues_given_positions() -> bool:
    """Whether generate() counts on from the caller's ``position_ids``, rather than to hand on the last one for ever."""
    return "position_ids" in inspect.getsource(GenerationMixin._update_model_kwargs_for_generation)


@cache
def recording_shows_window_only() -> bool:
    """Whether a sliding layer that records its past returns only what the mask covers, rather than all it kept."""
    if not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"):
        return False
    layer: Any = DynamicSlidingWindowLayer(sliding_window=3)
    layer.activate_past_recording()
    tokens = torch.zeros(1, 1, 8, 1)
    stock_update = inspect.unwrap(DynamicSlidingWindowLayer.update)
    stock_update(layer, tokens, tokens)
    returned, _ = stock_update(layer, tokens[:, :, :1], tokens[:, :, :1])
    return bool(returned.shape[2] == 3)


class MaskParts(NamedTuple):
    """What a mask function says: whether rows see later tokens, a window, and numbers of packed sequences [B, T]."""

    causal: bool
    window: int | None
    packed: torch.Tensor | None


def mask_parts(function: Callable[..., Any]) -> MaskParts | None:
    """Take a mask function of masking_utils apart; None if it says something else too, or is somebody else's."""
    found: dict[str, Any] = {}
    if not _collect(function, found) or not found.keys() & {"causal", "bidirectional"}:
        return None
    if ("window" in found and "causal" not in found) or ("remapped" in found and "packed" not in found):
        return None
    return MaskParts("causal" in found, found.get("window"), found.get("packed"))


def _collect(function: Any, found: dict[str, Any]) -> bool:
    """Add what ``function`` says to what was found; False where that cannot be said so."""
    if function is masking_utils.causal_mask_function:
        found["causal"] = True
        return True
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        found["bidirectional"] = True
        return True
    code: Any = getattr(function, "__code__", None)
    kind = _mask_codes().get(code)
    if kind is None or kind in found:
        return False
    inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if kind == "and":
        return all(_collect(part, found) for part in inside["mask_functions"])
    if kind == "remapped":
        found[kind] = True
        return _collect(inside["mask_function"], found)
    found[kind] = inside["sliding_window" if kind == "window" else "packed_sequence_mask"]
    return True


@cache
def _mask_codes() -> dict[Any, str]:
    """What the functions that masking_utils' factories make say, by their code."""
    nothing, causal = torch.empty(0, 0), masking_utils.causal_mask_function
    made = {
        "and": masking_utils.and_masks(causal),
        "window": masking_utils.sliding_window_overlay(1),
        "packed": masking_utils.packed_sequence_mask_function(nothing),
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        made["remapped"] = masking_utils.remap_positions_for_packed_sequence(causal, nothing)
    return {function.__code__: kind for kind, function in made.items()}


def first_row_of(mask_arguments: dict[str, Any]) -> int:
    """The position of a mask's first row.

    Effects: before 5.17 it is on the device, and read where the rows are not all that there is.
    """
    if "q_length" in mask_arguments:
        offset = mask_arguments.get("q_offset", 0)
        return offset if isinstance(offset, int) else -1  # on the device: a cache of fixed size
    positions = mask_arguments["cache_position"]
    if positions.shape[0] == mask_arguments["kv_length"] + mask_arguments.get("kv_offset", 0):
        return 0
    return int(positions[0])


def mask_device(mask_arguments: dict[str, Any]) -> torch.device:
    """Where a mask is wanted."""
    if "cache_position" in mask_arguments:
        device: torch.device = mask_arguments["cache_position"].device
        return device
    return torch.device(mask_arguments.get("device", "cpu"))


@cache
def is_plain_eager(function: Callable[..., Any]) -> bool:
    """Whether a model's ``eager_attention_forward`` is a softmax with at most what our operators know: sinks, a cap.

    transformers copies these functions into every model's file: those that are the same have the same code.
    """
    return any(_says_same(function, known) for known in _plain_eager_functions())


@cache
def _plain_eager_functions() -> tuple[Callable[..., Any], ...]:
    names = "llama", "mistral", "bert", "gemma3", "gpt_oss", "whisper", "gpt2"
    functions = []
    for name in names:
        try:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        except ImportError:
            continue
        functions.append(getattr(module, "eager_attention_forward", None))
    return tuple(function for function in functions if function is not None)


def _says_same(one: Any, other: Any) -> bool:
    parts = "co_code", "co_consts", "co_names", "co_varnames"
    codes = getattr(one, "__code__", None), getattr(other, "__code__", None)
    return None not in codes and all(getattr(codes[0], part) == getattr(codes[1], part) for part in parts)


@cache
def _collector() -> Any:
    try:
        capturing = importlib.import_module("transformers.utils.output_capturing")
    except ImportError:
        return None
    return capturing._active_collector


def attentions_are_wanted() -> bool:
    """Whether the running forward collects attention weights; where this version does not tell, that it may."""
    collector = _collector()
    if collector is None:
        return True
    collected = collector.get()
    return collected is not None and any("attentions" in key for key in collected)
