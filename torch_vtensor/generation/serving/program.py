"""ServingProgram: steps of a running batch, and what takes up prompts, captured as graphs or run as they are.

A captured step serves every number of sequences up to its size: seats that nobody has go on with a scratch row. So the
batch changes by a few numbers in device memory, and a few sizes are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.decode.graphs import Graph
from torch_vtensor.generation.decode.program import Program, PromptGraph, Traced
from torch_vtensor.generation.decode.prompt import Part, parts_of
from torch_vtensor.generation.decode.step import LayerRows, Step, prompt_forward, step_forward
from torch_vtensor.generation.serving.choice import Choice
from torch_vtensor.generation.serving.seats import Seats

__all__ = ["ServingProgram"]

_MAX_CHOICES = 32
_STEPS_UNTIL_RETRIED = 200


class ServingProgram(Program):
    """The steps of one model over sequences of one layout.

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
        self.seats = Seats(_size_of(max_batch), num_groups, num_arguments, device)
        self._layers = layers
        self._traced_prompt = traced.prompt if self.captures_prompts else None
        self._twin, self._twin_for_many = traced.twin, traced.twin_for_many
        self._mask = torch.ones(self.seats.num_seats, 1, 1, 1, dtype=torch.bool, device=device)
        self._workspace = graphs.workspace(self.seats.num_seats, layers, device)
        self._space = graphs.capture_space(device)
        self._logits: dict[int, torch.Tensor] = {}
        self._steps: dict[int, Graph] = {}
        self._num_steps = 0
        self._plain_until: dict[tuple[bool, int], float] = {}  # number of steps, by whether of prompts, and size
        self._choices: dict[tuple[int, Any], Graph] = {}
        self._plain_step = step_forward(traced.twin_for_many)
        self._several: Callable[..., torch.Tensor] | None = None  # compiled for all batches but single ones
        # Of prompts, of one sequence at a time:
        self._alone = Seats(1, num_groups, num_arguments, device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_new = torch.zeros(1, dtype=torch.int32, device=device)
        self._prompt_logits: torch.Tensor | None = None  # of the part that was run last
        self._captured_logits: torch.Tensor | None = None  # where captured parts leave them
        self._prompts: dict[int, PromptGraph] = {}
        self._plain_prompt = prompt_forward(traced.twin_for_many)

    def warm_up(self, choice: Choice, part: Part | None = None) -> None:
        """Compile and capture what is run next, a step of the taken seats or a part of a prompt, if not done before.

        Effects: the row behind each sequence of these is written to; it must have memory.
        """
        try:
            if part is not None:
                if self._captures(True, part.size) and part.size not in self._prompts:
                    self._prompts[part.size] = self._capture_prompt(part.size)
            elif self._captures(False, size := _size_of(self.seats.num_taken)):
                if size not in self._steps:
                    self._steps[size] = self._capture_step(size)
                self._choice(size, choice)
        except Exception:
            self._space = graphs.capture_space(self.device)  # others go on in a pool that no broken capture holds
            raise

    def run_plainly(self, part: Part | None = None, for_now: bool = False) -> None:
        """Compile and capture steps of this size, or parts of prompts, not any more, or ``for_now`` not again soon."""
        key = part is not None, _size_of(self.seats.num_taken) if part is None else part.size
        self._plain_until[key] = self._num_steps + _STEPS_UNTIL_RETRIED if for_now else math.inf

    def run_step(self, choice: Choice) -> torch.Tensor:
        """The next token of every taken seat [taken], on the device; the seats go on with them.

        Effects: writes a row behind each sequence, which must have memory.
        """
        batch, size = self.seats.num_taken, _size_of(self.seats.num_taken)
        self._num_steps += 1
        if size in self._steps and self._captures(False, size):
            self._steps[size]()
            self._choice(size, choice)()
        else:
            self._choose(self._run_forward(batch, self._plain_step), choice)
        return self.seats.tokens[:batch, 0]

    def next_part(self, num_tokens: int, max_tokens: int) -> Part:
        """What to take up first of ``num_tokens`` of a prompt, ``max_tokens`` at most."""
        if self.captures_prompts:
            return parts_of(num_tokens, 1, max_tokens)[0]
        return Part(0, min(num_tokens, max_tokens), min(num_tokens, max_tokens))

    def place_prompt(self, addresses: Sequence[int], num_rows: int, arguments: Sequence[int]) -> None:
        """Have what is run next of a prompt continue the sequence with these addresses and rows."""
        self._alone.keep(())
        self._alone.take(addresses, num_rows, arguments)

    def run_prompt(self, tokens: Sequence[int], num_rows: int, part: Part) -> None:
        """Take up a part of a prompt, ``tokens``, behind ``num_rows`` rows; leaves the logits of the last one.

        Effects: writes a row for each token, which must have memory.
        """
        given = self._alone.on_device(tokens, torch.int64)[None]
        positions = torch.arange(num_rows, num_rows + len(tokens), device=self.device)[None]
        self._last.fill_(len(tokens) - 1)
        prompt = self._prompts.get(part.size) if self._captures(True, part.size) else None
        if prompt is not None:
            prompt.tokens[:, : len(tokens)].copy_(given)
            prompt.positions[:, : len(tokens)].copy_(positions)
            self._num_new.fill_(len(tokens))
            prompt.graph()
            self._prompt_logits = self._captured_logits
        else:
            step = Step(self._layers, self._alone.groups(1), *self._workspace)
            self._prompt_logits = self._plain_prompt(given, positions, self._mask[:1], step, self._last)

    def first_token(self, choice: Choice) -> torch.Tensor:
        """The token [1] behind the prompt that was taken up last."""
        assert self._prompt_logits is not None
        return choice.choose(self._prompt_logits, self._alone.arguments)

    def _captures(self, is_prompt: bool, size: int) -> bool:
        is_wanted = self.captures_prompts if is_prompt else self.is_captured
        return is_wanted and self._plain_until.get((is_prompt, size), 0) <= self._num_steps

    def _capture_step(self, size: int) -> Graph:
        if size == 1:
            forward = graphs.compile_step(step_forward(self._twin))
        else:
            forward = self._several or graphs.compile_step(step_forward(self._twin_for_many), of_any_batch=True)
            self._several = forward

        def run() -> None:
            logits = self._run_forward(size, forward)
            if size not in self._logits:
                self._logits[size] = torch.empty_like(logits)  # while rehearsing: no part of a graph's memory
            self._logits[size].copy_(logits)

        return graphs.capture(run, self.device, self._space)

    def _run_forward(self, batch: int, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        seats = self.seats
        step = Step(self._layers, seats.groups(batch), *self._workspace)
        return forward(seats.tokens[:batch], seats.positions[:batch], self._mask[:batch], step)

    def _choice(self, size: int, choice: Choice) -> Graph:
        graph = self._choices.pop((size, choice.signature), None)
        if graph is None:

            def rehearse() -> None:
                choice.choose(self._logits[size], self.seats.arguments[:, :size])

            graph = graphs.capture(lambda: self._choose(self._logits[size], choice), self.device, self._space, rehearse)
        if choice.signature is not None:
            self._choices[size, choice.signature] = graph  # the last one used comes last
            if len(self._choices) > _MAX_CHOICES:
                del self._choices[next(iter(self._choices))]
        return graph

    def _choose(self, logits: torch.Tensor, choice: Choice) -> None:
        self.seats.advance(choice.choose(logits, self.seats.arguments[:, : len(logits)]))

    def _capture_prompt(self, size: int) -> PromptGraph:
        tokens, positions = (self._last.new_zeros(1, size) for _ in range(2))
        step = Step(self._layers, self._alone.groups(1), *self._workspace, self._num_new)
        forward = self._traced_prompt
        assert forward is not None

        def run() -> None:
            logits = forward(tokens, positions, self._mask[:1], step, self._last)
            if self._captured_logits is None:
                self._captured_logits = torch.empty_like(logits)
            self._captured_logits.copy_(logits)

        self._last.zero_()
        self._num_new.fill_(1)
        return PromptGraph(tokens, positions, graphs.capture(run, self.device, self._space))


def _size_of(batch: int) -> int:
    """The size of the captured step that serves so many sequences."""
    return 1 << (batch - 1).bit_length()
