"""memory_pool(): torch tensors on the pages, and within the budget, of a device's PagePool.

torch's caching allocator stays on top. A `with` block borrows one of its memory pools, whose segments come from the
native allocator, which takes pages from the same ledger as PagePool:

    torch.empty ──> caching allocator's pool ──> vtp_torch_alloc (C, no GIL) ──> ledger <── PagePool <── VTensor

torch keeps the segments of dead tensors cached for the next block that borrows the pool. They go back to the ledger
when PagePool runs out of pages, or with `release_idle`: the pool is retired, and torch releases what is unused in it.

`sleep` copies segments to offloaded pages and unmaps them; torch notices nothing, as long as nobody uses the tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch

from torch_vtensor.allocator import _torch_compat, native
from torch_vtensor.allocator._torch_compat import PoolId
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.native_allocator import Failure, NativeAllocator, Outcome, Segment, TorchPoolStats
from torch_vtensor.allocator.page_copy import Piece, Transfer, copy_pieces
from torch_vtensor.allocator.page_pool import Page, PagePool, Tier, read_budget
from torch_vtensor.allocator.pools import default_pool
from torch_vtensor.allocator.tiers import has_tag
from torch_vtensor.allocator.watcher import is_watching
from torch_vtensor.errors import DriverError, OutOfPagesError, VTensorError

__all__ = ["TorchPoolStats", "memory_pool", "release_idle", "torch_pool_stats"]

_OVER_BUDGET = "over budget"
_OUT_OF_MEMORY = (_OVER_BUDGET, "CUDA_ERROR_OUT_OF_MEMORY")


class TorchPools:
    """The memory pools of torch's caching allocator on the pages of one PagePool.

    One is borrowed by each `with` block that is open, so there are as many as were ever open at once: torch refuses to
    route two blocks to one pool.
    """

    def __init__(self, pool: PagePool, native: NativeAllocator, allocator: torch.cuda.CUDAPluggableAllocator) -> None:
        assert pool.device.index is not None
        self.pool = pool
        self.device_index = pool.device.index
        self._native = native
        self._allocator = allocator
        # Reentrant: a block that was never closed ends in a finalizer, which may run on a thread that holds the lock.
        self._lock = threading.RLock()
        self._idle: dict[str, list[PoolId]] = {}
        self._tags: list[str] = []  # by number
        # By a segment's number: what sleeping ones held; no page: it was discarded. Addresses are used again.
        self._kept: dict[int, list[Page]] = {}
        pool.is_lent_to_torch = True
        pool.reclaimers.append(self._reclaim)
        pool.sleepers.append(self)

    @contextlib.contextmanager
    def routed(self, tag: str) -> Iterator[None]:
        """Send the calling thread's allocations on the device to the pages, until the block ends."""
        failures_before = self._native.failure().num_failures
        pool_id = self._borrow(tag)
        tag_before = self._native.set_tag(self.device_index, self._number_of(tag))
        try:
            _torch_compat.start_routing(pool_id, self.device_index)
            try:
                yield
            finally:
                _torch_compat.stop_routing(pool_id, self.device_index)
        except OutOfPagesError:
            raise
        except torch.OutOfMemoryError as error:
            failure = self._native.failure()
            if failure.num_failures == failures_before:
                raise
            raise self._cause(failure) from error
        finally:
            self._native.set_tag(self.device_index, tag_before)
            with self._lock:
                self._idle.setdefault(tag, []).append(pool_id)

    @property
    def is_asleep(self) -> bool:
        """Whether any of the tensors' memory sleeps."""
        return bool(self._kept)

    def release_idle(self, wait: bool) -> int:
        """Give the segments of dead tensors back to the page pool; returns the bytes."""
        before = self.pool.ledger.torch_bytes
        if self.stats().live_bytes > 0:
            # Which segments are unused, torch does not tell (asking for a pool's snapshot crashes torch 2.11): all idle
            # pools are retired, and whatever is unused in a retired pool, now or later, goes when the cache is emptied.
            with self._lock:
                for idle in self._idle.values():
                    while idle:
                        _torch_compat.retire_memory_pool(idle.pop(), self.device_index)
            torch.cuda.empty_cache()
        self._native.drain(self.device_index, wait)
        if self._kept:
            with self.pool.lock:
                self._forget_freed(self._native.segments(self.device_index))
        return max(before - self.pool.ledger.torch_bytes, 0)

    def stats(self) -> TorchPoolStats:
        """What the native allocator holds of this device."""
        return self._native.stats(self.device_index)

    def sleep(self, scheduler: GrowthScheduler, tags: Collection[str] | None, discard: Collection[str] | None) -> None:
        """Unmap the segments with these tags (None: all), and pool their pages. What they hold is kept, or discarded.

        Effects: waits for the device; torch's tensors on them must not be used until ``wake``.
        Raises:  OffloadLimitError or DriverError, with every segment as it was, or awake.
        """
        pool, driver = self.pool, self.pool.driver
        self.release_idle(wait=True)
        with pool.lock, self._native.watched(self.device_index) as segments:
            self._forget_freed(segments)
            tagged = [it for it in segments if not it.is_asleep and has_tag(self._tags[it.tag], tags)]
            for it in tagged:
                if it.number in self._kept and self._native.sleep(self.device_index, it.address) is Outcome.FAILED:
                    raise self._cause(self._native.failure())  # again: what it held is still only where it was
            going = [it for it in tagged if it.number not in self._kept]
            going.sort(key=lambda it: has_tag(self._tags[it.tag], discard))  # what is lost goes last
            plans = [[] if has_tag(self._tags[it.tag], discard) else pool.page_plan(it.nbytes) for it in going]
            pages = iter(pool.outside([size for plan in plans for size in plan], Tier.ASLEEP))
            left = {it: [next(pages) for _ in plan] for it, plan in zip(going, plans, strict=True)}

            def put_to_sleep(it: Segment) -> None:
                outcome = self._native.sleep(self.device_index, it.address)
                if outcome is Outcome.FAILED:
                    raise self._cause(self._native.failure())
                kept = left.pop(it)
                if outcome is Outcome.GONE:
                    pool.drop(kept)
                else:
                    self._kept[it.number] = kept
                with suppress(DriverError):  # whoever puts all to sleep sees to what is left
                    pool.trim()

            pieces = [
                Piece(it.nbytes, partial(_to_pages, it, kept), partial(put_to_sleep, it)) for it, kept in left.items()
            ]
            try:
                driver.fence().wait()
                copy_pieces(scheduler, pieces)
            except BaseException:
                for kept in left.values():
                    pool.drop(kept)
                with suppress(VTensorError):
                    self._wake(scheduler, [it for it in going if it not in left])
                raise

    def wake(self, scheduler: GrowthScheduler, tags: Collection[str] | None) -> None:
        """Map pages at the addresses of the segments with these tags (None: all) again, with all that they held.

        Effects: waits for the device. What was discarded is zeros.
        Raises:  OutOfPagesError or DriverError, with every segment as it was, or awake.
        """
        with self.pool.lock:
            try:
                self._wake_watched(scheduler, tags)
            except OutOfPagesError as error:
                self.pool.make_room(error.asked_bytes)  # not before, and not while segments have to stay mapped
                self._wake_watched(scheduler, tags)

    def _wake_watched(self, scheduler: GrowthScheduler, tags: Collection[str] | None) -> None:
        with self._native.watched(self.device_index) as segments:
            self._forget_freed(segments)
            self._wake(scheduler, [it for it in segments if has_tag(self._tags[it.tag], tags)])

    def _wake(self, scheduler: GrowthScheduler, segments: Sequence[Segment]) -> None:
        coming = [it for it in segments if it.number in self._kept]
        woken: list[Segment] = []

        def begin(it: Segment) -> list[Transfer]:
            outcome = self._native.wake(self.device_index, it.address)
            if outcome in (Outcome.FAILED, Outcome.LACKS_MEMORY):
                raise self._cause(self._native.failure(), sum(it.nbytes for it in coming))
            if outcome is Outcome.GONE:
                return []
            woken.append(it)
            return _from_pages(it, self._kept[it.number])

        try:
            copy_pieces(scheduler, [Piece(it.nbytes, partial(begin, it)) for it in coming])
        except BaseException:
            for it in woken:  # what they hold is only where it was
                self._native.sleep(self.device_index, it.address)
            raise
        for it in coming:
            self.pool.drop(self._kept.pop(it.number))

    def _forget_freed(self, segments: Sequence[Segment]) -> None:
        """Let go of what segments held that torch has freed while they slept."""
        for number in self._kept.keys() - {it.number for it in segments}:
            self.pool.drop(self._kept.pop(number))

    def _number_of(self, tag: str) -> int:
        with self._lock:
            if tag not in self._tags:
                self._tags.append(tag)
                self.pool.tags.add(tag)
            return self._tags.index(tag)

    def _borrow(self, tag: str) -> PoolId:
        with self._lock:
            if self._idle.get(tag):
                return self._idle[tag].pop()
        return _torch_compat.create_memory_pool(self._allocator, self.device_index)

    def _reclaim(self, nbytes: float) -> None:
        """PagePool runs out of pages: waits for the device only if nothing else helps."""
        if is_watching():  # to empty torch's cache breaks what another thread may be capturing
            return
        for wait in (False, True):
            if self.pool.ledger.free_bytes < nbytes and self.pool.ledger.torch_bytes > 0:
                self.release_idle(wait)

    def _cause(self, failure: Failure, asked_bytes: int | None = None) -> Exception:
        if failure.code not in _OUT_OF_MEMORY:
            return DriverError(failure.call, failure.code, self.pool.device, failure.nbytes)
        return OutOfPagesError(
            self.pool.device,
            failure.asked_bytes if asked_bytes is None else asked_bytes,
            self.pool.ledger.committed_bytes,
            self.pool.budget_bytes,
            is_device_full=failure.code != _OVER_BUDGET,
        )


