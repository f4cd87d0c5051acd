"""Requests in tests of continuous batching: prompts, what each is answered alone, and managers driven by hand."""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from tiny_models import model_of, sizes
from transformers import GenerationConfig

import torch_vtensor
from torch_vtensor.generation import prefix_cache, shared_reads
from torch_vtensor.generation.decode import graphs, program, prompt_parts, step
from torch_vtensor.generation.serving import _transformers_compat as compat
from torch_vtensor.generation.serving import support

WHY_SKIPPED = compat.why_other_interface()
"""Why this version of transformers keeps its own managers, if so."""


BATCHES = [
    pytest.mark.skipif(WHY_SKIPPED is not None, reason=str(WHY_SKIPPED)),
    pytest.mark.usefixtures("uncompiled_batches"),
]
"""Marks of tests of batches: each begins with no counts and no programs."""
IN_ONE_LAYOUT = [*BATCHES, pytest.mark.parametrize("memory", ["token-major"], indirect=True)]
"""Of those which do not depend on how memory is laid out."""


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a fixture: steps that would be compiled run as they are; counters and programs are the test's alone."""
    monkeypatch.setattr(graphs, "compile_step", lambda forward, **options: forward)
    monkeypatch.setattr(prompt_parts, "compile_parts", lambda twin: None)
    monkeypatch.setattr(program, "_traced", weakref.WeakKeyDictionary())
    support.counters.clear()
    prefix_cache.counters.clear()
    yield
    torch_vtensor.disable()
    support.counters.clear()
    prefix_cache.counters.clear()


def counted(name: str) -> int:
    """How often something was counted since."""
    return torch_vtensor.stats().serving.get(name, 0)


def model_to_serve(family: str) -> Any:
    """A tiny model: of a family, or a Qwen3."""
    return _qwen3() if family == "qwen3" else model_of(family)


@functools.cache
def _qwen3() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes())).eval()


def config_of(**options: Any) -> Any:
    """Greedy, and nothing ends an answer but its length."""
    return GenerationConfig(
        **{"do_sample": False, "eos_token_id": [-1], "pad_token_id": 0, "max_new_tokens": 8} | options
    )


def batching(**options: Any) -> Any:
    """transformers' settings of a manager, which older versions lack."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**options)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    drawn = random.Random(seed)
    return [[drawn.randrange(3, 90) for _ in range(length)] for length in lengths]


_alone: dict[tuple[str, tuple[int, ...]], list[int]] = {}


def alone(family: str, prompt: Sequence[int], num_new: int) -> list[int]:
    """What generate() answers to one prompt, by transformers' own loop."""
    key = family, tuple(prompt)
    if len(_alone.get(key, ())) < num_new:
        ids = torch.tensor([list(prompt)])
        options = config_of(max_new_tokens=num_new)
        with torch.no_grad():
            output = model_to_serve(family).generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=options
            )
        _alone[key] = output[0, len(prompt) :].tolist()
        assert len(_alone[key]) == num_new
    return _alone[key][:num_new]


def watch_shared_reads(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Have steps be told what sequences share as on a GPU, whatever it saves, and compare the rows.

    Returns: the groups of every step so far that was told of any.
    """
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    attend, told = step.cached_attention, []

    def checked(*args: Any, groups: Any = None, num_shared: Any = None, **options: Any) -> Any:
        if groups is not None and len(groups) > 0:
            members = [row for row in ([slot for slot in row if slot >= 0] for row in groups.tolist()) if row]
            if members:
                told.append(members)
            _check_rows(members, num_shared.tolist(), *args)
        return attend(*args, **options)

    monkeypatch.setattr(step, "cached_attention", checked)
    return told


READ_APART = "read apart: the step cannot be made to read once what is shared"
"""Counted where a step that reads once has failed, as one does whose rows are not the same."""


def _check_rows(members: list[list[int]], num_shared: list[int], *args: Any) -> None:
    """Assert that the rows that each group reads once are the same for all of its members, and written."""
    key, addresses, lengths, token_stride = args[1], args[3], args[5], args[13]
    seen = list(itertools.chain(*members))
    assert len(seen) == len(set(seen)), "a slot is in one group at most"
    assert all(num_shared[slot] == 0 for slot in set(range(len(num_shared))) - set(seen))
    for row in members:
        (num_rows,) = {num_shared[slot] for slot in row}
        assert 0 < num_rows <= min(lengths[slot] for slot in row)
        nbytes = num_rows * token_stride * key.dtype.itemsize
        assert len({ctypes.string_at(int(addresses[slot]), nbytes) for slot in row}) == 1


class Served:
    """A manager whose loop is driven by hand, and what it delivered.

    >>> served = Served(model, generation_config=config_of())
    >>> served.manager.add_request([3, 4, 5])
    >>> served.run()
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.manager = model.init_continuous_batching(**options)
        with torch.no_grad():
            self.engine = self.manager._make_engine()
        self.manager.batch_processor = self.manager._engine = self.engine
        self.outputs: list[Any] = []

    def round(self) -> None:
        """One round of the loop, if there is anything to do."""
        compat.wake_up_event(self.manager).set()  # it does not sleep
        with torch.no_grad():
            self.manager._serve(self.engine)
        self.outputs += compat.drained(self.manager.output_router.output_queue)

    def run(self) -> dict[str, Any]:
        """Rounds until nobody waits; the last output of each request."""
        self.round()
        while self.engine.has_pending_requests():
            self.round()
        return {output.request_id: output for output in self.outputs}

    def close(self) -> None:
        self.engine.close()
