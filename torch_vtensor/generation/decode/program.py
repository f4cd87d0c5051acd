"""DecodeProgram: one batch size of one model as captured graphs, kept from call to call.

Two graphs a token: the model's step, compiled by inductor, and the choice of the next token, which also moves every
length and position on. Both read where a cache lies from device memory, so the next call only writes new addresses.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from torch_vtensor.generation.decode.fuse import fuse
from torch_vtensor.generation.decode.sampling import Sampling
from torch_vtensor.generation.decode.step import GroupRows, LayerRows, Step, make_forward, route_attention

__all__ = ["DecodeProgram", "Placement", "acquire_program"]

Graph = Callable[[], None]
_MAX_CHOICES = 16


class Placement(NamedTuple):
    """Where a cache lies now: what differs between two caches of the same layout.

    Units: addresses in bytes, one a slot; tokens.
    """

    key_addresses: list[int]
    value_addresses: list[int]
    length: int
    firsts: list[int]


class DecodeProgram:
    """Captured decoding of ``batch`` sequences by ``model``.

    Args:
        model: of which its tensors alone are kept.
        layers, num_groups: the layout of its caches.
    """

    def __init__(self, model: Any, batch: int, layers: tuple[LayerRows, ...], num_groups: int) -> None:
        route_attention()
        device = model.device
        self.batch = batch
        self.device = device
        self._lock = threading.Lock()  # held by the call whose sequences are being decoded
        self._released: torch.cuda.Event | None = None
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
            )
            for _ in range(num_groups)
        )
        self.step = Step(layers, groups, *_workspace(batch, layers, device))
        self._forward = _compile(make_forward(model), device)
        self._graph: Graph | None = None
        self.logits: torch.Tensor | None = None
        # Of the choice of tokens:
        self.is_open = torch.ones(batch, dtype=torch.bool, device=device)
        self.length = torch.zeros((), **ints)
        self.num_chosen = torch.zeros(1, **ints)
        self.chosen = torch.zeros(batch, 0, **ints)
        self.history = torch.zeros(batch, 0, **ints)
        self._choices: dict[Any, Graph] = {}

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

    def place(self, placements: Sequence[Placement]) -> None:
        """Make the next step continue the caches that lie there."""
        for group, placement in zip(self.step.groups, placements, strict=True):
            group.key_addresses.copy_(_on(self.device, placement.key_addresses, torch.int64), non_blocking=True)
            group.value_addresses.copy_(_on(self.device, placement.value_addresses, torch.int64), non_blocking=True)
            group.firsts.copy_(_on(self.device, placement.firsts, torch.int32), non_blocking=True)
            group.lengths.fill_(placement.length)

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
        self.is_open.copy_(sampling.remains_open(sequences[:, -1], torch.ones_like(self.is_open)))

    def warm_up(self) -> None:
        """Compile and capture the model's step. The rows behind each sequence must have memory; they are written to."""
        if self._graph is not None:
            return
        began = time.perf_counter()
        self._graph = _capture(self._run_forward, self.device)
        self.warm_up_s = time.perf_counter() - began

    def choice(self, sampling: Sampling) -> Graph:
        """The captured choice of the next token; one that was captured before, if it is the same."""
        graph = self._choices.pop(sampling.signature, None)
        if graph is None:

            def rehearse() -> None:
                assert self.logits is not None
                sampling.choose(sampling.scores(self.logits, self.history, self.length), self.is_open)

            graph = _capture(lambda: self._choose(sampling), self.device, rehearse)
        if sampling.signature is not None:
            self._choices[sampling.signature] = graph  # the last one used comes last
            if len(self._choices) > _MAX_CHOICES:
                del self._choices[next(iter(self._choices))]
        return graph

    def run_step(self) -> None:
        """The model's step: reads ``tokens`` and leaves ``logits``."""
        assert self._graph is not None
        self._graph()

    def _run_forward(self) -> None:
        logits = self._forward(self.tokens, self.positions, self._mask, self.step)
        self.logits = logits

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


_Tensors = tuple[int, ...]
_programs: weakref.WeakKeyDictionary[Any, tuple[_Tensors, dict[Any, list[DecodeProgram]]]] = weakref.WeakKeyDictionary()
"""The programs of a model by batch and layout, and the addresses of the model's tensors that they read."""
_programs_lock = threading.Lock()


def acquire_program(model: Any, batch: int, layers: tuple[LayerRows, ...], num_groups: int) -> DecodeProgram:
    """A program for so many sequences in caches of this layout, the caller's alone until it is released.

    One made before, if it is free and reads the tensors that the model has now, captured or not yet.
    """
    key = (batch, layers, num_groups)
    tensors = _tensors_of(model)
    with _programs_lock:
        read, by_key = _programs.get(model, ((), {}))
        if read != tensors:
            by_key = {}
            _programs[model] = tensors, by_key
        programs = by_key.setdefault(key, [])
        for program in programs:
            if program.acquire():
                return program
        program = DecodeProgram(model, batch, layers, num_groups)
        program.acquire()
        programs.append(program)
        return program


def _tensors_of(model: Any) -> _Tensors:
    """What changes when the model is moved, converted or resized; captured graphs go on reading the old tensors."""
    return tuple(
        tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else id(tensor)
        for tensor in chain(model.parameters(), model.buffers())
    )


def _on(device: torch.device, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.tensor(numbers, dtype=dtype, device="cpu")
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _rounded(count: int) -> int:
    return max(256, 1 << (count - 1).bit_length())


def _workspace(batch: int, layers: tuple[LayerRows, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if device.type != "cuda":
        return torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    from torch_vtensor.ops.decode_attention.triton import make_workspace

    heads, value_dim = max(layer.heads for layer in layers), max(layer.value_dim for layer in layers)
    return make_workspace(batch, heads, value_dim, device)


def _compile(forward: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    # A code object of its own: dynamo counts recompilations by code object, and every batch size is meant to be one.
    forward.__code__ = forward.__code__.replace()

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        fuse(graph_module)
        return compile_fx(graph_module, example_inputs)

    return torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)


def _capture(run: Callable[[], None], device: torch.device, rehearse: Callable[[], None] | None = None) -> Graph:
    """``run`` as a captured graph; without a GPU, ``run`` itself. ``rehearse`` is what to do before, ``run`` if None.

    Effects: the random state is as before.
    """
    rehearse = rehearse or run
    if device.type != "cuda":
        random = torch.get_rng_state()
        try:
            rehearse()
        finally:
            torch.set_rng_state(random)
        return run
    random = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                rehearse()
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(random, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay
