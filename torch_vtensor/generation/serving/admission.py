"""Admission: which of the requests that wait begin, and with which memory."""

from __future__ import annotations

import math
import time
from contextlib import suppress

from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.prefix import MOST_MAPPINGS
from torch_vtensor.errors import DriverError, OutOfPagesError, VTensorError
from torch_vtensor.generation.serving._transformers_compat import RequestStatus
from torch_vtensor.generation.serving.known import Known
from torch_vtensor.generation.serving.queues import Queues
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.results import Results
from torch_vtensor.generation.serving.rows import Need, SequenceRows
from torch_vtensor.generation.serving.support import counters, is_out_of_memory
from torch_vtensor.generation.tenant import prefix_salt

__all__ = ["Admission"]

_MARGIN = 0.02  # of a device, which steps need for a while
_MOST_WAIT_S = 60.0  # for memory that others hold


class Admission:
    """Begins requests in the order of their arrival, as long as there is memory for them beside the others.

    Args:
        scratch: rows of the layout.
        max_batch: the most at once.
        margin: nobody begins beside others while less of the memory than this part is free; default: a little of a
            device without a budget.
    """

    def __init__(
        self,
        queues: Queues,
        known: Known,
        results: Results,
        scratch: SequenceRows,
        max_batch: int,
        margin: float | None,
    ) -> None:
        self._queues = queues
        self._known = known
        self._results = results
        self._scratch = scratch
        self._layout = scratch.layout
        self._pool: PagePool = scratch.scheduler.pool
        self._max_batch = max_batch
        self._margin = margin

    def begin_waiting(self) -> None:
        """Begin whoever can; one whose first tokens are just being computed for another waits until they are known."""
        queues = self._queues
        queues.holds_back = queues.holds_back and bool(queues.active)
        for request in list(queues.waiting):
            if queues.holds_back or len(queues.active) >= self._max_batch:
                break
            try:
                if not self._known.knows_more_soon(request, queues.prompts):
                    queues.holds_back = not self._begin(request)
            except Exception as error:  # this one's alone: the others go on
                self._results.fail(request, error)

    def waits_for_others(
        self, error: BaseException, request: Request, rows: SequenceRows | None, num_rows: int
    ) -> bool:
        """Whether a request that is alone, and found no memory, may find some when others give theirs back.

        Args:
            error: what it found instead.
            rows: what it has.
            num_rows: what it needs in all.
        """
        request.waits_since = request.waits_since or time.monotonic()
        pool, scratch_bytes = self._pool, self._scratch.committed_bytes
        with pool.lock:
            counts = pool.ledger.counts()
            own_bytes = scratch_bytes + (0 if rows is None else rows.committed_bytes)
            is_of_budget = isinstance(error, OutOfPagesError) and not error.is_device_full
            others_hold = not is_of_budget or counts.committed_bytes - counts.free_bytes > own_bytes
        fits_alone = self._scratch.need(num_rows).nbytes + scratch_bytes <= pool.limit_bytes
        return others_hold and fits_alone and time.monotonic() - request.waits_since < _MOST_WAIT_S

    def trim(self) -> None:
        """Let the device have what nobody needs: prefixes, and what has ended."""
        with suppress(DriverError):
            self._scratch.scheduler.trim()

    def _begin(self, request: Request) -> bool:
        """Give a request memory for its prompt and the token after it; False if there is none as things are."""
        num_rows = request.num_tokens + 1
        self._check_length(request)
        is_alone = not self._queues.active
        if not is_alone and not self._has_room_for(self._scratch.need(num_rows - self._known.num_known(request))):
            return False
        rows = None
        try:
            rows = self._known.begin(request)
            with prefix_salt(request.salt):
                rows = rows or SequenceRows(self._layout, num_rows)
                rows.most_rows = len(request.state.initial_tokens) + request.limit
                rows.commit(num_rows)
        except BaseException as error:
            may_wait = isinstance(error, VTensorError) and is_out_of_memory(error)
            may_wait = may_wait and (not is_alone or self.waits_for_others(error, request, rows, num_rows))
            if rows is not None:
                rows.close()
            if may_wait:
                return False
            raise
        request.waits_since = None
        request.num_lent = rows.num_rows
        request.rows = rows
        self._queues.begin(request)
        if request.state.status == RequestStatus.PENDING:
            request.state.status = RequestStatus.PREFILLING
        return True

    def _check_length(self, request: Request) -> None:
        """Raise ValueError for a prompt that has no place, and let no answer be longer than its addresses."""
        num_asked, capacity = len(request.state.initial_tokens), self._layout.capacity
        if num_asked == 0:
            raise ValueError("the prompt has no tokens; give at least one")
        if num_asked >= capacity:
            raise ValueError(
                f"the prompt has {num_asked} tokens, and sequences of this model have addresses for {capacity}, with "
                "the answer: shorten it"
            )
        if request.limit > capacity - num_asked:
            if request.limit < 2**31 - 1:
                counters["limited: max_new_tokens is more than there are addresses for"] += 1
            request.cap(capacity - num_asked)

    def _has_room_for(self, need: Need) -> bool:
        """Whether a request with this need may begin beside others: mappings and a margin of memory are left after."""
        pool = self._pool
        most = MOST_MAPPINGS[pool.device.type] * 3 // 4  # those under way grow
        if pool.num_mappings + need.num_mappings > most:
            for reclaim in list(pool.reclaimers):  # what has ended is mapped still
                reclaim(math.inf)
            if pool.num_mappings + need.num_mappings > most:
                counters["held back: mappings"] += 1
                return False
        margin = self._margin if self._margin is not None else _MARGIN if pool.budget_bytes is None else 0.0
        least = need.nbytes + margin * pool.limit_bytes
        if margin > 0 and self._free_bytes() < least:
            pool.reclaim(least)
            pool.trim()
            if self._free_bytes() < least:
                counters["held back: safety margin"] += 1
                return False
        return True

    def _free_bytes(self) -> int:
        pool, counts = self._pool, self._pool.ledger.counts()
        if pool.budget_bytes is None:
            return pool.driver.free_bytes() + counts.free_bytes
        return pool.budget_bytes - counts.committed_bytes + counts.free_bytes
