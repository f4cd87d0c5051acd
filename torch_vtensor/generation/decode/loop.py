"""The decoding loop that stands for transformers' own: same results, two graph launches a token, no waiting."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation import layers as cache_layers
from torch_vtensor.generation.decode.program import DecodeProgram, Placement, acquire_program
from torch_vtensor.generation.decode.sampling import Sampling, sampling_of
from torch_vtensor.generation.decode.step import LayerRows
from torch_vtensor.generation.decode.support import end_tokens_of, why_stock
from torch_vtensor.generation.kv_store import KVStore

__all__ = ["sample"]

_STEPS_AHEAD = 3  # of the device: enough to keep it busy, few enough to stop soon after the last sequence ends
_AHEAD_TOKENS = 64


def sample(
    stock: Callable[..., Any],
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """``GenerationMixin._sample``: the prompt and the first token by transformers, all others by captured graphs.

    Calls that the captured loop cannot take go to ``stock``, counted with the reason.
    Raises: OutOfPagesError, with the tokens so far in its ``sequences``; the cache keeps them.
    """
    reason = why_stock(model, input_ids, stopping_criteria, generation_config, synced_gpus, model_kwargs)
    sampling: Sampling | str = ""
    if reason is None:
        end_tokens = end_tokens_of(stopping_criteria)
        pad_token = generation_config._pad_token_tensor if end_tokens is not None else None
        sampling = sampling_of(logits_processor, generation_config.do_sample, end_tokens, pad_token)
        reason = sampling if isinstance(sampling, str) else None
    firsts = _first_tokens(input_ids, model_kwargs) if reason is None else None
    if reason is None and firsts is None:
        reason = "an attention mask with holes"
    if reason is not None:
        cache_layers.counters[f"stock loop: {reason}"] += 1
        return stock(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
            **model_kwargs,
        )  # fmt: skip
    assert isinstance(sampling, Sampling) and firsts is not None
    call = _Call(model, input_ids, stopping_criteria, sampling, streamer, firsts, model_kwargs["past_key_values"])
    first = StoppingCriteriaList([MaxLengthCriteria(max_length=input_ids.shape[1] + 1)])
    output = stock(model, input_ids, logits_processor, first, generation_config, False, None, **model_kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    if streamer is not None:
        streamer.put(sequences[:, -1].cpu())
    reason = _refused.get(model)
    try:
        decoding = _prepare(call, sequences) if reason is None else None
    except (OutOfPagesError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever torch.compile or the model's own code may raise
        _refused[model] = reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        decoding = None
        _log.warning(
            "%s decodes by transformers' own loop: its step cannot be compiled: %s", type(model).__name__, reason
        )
    if decoding is None:
        cache_layers.counters["stock loop: the model's step cannot be compiled"] += 1
        more = _continued(model_kwargs)
        return stock(model, sequences, logits_processor, stopping_criteria, generation_config, False, streamer, **more)
    with decoding:
        sequences = _decode(call, decoding, sequences)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


_log = logging.getLogger(__name__)
_refused: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Models whose step could not be compiled, and why."""


class _Call(NamedTuple):
    """One call of generate() that the captured loop has taken."""

    model: Any
    input_ids: torch.Tensor
    criteria: Any
    sampling: Sampling
    streamer: Any
    firsts: list[int]
    cache: Any


class _Group(NamedTuple):
    """Layers that share a store, and so addresses and lengths."""

    store: KVStore
    length: int
    placement: Placement


class _Placed(NamedTuple):
    """A cache whose rows from ``length`` on are ready to be written by the device."""

    layers: tuple[LayerRows, ...]
    groups: list[_Group]


class _Decoding(AbstractContextManager["_Decoding"]):
    """A program that is this call's alone, and the cache that it continues."""

    def __init__(self, program: DecodeProgram, placed: _Placed) -> None:
        self.program = program
        self.placed = placed

    def __exit__(self, *exception: object) -> None:
        self.program.lock.release()


def _prepare(call: _Call, sequences: torch.Tensor) -> _Decoding:
    """Everything up to the first captured step of ``sequences`` [B, L + 1], of which the cache holds L tokens."""
    max_new = call.criteria.max_length - sequences.shape[1]
    placed = _place(call, max_new)
    for group in placed.groups:
        _commit(group, 1)
    positions = [call.cache.get_seq_length() - first for first in call.firsts]
    program = acquire_program(call.model, len(sequences), placed.layers, len(placed.groups))
    decoding = _Decoding(program, placed)
    with ExitStack() as undo:
        undo.push(decoding)
        program.place([group.placement for group in placed.groups])
        program.start(sequences, torch.tensor(positions, device=sequences.device), max_new, call.sampling)
        program.warm_up()
        undo.pop_all()
    return decoding


