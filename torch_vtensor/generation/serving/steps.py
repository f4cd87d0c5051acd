"""Steps: what is launched in a round: parts of prompts, and the next token of all sequences that run.

A round takes up 2,048 tokens of prompts at most, and then launches a step, so that those who run wait for about 50 ms
(a model with 8 billion weights on an H100). While more requests wait for their first token than for their next, it
takes up 4,096, and only every fourth round launches a step. Long prompts are taken up in parts over several rounds.
Where answers are handed over all together, as `generate_batch` does, nobody waits for a next token: a step reads all
weights for however few, so none is launched before all prompts that there is room for have been taken up, or sixteen
rounds of them, for whoever is served by such a manager later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_vtensor.errors import VTensorError
from torch_vtensor.generation.serving.admission import Admission
from torch_vtensor.generation.serving.choice import Choice
from torch_vtensor.generation.serving.known import Known
from torch_vtensor.generation.serving.program import Prompt, ServingProgram
from torch_vtensor.generation.serving.prompts import PromptShape, place_size, shape_alone, together
from torch_vtensor.generation.serving.queues import Queues
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.results import Results
from torch_vtensor.generation.serving.rows import shared_by
from torch_vtensor.generation.serving.seats import Column
from torch_vtensor.generation.serving.support import counters, is_out_of_memory, log
from torch_vtensor.generation.tenant import prefix_salt

__all__ = ["Pace", "Steps"]

_PROMPT_TOKENS = 4096  # in a round, while more wait for their first token than for their next
_PROMPT_TOKENS_BESIDE = 2048  # otherwise
_LEAST_TOKENS = 16  # of a forward, unless a round is for fewer
_ROUNDS_WITHOUT_STEP = 3  # at most, where somebody is running
_ROUNDS_WITHOUT_STEP_TOGETHER = 15  # at most, where answers come all together


class Pace(NamedTuple):
    """What comes first.

    ``prompt_tokens`` is how many tokens of prompts a round takes up at most, None: as many as suit. ``prompts_first``
    tells whether that is most of what is done while there are any, ``all_together`` whether it is all as long as nobody
    streams.
    """

    prompt_tokens: int | None
    prompts_first: bool
    all_together: bool


class Steps:
    """Launches what runs on the device.

    Args:
        name: the model's, for messages.
    """

    def __init__(
        self,
        name: str,
        queues: Queues,
        admission: Admission,
        known: Known,
        results: Results,
        program: ServingProgram,
        choice: Choice,
        pace: Pace,
    ) -> None:
        self._name = name
        self._queues = queues
        self._admission = admission
        self._known = known
        self._results = results
        self._program = program
        self._choice = choice
        self._pace = pace
        self._num_without_step = 0  # rounds, since the last one
        self._shares = False  # whether steps read anything once

    def launch(self) -> None:
        """Take up parts of prompts, and launch a step, unless more could have their first token than their next."""
        queues = self._queues
        pace = self._pace
        all_together = pace.all_together and not any(request.state.streaming for request in queues.seated)
        prompts_come_first = pace.prompts_first or all_together or len(queues.prompts) > len(queues.seated)
        budget = pace.prompt_tokens or (_PROMPT_TOKENS if prompts_come_first else _PROMPT_TOKENS_BESIDE)
        least = 1
        while queues.prompts and budget >= least:
            budget -= self._take_up_prompts(budget)
            least = _LEAST_TOKENS
        most = _ROUNDS_WITHOUT_STEP_TOGETHER if all_together else _ROUNDS_WITHOUT_STEP
        if queues.prompts and prompts_come_first and self._num_without_step < most:
            self._num_without_step += 1
        else:
            self._num_without_step = 0
            self._decode()

    def warm_up(self, whats: Sequence[PromptShape | int]) -> None:
        """Compile and capture prompts of these shapes and steps of these sizes, as far as not done before.

        Steps also as they are where sequences share something, if anything is reused.
        """
        self._make_room_for_all()
        for what in whats:
            self._warm_up(what)
        if self._known.is_on:
            self._program.steps.share(self._program.all_shared)
            for size in [what for what in whats if isinstance(what, int) and what > 1]:
                self._warm_up(size)
            self._program.steps.share(self._program.nothing_shared)
            self._share()

    def arrange(self) -> None:
        """Let those who need no further token leave their seats."""
        queues = self._queues
        stay = [seat for seat, request in enumerate(queues.seated) if request.rows is not None and request.wants_more]
        if len(stay) < len(queues.seated):
            self._program.seats.keep(stay)
            queues.seated = [queues.seated[seat] for seat in stay]
            self._share()

    def leave_seats(self) -> list[Request]:
        """Let everybody leave their seats; who they were."""
        queues = self._queues
        left, queues.seated = queues.seated, []
        self._program.seats.keep(())
        self._share()
        return left

    # Prompts

    def _take_up_prompts(self, budget: int) -> int:
        """Run a part of the first prompt, or several short ones whole; returns how many tokens that took."""
        several, shape = self._next_prompts(budget)
        self._warm_up(shape)
        columns = [self._column(request) for request in several]
        prompts = [
            Prompt(column, request.tokens[column.num_rows :][: shape.size])
            for request, column in zip(several, columns, strict=True)
        ]
        self._program.run_prompts(prompts, shape)
        for request, prompt in zip(several, prompts, strict=True):
            rows = request.rows
            assert rows is not None
            if rows.num_rows == request.num_lent:
                counters["tokens of prompts"] += request.num_tokens - request.num_lent
                self._known.count(request)
            rows.wrote(rows.num_rows + len(prompt.tokens))
        if _num_left(several[0]) == 0:
            for request in several:
                self._queues.prompts.remove(request)
            self._seat(several)
        return shape.num_rows

    def _next_prompts(self, budget: int) -> tuple[list[Request], PromptShape]:
        """The first prompt, and others that go together with it, if any do."""
        prompts = self._queues.prompts
        num_left = _num_left(prompts[0])
        size = place_size(num_left)
        if size is not None:
            fitting = [request for request in prompts if _num_left(request) <= size]
            found = together(len(fitting), size, budget)
            if found is not None:
                return fitting[: found[0]], found[1]
        return [prompts[0]], shape_alone(num_left, budget, self._program.captures_prompts)

    def _seat(self, several: list[Request]) -> None:
        """Have the first tokens of requests whose prompts were taken up last, and let them go on with the others."""
        tokens = self._program.first_tokens(self._choice)
        for request in several:
            request.num_launched = request.num_known + 1
        self._results.launched.note(tokens, several)
        for request in several:
            self._known.record(request)  # so that others who wait with the same beginning have it
        stay = [index for index, request in enumerate(several) if request.wants_more]
        if not stay:
            return
        self.arrange()
        seats, columns = self._program.seats, [self._column(several[index]) for index in stay]
        if len(stay) < len(several):
            tokens = tokens.index_select(0, seats.on_device(stay, torch.int64))
        seats.take(columns, tokens)
        self._queues.seated += [several[index] for index in stay]
        self._share()

    def _column(self, request: Request) -> Column:
        assert request.rows is not None
        return Column(request.rows.addresses(), request.rows.num_rows, self._choice.arguments_of(request.state))

    # Steps

    def _decode(self) -> None:
        """Launch the next step of everybody who is seated."""
        self._make_room_for_all()
        seated = self._queues.seated
        if not seated:
            return
        self._warm_up(self._program.step_size)
        self._results.launched.note(self._program.run_step(self._choice), seated)
        counters["steps"] += 1
        if self._shares:
            counters["steps that read shared tokens once"] += 1
        for request in seated:
            assert request.rows is not None
            request.rows.wrote(request.rows.num_rows + 1)
            request.num_launched += 1
        self.arrange()

    def _share(self) -> None:
        """Tell steps what those who are seated now share."""
        seated = self._queues.seated
        # Two share nothing unless one of them has begun with what was known.
        rows = [request.rows for request in seated if request.rows is not None]
        if len(rows) < len(seated) or not any(request.num_lent for request in seated):
            rows = []
        if rows or self._shares:
            prefixes = shared_by(rows) if rows else self._program.nothing_shared
            self._program.steps.share(prefixes)
            self._shares = any(prefixes)

    def _make_room_for_all(self) -> None:
        """Have memory for the next row of everybody who is seated then."""
        for request in list(self._queues.seated):
            if request.rows is None or not request.rows.has_room:
                self._make_room(request)
        self.arrange()

    def _make_room(self, request: Request) -> None:
        """Have memory for the next row of a request, by those that came last giving way if need be."""
        queues, results = self._queues, self._results
        while request.rows is not None:
            try:
                with prefix_salt(request.salt):
                    request.rows.commit(request.rows.num_rows + 1)
                return
            except VTensorError as error:
                if results.launched:
                    results.read(0)  # who has ended meanwhile leaves memory
                elif is_out_of_memory(error) and len(queues.active) > 1:
                    self.give_way(queues.newest())
                elif is_out_of_memory(error) and self._admission.waits_for_others(
                    error, request, request.rows, request.rows.num_rows + 1
                ):
                    self.give_way(request)
                else:
                    results.fail(request, error)

    def give_way(self, request: Request) -> None:
        """Take a request's memory away; it begins anew, with what it has said, when somebody has ended."""
        counters["gave way"] += 1
        self._known.record(request)
        self._queues.begin_anew(request)
        self._queues.holds_back = True

    def _warm_up(self, what: PromptShape | int) -> None:
        """Have what is run next, a step or prompts, compiled, or run it as it is if that fails."""
        try:
            self._program.warm_up(self._choice, what)
        except Exception as error:  # whatever torch.compile or the model's own code may raise
            self._program.run_plainly(what, for_now=is_out_of_memory(error))
            told = f"{what.num_rows} tokens of prompts" if isinstance(what, PromptShape) else f"{what} sequences"
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            log.warning("a step of %s for %s is run uncompiled: %s", self._name, told, reason)
            log.debug("why it cannot be compiled", exc_info=error)
            if is_out_of_memory(error):
                counters["uncompiled for now: out of memory"] += 1
                self._admission.trim()
            else:
                counters["uncompiled: the model's step cannot be compiled"] += 1


def _num_left(request: Request) -> int:
    """How many tokens of a prompt are to be taken up."""
    assert request.rows is not None
    return request.num_tokens - request.rows.num_rows
