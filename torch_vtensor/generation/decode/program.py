"""DecodeProgram: one batch size of one model as captured graphs, kept from call to call.

Two graphs a token: the model's step, compiled by inductor, and the choice of the next token, which also moves every
length and position on; and for prompts one graph for each of a few sizes of what is taken up at once. All read where a
cache lies from device memory, so the next call only writes new addresses.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch

from torch_vtensor.generation.decode import graphs, prompt_parts
from torch_vtensor.generation.decode.graphs import Captures, Graph, LatestGraphs
from torch_vtensor.generation.decode.prompt import Part
from torch_vtensor.generation.decode.prompt_graphs import PromptGraphs
from torch_vtensor.generation.decode.sampling import Sampling
from torch_vtensor.generation.decode.step import (
    GroupRows,
    LayerRows,
    LayerShape,
    Step,
    layer_shapes,
    prompt_forward,
    step_forward,
    twin_of,
)
from torch_vtensor.generation.modules import modules_of
from torch_vtensor.generation.shared_reads import SharedPrefix, SharedTables, table_shape, tables_of

__all__ = ["DecodeProgram", "Placement", "Program", "Traced", "traced_model"]

_MAX_CHOICES = 16
_WITH_ADDRESSES = (torch.Tensor, torch.nn.Parameter)
_address = torch.Tensor.data_ptr


class Program:
    """What is kept of a model from call to call, for one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()  # held by whose sequences are decoded
        self._released: torch.cuda.Event | None = None

    def acquire(self) -> bool:
        """Make the program the caller's alone, if it is nobody's, also on the device."""
        if not self._lock.acquire(blocking=False):
            return False
        if self._released is not None:
            torch.cuda.current_stream(self.device).wait_event(self._released)
        return True

    def release(self) -> None:
        """Let others have the program. What was launched may still run."""
        if self.device.type == "cuda":
            self._released = torch.cuda.current_stream(self.device).record_event()
        self._lock.release()


AnyProgram = TypeVar("AnyProgram", bound=Program)


class Placement(NamedTuple):
    """Where a cache lies now: what differs between two caches of the same layout.

    Units: addresses in bytes, one a slot; tokens.
    """

    key_addresses: list[int]
    value_addresses: list[int]
    length: int
    firsts: list[int]
    shared: tuple[SharedPrefix, ...] = ()


