"""One decoding step of a transformers model over rows at addresses: what torch.compile traces.

The model is called with its own code. Its cache hands the new keys and values on, its attention function appends them
to the rows that the cache reserved and attends to all of them there. Where the rows lie and how many tokens each
sequence has is data (`Step`), so what was traced and captured once is right for every cache of the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_vtensor.generation._transformers_compat import DynamicCache
from torch_vtensor.ops.cached_attention import cached_attention

__all__ = ["ATTENTION", "LayerRows", "Step", "make_forward", "route_attention"]

ATTENTION = "torch_vtensor_step"
"""The name under which transformers finds our attention function while a step is traced."""


class LayerRows(NamedTuple):
    """Where one layer's keys and values lie; strides and offsets in elements, tensors as `cached_attention` takes."""

    group: int
    key_offset: int
    value_offset: int
    key_strides: tuple[int, int]
    value_strides: tuple[int, int]
    window: int | None
    heads: int
    value_dim: int


class GroupRows(NamedTuple):
    """Of layers whose sequences have one address and one length: tensors [B] on the device."""

    key_addresses: torch.Tensor
    value_addresses: torch.Tensor
    lengths: torch.Tensor
    firsts: torch.Tensor


class Step(NamedTuple):
    """All that the attention of one step reads, but for the new tokens."""

    layers: tuple[LayerRows, ...]
    groups: tuple[GroupRows, ...]
    partials: torch.Tensor
    arrivals: torch.Tensor


class _NewTokens(DynamicCache):
    """A cache that hands new keys and values on as they are: the attention function appends them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    torch_vtensor_step: Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, Hq, Q, D], new key and value [B, H, Q, D]; returns [B, Q, Hq, D]."""
    if torch_vtensor_step is None:
        raise RuntimeError("this model does not hand keyword arguments on to its attention")
    step = torch_vtensor_step
    layer = step.layers[module.layer_idx]
    group = step.groups[layer.group]
    out = cached_attention(
        query,
        key,
        value,
        group.key_addresses,
        group.value_addresses,
        group.lengths,
        group.firsts,
        s_aux,
        step.partials,
        step.arrivals,
        layer.key_offset,
        layer.value_offset,
        *layer.key_strides,
        *layer.value_strides,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        layer.window,
        softcap,
    )
    return out.transpose(1, 2), None


def route_attention() -> None:
    """Make `ATTENTION` known to transformers."""
    if ATTENTION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(ATTENTION, _attention)


def make_forward(model: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Step], torch.Tensor]:
    """A function of tokens [B, 1], positions [B, 1], a mask [B, 1, 1, 1] that is not looked at, and a step: the logits.

    The mask has four dims, which transformers takes for prepared and hands on.
    """

    def forward(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, step: Step) -> torch.Tensor:
        cache = _NewTokens()
        out = model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            torch_vtensor_step=step,
        )
        logits: torch.Tensor = out.logits
        return logits[:, -1].float()

    return forward