def _to_pages(segment: Segment, pages: Sequence[Page]) -> list[Transfer]:
    """The copies of a segment to the pages that stand for it."""
    return [Transfer(ptr, page, page.nbytes) for ptr, page in _addresses(segment, pages)]


def _from_pages(segment: Segment, pages: Sequence[Page]) -> list[Transfer]:
    """The copies back; zeros where no pages stand for it."""
    if not pages:
        return [Transfer(None, segment.address, segment.nbytes)]
    return [Transfer(page, ptr, page.nbytes) for ptr, page in _addresses(segment, pages)]


def _addresses(segment: Segment, pages: Sequence[Page]) -> Iterator[tuple[int, Page]]:
    ends = itertools.accumulate((page.nbytes for page in pages), initial=segment.address)
    return zip(ends, pages, strict=False)


# torch keeps a plain pointer to the allocator in every segment: it lives as long as the process.
_lock = threading.Lock()
_native: NativeAllocator | None = None
_allocator: torch.cuda.CUDAPluggableAllocator | None = None
_pools: dict[int, TorchPools] = {}


@contextlib.contextmanager
def memory_pool(
    device: torch.device | str | int | None = None, budget_bytes: int | str | None = None, *, tag: str = "weights"
) -> Iterator[PagePool]:
    """Inside the `with` block, this thread's CUDA tensors come from the device's PagePool, and count in its budget.

    They are ordinary tensors and may outlive the block. The memory of dead ones stays cached for the next block; it
    goes back to the page pool when that runs out of pages, and with ``torch_vtensor.trim()``. Blocks may be nested, and
    open in several threads; a CUDA graph may be captured inside, but no block may be opened inside a capture.

    Args:
        device: a CUDA device; the current one by default. Tensors of other devices are not affected.
        budget_bytes: sets the budget of the device's PagePool, KV memory included, also after the block: bytes, or a
            text such as "8GiB".
        tag: by which ``sleep`` and ``wake`` can name the tensors that are made inside.

    Effects: the block itself makes no driver call. A tensor that needs a new segment does, natively, without the GIL
        and without waiting for the device, unless memory that it still uses is the last there is.
    Raises:  OutOfPagesError (a ``torch.OutOfMemoryError``) out of the block where an allocation in it found no page;
        VTensorError on a machine without CUDA, or inside a capture; ValueError for a budget of less than one byte.
    """
    budget = read_budget(budget_bytes)
    pools = _pools_on(_cuda_device(device))
    if torch.cuda.is_current_stream_capturing():
        raise VTensorError(
            "memory_pool() was opened while the current stream captures a CUDA graph, whose memory torch keeps in a "
            "pool of the graph's own. Open it before the capture: captures inside the block are fine."
        )
    if budget is not None:
        pools.pool.budget_bytes = budget
    with pools.routed(tag):
        yield pools.pool