class DecodeProgram(Program):
    """Captured decoding of ``batch`` sequences by a model.

    Args:
        traced: the model, of which its tensors alone are kept.
        layers: the layout of its caches.
        shares: for each group of layers whether its sequences may share tokens that are to be read once.
    """

    def __init__(self, traced: Traced, batch: int, layers: tuple[LayerRows, ...], shares: tuple[bool, ...]) -> None:
        device = traced.twin.device
        super().__init__(device)
        self.batch = batch
        self.warm_up_s = 0.0
        ints = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(batch, 1, **ints)
        self.positions = torch.zeros(batch, 1, **ints)
        self._mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
        groups = tuple(
            GroupRows(
                torch.zeros(batch, **ints),
                torch.zeros(batch, **ints),
                torch.zeros(batch, dtype=torch.int32, device=device),
                torch.zeros(batch, dtype=torch.int32, device=device),
                SharedTables(*(table.to(device) for table in tables_of((), batch, table_shape(batch))))
                if is_shared
                else None,
            )
            for is_shared in shares
        )
        self.step = Step(layers, groups, *graphs.workspace(batch, layers, device))
        self._forward = graphs.compile_step(step_forward(traced.twin))
        self._captures = Captures(device)
        self._graph: Graph | None = None
        self.logits: torch.Tensor | None = None
        # Of prompts:
        self._last = torch.zeros(1, **ints)
        self._num_new = torch.zeros(batch, dtype=torch.int32, device=device)
        self._num_added = torch.zeros((), dtype=torch.int32, device=device)
        self._prompts = PromptGraphs(self._captures, traced.prompt, self._mask) if traced.takes_prompts else None
        # Of the choice of tokens:
        self.is_open = torch.ones(batch, dtype=torch.bool, device=device)
        self.length = torch.zeros((), **ints)
        self.num_chosen = torch.zeros(1, **ints)
        self.chosen = torch.zeros(batch, 0, **ints)
        self.history = torch.zeros(batch, 0, **ints)
        self._choices = LatestGraphs(_MAX_CHOICES)

    def place(self, placements: Sequence[Placement]) -> None:
        """Make the next step continue the caches that lie there."""
        for group, placement in zip(self.step.groups, placements, strict=True):
            group.key_addresses.copy_(_on(self.device, placement.key_addresses, torch.int64), non_blocking=True)
            group.value_addresses.copy_(_on(self.device, placement.value_addresses, torch.int64), non_blocking=True)
            group.firsts.copy_(_on(self.device, placement.firsts, torch.int32), non_blocking=True)
            group.lengths.fill_(placement.length)
            if group.shared is not None:
                tables = tables_of(placement.shared, self.batch, table_shape(self.batch))
                for table, numbers in zip(group.shared, tables, strict=True):
                    table.copy_(_pinned(self.device, numbers), non_blocking=True)

    def start(self, sequences: torch.Tensor, positions: torch.Tensor, max_new: int, sampling: Sampling) -> None:
        """Continue ``sequences`` [B, L], whose last tokens stand at ``positions`` [B], by up to ``max_new`` tokens."""
        if self.chosen.shape[1] < max_new:
            self.chosen = self.chosen.new_zeros(self.batch, _rounded(max_new))
            self._choices.clear()
        if sampling.needs_tokens:
            num_tokens = sequences.shape[1] + max_new
            if self.history.shape[1] < num_tokens:
                self.history = self.history.new_zeros(self.batch, _rounded(num_tokens))
                self._choices.clear()
            self.history[:] = sequences[:, :1]
            self.history[:, : sequences.shape[1]] = sequences
        self.tokens.copy_(sequences[:, -1:])
        self.positions.copy_(positions[:, None])
        self.length.fill_(sequences.shape[1])
        self.num_chosen.zero_()
        self.is_open.fill_(True)

    def close_ended(self, sequences: torch.Tensor, sampling: Sampling) -> None:
        """Note which of ``sequences`` [B, L] have ended with their last tokens."""
        self.is_open.copy_(sampling.remains_open(sequences[:, -1], self.is_open))

    def warm_up(self, parts: Sequence[Part] = ()) -> None:
        """Compile and capture the model's step, and what takes up these parts of a prompt, as far as not done before.

        The row behind each sequence must have memory; it is written to.
        """
        began = time.perf_counter()
        if self._graph is None:
            self._graph = self._captures(self._run_forward)
        for size in {part.size for part in parts}:
            self._capture_prompt(size)
        self.warm_up_s += time.perf_counter() - began

    @property
    def has_step(self) -> bool:
        """Whether the model's step is compiled and captured."""
        return self._graph is not None

    def run_prompt(self, tokens: torch.Tensor, positions: torch.Tensor, parts: Sequence[Part]) -> None:
        """Take up a prompt: rows are appended, and ``logits`` are left for the token after it.

        Shapes: tokens, positions [B, N]; the parts cover all of N.
        """
        assert self._prompts is not None
        for part in parts:
            num_tokens = part.stop - part.start
            self._last.fill_(num_tokens - 1)
            self._num_new.fill_(num_tokens)
            # The choice of a token moves lengths on by one more.
            self._num_added.fill_(num_tokens - (part.stop == tokens.shape[1]))
            self._prompts.run(part.size, *(given[:, part.start : part.stop] for given in (tokens, positions)))

    def _capture_prompt(self, size: int) -> None:
        assert self._prompts is not None
        if size in self._prompts:
            return

        def move_on() -> None:
            for group in self.step.groups:
                group.lengths.add_(self._num_added)

        step = self.step._replace(num_new=self._num_new)
        self._prompts.capture(size, (self.batch, size), step, self._last, self._leave, move_on)

    def choice(self, sampling: Sampling) -> Graph:
        """The captured choice of the next token; one that was captured before, if it is the same."""

        def rehearse() -> None:
            assert self.logits is not None
            sampling.choose(sampling.scores(self.logits, self.history, self.length), self.is_open)

        return self._choices.get(sampling.signature, lambda: self._captures(lambda: self._choose(sampling), rehearse))

    def run_step(self) -> None:
        """The model's step: reads ``tokens`` and leaves ``logits``."""
        assert self._graph is not None
        self._graph()

    def _run_forward(self) -> None:
        self._leave(self._forward(self.tokens, self.positions, self._mask, self.step))

    def _leave(self, logits: torch.Tensor) -> None:
        if self.logits is None:
            self.logits = torch.empty_like(logits)  # while rehearsing, so that it is not part of a graph's memory
        self.logits.copy_(logits)

    def _choose(self, sampling: Sampling) -> None:
        assert self.logits is not None
        scores = sampling.scores(self.logits, self.history, self.length)
        tokens = sampling.choose(scores, self.is_open)
        self.is_open.copy_(sampling.remains_open(tokens, self.is_open))
        self.chosen.scatter_(1, self.num_chosen.expand(self.batch, 1), tokens[:, None])
        if sampling.needs_tokens:
            self.history.scatter_(1, self.length.expand(self.batch, 1), tokens[:, None])
        self.tokens.copy_(tokens[:, None])
        self.positions += 1
        self.length += 1
        self.num_chosen += 1
        for group in self.step.groups:
            group.lengths.add_(1)


