"""Which calls of generate() the compiled loop takes; every other goes to transformers' own, with the reason."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import stopping_criteria as stopping

from torch_vtensor.generation._transformers_compat import Cache, DynamicLayer, DynamicSlidingWindowLayer
from torch_vtensor.generation.layers import DEVICE_TYPES

__all__ = ["end_tokens_of", "why_stock"]

_KNOWN_INPUTS = {
    "past_key_values",
    "attention_mask",
    "position_ids",
    "cache_position",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def why_stock(
    model: Any, input_ids: torch.Tensor, criteria: Any, config: Any, synced_gpus: bool, inputs: dict[str, Any]
) -> str | None:
    """Why this call must take transformers' own loop, or None.

    Args:
        criteria, config: the stopping criteria and the generation config.
        inputs: what generate() hands to the model besides the tokens.
    """
    cache = inputs.get("past_key_values")
    if not isinstance(cache, Cache) or not inputs.get("use_cache"):
        return "no cache"
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "the model's attention is not exchangeable"
    if getattr(model, "hf_device_map", None) or model.device.type not in DEVICE_TYPES:
        return "the model is on several devices, or on one without a memory driver"
    if synced_gpus or getattr(config, "is_assistant", False):
        return "steps are synchronised with another process or model"
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if config.return_dict_in_generate and any(getattr(config, name, False) for name in wanted):
        return "scores, logits, attentions or hidden states are asked for"
    unknown = sorted(name for name, value in inputs.items() if name not in _KNOWN_INPUTS and value is not None)
    if unknown:
        return f"the model takes more than tokens ({', '.join(unknown)})"
    position_ids = inputs.get("position_ids")
    if position_ids is not None and position_ids.dim() != 2:
        return "positions of several dimensions"
    if not cache.layers or not all(_is_plain(layer) for layer in cache.layers):
        return "layers that keep something else than keys and values"
    if any(type(one) not in _CRITERIA for one in criteria):
        return "a stopping criterion that needs the host"
    if input_ids.shape[1] + 1 >= criteria.max_length:
        return "a single new token"
    return None


_CRITERIA = (stopping.MaxLengthCriteria, stopping.EosTokenCriteria, stopping.MaxTimeCriteria)


def _is_plain(layer: Any) -> bool:
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(layer) in kinds or (getattr(layer, "is_explicit", False) and type(layer).__mro__[1] in kinds)


def end_tokens_of(criteria: Any) -> torch.Tensor | None:
    """The tokens that end a sequence."""
    return next((one.eos_token_id for one in criteria if isinstance(one, stopping.EosTokenCriteria)), None)
