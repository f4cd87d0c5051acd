"""Which calls of generate() the compiled loop takes; every other goes to transformers' own, with the reason."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.generation import stopping_criteria as stopping

from torch_vtensor.generation._transformers_compat import (
    CACHE_NAME,
    Cache,
    DynamicCache,
    continues_given_positions,
)
from torch_vtensor.generation.asked import is_same, kept_copy
from torch_vtensor.generation.cached_rows import is_plain
from torch_vtensor.generation.layers import why_no_driver
from torch_vtensor.generation.modules import has_foreign_hooks, is_training, modules_of

__all__ = [
    "MODEL_INPUTS",
    "end_tokens_of",
    "first_tokens",
    "is_spread",
    "paddings_of",
    "why_more_than_tokens",
    "why_never",
    "why_stock",
    "windows_of",
]

MODEL_INPUTS = {CACHE_NAME, "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep"}
"""What generate() may hand to a model besides tokens without telling it more than they do."""
_KNOWN_INPUTS = MODEL_INPUTS | {"output_attentions", "output_hidden_states"}


def why_stock(
    model: Any,
    windows: Callable[[], list[int | None] | None],
    input_ids: torch.Tensor,
    criteria: Any,
    config: Any,
    synced_gpus: bool,
    inputs: dict[str, Any],
) -> str | None:
    """Why this call must take transformers' own loop, or None.

    Args:
        windows: gives ``windows_of(model)``, if it comes to that.
        criteria, config: the stopping criteria and the generation config.
        inputs: what generate() hands to the model besides the tokens.
    """
    cache = inputs.get(CACHE_NAME)
    if not isinstance(cache, Cache) or inputs.get("use_cache") is False:
        return "no cache"
    if (reason := why_never(model)) is not None:
        return reason
    modules = modules_of(model)
    if any(map(is_training, modules)):
        return "the model is in training mode (call model.eval())"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast"
    if synced_gpus or getattr(config, "is_assistant", False):
        return "steps are synchronised with another process or model"
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if config.return_dict_in_generate and any(getattr(config, name, False) for name in wanted):
        return "scores, logits, attentions or hidden states are asked for"
    if (reason := why_more_than_tokens(inputs, _KNOWN_INPUTS)) is not None:
        return reason
    if has_foreign_hooks(modules):
        return "the model has forward hooks"
    position_ids = inputs.get("position_ids")
    if position_ids is not None and position_ids.dim() != 2:
        return "positions of several dimensions"
    if position_ids is not None and not continues_given_positions():
        return "positions of the caller's own"
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1:] != input_ids.shape[1:]:
        return "the tokens before the new ones are not given"
    kinds: list[Any] = [type(layer) for layer in cache.layers] or [getattr(cache, "layer_class_to_replicate", None)]
    if not all(is_plain(kind) for kind in kinds):
        return "layers that keep something else than keys and values"
    sees = windows()
    if sees is None:
        return "attention that is neither full nor to a sliding window"
    kept = [getattr(layer, "sliding_window", None) for layer in cache.layers] or sees
    if len(kept) != len(sees) or any(keeps not in (None, window) for keeps, window in zip(kept, sees, strict=True)):
        return "a cache for another model"
    if [type(one) for one in criteria].count(stopping.MaxLengthCriteria) != 1:
        return "no limit of tokens, or several"
    if any(type(one) not in _CRITERIA for one in criteria):
        return "a stopping criterion that needs the host"
    if input_ids.shape[1] + 1 >= criteria.max_length:
        return "a single new token"
    return None


def why_never(model: Any) -> str | None:
    """Why no step of this model can run over rows at addresses, whatever is asked for, or None."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "the model's attention is not exchangeable"
    if is_spread(model) or why_no_driver(model.device.type):
        return "the model is on several devices, or on one without a memory driver"
    if hasattr(model, "peft_config"):
        return "the model has adapters (merge them)"
    return None


def is_spread(model: Any) -> bool:
    """Whether a model was loaded to several devices, or in a way that has accelerate move its tensors."""
    places = getattr(model, "hf_device_map", None) or {}
    return len(set(places.values())) > 1 or (
        bool(places) and any(hasattr(each, "_hf_hook") for each in model.modules())
    )


_CRITERIA = (stopping.MaxLengthCriteria, stopping.EosTokenCriteria, stopping.MaxTimeCriteria)


def windows_of(model: Any) -> list[int | None] | None:
    """How many tokens each layer attends to (None: all), whatever the cache; None if some do it in another way."""
    settings = vars(model.config.get_text_config(decoder=True))
    known = _known_windows.get(model)
    if known is None or not is_same(known.settings, settings):
        windows, kept = _windows_by(model.config), kept_copy(settings)
        if kept is None:
            return windows
        known = _known_windows[model] = _Windows(kept, windows)
    return known.windows


class _Windows(NamedTuple):
    """What a model's layers attend to under these settings of its config."""

    settings: dict[str, Any]
    windows: list[int | None] | None


_known_windows: weakref.WeakKeyDictionary[Any, _Windows] = weakref.WeakKeyDictionary()


def _windows_by(config: Any) -> list[int | None] | None:
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"} or getattr(text, "attention_chunk_size", None):
        return None
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def why_more_than_tokens(inputs: dict[str, Any], known: set[str]) -> str | None:
    """That the model is handed more than ``known``, by name, or None."""
    unknown = sorted(name for name, value in inputs.items() if name not in known and value is not None)
    return f"the model takes more than tokens ({', '.join(unknown)})" if unknown else None


def paddings_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens of padding stand before each sequence, and whether there is none elsewhere; on the device.

    Shapes: mask [B, T]; returns [B] integers and [B] booleans.
    """
    firsts_B = (mask == 0).sum(1)
    is_left_BT = (mask != 0) == (torch.arange(mask.shape[1], device=mask.device) >= firsts_B[:, None])
    return firsts_B, is_left_BT.all(1)


def first_tokens(input_ids: torch.Tensor, inputs: dict[str, Any]) -> list[int] | None:
    """How many tokens of padding stand before each sequence; None where there is padding elsewhere."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return [0] * len(input_ids)
    if mask.dim() != 2:
        return None
    if mask.all():  # as a rule; to see it takes one kernel
        return [0] * len(input_ids)
    firsts_B, is_left_B = paddings_of(mask)
    *numbers, ok = torch.cat([firsts_B, is_left_B.all()[None]]).tolist()
    return numbers if ok else None


def end_tokens_of(criteria: Any) -> torch.Tensor | None:
    """The tokens that end a sequence."""
    tokens = [one.eos_token_id.flatten() for one in criteria if isinstance(one, stopping.EosTokenCriteria)]
    return torch.cat(tokens) if tokens else None
