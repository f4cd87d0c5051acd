"""What a session is asked for: the tokens of a turn, and settings of generate() under which it can answer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_vtensor.generation._transformers_compat import effective_settings
from torch_vtensor.generation.asked import Asked, asked_of, is_same
from torch_vtensor.generation.decode.support import MODEL_INPUTS, why_more_than_tokens

__all__ = ["Turn", "are_messages", "checked_settings", "known_tokens", "num_common", "tokens_of"]

Turn = str | Sequence[int] | torch.Tensor | Mapping[str, Any]
"""Text, for which a session needs a tokenizer; or token ids: a list, a tensor [T] or [1, T], or what a tokenizer
returns."""

_ITS_OWN = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position",
            "past_key_values", "cache", "use_cache", "cache_implementation"}  # fmt: skip
_OUTPUTS = {"output_attentions", "output_hidden_states"}
_ONE_BY_ONE = ("sample", "greedy_search")
_NOT_LOOKED_AT = {"streamer", "logits_processor", "stopping_criteria"}
"""Arguments of generate() of which it matters to a session only whether they are given."""

_accepted: weakref.WeakKeyDictionary[Any, tuple[Asked, tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()
"""Of each model what was accepted last, by which code, and whether it uses a cache by itself."""


def checked_settings(model: Any, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
    """``generate_kwargs``, with which the model uses the cache; ValueError for what a session cannot do.

    The turns of a conversation ask for the same again and again: what was accepted last is remembered.
    """
    config = generate_kwargs.get("generation_config")
    asked = asked_of(model, config, {name: it for name, it in generate_kwargs.items() if name != "generation_config"})
    its_own = tuple(sorted(vars(model).keys() & {"forward", "prepare_inputs_for_generation"}))
    code = type(model), type(model).forward, type(model).prepare_inputs_for_generation, its_own
    known = _accepted.get(model)
    if known is not None and known[1] == code and is_same(known[0], asked):
        uses_cache = known[2]
    else:
        uses_cache = _check(model, generate_kwargs)
        if asked.others <= _NOT_LOOKED_AT and not its_own and (kept := asked.copied()) is not None:
            _accepted[model] = kept, code, uses_cache
    return generate_kwargs if uses_cache else {**generate_kwargs, "use_cache": True}


def _check(model: Any, generate_kwargs: dict[str, Any]) -> bool:
    """Whether the model uses the cache by these settings; ValueError for what a session cannot do."""
    if taken := sorted(_ITS_OWN & generate_kwargs.keys()):
        raise ValueError(f"generate got {', '.join(taken)}, which a session brings itself: leave it out")
    if getattr(generate_kwargs.get("generation_config"), "use_cache", None) is False:
        raise ValueError("the generation_config says use_cache=False; a session is a cache: leave it out")
    config, decodes_by, model_kwargs = effective_settings(model, generate_kwargs)
    for name in ("num_beams", "num_return_sequences"):
        count = getattr(config, name, None) or 1
        if count > 1:
            raise ValueError(f"{name} is {count}; a session is one sequence: fork({count}) makes several of it")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if generate_kwargs.get(name, getattr(config, name, None)) is not None:
            raise ValueError(
                f"assisted generation, by {name}, runs again what a cache holds, in transformers: leave it out"
            )
    if decodes_by not in _ONE_BY_ONE:
        raise ValueError(f"the settings ask for {decodes_by}; a session decodes token by token, greedy or sampling")
    if config.cache_implementation is not None:
        raise ValueError(f"cache_implementation is {config.cache_implementation!r}; a session brings its own cache")
    if (reason := why_more_than_tokens(model_kwargs, MODEL_INPUTS | _OUTPUTS)) is not None:
        raise ValueError(f"{reason}, and a session knows again what was said by its tokens: use model.generate()")
    return bool(config.use_cache)


def tokens_of(turn: Any, model: Any, tokenizer: Any, *, is_first: bool) -> torch.Tensor:
    """The tokens [T] of a turn, on the CPU; ValueError for what is none, or none of the model's."""
    if isinstance(turn, str):
        if tokenizer is None:
            raise ValueError("the turn is text, for which a session needs a tokenizer: Session(model, tokenizer)")
        turn = tokenizer(turn, add_special_tokens=is_first)["input_ids"]
    if isinstance(turn, Mapping):
        turn = _ids_in(turn)
    ids = turn if isinstance(turn, torch.Tensor) else _tensor_of(turn)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"a turn is tokens [T] or [1, T], of one sequence; it is {tuple(ids.shape)} {ids.dtype}")
    return known_tokens(ids.to("cpu", torch.int64), model)


def _ids_in(encoding: Mapping[str, Any]) -> Any:
    """The tokens of what a tokenizer returns, if it says no more than they do."""
    mask = encoding.get("attention_mask")
    if "input_ids" not in encoding or (mask is not None and not bool(torch.as_tensor(mask).all())):
        raise ValueError("a turn that is a dict has input_ids, and an attention_mask of ones if any: without padding")
    if (reason := why_more_than_tokens(dict(encoding), {"input_ids", "attention_mask"})) is not None:
        raise ValueError(f"a turn is tokens, and of this one {reason}: leave it out")
    return encoding["input_ids"]


def _tensor_of(turn: Any) -> torch.Tensor:
    try:
        tokens = list(turn)
        ids = torch.tensor(tokens, device="cpu") if tokens else torch.empty(0, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a turn is text, or a list or tensor of token ids, not {turn!r:.60}: {error}") from error
    if any(isinstance(token, bool) for token in tokens):
        raise ValueError("a turn is a list of token ids: it has True or False among them")
    return ids


def known_tokens(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """``ids``; ValueError for tokens that the model does not know: a GPU's kernel would not survive them."""
    num_known = model.get_input_embeddings().num_embeddings
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_known:
        wrong = ids[(ids < 0) | (ids >= num_known)]
        raise ValueError(f"token {int(wrong[0])} is none of the model's, which go from 0 to {num_known - 1}")
    return ids


def are_messages(turn: Any) -> bool:
    """Whether a turn is messages for a chat template."""
    return isinstance(turn, list | tuple) and len(turn) > 0 and isinstance(turn[0], dict)


def num_common(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    if torch.equal(one[:length], other[:length]):
        return length
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0])
