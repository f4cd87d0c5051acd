"""Engine: one round of continuous batching after the other, over rows that grow in place.

A round takes up what the device has finished, begins requests that wait, takes up parts of their prompts, and launches
one step for all sequences that are running. Tokens go from step to step on the device; the host reads them a few steps
later, and only then learns who has ended. Memory is mapped ahead, so a round in which nobody begins or ends calls no
driver and waits for nothing. While memory sleeps none touches it.

    results.read ──> admission.begin_waiting ──> steps.launch ──> results.deliver
    who has ended    queues: waiting, prompts    prompts, step

Of the requests that are under way the newest gives way when memory is short: it loses its rows, and is run again from
its tokens. So the oldest always goes on. One that is alone waits a while for memory that others hold, and fails where
that cannot help.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch_vtensor.allocator.tiers import Rounds
from torch_vtensor.generation.cached_rows import CachedRows
from torch_vtensor.generation.decode.program import Traced
from torch_vtensor.generation.serving.admission import Admission
from torch_vtensor.generation.serving.choice import Choice
from torch_vtensor.generation.serving.known import Known, Reuse
from torch_vtensor.generation.serving.program import ServingProgram
from torch_vtensor.generation.serving.prompts import PromptShape
from torch_vtensor.generation.serving.queues import Queues
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.results import Results
from torch_vtensor.generation.serving.rows import RowsLayout, SequenceRows
from torch_vtensor.generation.serving.steps import Pace, Steps
from torch_vtensor.generation.serving.support import counters, is_out_of_memory, log

__all__ = ["MAX_BATCH", "Engine", "Terms"]

MAX_BATCH = 256
_STEPS_AHEAD = 3


class Terms(NamedTuple):
    """What a manager asks for: how tokens are chosen and from which seed, the most sequences at once, captured steps,
    prefixes reused, the pace of prompts, and how much of the memory stays free (see `Admission`)."""

    choice: Choice
    seed: int
    max_batch: int
    is_captured: bool
    reuse: Reuse
    pace: Pace
    margin: float | None


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
        self.router = router
        self.seed = terms.seed
        self.queues = Queues()
        self._rounds = Rounds()
        self._num_discards = 0
        self._scratch = SequenceRows(layout, 1)
        scratch = self._scratch.cached(1)
        assert isinstance(scratch, CachedRows)
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
        self.program.begin(self._scratch.addresses(), terms.seed)
        self.known = Known(model, terms.reuse, layout, scratch.layouts, self._scratch.scheduler.pool)
        self.results = Results(self.queues, self.known, router)
        self.admission = Admission(self.queues, self.known, self.results, self._scratch, terms.max_batch, terms.margin)
        self.steps = Steps(
            type(model).__name__, self.queues, self.admission, self.known, self.results, self.program, terms.choice,
            terms.pace,
        )  # fmt: skip
        self._pool = self._scratch.scheduler.pool
        with self._pool.lock:
            self._pool.rounds.append(self._rounds)

    # What happens to it

    def add(self, state: Any, salt: Any) -> None:
        """Take in a request, and the children that it is to be forked into."""
        children = [state.fork(f"{state.request_id}__child#{index}") for index in range(state.num_children)]
        for each in (*children, state):
            each.num_children = 0
            self.queues.add(each, salt)
            counters["requests"] += 1

    def cancel(self, request_id: str) -> None:
        """Forget a request; its memory is free at once."""
        with self._rounds.lock:
            for request in self.queues.of(request_id):
                counters["cancelled"] += 1
                self.queues.leave(request)

    def has_pending_requests(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self.queues.everybody())

    def round(self) -> bool:
        """Bring every request on by what can be done now; waits for the device only if it is far behind.

        Returns: whether the next one may do more; if not, memory sleeps, or others hold all of it.
        """
        with self._rounds.lock:
            if self.is_asleep:
                return False
            if self._num_discards != self._rounds.num_discards:
                self._lose_rows()
            self.results.read(_STEPS_AHEAD)
            self.admission.begin_waiting()
            num_launched = len(self.results.launched)
            try:
                self.steps.launch()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._recover(error)
            if len(self.results.launched) == num_launched:
                self.results.read(0)  # there is nothing else to do
            self.results.deliver()
            return bool(self.queues.active) or not self.queues.waiting

    def warm_up(self, whats: list[PromptShape | int]) -> None:
        """Compile and capture prompts of these shapes and steps of these sizes, as far as not done before.

        Effects: requests that are under way wait meanwhile.
        """
        with self._rounds.lock:
            if not self.is_asleep:
                self.steps.warm_up(whats)

    @property
    def is_asleep(self) -> bool:
        """Whether anything sleeps that a round may touch."""
        if not self._pool.is_tiered:
            return False
        rows = [self._scratch, *(request.rows for request in self.queues.active if request.rows is not None)]
        return any(it.is_asleep for it in self._pool.sleepers) or any(each.is_asleep for each in rows)

    def settle(self) -> None:
        """Wait for everything that was launched, and deliver it."""
        with self._rounds.lock:
            self.results.read(0)
            self.results.deliver()

    def hand_over(self, other: Engine) -> None:
        """Have another engine go on with all requests, from their tokens, and with the next random numbers."""
        with self._rounds.lock:
            self.settle()
            self.queues.begin_all_anew()
        mine, its = self.program.generator, other.program.generator
        if mine.device.type == its.device.type:  # of another one they would be other numbers in any case
            its.set_state(mine.get_state())
        self.queues.hand_over(other.queues)

    def fail_all_requests(self, error: Exception) -> None:
        """Tell everybody who waits for an answer that there will be none."""
        with self._rounds.lock:
            self.results.launched.clear()
            for request in self.queues.everybody():
                self.results.fail(request, error)

    def _handle_request_error(self, error: Exception, state: Any) -> None:
        """transformers' name for failing a request that was not taken in yet."""
        self.router.fail_and_deliver(state, error)

    def close(self) -> None:
        """Give all memory back."""
        with self._rounds.lock:
            self.results.launched.clear()
            for request in self.queues.everybody():
                self.queues.leave(request)
            self.program.end()
            self._scratch.close()
            self.program.release()
            with self._pool.lock:
                self._pool.rounds.remove(self._rounds)

    # When something is short

    def _recover(self, error: Exception) -> None:
        """After what was run has found no memory: the newest gives way, and the others go on from what is known.

        One that is alone is tried once more, and fails then. Wherever the error came, a request goes on by its last
        token, as if that was what is left of its prompt, if its rows are those of the tokens before.
        """
        counters["out of memory"] += 1
        self.results.read(0)
        queues, seated = self.queues, self.steps.leave_seats()
        under_way = sorted(queues.active, key=lambda each: each.arrival)
        if len(under_way) == 1:
            (request,) = under_way
            request.num_shortages += 1
            queues.holds_back = True
            if request.num_shortages > 1:
                self.results.fail(request, error)
        elif under_way:
            self.steps.give_way(under_way.pop())
        for request in reversed(under_way):
            if request.rows is None or request in queues.prompts:
                continue
            if request in seated and request.rows.num_rows == request.num_tokens - 1:
                self._go_on_by_last_token(request)
            else:
                queues.begin_anew(request)
        log.info("%s has run out of memory in a step", type(self.model).__name__, exc_info=error)
        self.admission.trim()

    def _go_on_by_last_token(self, request: Request) -> None:
        request.num_launched = request.num_known
        self.queues.prompts.appendleft(request)

    def _lose_rows(self) -> None:
        """Begin everybody anew, as rows were discarded; what was read of them before counts."""
        self._num_discards = self._rounds.num_discards
        for request in self.queues.active:
            request.mark = None  # nothing is left of them
        self.results.read(0)
        self.queues.begin_all_anew()
        self.steps.arrange()
