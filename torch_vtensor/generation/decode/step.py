"""One step of a transformers model over rows at addresses, for one token or a part of a prompt: what is compiled.

The model is called with its own code. Its cache hands the new keys and values on, its attention function appends them
to the rows that the cache reserved and attends to all of them there. Where the rows lie and how many tokens each
sequence has is data (`Step`), so what was traced and captured once is right for every cache of the same layout.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_vtensor.generation._transformers_compat import CACHE_NAME, DynamicCache
from torch_vtensor.generation.shared_reads import SharedTables
from torch_vtensor.ops.cached_attention import cached_attention

__all__ = [
    "ATTENTION",
    "GroupRows",
    "LayerRows",
    "LayerShape",
    "Step",
    "layer_shapes",
    "prompt_forward",
    "step_forward",
    "twin_of",
]

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
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class LayerShape(NamedTuple):
    """What one layer keeps of a token: keys [heads, key_dim] and values [heads, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class GroupRows(NamedTuple):
    """Of layers whose sequences have one address and one length: tensors [B] on the device.

    ``shared`` says which sequences have their first tokens in common, if any may: see `shared_reads`.
    """

    key_addresses: torch.Tensor
    value_addresses: torch.Tensor
    lengths: torch.Tensor
    firsts: torch.Tensor
    shared: SharedTables | None = None


class Step(NamedTuple):
    """All that the attention of one step reads, but for the new tokens."""

    layers: tuple[LayerRows, ...]
    groups: tuple[GroupRows, ...]
    partials: torch.Tensor
    arrivals: torch.Tensor
    num_new: torch.Tensor | None = None  # [B], of a prompt's part: how many of its tokens count


class _NewTokens(DynamicCache):
    """A cache that hands new keys and values on as they are: the attention function appends them."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """What layers had to keep, and the attention function has not appended yet."""
        self.num_appended = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.given[layer_idx] = key_states, value_states
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
    torch_vtensor_step: Step | dict[int, LayerShape] | None = None,
    torch_vtensor_cache: _NewTokens | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, Hq, Q, D], new key and value [B, H, Q, D]; returns [B, Q, Hq, D].

    With a dictionary for a step, it only notes there what each layer keeps.
    """
    if torch_vtensor_step is None or torch_vtensor_cache is None:
        raise RuntimeError("this model does not hand keyword arguments on to its attention")
    step = torch_vtensor_step
    given_key, given_value = torch_vtensor_cache.given.pop(module.layer_idx, (None, None))
    if given_key is not key or given_value is not value:
        raise RuntimeError(f"layer {module.layer_idx} attends to something else than the keys and values that it keeps")
    if attention_mask is not None and (attention_mask.shape[1:] != (1, 1, 1) or attention_mask.dtype is not torch.bool):
        raise RuntimeError(f"layer {module.layer_idx} attends by a mask of its own")
    is_causal = kwargs.get("is_causal")
    if query.shape[2] > 1 and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise RuntimeError(f"layer {module.layer_idx} lets tokens see later ones")
    torch_vtensor_cache.num_appended += 1
    if isinstance(step, dict):
        step[module.layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        batch, heads, num_query, _ = query.shape
        return query.new_zeros(batch, num_query, heads, value.shape[3]), None
    layer = step.layers[module.layer_idx]
    if kwargs.get("sliding_window", layer.window) != layer.window:
        raise RuntimeError(f"layer {module.layer_idx} attends to another window than its cache layer keeps")
    kept = layer.heads, layer.key_dim, layer.heads, layer.value_dim
    given = key.shape[1], key.shape[3], value.shape[1], value.shape[3]
    if given != kept or not key.dtype == value.dtype == query.dtype == layer.dtype:
        raise RuntimeError(f"layer {module.layer_idx} has keys and values that do not fit the tokens before them")
    group = step.groups[layer.group]
    num_rows, num_sequences = len(query), len(group.lengths)
    if num_sequences != num_rows:  # side by side in one row, each as long as the others
        query, key, value = (x[0].unflatten(1, (num_sequences, -1)).transpose(0, 1) for x in (query, key, value))
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
        num_new=step.num_new,
        **({} if group.shared is None else group.shared._asdict()),
    )
    out = out.transpose(1, 2)
    return (out if num_sequences == num_rows else out.flatten(0, 1)[None]), None


def _route_attention() -> None:
    """Make `ATTENTION` known to transformers."""
    if ATTENTION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(ATTENTION, _attention)


def twin_of(model: Any, for_few_tokens: bool = True) -> Any:
    """The model's modules and configurations once more, over the same tensors, attending by `ATTENTION`.

    Args:
        for_few_tokens: let transformers choose kernels of experts that are for decoding, which copy the weights that
            each token needs.

    The model itself stays as it is: other threads may be using it. Nothing in the twin keeps the model alive.
    """
    _route_attention()
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    optimize = getattr(model, "_optimize_model_for_decode", nullcontext) if for_few_tokens else nullcontext
    with optimize():
        twin = copy.deepcopy(model, tensors)
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = ATTENTION
    return twin


def layer_shapes(twin: Any) -> list[LayerShape]:
    """What every layer of the model keeps, found by running one token through it.

    Raises: RuntimeError if a layer attends to something else than what it keeps.
    """
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=twin.device)
    shapes: dict[int, LayerShape] = {}
    _call(twin, tokens, tokens, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=twin.device), shapes)
    return [shapes[index] for index in sorted(shapes)]


def step_forward(twin: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Step], torch.Tensor]:
    """A function of tokens [B, 1], positions [B, 1], a mask [B, 1, 1, 1] that is not looked at, and a step: the logits.

    The mask has four dims, which transformers takes for prepared and hands on.
    """

    def forward(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, step: Step) -> torch.Tensor:
        logits: torch.Tensor = _call(twin, tokens, positions, mask, step).logits
        return logits[:, -1].float()

    return forward


def prompt_forward(twin: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Step, torch.Tensor], torch.Tensor]:
    """As `step_forward`, for T tokens a sequence, of which ``last`` [1] is the one whose logits [B, V] are wanted.

    Or for tokens [1, B x T] of B sequences side by side, with ``last`` [B] among all of them: only attention is told
    which are whose.
    """
    takes_last = "logits_to_keep" in inspect.signature(twin.forward).parameters

    def forward(
        tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, step: Step, last: torch.Tensor
    ) -> torch.Tensor:
        more = {"logits_to_keep": last} if takes_last else {}
        logits: torch.Tensor = _call(twin, tokens, positions, mask, step, **more).logits
        if not takes_last:
            logits = logits.index_select(1, last)
        return logits.flatten(0, 1).float()

    return forward


def _call(
    twin: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    step: Step | dict[int, LayerShape],
    **more: Any,
) -> Any:
    cache = _NewTokens()
    out = twin(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
        return_dict=True,
        torch_vtensor_step=step,
        torch_vtensor_cache=cache,
        **{CACHE_NAME: cache},
        **more,
    )
    num_layers = len(step) if isinstance(step, dict) else len(step.layers)
    if cache.given or cache.num_appended != num_layers:
        raise RuntimeError(f"{cache.num_appended} of {num_layers} layers attended by the function asked for")
    return out
