"""The decoding loop that stands for transformers' own: same results, two graph launches a token, no waiting.

The prompt is taken up by graphs as well, unless it is for transformers: where the cache has layers of an unknown kind,
or a sliding window would drop some of it at once.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from torch_vtensor.errors import AsleepError, DriverError, ForkedProcessError, OutOfPagesError
from torch_vtensor.generation import layers as cache_layers
from torch_vtensor.generation._transformers_compat import CACHE_NAME, DynamicLayer, decoder_output, with_cache
from torch_vtensor.generation.decode.program import DecodeProgram, Placement, Traced, traced_model
from torch_vtensor.generation.decode.prompt import Part, parts_of
from torch_vtensor.generation.decode.sampling import Sampling, sampling_of
from torch_vtensor.generation.decode.step import LayerRows
from torch_vtensor.generation.decode.support import end_tokens_of, first_tokens, why_stock, windows_of
from torch_vtensor.generation.kv_store import KVShape, KVStore
from torch_vtensor.generation.shared_reads import shared_prefixes

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
    """``GenerationMixin._sample`` by captured graphs; some prompts, with the first token, by transformers.

    Calls that the captured loop cannot take go to ``stock``, counted with the reason.
    Raises: OutOfPagesError, with the tokens so far in its ``sequences``; the cache keeps all of them but the last.
    """
    given, model_kwargs = model_kwargs, with_cache(model, model_kwargs)
    windows_once = functools.cache(functools.partial(windows_of, model))
    reason = why_stock(model, windows_once, input_ids, stopping_criteria, generation_config, synced_gpus, model_kwargs)
    sampling: Sampling | str = ""
    if reason is None:
        end_tokens = end_tokens_of(stopping_criteria)
        pad_token = generation_config._pad_token_tensor if end_tokens is not None else None
        sampling = sampling_of(logits_processor, generation_config.do_sample, end_tokens, pad_token, input_ids.device)
        reason = sampling if isinstance(sampling, str) else None
    firsts = first_tokens(input_ids, model_kwargs) if reason is None else None
    if reason is None and firsts is None:
        reason = "an attention mask with holes"
    if reason is not None:
        cache_layers.counters[f"stock loop: {reason}"] += 1
        return stock(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
            **given,
        )  # fmt: skip
    windows = windows_once()
    assert isinstance(sampling, Sampling) and firsts is not None and windows is not None
    call = _Call(model, stopping_criteria, sampling, streamer, firsts, windows, model_kwargs)
    if _takes_prompt(call, input_ids):
        with torch.inference_mode(False), torch.no_grad(), _current(model.device):
            decoding = _prepare(call, input_ids, _prompt_of(call, input_ids, generation_config.prefill_chunk_size))
            if isinstance(decoding, _Decoding):
                with decoding:
                    sequences = _decode(call, decoding, input_ids)
                return decoder_output(sequences, call.cache) if generation_config.return_dict_in_generate else sequences
        cache_layers.counters[f"prompt by transformers: {decoding}"] += 1
    one_token = StoppingCriteriaList([MaxLengthCriteria(max_length=input_ids.shape[1] + 1)])
    try:
        output = stock(model, input_ids, logits_processor, one_token, generation_config, False, None, **model_kwargs)
    except OutOfPagesError as error:
        _keep_text(error, input_ids, 0)
        raise
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    if streamer is not None:
        streamer.put(sequences[:, -1].cpu())
    with torch.inference_mode(False), torch.no_grad(), _current(model.device):
        decoding = _prepare(call, sequences, None)
        if isinstance(decoding, _Decoding):
            with decoding:
                return _with_sequences(output, _decode(call, decoding, sequences))
    cache_layers.counters[f"stock loop: {decoding}"] += 1
    is_open = sampling.remains_open(sequences[:, -1], torch.ones_like(sequences[:, -1], dtype=torch.bool))
    if not is_open.any() or _out_of_time(stopping_criteria):
        if streamer is not None:
            streamer.end()
        return output
    processors, criteria = [*logits_processor], [*stopping_criteria]
    if not is_open.all():  # what has ended already, the stock loop cannot know
        processors.append(_Padded(is_open, sampling.pad_token))
        criteria.append(_Closed(is_open))
    config = copy.copy(generation_config)
    config.prefill_chunk_size = None  # there is one token to be taken up
    return stock(
        model, sequences, LogitsProcessorList(processors), StoppingCriteriaList(criteria), config, False, streamer,
        **_continued(sequences, model_kwargs),
    )  # fmt: skip


_log = logging.getLogger(__name__)
_refused: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose step could not be compiled."""
_CANNOT_COMPILE = "the model's step cannot be compiled"
_sharing_refused: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose step could not be compiled to read what sequences share once."""
_prompts_refused: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose prompts could not be taken up by graphs; their steps are another matter."""
_PROMPT_IS_STOCK = "prompts are for transformers"


