"""ServingProgram: all that runs on the device for a running batch: its steps, and what takes up prompts.

What is captured stays with the model, for the next batches. The running batch changes by a few numbers in device memory
(`Seats`), and a few sizes are enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.decode.graphs import Captures
from torch_vtensor.generation.decode.program import Program, Traced
from torch_vtensor.generation.decode.prompt_graphs import PromptGraphs
from torch_vtensor.generation.decode.step import LayerRows, Step, prompt_forward
from torch_vtensor.generation.serving.choice import Choice
from torch_vtensor.generation.serving.prompts import MOST_PLACES, PromptShape
from torch_vtensor.generation.serving.seats import Column, Seats
from torch_vtensor.generation.serving.step_graphs import StepGraphs, size_of
from torch_vtensor.generation.shared_reads import SharedPrefix, shares_reads

__all__ = ["Prompt", "ServingProgram"]

_STEPS_UNTIL_RETRIED = 200


class Prompt(NamedTuple):
    """What is run next of a prompt: ``tokens``, behind the rows of its sequence."""

    sequence: Column
    tokens: Sequence[int]


class ServingProgram(Program):
    """The steps and prompts of one model over sequences of one layout.

    Args:
        traced: the model, of which its tensors alone are kept.
        layers, num_groups: the layout of the sequences.
        max_batch: the most sequences at once.
        num_arguments: numbers that each request brings for the choice of its tokens.
        is_captured: whether steps are compiled and captured, for a few sizes of the batch.

    Source: DecodeProgram, whose sequences begin and end together.
    """

    def __init__(
        self,
        traced: Traced,
        layers: tuple[LayerRows, ...],
        num_groups: int,
        max_batch: int,
        num_arguments: int,
        is_captured: bool,
    ) -> None:
        device = traced.twin.device
        super().__init__(device)
        self.is_captured = is_captured
        self.captures_prompts = is_captured and traced.takes_prompts
        self.generator = torch.Generator(device)
        """What tokens are drawn by: no other thread's numbers depend on them."""
        self.seats = Seats(size_of(max_batch), num_groups, num_arguments, device)
        captures = Captures(device, self.generator)
        workspace = graphs.workspace(max(self.seats.num_seats, MOST_PLACES), layers, device)
        self.steps = StepGraphs(traced, layers, workspace, self.seats, captures)
        self._num_steps = 0
        self._plain_until: dict[PromptShape | int, float] = {}  # number of steps, by prompts' shapes and steps' sizes
        # Of prompts:
        self._places = Seats(MOST_PLACES, num_groups, num_arguments, device)
        self._layers, self._workspace = layers, workspace
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self._last = torch.zeros(MOST_PLACES, dtype=torch.int64, device=device)
        self._num_new = torch.zeros(MOST_PLACES, dtype=torch.int32, device=device)
        self._logits: torch.Tensor | None = None  # of what was run last
        self._captured_logits: dict[int, torch.Tensor] = {}  # where captured prompts leave them, by how many they are
        self._captured = PromptGraphs(captures, traced.prompt, self._mask) if self.captures_prompts else None
        self._plain = prompt_forward(traced.twin_for_many)

    def begin(self, scratch: Sequence[int], seed: int) -> None:
        """Free all seats, which point at these addresses from now on: a row of each group that is nobody's.

        Args:
            seed: of what tokens are drawn by.
        """
        self.seats.use_scratch(scratch)
        self._places.use_scratch(scratch)
        self.steps.share(self.nothing_shared)
        self.generator.manual_seed(seed)

    def end(self) -> None:
        """Free all seats, which point at nothing any more."""
        for seats in (self.seats, self._places):
            seats.use_scratch([0] * len(seats.addresses))

    @property
    def nothing_shared(self) -> list[tuple[SharedPrefix, ...]]:
        """What is shared if nothing is, for each group of layers."""
        return [()] * (len(self.seats.addresses) // 2)

    @property
    def all_shared(self) -> list[tuple[SharedPrefix, ...]]:
        """As if something was shared in every group of layers where that may be."""
        if not shares_reads(self.device):
            return self.nothing_shared
        groups = {layer.group for layer in self._layers if layer.window is None}
        return [(SharedPrefix((), 0),) if group in groups else () for group in range(len(self.nothing_shared))]

    def warm_up(self, choice: Choice, what: PromptShape | int) -> None:
        """Compile and capture prompts of a shape, or the next step for up to so many seats, if not done before.

        Effects: the row behind each sequence that has a seat may be written to; it must have memory.
        """
        if not self._captures(what):
            return
        if isinstance(what, PromptShape):
            self._capture_prompts(what)
        else:
            self.steps.warm_up(what, choice)

    def run_plainly(self, what: PromptShape | int, for_now: bool = False) -> None:
        """Compile and capture such steps or prompts not any more, or ``for_now`` not again soon."""
        self._plain_until[what] = self._num_steps + _STEPS_UNTIL_RETRIED if for_now else math.inf

    @property
    def step_size(self) -> int:
        """The size of the next step of the taken seats."""
        return size_of(self.seats.num_taken)

    def run_step(self, choice: Choice) -> torch.Tensor:
        """The next token of every taken seat [taken], on the device; the seats go on with them.

        Effects: writes a row behind each sequence, which must have memory.
        """
        self._num_steps += 1
        return self.steps.run(self.step_size, choice, self._captures(self.step_size))

    def run_prompts(self, prompts: Sequence[Prompt], shape: PromptShape) -> None:
        """Take up these prompts or parts of them, each in a place; leaves the logits of the last token of each.

        Effects: writes a row for each token, which must have memory.
        """
        num_places, size = shape
        tokens, positions = [0] * shape.num_rows, [0] * shape.num_rows
        last, num_new = [place * size for place in range(num_places)], [1] * num_places  # others go to the scratch row
        for place, (sequence, given) in enumerate(prompts):
            start, num_tokens = place * size, len(given)
            tokens[start : start + num_tokens] = given
            positions[start : start + num_tokens] = range(sequence.num_rows, sequence.num_rows + num_tokens)
            last[place], num_new[place] = start + num_tokens - 1, num_tokens
        self._places.keep(())
        self._places.take([prompt.sequence for prompt in prompts])
        both = self._places.on_device([tokens, positions], torch.int64)
        ends = self._places.on_device([last, num_new], torch.int64)
        self._last[:num_places].copy_(ends[0])
        self._num_new[:num_places].copy_(ends[1])
        if self._captured is not None and shape in self._captured and self._captures(shape):
            self._captured.run(shape, both[:1], both[1:])
            self._logits = self._captured_logits[num_places]
        else:
            step = self._step(num_places)
            self._logits = self._plain(both[:1], both[1:], self._mask, step, self._last[:num_places])

    def first_tokens(self, choice: Choice) -> torch.Tensor:
        """The tokens [prompts] behind the prompts that were taken up last."""
        assert self._logits is not None
        taken = self._places.num_taken
        return choice.choose(self._logits[:taken], self._places.arguments[:, :taken], self.generator)

    def _captures(self, what: PromptShape | int) -> bool:
        is_wanted = self.captures_prompts if isinstance(what, PromptShape) else self.is_captured
        return is_wanted and self._plain_until.get(what, 0) <= self._num_steps

    def _step(self, num_places: int) -> Step:
        """What attention reads of so many places."""
        return Step(self._layers, self._places.groups(num_places), *self._workspace, self._num_new[:num_places])

    def _capture_prompts(self, shape: PromptShape) -> None:
        assert self._captured is not None
        if shape in self._captured:
            return

        def leave(logits: torch.Tensor) -> None:
            if shape.num_places not in self._captured_logits:
                self._captured_logits[shape.num_places] = torch.empty_like(logits)
            self._captured_logits[shape.num_places].copy_(logits)

        self._places.keep(())
        last = self._last[: shape.num_places]
        self._captured.capture(shape, (1, shape.num_rows), self._step(shape.num_places), last, leave)