def release_idle(device: torch.device | str | int | None = None, wait: bool = True) -> int:
    """Give memory that dead tensors of `memory_pool` blocks left cached back to the page pool; returns the bytes.

    Where any such tensor was made, torch's own cache is emptied as well: torch has no narrower call that is safe while
    other threads allocate.

    Args:
        device: a CUDA device; all by default.
        wait: also give back what the device still uses, by waiting for it.
    """
    with _lock:
        pools = list(_pools.values())
    if device is not None:
        index = _cuda_device(device).index
        pools = [candidate for candidate in pools if candidate.device_index == index]
    return sum(candidate.release_idle(wait) for candidate in pools)


def torch_pool_stats(device: torch.device | str | int | None = None) -> TorchPoolStats:
    """What `memory_pool` holds on a CUDA device, the current one by default."""
    return _pools_on(_cuda_device(device)).stats()


def _cuda_device(device: torch.device | str | int | None) -> torch.device:
    if isinstance(device, int):
        found = torch.device("cuda", device)
    else:
        found = torch.device("cuda" if device is None else device)
    if found.type != "cuda":
        raise ValueError(f"device is '{found}'; memory_pool() serves CUDA devices. Leave it out for tensors elsewhere.")
    if not torch.cuda.is_available():
        reason = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise VTensorError(
            f"memory_pool() needs a CUDA GPU, and torch {torch.__version__} {reason}. Leave the `with` out on this "
            "machine: VTensors and KV caches work without it, and torch's own allocator serves all other tensors."
        )
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _pools_on(device: torch.device) -> TorchPools:
    global _native, _allocator
    with _lock:
        if device.index not in _pools:
            if (backend := torch.cuda.get_allocator_backend()) != "native":
                raise VTensorError(
                    f"torch's allocator backend is {backend!r}; memory_pool() builds on the caching one. "
                    "Take `backend:` out of PYTORCH_ALLOC_CONF."
                )
            if _native is None or _allocator is None:
                _native = NativeAllocator(str(native.library_path()))
                _allocator = torch.cuda.CUDAPluggableAllocator(_native.path, "vtp_torch_alloc", "vtp_torch_free")
            pool = default_pool(device)
            others = [index for index in range(torch.cuda.device_count()) if index != device.index]
            peers = [index for index in others if torch.cuda.can_device_access_peer(index, device.index)]
            _native.attach(device, pool.ledger, pool.driver.page_sizes, peers)
            _pools[device.index] = TorchPools(pool, _native, _allocator)
            pool.listen()
        return _pools[device.index]
