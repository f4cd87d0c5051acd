"""The same text sampled over three caches: what each held after every step, how long the step took, which tokens came.

DynamicCache    holds what is written; each step copies it: torch.cat makes the new tensor before the old goes
torch_vtensor   holds whole pages; each step writes its token behind the last one, where it stays
StaticCache     holds the longest length that it was made for, from the first step on
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache, StoppingCriteria

import torch_vtensor
from torch_vtensor.settings import MIB

__all__ = ["DYNAMIC", "STATIC", "VTENSOR", "Contender", "Memory", "Run", "Step", "format_table", "generate"]


class Memory(NamedTuple):
    """Bytes of one cache after a step, and the driver calls so far.

    ``held_bytes`` are physical, ``reserved_bytes`` addresses; ``peak_bytes`` were held for a moment during the step.
    """

    written_bytes: int
    held_bytes: int
    peak_bytes: int
    reserved_bytes: int
    num_driver_calls: int = 0


class Step(NamedTuple):
    """One call of the model: how long it took, and what the cache held then. The first one reads the prompt."""

    seconds: float
    num_tokens: int
    memory: Memory


class Run(NamedTuple):
    """One generation over one kind of cache."""

    name: str
    tokens: list[int]
    steps: list[Step]

    @property
    def num_driver_calls(self) -> list[int]:
        """Memory driver calls in each step that reads one token."""
        calls = [step.memory.num_driver_calls for step in self.steps]
        return [after - before for before, after in pairwise(calls)]


class Contender(NamedTuple):
    """A kind of cache: how to make one for a number of tokens, how to measure it, and in which context it works."""

    name: str
    make: Callable[[PreTrainedModel, int], Any]
    measure: Callable[[Any, int], Memory]
    context: Callable[[], AbstractContextManager[None]] = nullcontext


def generate(
    model: PreTrainedModel, contender: Contender, prompt: torch.Tensor, num_new: int, seed: int, capacity: int
) -> Run:
    """Sample ``num_new`` tokens after ``prompt`` [1, T] by ``model.generate()``, recording every step.

    ``capacity`` tokens is what a cache that has to know it beforehand is made for.

    Effects: for all contenders alike, a step ends when the device is done, and the clock stands while memory is
        measured.
    """
    with contender.context():
        cache = contender.make(model, capacity)
        recorder = _Recorder(lambda num_tokens: contender.measure(cache, num_tokens))
        torch.manual_seed(seed)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=num_new,
            do_sample=True,
            temperature=0.7,
            pad_token_id=0,
            stopping_criteria=[recorder],
        )
    return Run(contender.name, output[0, prompt.shape[1] :].tolist(), recorder.steps)


def format_table(runs: Sequence[Run]) -> str:
    """One row a run: memory at the end and at its peak, early and late steps, tokens against the first run's."""
    part = max((len(runs[0].steps) - 1) // 8, 1)
    header = ["", "MiB held", "MiB peak", f"ms/token: first {part}", f"last {part}", "driver calls/token", "tokens"]
    rows = [header]
    for run in runs:
        seconds = [step.seconds for step in run.steps[1:]]
        same = "identical" if run.tokens == runs[0].tokens else "different"
        rows.append(
            [
                run.name,
                f"{run.steps[-1].memory.held_bytes / MIB:.2f}",
                f"{max(step.memory.peak_bytes for step in run.steps) / MIB:.2f}",
                f"{1000 * statistics.median(seconds[:part]):.2f}",
                f"{1000 * statistics.median(seconds[-part:]):.2f}",
                f"{statistics.mean(run.num_driver_calls):.2f}",
                "reference" if run is runs[0] else same,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


class _Recorder(StoppingCriteria):
    """Called by generate() after each token: stops nothing."""

    def __init__(self, measure: Callable[[int], Memory]) -> None:
        self.steps: list[Step] = []
        self._measure = measure
        self._start = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        seconds = time.perf_counter() - self._start
        num_tokens = input_ids.shape[1] - 1  # the newest token is not in the cache yet
        self.steps.append(Step(seconds, num_tokens, self._measure(num_tokens)))
        self._start = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _keys_and_values(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _measure_dynamic(cache: Any, num_tokens: int) -> Memory:
    tensors = _keys_and_values(cache)
    held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    # Of one tensor, the one that cat has just made and the one that it was made from were both there.
    old_bytes = max(tensor.nbytes // num_tokens * (num_tokens - 1) for tensor in tensors)
    return Memory(held_bytes, held_bytes, held_bytes + old_bytes, held_bytes)


def _measure_static(cache: Any, num_tokens: int) -> Memory:
    tensors = _keys_and_values(cache)
    held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    written_bytes = sum(tensor.nbytes // tensor.shape[2] * num_tokens for tensor in tensors)
    return Memory(written_bytes, held_bytes, held_bytes, held_bytes)


def _measure_vtensor(cache: Any, num_tokens: int) -> Memory:
    """Everything that the process holds for caches on this device, idle pages included."""
    memory = torch_vtensor.memory(cache)
    pool = torch_vtensor.stats().devices[cache.layers[0].keys.device]
    held_bytes = pool.committed_bytes + memory.ordinary_bytes
    return Memory(memory.written_bytes, held_bytes, held_bytes, pool.reserved_bytes, pool.num_driver_calls)


DYNAMIC = Contender("DynamicCache", lambda model, num_tokens: DynamicCache(config=model.config), _measure_dynamic)
VTENSOR = Contender("torch_vtensor", DYNAMIC.make, _measure_vtensor, torch_vtensor.enabled)
STATIC = Contender(
    "StaticCache",
    lambda model, num_tokens: StaticCache(config=model.config, max_cache_len=num_tokens),
    _measure_static,
)
