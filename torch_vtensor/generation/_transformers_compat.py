"""What differs between transformers' versions, and what of it is private. Checked on 4.57.6, 5.0.0, 5.17.0, 5.23.0."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin, cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

__all__ = [
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMixin",
    "continues_given_positions",
    "decoder_output",
    "growing_layers",
    "initialize",
    "recording_shows_window_only",
    "with_cache",
]


def initialize(layer: DynamicLayer, key: torch.Tensor, value: torch.Tensor) -> None:
    """Call ``layer.lazy_initialization`` with the arguments that this version's takes."""
    if _initialization_takes_value():
        layer.lazy_initialization(key, value)
    else:
        layer.lazy_initialization(key)


def with_cache(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What generate() hands to the model, with the cache that 5.0 leaves to the model's first step to make."""
    is_left_to_model = inputs.get("past_key_values") is None and bool(inputs.get("use_cache"))
    takes_one = "past_key_values" in inspect.signature(model.forward).parameters
    if not is_left_to_model or not takes_one or model.config.is_encoder_decoder:
        return inputs
    return inputs | {"past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True))}


def decoder_output(sequences: torch.Tensor, cache: Cache) -> Any:
    """What generate() returns for a decoder-only model if a dictionary is asked for."""
    fields = inspect.signature(GenerateDecoderOnlyOutput).parameters
    return GenerateDecoderOnlyOutput(
        sequences=sequences, **{"cache" if "cache" in fields else "past_key_values": cache}
    )


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