class _Call(NamedTuple):
    """One call of generate() that the captured loop has taken."""

    model: Any
    criteria: Any
    sampling: Sampling
    streamer: Any
    firsts: list[int]
    windows: list[int | None]
    inputs: dict[str, Any]

    @property
    def cache(self) -> Any:
        return self.inputs[CACHE_NAME]


class _Group(NamedTuple):
    """Layers that share a store, and so addresses and lengths."""

    store: KVStore
    length: int
    placement: Placement


class _Placed(NamedTuple):
    """A cache whose rows from ``length`` on are ready to be written by the device."""

    layers: tuple[LayerRows, ...]
    groups: list[_Group]


class _Prompt(NamedTuple):
    """Tokens [B, N] and positions [B, N] that are to be taken up, in ``parts``."""

    tokens: torch.Tensor
    positions: torch.Tensor
    parts: list[Part]


class _Decoding(AbstractContextManager["_Decoding"]):
    """A program that is this call's alone, the cache that it continues, and the prompt if it is not there yet."""

    def __init__(self, program: DecodeProgram, placed: _Placed, prompt: _Prompt | None) -> None:
        self.program = program
        self.placed = placed
        self.prompt = prompt
        self.choose: Callable[[], None]
        self._held = ExitStack()

    def hold_in_place(self) -> None:
        """Keep other threads from moving the cache's rows, until the call has ended."""
        for group in self.placed.groups:
            self._held.enter_context(group.store.lease)
            group.store.use()

    def __exit__(self, *exception: object) -> None:
        self._held.close()
        self.program.release()


def _takes_prompt(call: _Call, input_ids: torch.Tensor) -> bool:
    """Whether the prompt can be taken up by graphs as well."""
    cache, windows = call.cache, call.windows
    num_tokens = input_ids.shape[1] - cache.get_seq_length()
    if call.model in _refused or call.model in _prompts_refused or len(cache.layers) != len(windows) or num_tokens < 1:
        return False
    positions = call.inputs.get("position_ids")
    if positions is not None and positions.shape[1] < num_tokens:
        return False
    if num_tokens > min((window for window in windows if window is not None), default=num_tokens):
        return False  # of the longest part of it no window would keep anything
    return all(_is_empty(layer) or cache_layers.state_of(layer) is not None for layer in cache.layers)