def _continued(inputs: dict[str, Any]) -> dict[str, Any]:
    """What generate() would hand to the model for the token after those that ``inputs`` were for."""
    more = {name: value for name, value in inputs.items() if name != "cache_position"}
    mask, positions = more.get("attention_mask"), more.get("position_ids")
    if mask is not None:
        more["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    if positions is not None:
        more["position_ids"] = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return more


def _decode(call: _Call, decoding: _Decoding, sequences: torch.Tensor) -> torch.Tensor:
    """Continue ``sequences`` until every one has ended."""
    num_new = _run(call, decoding.program, decoding.placed, sequences)
    chosen = decoding.program.chosen[:, :num_new].clone()
    if call.streamer is not None:
        call.streamer.end()
    return torch.cat([sequences, chosen], dim=1)


def _run(call: _Call, program: DecodeProgram, placed: _Placed, sequences: torch.Tensor) -> int:
    """Decode until every sequence has ended; returns the number of new tokens, which the cache then accounts for."""
    max_new = call.criteria.max_length - sequences.shape[1]
    choose = program.choice(call.sampling)
    ends = _Ends(program)
    num_steps = num_new = 0
    ends.record(has_tokens=False)  # the first token may have been the last
    try:
        is_open = True
        while is_open and num_steps < max_new:
            for group in placed.groups:
                _commit(group, num_steps + 1)
            program.run_step()
            choose()
            num_steps += 1
            ends.record()
            num_new, is_open = ends.look(call.streamer)
            is_open = is_open and not _out_of_time(call.criteria)
        num_new, _ = ends.look(call.streamer, wait_for_all=True)
    except OutOfPagesError as error:
        num_new, _ = ends.look(call.streamer, wait_for_all=True)
        error.sequences = torch.cat([sequences, program.chosen[:, :num_new].clone()], dim=1)  # type: ignore[attr-defined]
        error.add_note(f"{num_new + 1} new tokens were generated before; they are in this error's sequences")
        raise
    finally:
        _account(call.cache, placed, num_new)
    return num_new


class _Noted(NamedTuple):
    """A launched step: whether any sequence goes on after it, its tokens, and when they are there."""

    any_open: torch.Tensor
    tokens: torch.Tensor | None
    event: Any


class _Ends:
    """What the device has finished: read behind it, without making it wait."""

    def __init__(self, program: DecodeProgram) -> None:
        self.program = program
        self.num_new = 0
        self.has_ended = False
        self._pending: deque[_Noted] = deque()

    def record(self, has_tokens: bool = True) -> None:
        """Note the step just launched."""
        program = self.program
        any_open = program.is_open.any().to("cpu", non_blocking=True)
        tokens = program.tokens[:, 0].to("cpu", non_blocking=True, copy=True) if has_tokens else None
        event = torch.cuda.Event() if program.device.type == "cuda" else None
        if event is not None:
            event.record()
        self._pending.append(_Noted(any_open, tokens, event))

    def look(self, streamer: Any, wait_for_all: bool = False) -> tuple[int, bool]:
        """How many tokens a sequence has got, and whether any goes on."""
        while self._pending and not self.has_ended:
            noted = self._pending[0]
            if noted.event is not None and not noted.event.query():
                if not wait_for_all and len(self._pending) <= _STEPS_AHEAD:
                    break
                noted.event.synchronize()
            self._pending.popleft()
            self.has_ended = not bool(noted.any_open)
            if noted.tokens is not None:
                self.num_new += 1
                if streamer is not None:
                    streamer.put(noted.tokens)
        return self.num_new, not self.has_ended


def _out_of_time(criteria: Any) -> bool:
    return any(
        time.time() - one.initial_timestamp > one.max_time for one in criteria if isinstance(one, MaxTimeCriteria)
    )


def _first_tokens(input_ids: torch.Tensor, inputs: dict[str, Any]) -> list[int] | None:
    """How many tokens of padding stand before each sequence; None where there is padding elsewhere."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return [0] * len(input_ids)
    if mask.dim() != 2:
        return None
    firsts = (mask == 0).sum(1)
    is_left = (mask != 0) == (torch.arange(mask.shape[1], device=mask.device) >= firsts[:, None])
    *numbers, ok = torch.cat([firsts, is_left.all()[None]]).tolist()
    return numbers if ok else None


def _place(call: _Call, max_new: int) -> _Placed:
    """Bring every layer to where the device can append to it: pages, addresses for all that is to come, its own."""
    cache = call.cache
    num_cached = cache.get_seq_length()
    groups: dict[tuple[int, int], int] = {}
    made: list[_Group] = []
    rows: list[LayerRows] = []
    for layer in cache.layers:
        state = cache_layers.state_of(layer)
        if state is None:
            raise RuntimeError("a layer of the cache went back to stock memory")
        store = state.column.reach(state.first, state.stop, state.stop + max_new)
        state.publish(layer, state.first, state.stop, *state.column.views(state.first, state.stop))
        key, value = store.places(state.column.index)
        at = (id(store), state.stop)
        if at not in groups:
            groups[at] = len(made)
            hidden = num_cached - state.stop  # tokens before the first that this layer ever kept
            firsts = [max(0, first - hidden) for first in call.firsts]
            placement = Placement(store.slot_addresses(key), store.slot_addresses(value), state.stop, firsts)
            made.append(_Group(store, state.stop, placement))
        rows.append(
            LayerRows(
                groups[at],
                key.offset,
                value.offset,
                (key.strides[1], key.strides[2]),
                (value.strides[1], value.strides[2]),
                getattr(layer, "sliding_window", None),
                state.column.shape.heads,
                state.column.shape.value_dim,
            )
        )
    return _Placed(tuple(rows), made)


def _commit(group: _Group, num_steps: int) -> None:
    """Memory for the next step, ahead of need if possible."""
    needed = group.length + num_steps
    committed = group.store.committed
    if needed > committed:
        group.store.commit(needed)
    elif needed + _AHEAD_TOKENS > committed:
        group.store.commit_ahead()


def _account(cache: Any, placed: _Placed, num_new: int) -> None:
    """Let the layers know of the tokens that the device appended."""
    for layer in cache.layers:
        state = cache_layers.state_of(layer)
        if state is None or num_new == 0:
            continue
        state.column.extended(state.first, state.stop + num_new)
        window = getattr(layer, "sliding_window", None)
        stop = state.stop + num_new
        first = state.first if window is None else max(state.first, stop - window + 1)
        state.publish(layer, first, stop, *state.column.views(first, stop))
        if window is not None:
            layer.cumulative_length += num_new
            state.column.keep(first)
