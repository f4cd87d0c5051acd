"""GrowthScheduler: maps ahead of need and takes memory back, both off the critical path.

A range's life:

    reserve ──> in use ──(last view gone)──> dead ──(fence recorded)──> parked ──> adopted by the next sequence
                                                                          │
                                        pressure, trim, above the watermark, unwanted for a while
                                                                          │
                                                                          └──(fence passed)──> unmapped, pages pooled

Finalizers only append to ``_dead``: they run inside garbage collection, on any thread, where neither a lock may be
taken nor the driver called. Everything else happens at the next operation or on the scheduler's thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import ExitStack, suppress

from torch_vtensor.allocator import tiers
from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.captures import bar_captures, outside_captures
from torch_vtensor.allocator.idle_ranges import IdleRanges, Left
from torch_vtensor.allocator.page_pool import Page, PagePool, PoolStats
from torch_vtensor.allocator.watcher import is_watching
from torch_vtensor.allocator.worker import Worker, is_ahead_of_need, run
from torch_vtensor.errors import DriverError, VTensorError
from torch_vtensor.settings import IDLE_SECONDS, MIB

__all__ = ["GrowthScheduler", "RangeHold"]

_log = logging.getLogger(__name__)
_IDLE_FRACTION = 8  # idle memory above 1/8 of the limit goes back, down to 1/16
_MOST_BYTES_AT_ONCE = 256 * MIB  # given back under one hold of the pool's lock, of a range that is emptied whole
_LEAST_PAUSE_S = 0.01  # between two looks at what is idle


class RangeHold:
    """Keeps a range's mapping alive; the range dies with the last reference, a torch storage's or a VTensor's.

    Once the front of the range was given back, this holds that front, and ``rest`` holds what is in use.
    """

    __slots__ = ("__weakref__", "_dead", "range", "rest")

    def __init__(self, range_: AddressRange, dead: deque[AddressRange]) -> None:
        self.range = range_
        self.rest: RangeHold | None = None
        self._dead = dead

    def __del__(self) -> None:
        self._dead.append(self.range)


class GrowthScheduler:
    """Hands out address ranges of one pool, grows them ahead of need, and reclaims them behind the device.

    Args:
        pool: the device's pages.
        idle_bytes: how much parked and pooled memory to keep for the next sequence; more than that is returned to
            the system in the background. Default: an eighth of the pool's limit.
        idle_seconds: how long any of it is kept that nobody wants, beyond a fifth of what is live. What was parked, or
            stayed pooled, for so long goes back in the background too, after twice that at the latest; None: never.
        clock: what time it is, in seconds.

    Raises: ValueError for ``idle_seconds`` that are not more than 0.
    Source: vTensor (arXiv 2407.15309) section 4.3, the vTensor scheduler: there a thread spins through every step;
        here it sleeps until a sequence is about to need a page.
    """

    def __init__(
        self,
        pool: PagePool,
        idle_bytes: int | None = None,
        *,
        idle_seconds: float | None = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if idle_seconds is not None and not idle_seconds > 0:
            raise ValueError(f"idle_seconds is {idle_seconds}: give more than 0 seconds, or None")
        self.pool = pool
        self._idle_bytes = idle_bytes
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._is_watching_idle = False
        self._look_at_idle = _weakly(self._give_back_unwanted)
        self._idle = IdleRanges(pool)
        self._dead: deque[AddressRange] = deque()
        self._forsaken: deque[Sequence[Page]] = deque()
        self._idle_clock = itertools.count()
        self._thread: Worker | None = None
        self._thread_lock = threading.RLock()
        pool.reclaimers.append(self._reclaim)
        pool.offloaders.append(self._offload_idle)
        pool.keepers.append(self._watch_idle)

    @property
    def idle_bytes(self) -> int:
        """The high watermark of parked and pooled memory."""
        if self._idle_bytes is not None:
            return self._idle_bytes
        return self.pool.limit_bytes // _IDLE_FRACTION

    @property
    def num_device_waits(self) -> int:
        """How often memory was short enough to wait for the device."""
        return self._idle.num_device_waits

    def reserve(
        self,
        num_strips: int,
        strip_bytes: int,
        first_bytes: int | None,
        salt: Hashable = None,
        tag: str = "kv_cache",
    ) -> RangeHold:
        """A range with room for ``strip_bytes`` a strip: a parked one of the same tenant, still mapped, or a new one.

        A parked range is adopted only if it holds at most twice the ``first_bytes`` a strip that the caller is about
        to commit (plus a page), so that adoption never ties up much more memory than a new range would; None: never.

        Raises: DriverError without addresses; ForkedProcessError where the pool is the parent's.
        """
        self.pool.check_process()
        with self.pool.lock:
            self._drain()
            if first_bytes is not None and not self.pool.driver.is_capturing():
                parked = self._idle.adopt(num_strips, strip_bytes, 2 * first_bytes + self.pool.page_bytes, salt)
                if parked is not None:
                    parked.tag = tag
                    self.pool.tags.add(tag)
                    return RangeHold(parked, self._dead)
            new = AddressRange(self.pool, num_strips, strip_bytes, salt, tag)
            return RangeHold(new, self._dead)

    def drop_head(self, hold: RangeHold, nbytes: int) -> RangeHold:
        """Part with the whole pages below offset ``nbytes`` of every strip; returns the hold to use from now on.

        The old hold, which the views made so far keep alive, stands for those pages from now on, and keeps the new
        one alive: so they go back when the last such view is gone and the device is done, and the rest lives on.
        """
        with self.pool.lock:
            head = hold.range.detach_head(nbytes)
            if head is None:
                return hold
            hold.rest = RangeHold(hold.range, self._dead)
            hold.range = head
            return hold.rest

    def reap(self) -> None:
        """Notice what died since, and have it taken back, off this thread, once the device is done with it."""
        with self.pool.lock:
            self._drain()

    def let_go_soon(self, pages: Sequence[Page]) -> None:
        """``PagePool.let_go`` at the next operation; may be called from a finalizer."""
        self._forsaken.append(pages)

    def commit_soon(self, hold: RangeHold, nbytes: int) -> None:
        """Commit up to offset ``nbytes`` on the scheduler's thread; without memory, the next commit will say so."""
        self.pool.check_process()
        alive = weakref.ref(hold)

        def commit() -> None:
            with self.pool.lock:
                current = alive()
                try:
                    while current is not None and current.rest is not None:
                        current = current.rest  # the front was given back since; the rest grows
                    if current is not None:
                        current.range.commit(nbytes, ahead=True)
                finally:
                    del current  # before the lock is released, also from a traceback: references to holds are counted

        self.run_soon(commit)

    def run_soon(self, job: Callable[[], object]) -> None:
        """Run ``job`` on the scheduler's thread; one that raises is logged, and its caller meets the cause itself."""
        worker = self._worker()
        if worker is None:
            run(job)
        else:
            worker.jobs.put(job)

    def settle(self) -> None:
        """Return once the scheduler's thread has done everything it was asked to do so far."""
        done = threading.Event()
        self.run_soon(done.set)
        done.wait()

    def sleep(self, tags: Collection[str] | None = None, discard: Collection[str] | None = ()) -> int:
        """Take the tensors with these tags (None: all) off the device; returns the bytes that the device got back.

        Args:
            discard: tags of those that lose their rows (None: all) instead of keeping them outside the device. Prefixes
                that nobody uses go with "kv_cache"; rows that belong to others are kept.

        Effects: what is parked or pooled goes as well. Waits for the device. See ``tiers.put_to_sleep``.
        Raises:  OffloadLimitError or DriverError, with every tensor as it was, or awake; VTensorError in a capture.
        """
        if self.pool.is_foreign:
            return 0
        with tiers.between_uses(self.pool, tags), ExitStack() as held:
            tiers.keep_captures_out(self.pool, held)
            committed_bytes = self.pool.ledger.committed_bytes
            self._empty_parked()
            if tiers.has_tag(tiers.PREFIX_TAG, tags) and tiers.has_tag(tiers.PREFIX_TAG, discard):
                for rounds in self.pool.rounds:
                    rounds.num_discards += 1
                for evict in list(self.pool.evictors):
                    evict(math.inf)
            try:
                for sleeper in self.pool.sleepers:
                    sleeper.sleep(self, tags, discard)
                tiers.put_to_sleep(self, tags, discard)
            except BaseException:
                for sleeper in self.pool.sleepers:
                    with suppress(VTensorError):
                        sleeper.wake(self, tags)
                raise
            finally:
                self.pool.note_tiers()
            try:
                self._empty_parked()
                self.pool.trim()
            except DriverError as error:  # all sleep, and what was returned says that less than all of it came back
                _log.warning("memory that sleep() took stays until the next trim(): %s", str(error))
            return committed_bytes - self.pool.ledger.committed_bytes

    def wake(self, tags: Collection[str] | None = None) -> int:
        """Bring back what ``sleep`` took off the device; returns the bytes that its pages take there.

        Raises: OutOfPagesError or DriverError, with every tensor as it was, or awake; VTensorError in a capture.
        """
        if self.pool.is_foreign:
            return 0
        with tiers.between_uses(self.pool, tags), ExitStack() as held:
            tiers.keep_captures_out(self.pool, held)
            used_bytes = self.pool.ledger.committed_bytes - self.pool.ledger.free_bytes
            for sleeper in self.pool.sleepers:
                sleeper.wake(self, tags)
            tiers.wake(self, tags)
            for range_ in list(self.pool.ranges.values()):
                if not range_.is_idle:
                    range_.note_away()  # where somebody used shared pages meanwhile
            self.pool.note_tiers()
            return max(self.pool.ledger.committed_bytes - self.pool.ledger.free_bytes - used_bytes, 0)

    def offload(self, hold: RangeHold) -> int:
        """Move the range's pages that are in no other use to outside the device; returns the bytes. See ``tiers``.

        Raises: OffloadLimitError or DriverError, with every row where it was, or outside the device.
        """
        with self.pool.lock, ExitStack() as held:
            self.mark_idle(hold)
            tiers.keep_captures_out(self.pool, held)
            self._drain()
            self._idle.empty_retired(wait=True)
            return tiers.offload(self, [hold.range])

    def mark_idle(self, hold: RangeHold) -> None:
        """Have the range's pages offloaded when the device is short of memory; until ``prefetch``."""
        with self.pool.lock:
            self.pool.is_tiered = True
            hold.range.is_idle, hold.range.idle_since = True, next(self._idle_clock)

    def prefetch(self, hold: RangeHold) -> int:
        """Bring the range's pages back to the device, where they stay; returns the bytes that came.

        Raises: OutOfPagesError or DriverError, with every row where it was, or on the device.
        """
        with self.pool.lock, ExitStack() as held:
            hold.range.is_idle = False
            try:
                tiers.keep_captures_out(self.pool, held)
                self._drain()
                self._idle.empty_retired(wait=True)  # which may map the same pages
                return tiers.prefetch(self, [hold.range])
            finally:
                hold.range.note_away()
                self.pool.note_tiers()

    def trim(self) -> int:
        """Return all parked and pooled memory, and unused prefixes, to the system; waits for the device if it must.

        Other threads' captures are waited for, ten seconds at most. While this stream is being captured into a graph,
        only pooled memory goes back: waiting would break the capture.

        Returns: bytes of physical memory given back; 0 in a child process, where all of it is the parent's.
        """
        if self.pool.is_foreign:
            return 0
        with outside_captures(self.pool.driver, self.pool.lock):
            self._empty_parked()
            for evict in list(self.pool.evictors):
                evict(math.inf)
            self.pool.offloads.trim()
            return self.pool.trim()

    def stats(self) -> PoolStats:
        """Exact figures of this pool, at this moment."""
        pool = self.pool
        with pool.lock:
            self._drain()
            uses, counts = self._idle.uses(), pool.ledger.counts()
            return PoolStats(
                reserved_bytes=pool.reserved_bytes,
                committed_bytes=counts.committed_bytes,
                live_bytes=uses.live_bytes,
                shared_bytes=uses.shared_bytes,
                prefix_bytes=uses.prefix_bytes,
                parked_bytes=uses.parked_bytes,
                pooled_bytes=counts.free_bytes,
                torch_bytes=counts.torch_bytes,
                offloaded_bytes=pool.offloads.used_bytes,
                offload_pooled_bytes=pool.offloads.pooled_bytes,
                budget_bytes=counts.budget_bytes,
                scrubbed_bytes=pool.scrubbed_bytes,
                num_mappings=pool.num_mappings,
                num_device_waits=self.num_device_waits,
                driver_calls=pool.driver.stats(),
            )

    def _drain(self) -> None:
        """Put a fence behind every range that died since, and park it. No driver call on memory."""
        if self.pool.is_foreign:
            self._dead.clear()  # made before fork(): the parent unmaps and frees its own memory
            self._forsaken.clear()
            return
        while self._forsaken:
            self.pool.let_go(self._forsaken.popleft())
        self.pool.driver.collect()
        num_dead = len(self._dead)  # one that dies during this call may have work behind this call's fence
        if not num_dead or self.pool.driver.is_capturing() or self._leaves_fences_to_others():
            self._watch_idle()  # what torch's allocator has pooled without a word
            return
        with ExitStack() as held:
            # A fence would wait for who begins a capture just now, and that one may wait for the pool's lock.
            if not bar_captures(self.pool.driver, held):
                return
            fence = self.pool.driver.fence()
        now = self._clock()
        while num_dead and self._dead:  # a close() in a finalizer can come in between
            num_dead -= 1
            self._idle.put(self._dead.popleft(), fence, now)
        self._watch_idle()
        if self._idle.has_retired or self._idle.is_more_than(self.idle_bytes):
            self.run_soon(self._collect)

    def _worker(self) -> Worker | None:
        """The scheduler's thread; None where none can be started, as while the interpreter ends."""
        with self._thread_lock:
            if self._thread is None or not self._thread.is_alive():
                try:
                    self._thread = Worker(self.pool.driver.prepare_thread, self._clock)
                except RuntimeError:
                    self._thread = None
                else:
                    weakref.finalize(self, self._thread.jobs.put, None).atexit = False  # it ends with its scheduler
            return self._thread

    def _watch_idle(self) -> None:
        """Have the scheduler's thread look at idle memory after a while, if there is any and it will not anyway."""
        if self._is_watching_idle or self._idle_seconds is None or self.pool.is_foreign:
            return
        worker = self._worker() if self._idle.has_memory else None
        if worker is not None:
            self.pool.ledger.watch()
            worker.run_at(self._clock() + max(self._idle_seconds, _LEAST_PAUSE_S), self._look_at_idle)
            self._is_watching_idle = True

    def _give_back_unwanted(self) -> None:
        """Return idle memory that nobody wanted for a while; of much some at a time, and others are let in between."""
        assert self._idle_seconds is not None
        with self.pool.lock:
            left = Left.WANTED
            try:
                if not self.pool.driver.is_capturing():  # asking a fence would break the capture
                    left = self._idle.give_back(self._clock() - self._idle_seconds, _MOST_BYTES_AT_ONCE)
            finally:
                self._is_watching_idle = left is Left.MORE
                if left is Left.MORE:
                    self.run_soon(self._look_at_idle)
                elif left is Left.WANTED:
                    self._watch_idle()

    def _empty_parked(self) -> None:
        """Unmap all that is dead; waits for the device, unless a graph is being captured: then nothing happens."""
        self._drain()
        if not self.pool.driver.is_capturing():
            self._idle.empty()

    def _offload_idle(self, nbytes: float) -> None:
        if not is_ahead_of_need() and not self._leaves_fences_to_others():
            tiers.offload_idle(self, nbytes)

    def _leaves_fences_to_others(self) -> bool:
        """Whether this thread cannot know that another is capturing a graph meanwhile, which a fence would break."""
        return is_ahead_of_need() or (is_watching() and self.pool.driver.fences_break_captures)

    def _collect(self) -> None:
        """Empty what is retired and, above the watermark, what is parked, as far as the device is done with it."""
        with self.pool.lock:
            self._idle.shrink(self.idle_bytes, keep_bytes=self.idle_bytes // 2)

    def _reclaim(self, nbytes: float) -> None:
        """Turn parked ranges into pooled pages until ``nbytes`` are free; waits for the device only if it must."""
        with self.pool.lock:
            self._drain()
            if not self.pool.driver.is_capturing():  # asking a fence would break the capture
                self._idle.reclaim(nbytes)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """A call of a bound method that does not keep its object alive, and is none once that is gone."""
    alive = weakref.WeakMethod(method)

    def call() -> None:
        if (found := alive()) is not None:
            found()

    return call