def _is_empty(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and layer.get_seq_length() == 0


def _prompt_of(call: _Call, input_ids: torch.Tensor, max_part: int | None) -> _Prompt:
    """The tokens that the cache does not hold yet, at most ``max_part`` of a sequence at once."""
    num_cached = call.cache.get_seq_length()
    tokens = input_ids[:, num_cached:]
    positions = call.inputs.get("position_ids")
    if positions is None:
        counted = torch.arange(num_cached, input_ids.shape[1], device=tokens.device)
        positions = (counted - torch.tensor(call.firsts, device=tokens.device)[:, None]).clamp_min(0)
    return _Prompt(tokens, positions[:, -tokens.shape[1] :], parts_of(tokens.shape[1], len(tokens), max_part))


def _prepare(call: _Call, sequences: torch.Tensor, prompt: _Prompt | None) -> _Decoding | str:
    """Everything up to the first captured graph that continues ``sequences`` [B, L].

    Args:
        prompt: the last of their tokens, which the cache does not hold yet; None if it holds all but the last one,
            which the model has chosen.

    Returns why there can be no captured graph, if so.
    """
    if call.model in _refused:
        return _CANNOT_COMPILE
    max_new = call.criteria.max_length - sequences.shape[1]
    num_rows = 1 if prompt is None else prompt.tokens.shape[1]
    program: DecodeProgram | None = None
    try:
        traced = traced_model(call.model)
        if prompt is not None and not traced.takes_prompts:
            return _PROMPT_IS_STOCK
        placed = _place(call, traced, num_rows, max_new)
        if placed is None:
            return "a layer of the cache is in stock memory"
        for group in placed.groups:
            _commit(group, num_rows, num_rows + max_new)  # which takes apart what is written to
        placements = [group.placement for group in placed.groups]
        if call.model not in _sharing_refused:
            placements = [_sharing(index, placed) for index in range(len(placed.groups))]
        shares = tuple(bool(placement.shared) for placement in placements)
        layout = len(sequences), placed.layers, shares
        program = traced.acquire_program(layout, lambda: DecodeProgram(traced, *layout))
        with ExitStack() as undo:
            decoding = undo.enter_context(_Decoding(program, placed, prompt))
            decoding.hold_in_place()
            program.place(placements)
            newest = _newest_positions(call, sequences) if prompt is None else prompt.positions[:, -1]
            program.start(sequences, newest, max_new, call.sampling)
            if prompt is None:
                program.close_ended(sequences, call.sampling)
            program.warm_up(() if prompt is None else prompt.parts)
            decoding.choose = program.choice(call.sampling)
            undo.pop_all()
        return decoding
    except OutOfPagesError as error:
        _keep_text(error, sequences, 1 if prompt is None else 0)
        raise
    except AsleepError:
        raise
    except (DriverError, ForkedProcessError) as error:
        return f"memory driver: {type(error).__name__}"
    except torch.OutOfMemoryError:
        return "no memory to compile the model's step"
    except Exception as error:  # whatever torch.compile or the model's own code may raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        name = type(call.model).__name__
        if prompt is not None and program is not None and program.has_step:
            _prompts_refused.add(call.model)
            _log.info("prompts of %s are taken up by transformers: %s", name, reason, exc_info=error)
            return _PROMPT_IS_STOCK
        if program is not None and any(group.shared for group in program.step.groups):
            _sharing_refused.add(call.model)
            _log.info("%s reads what sequences share once for each of them: %s", name, reason, exc_info=error)
            return _prepare(call, sequences, prompt)
        _refused.add(call.model)
        _log.warning("%s decodes by transformers' own loop: its step cannot be compiled: %s", name, reason)
        _log.debug("why the step of %s cannot be compiled", name, exc_info=error)
        return _CANNOT_COMPILE


def _newest_positions(call: _Call, sequences: torch.Tensor) -> torch.Tensor:
    """The positions [B] of the newest tokens, which the model has chosen."""
    given = call.inputs.get("position_ids")
    if given is not None:
        next_positions: torch.Tensor = given[:, -1] + 1
        return next_positions
    num_cached = call.cache.get_seq_length()
    return torch.tensor([num_cached - first for first in call.firsts], device=sequences.device)


def _continued(sequences: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """What generate() would hand to the model for the last of ``sequences``, if ``inputs`` were for those before."""
    more = {name: value for name, value in inputs.items() if name != "cache_position"}
    mask, positions = more.get("attention_mask"), more.get("position_ids")
    if mask is None:
        more["attention_mask"] = torch.ones_like(sequences)
    else:
        more["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    if positions is not None:
        more["position_ids"] = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return more


class _Padded(LogitsProcessor):
    """Only the padding token for sequences that are not open."""

    def __init__(self, is_open: torch.Tensor, pad_token: torch.Tensor | None) -> None:
        assert pad_token is not None
        self.is_open = is_open
        self.pad_token = pad_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        padding = torch.full_like(scores, -torch.inf)
        padding[:, self.pad_token] = 0.0
        return torch.where(self.is_open[:, None], scores, padding)


class _Closed(StoppingCriteria):
    """Sequences that are not open have ended."""

    def __init__(self, is_open: torch.Tensor) -> None:
        self.is_open = is_open

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return ~self.is_open


def _with_sequences(output: Any, sequences: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


def _keep_text(error: OutOfPagesError, sequences: torch.Tensor, num_new: int) -> None:
    error.sequences = sequences  # type: ignore[attr-defined]
    error.add_note(f"{num_new} new tokens a sequence were generated before; they are in this error's `sequences`")


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels and graphs go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _decode(call: _Call, decoding: _Decoding, sequences: torch.Tensor) -> torch.Tensor:
    """Continue ``sequences`` until every one has ended."""
    num_new = _run(call, decoding, sequences)
    if call.streamer is not None:
        call.streamer.end()
    return torch.cat([sequences, decoding.program.chosen[:, :num_new]], dim=1)


def _run(call: _Call, decoding: _Decoding, sequences: torch.Tensor) -> int:
    """Decode until every sequence has ended; returns the number of new tokens, which the cache then accounts for."""
    max_new = call.criteria.max_length - sequences.shape[1]
    program, groups, prompt = decoding.program, decoding.placed.groups, decoding.prompt
    ends = _Ends(program)
    num_chosen, num_rows = 0, 0
    most_rows = max_new if prompt is None else prompt.tokens.shape[1] + max_new
    num_known = 1 if prompt is None else 0  # new tokens among ``sequences``
    try:
        if prompt is not None:
            program.run_prompt(*prompt)
            decoding.choose()
            num_chosen, num_rows = 1, prompt.tokens.shape[1]
        ends.record(has_tokens=prompt is not None)  # the first token may have been the last
        while ends.look(call.streamer) and num_chosen < max_new and not _out_of_time(call.criteria):
            num_rows += 1
            for group in groups:
                _commit(group, num_rows, most_rows)
            program.run_step()
            decoding.choose()
            num_chosen += 1
            ends.record()
        ends.look(call.streamer, wait_for_all=True)
    except OutOfPagesError as error:
        if not ends.look(call.streamer, wait_for_all=True):
            return ends.num_new  # all had ended: the memory was for steps that nobody needs
        sequences = torch.cat([sequences, program.chosen[:, : ends.num_new]], dim=1)
        _keep_text(error, sequences, ends.num_new + num_known)
        raise
    finally:
        num_kept = ends.num_new  # all tokens but the newest
        if prompt is not None and num_chosen > 0:
            num_kept += prompt.tokens.shape[1] - 1
        _account(call.cache, decoding.placed, num_kept)
    return ends.num_new


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
        """How many tokens a sequence has got."""
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

    def look(self, streamer: Any, wait_for_all: bool = False) -> bool:
        """Take up what is there; whether any sequence goes on."""
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
        return not self.has_ended


def _out_of_time(criteria: Any) -> bool:
    return any(
        time.time() - one.initial_timestamp > one.max_time for one in criteria if isinstance(one, MaxTimeCriteria)
    )


def _place(call: _Call, traced: Traced, num_rows: int, max_new: int) -> _Placed | None:
    """Bring every layer to where the device can append to it: pages, addresses for all that is to come, its own.

    Args:
        num_rows, max_new: how many rows are written next, and tokens then at most.

    None if a layer is not in our memory.
    """
    cache = call.cache
    num_cached = cache.get_seq_length()
    if len(cache.layers) != len(call.windows):
        return None
    groups: dict[tuple[int, int, int], int] = {}
    made: list[_Group] = []
    rows: list[LayerRows] = []
    for layer, window, shape in zip(cache.layers, call.windows, traced.shapes, strict=True):
        state = cache_layers.state_of(layer)
        if state is None and _is_empty(layer):
            state = cache_layers.start_empty(cache, layer, KVShape(len(call.firsts), *shape, call.model.device))
        if state is None:
            return None
        column = state.column
        rows_before = column.rows
        store = column.reach(state.first, state.stop, num_rows, state.stop + num_rows + max_new)
        if column.rows is not rows_before:
            state.publish(layer, state.first, state.stop, *column.views(state.first, state.stop))
        key, value = store.places(column.index)
        at = (id(store), state.first, state.stop)
        if at not in groups:
            groups[at] = len(made)
            hidden = num_cached - state.stop  # tokens before the first that this layer ever kept
            firsts = [max(state.first, first - hidden) for first in call.firsts]
            placement = Placement(store.slot_addresses(key), store.slot_addresses(value), state.stop, firsts)
            made.append(_Group(store, state.stop, placement))
        rows.append(
            LayerRows(
                groups[at],
                key.offset,
                value.offset,
                (key.strides[1], key.strides[2]),
                (value.strides[1], value.strides[2]),
                window,
                column.shape.heads,
                column.shape.key_dim,
                column.shape.value_dim,
                column.shape.dtype,
            )
        )
    return _Placed(tuple(rows), made)


def _sharing(index: int, placed: _Placed) -> Placement:
    """Where a group lies, and which of its sequences begin with the same pages, if its layers read them as a whole."""
    group = placed.groups[index]
    if all(layer.window is not None for layer in placed.layers if layer.group == index):
        return group.placement
    firsts = group.placement.firsts
    shared = shared_prefixes(group.store, group.length)
    return group.placement._replace(
        shared=tuple(one for one in shared if len({firsts[slot] for slot in one.slots}) == 1)
    )


def _commit(group: _Group, num_rows: int, most_rows: int) -> None:
    """Memory for ``num_rows`` behind what was there, ahead of need if possible, but for no more than ``most_rows``."""
    needed, committed = group.length + num_rows, group.store.committed
    if needed > committed:
        group.store.commit(needed)
    elif min(needed + _AHEAD_TOKENS, group.length + most_rows) > committed:
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