class Traced:
    """A model as it is traced, with all programs that were made of it.

    Raises: whatever the model's own code may raise, if it cannot be run over rows at addresses.
    """

    def __init__(self, model: Any) -> None:
        modules = modules_of(model)
        self._places = [where for module in modules for where in (module._parameters, module._modules)]
        self._names = [*chain.from_iterable(self._places)]
        self._filled = [where for where in self._places if where]
        self._below = [*chain.from_iterable(where.values() for where in self._filled)]
        self._ids = [*map(id, self._below)]
        self._buffers = [(module._buffers, name, it) for module in modules for name, it in module._buffers.items()]
        tensors = (it for it in chain(self._below, (it for _, _, it in self._buffers)) if type(it) in _WITH_ADDRESSES)
        self._tensors = list(dict.fromkeys(tensors))
        self._addresses = [*map(_address, self._tensors)]
        self.twin = twin_of(model)
        self.shapes: list[LayerShape] = layer_shapes(self.twin)
        self.takes_prompts = not any("Experts" in type(module).__name__ for module in model.modules())
        """Whether graphs may take up prompts: experts choose their kernels by the number of tokens."""
        self.twin_for_many = self.twin if self.takes_prompts else twin_of(model, for_few_tokens=False)
        """The twin for many tokens at once."""
        self._programs: dict[Hashable, list[Any]] = {}
        self._lock = threading.Lock()

    @cached_property
    def prompt(self) -> Callable[..., torch.Tensor]:
        """Of all batch sizes and numbers of tokens."""
        twin = twin_of(self.twin)
        prompt_parts.compile_parts(twin)
        return prompt_forward(twin)

    def is_of_today(self) -> bool:
        """Whether the model still has the tensors that programs read, at the same addresses."""
        return (
            [*chain.from_iterable(self._places)] == self._names
            and [*map(id, chain.from_iterable([where.values() for where in self._filled]))] == self._ids
            and all(where.get(name) is it for where, name, it in self._buffers)
            and [*map(_address, self._tensors)] == self._addresses
        )

    def acquire_program(self, key: Hashable, make: Callable[[], AnyProgram]) -> AnyProgram:
        """A program that ``make`` makes, the caller's alone until it is released.

        One made before with an equal key, if it is free, captured or not yet.
        """
        with self._lock:
            programs: list[AnyProgram] = self._programs.setdefault(key, [])
            for program in programs:
                if program.acquire():
                    return program
            program = make()
            program.acquire()
            programs.append(program)
            return program


_traced: weakref.WeakKeyDictionary[Any, Traced] = weakref.WeakKeyDictionary()
_traced_lock = threading.Lock()


def traced_model(model: Any) -> Traced:
    """The model as it is traced; made anew where it was moved, converted, resized or otherwise changed its tensors."""
    with _traced_lock:
        known = _traced.get(model)
        if known is None or not known.is_of_today():
            known = _traced[model] = Traced(model)
        return known


def _on(device: torch.device, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    return _pinned(device, torch.tensor(numbers, dtype=dtype, device="cpu"))


def _pinned(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _rounded(count: int) -> int:
    return max(256, 1 << (count - 1).bit_length())
