"""What differs between transformers' versions, and what of it is private. Checked on 4.57.6, 5.0.0, 5.17.0, 5.23.0."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin, cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = [
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMixin",
    "growing_layers",
    "initialize",
    "recording_shows_window_only",
]


def initialize(layer: DynamicLayer, key: torch.Tensor, value: torch.Tensor) -> None:
    """Call ``layer.lazy_initialization`` with the arguments that this version's takes."""
    if _initialization_takes_value():
        layer.lazy_initialization(key, value)
    else:
        layer.lazy_initialization(key)


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
