"""Engine: one round of continuous batching after the other, over rows that grow in place.

A round takes up what the device has finished, begins requests that wait, takes up parts of their prompts, and launches
one step for all sequences that are running, unless more are waiting for their first token. Tokens go from step to step
on the device; the host reads them a few steps later, and only then learns who has ended. Memory is mapped ahead, so a
round calls no driver and waits for nothing.

    waiting ──begin──> prompts ──first token──> seated ──last token──> ended
       └──────────────────<──gives way when memory is short──┘

Of the requests that are under way the newest gives way: it loses its rows, and is run again from its tokens. So the
oldest always goes on, and one that is alone and finds no memory could never fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch_vtensor.errors import CapacityError, OutOfPagesError, VTensorError
from torch_vtensor.generation.cached_rows import CachedRows
from torch_vtensor.generation.decode.program import Traced
from torch_vtensor.generation.decode.prompt import Part
from torch_vtensor.generation.serving import known
from torch_vtensor.generation.serving._transformers_compat import RequestStatus
from torch_vtensor.generation.serving.choice import Choice
from torch_vtensor.generation.serving.launches import Launches
from torch_vtensor.generation.serving.program import ServingProgram
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.rows import RowsLayout, SequenceRows
from torch_vtensor.generation.serving.support import counters, log
from torch_vtensor.generation.tenant import prefix_salt

__all__ = ["MAX_BATCH", "Engine", "Terms"]

MAX_BATCH = 256
_STEPS_AHEAD = 3
_PROMPT_TOKENS = 4096  # in a round, while more wait for their first token than for their next
_PROMPT_TOKENS_BESIDE = 2048  # otherwise: others wait about 50 ms for a model with 8 billion weights on an H100


class Terms(NamedTuple):
    """What a manager asks for: how tokens are chosen, the most sequences at once, captured steps, prefixes reused.

    ``prompt_tokens`` are taken up in a round at most, by default fewer while others are running.
    """

    choice: Choice
    max_batch: int
    is_captured: bool
    reuses_prefixes: bool
    prompt_tokens: int | None
    prompts_first: bool


class Engine:
    """Serves requests of one model, on one thread.

    Args:
        model, traced: the model and its steps.
        layout: how its sequences lie.
        terms: what is asked for.
        router: transformers' ``OutputRouter``, which brings what was said to who asked.

    Effects: reserves and maps memory until ``close``.
    """

    def __init__(self, model: Any, traced: Traced, layout: RowsLayout, terms: Terms, router: Any) -> None:
        self.model = model
        self.layout = layout
        self.terms = terms
        self.router = router
        self.reuses_prefixes = terms.reuses_prefixes
        self.waiting: deque[Request] = deque()
        self.prompts: deque[Request] = deque()
        self.seated: list[Request] = []
        self.active: list[Request] = []
        self._launched = Launches()
        self._num_arrived = 0
        self._holds_back = False  # until somebody has ended: memory was short
        self._outputs: list[Any] = []
        self._scratch = SequenceRows(layout, 1)
        scratch = self._scratch.cached(1)
        assert isinstance(scratch, CachedRows)
        self._stores = scratch.layouts
        try:
            for store in self._scratch.stores:
                store.commit(1)
            layers, num_groups = layout.layer_rows(self._scratch), len(layout.kinds)
            key = "serving", layers, num_groups, terms.choice.num_arguments, terms.is_captured
            self.program = traced.acquire_program(
                key,
                lambda: ServingProgram(
                    traced, layers, num_groups, MAX_BATCH, terms.choice.num_arguments, terms.is_captured
                ),
            )
        except BaseException:
            self._scratch.close()
            raise
        self.program.seats.use_scratch(self._scratch.addresses())

    # What happens to it

    def add(self, state: Any, salt: Any) -> None:
        """Take in a request, and the children that it is to be forked into."""
        children = [state.fork(f"{state.request_id}__child#{index}") for index in range(state.num_children)]
        for each in (*children, state):
            each.num_children = 0
            self.waiting.append(Request(each, self._num_arrived, salt))
            self._num_arrived += 1
            counters["requests"] += 1

    def cancel(self, request_id: str) -> None:
        """Forget a request; its memory is free at once."""
        for request in [each for each in (*self.waiting, *self.active) if each.state.request_id == request_id]:
            counters["cancelled"] += 1
            self._leave(request)

    def has_pending_requests(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self.waiting or self.active)

    def round(self) -> None:
        """Bring every request on by what can be done now; waits for the device only if it is far behind."""
        self._read(_STEPS_AHEAD)
        self._begin_waiting()
        num_launched = len(self._launched)
        more_wait = len(self.prompts) + len(self.waiting) > len(self.seated)
        prompts_come_first = self.terms.prompts_first or more_wait
        self._take_up_prompts(prompts_come_first)
        if not (self.prompts and prompts_come_first):
            self._decode()
        if len(self._launched) == num_launched:
            self._read(0)  # there is nothing else to do
        self._deliver()

    def settle(self) -> None:
        """Wait for everything that was launched, and deliver it."""
        self._read(0)
        self._deliver()

    def hand_over(self, other: Engine) -> None:
        """Have another engine go on with all requests, from their tokens."""
        self.settle()
        for request in sorted(self.active, key=lambda each: each.arrival, reverse=True):
            self._begin_anew(request)
        other.waiting, other._num_arrived = self.waiting, self._num_arrived
        self.waiting = deque()

    def fail_all_requests(self, error: Exception) -> None:
        """Tell everybody who waits for an answer that there will be none."""
        self._launched.clear()
        for request in [*self.active, *self.waiting]:
            self._fail(request, error)

    def _handle_request_error(self, error: Exception, state: Any) -> None:
        """transformers' name for failing a request that was not taken in yet."""
        self.router.fail_and_deliver(state, error)

    def close(self) -> None:
        """Give all memory back."""
        self._launched.clear()
        for request in [*self.active, *self.waiting]:
            self._leave(request)
        self.program.seats.use_scratch([0] * 2 * len(self.layout.kinds))
        self._scratch.close()
        self.program.release()

    # Beginning

    def _begin_waiting(self) -> None:
        self._holds_back = self._holds_back and bool(self.active)
        while self.waiting and not self._holds_back and len(self.active) < self.terms.max_batch:
            request = self.waiting[0]
            try:
                self._holds_back = not self._begin(request)
            except Exception as error:  # this one's alone: the others go on
                self._fail(request, error)

    def _begin(self, request: Request) -> bool:
        """Give a request memory for its prompt and the token after it; False if there is none as long as others run."""
        tokens, capacity = request.tokens, self.layout.capacity
        num_asked = len(request.state.initial_tokens) + (request.limit if request.limit < 2**31 - 1 else 1)
        if not tokens:
            raise ValueError("the prompt has no tokens; give at least one")
        if num_asked > capacity:
            raise CapacityError(num_asked, capacity)
        with prefix_salt(request.salt):
            rows = known.begin(self.model, request, self.layout, self._stores) if self.reuses_prefixes else None
            rows = rows or SequenceRows(self.layout, len(tokens) + 1)
            try:
                rows.commit(len(tokens) + 1)
            except OutOfPagesError:
                rows.close()
                if self.active:
                    return False
                raise
            except BaseException:
                rows.close()
                raise
        self.waiting.remove(request)
        self.active.append(request)
        self.prompts.append(request)
        request.rows = rows
        if request.state.status == RequestStatus.PENDING:
            request.state.status = RequestStatus.PREFILLING
        counters["tokens of prompts"] += len(tokens) - rows.num_rows
        return True

    # Running

    def _take_up_prompts(self, come_first: bool) -> None:
        budget = self.terms.prompt_tokens or (_PROMPT_TOKENS if come_first else _PROMPT_TOKENS_BESIDE)
        while self.prompts and budget > 0:
            request = self.prompts[0]
            rows, tokens = request.rows, request.tokens
            assert rows is not None
            arguments = self.terms.choice.arguments_of(request.state)
            self.program.place_prompt(rows.addresses(), rows.num_rows, arguments)
            part = self._warmed_up(self.program.next_part(len(tokens) - rows.num_rows, budget))
            num_new = part.stop - part.start
            self.program.run_prompt(tokens[rows.num_rows : rows.num_rows + num_new], rows.num_rows, part)
            rows.wrote(rows.num_rows + num_new)
            budget -= num_new
            if rows.num_rows == len(tokens):
                self.prompts.popleft()
                self._seat(request, arguments)

    def _seat(self, request: Request, arguments: Sequence[int]) -> None:
        """Have the first token of a request whose prompt was taken up last, and let it go on with the others."""
        first = self.program.first_token(self.terms.choice)
        request.num_launched = request.num_known + 1
        self._launched.note(first, [request])
        if request.wants_more:
            self._arrange()
            assert request.rows is not None
            seat = self.program.seats.take(request.rows.addresses(), request.rows.num_rows, arguments)
            self.program.seats.tokens[seat].copy_(first)
            self.seated.append(request)

    def _arrange(self) -> None:
        """Let those who need no further token leave their seats."""
        stay = [seat for seat, request in enumerate(self.seated) if request.rows is not None and request.wants_more]
        if len(stay) < len(self.seated):
            self.program.seats.keep(stay)
            self.seated = [self.seated[seat] for seat in stay]

    def _decode(self) -> None:
        """Launch the next step of everybody who is seated."""
        for request in list(self.seated):
            if request.rows is None or not request.rows.has_room:
                self._make_room(request)
        self._arrange()
        if not self.seated:
            return
        self._warmed_up(None)
        self._launched.note(self.program.run_step(self.terms.choice), self.seated)
        counters["steps"] += 1
        for request in self.seated:
            assert request.rows is not None
            request.rows.wrote(request.rows.num_rows + 1)
            request.num_launched += 1
        self._arrange()

    def _warmed_up(self, part: Part | None) -> Part:
        """Have what is run next, a step or this part of a prompt, compiled, or run it as it is if that fails."""
        try:
            self.program.warm_up(self.terms.choice, part)
        except OutOfPagesError:
            raise
        except Exception as error:  # whatever torch.compile or the model's own code may raise
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            log.warning("%s is served uncompiled: %s", type(self.model).__name__, reason)
            log.debug("why %s cannot be compiled", type(self.model).__name__, exc_info=error)
            counters["uncompiled: the model's step cannot be compiled"] += 1
            self.program.run_plainly()
        return Part(0, 0, 0) if part is None else part

    def _read(self, num_pending: int) -> None:
        """Take up what the device has finished, and wait for all but the last ``num_pending`` launches."""
        for request, token in self._launched.read(num_pending):
            self._say(request, token)

    def _say(self, request: Request, token: int) -> None:
        state = request.state
        state.status = RequestStatus.DECODING
        is_last = state.update_and_check_completion(token, None)
        counters["tokens generated"] += 1
        if is_last:
            counters["finished"] += 1
            self._record(request)
            self._leave(request)
        if is_last or state.streaming:
            self._outputs.append(state.to_generation_output())

    def _deliver(self) -> None:
        if self._outputs:
            self.router.deliver_batch(self._outputs)
            self._outputs = []

    # Ending, and giving way

    def _make_room(self, request: Request) -> None:
        """Have memory for the next row of a request, by those that came last giving way if need be."""
        while request.rows is not None:
            try:
                with prefix_salt(request.salt):
                    request.rows.commit(request.rows.num_rows + 1)
                return
            except VTensorError as error:
                if self._launched:
                    self._read(0)  # who has ended meanwhile leaves memory
                elif isinstance(error, OutOfPagesError) and len(self.active) > 1:
                    self._give_way(max(self.active, key=lambda each: each.arrival))
                else:
                    self._fail(request, error)

    def _give_way(self, request: Request) -> None:
        """Take a request's memory away; it begins anew, with what it has said, when somebody has ended."""
        counters["gave way"] += 1
        self._record(request)
        self._begin_anew(request)
        self._holds_back = True

    def _begin_anew(self, request: Request) -> None:
        self._take_away(request)
        request.num_starts += 1
        request.num_launched = request.num_known
        self.waiting.appendleft(request)

    def _record(self, request: Request) -> None:
        if self.reuses_prefixes:
            with prefix_salt(request.salt):
                known.record(self.model, request)

    def _fail(self, request: Request, error: Exception) -> None:
        if not request.has_ended:
            counters[f"failed: {type(error).__name__}"] += 1
            self._leave(request)
            self._deliver()  # what it has said before
            self.router.fail_and_deliver(request.state, error)

    def _leave(self, request: Request) -> None:
        request.has_ended = True
        self._holds_back = False
        self._take_away(request)
        if request in self.waiting:
            self.waiting.remove(request)

    def _take_away(self, request: Request) -> None:
        for several in (self.active, self.prompts):
            if request in several:
                several.remove(request)
        if request.rows is not None:
            request.rows.close()
            request.rows = None
