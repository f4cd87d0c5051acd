"""PagePool: the physical pages of one device, shared by count, under one byte budget."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.ledger import Ledger, Take
from torch_vtensor.allocator.timed_driver import CallStats, TimedDriver
from torch_vtensor.errors import DriverError, ForkedProcessError, OutOfPagesError

__all__ = ["Page", "PagePool", "PoolStats", "check_budget"]


def check_budget(budget_bytes: int | None) -> None:
    """Refuse a budget that nothing fits into.

    Raises: ValueError for less than one byte.
    """
    if budget_bytes is not None and budget_bytes < 1:
        raise ValueError(f"budget_bytes is {budget_bytes}: give at least one byte, or None for no limit")


class Page:
    """One unit of physical memory with ``num_refs`` references: of ranges that map it, and ``num_held`` of holders.

    ``salt`` names the tenant whose memory it is. A dirty page may still show what another tenant wrote: it is scrubbed
    before anybody can read it.
    """

    __slots__ = ("handle", "is_dirty", "nbytes", "num_held", "num_refs", "salt")

    def __init__(self, handle: int, nbytes: int, salt: Hashable = None, is_dirty: bool = False) -> None:
        self.handle = handle
        self.nbytes = nbytes
        self.num_refs = 1
        self.num_held = 0
        self.salt = salt
        self.is_dirty = is_dirty


class PoolStats(NamedTuple):
    """Where a device's bytes are, exactly.

    ``committed_bytes = live_bytes + prefix_bytes + parked_bytes + pooled_bytes + torch_bytes``. A page that several
    tensors or views map counts once in ``live_bytes`` and once in ``shared_bytes``; what is still mapped but in no use
    is parked; what only a prefix tree keeps is a prefix. ``scrubbed_bytes`` were overwritten with zeros so far, because
    they passed from one tenant to another.
    """

    reserved_bytes: int
    committed_bytes: int
    live_bytes: int
    shared_bytes: int
    prefix_bytes: int
    parked_bytes: int
    pooled_bytes: int
    torch_bytes: int
    budget_bytes: int | None
    scrubbed_bytes: int
    num_mappings: int
    num_device_waits: int
    driver_calls: dict[str, CallStats]

    @property
    def num_driver_calls(self) -> int:
        """All driver calls since the pool was made."""
        return sum(call.count for call in self.driver_calls.values())


class PagePool:
    """Creates, shares, pools and destroys pages; knows nothing of addresses.

    A page whose last reference is dropped stays in the pool, because taking a pooled page costs no driver call.
    Under pressure the pool first asks its ``reclaimers`` (parked ranges give their pages back), then its ``evictors``
    (prefixes that nobody uses go), then destroys pooled pages of other sizes, and only then raises.

    Args:
        driver: the device's memory.
        budget_bytes: the most physical memory to hold, pooled pages included; None for what the device has.
        scrub: whether memory that passes from one tenant to another is overwritten with zeros first.

    Source: vTensor (arXiv 2407.15309) section 4.2, the pTree of physical chunks. Here a page also counts the ranges
        that share it, and the torch allocator takes from the same ledger.
    """

    def __init__(self, driver: Driver, budget_bytes: int | None = None, *, scrub: bool = True) -> None:
        self.driver = TimedDriver(driver)
        self.device = driver.device
        self.page_bytes = driver.page_sizes[0]
        self.lock = threading.RLock()
        self.ledger = Ledger(budget_bytes)
        self._free_bytes_at_first = driver.free_bytes()
        self.reclaimers: list[Callable[[float], None]] = []
        self.evictors: list[Callable[[float], None]] = []
        self.held_bytes = 0
        self.scrubbed_bytes = 0
        self.num_mappings = 0
        self._scrubs = scrub
        self._has_tenants = False
        self.is_lent_to_torch = False
        """Whether torch's allocator takes pages and puts them back, which does not say whose they were."""
        self._tenants: dict[int, Hashable] = {}  # by handle, pooled ones included: who wrote there last, unless None
        self._pages: set[Page] = set()
        self._pid = os.getpid()
        _pools.add(self)

    @property
    def budget_bytes(self) -> int | None:
        """The most bytes of physical memory to hold. Lowering it takes effect as memory is given back."""
        return self.ledger.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, value: int | None) -> None:
        self.ledger.budget_bytes = value

    @property
    def limit_bytes(self) -> int:
        """What there is to be shared out: the budget, without one what the device had free when the pool was made."""
        return self._free_bytes_at_first if self.budget_bytes is None else self.budget_bytes

    @property
    def is_foreign(self) -> bool:
        """True in a process that fork() made after this pool: the memory belongs to the parent."""
        return self._pid != os.getpid()

    def check_process(self) -> None:
        """Raise ForkedProcessError in a process that fork() made after this pool."""
        if self.is_foreign:
            raise ForkedProcessError(
                f"this memory on {self.device} was made before fork() and belongs to the parent process. Make a new "
                "tensor or cache in the child; old views show what the parent has there, so clone what has to stay."
            )

    def page_plan(self, nbytes: int) -> list[int]:
        """The sizes of the pages that hold ``nbytes``: large ones for the bulk, the smallest for the rest.

        Never more than one smallest page beyond what was asked: mapping costs the same for a large page as for a
        small one, so bulk commits are cheap and no memory is wasted for it.
        """
        plan = []
        for size in reversed(self.driver.page_sizes):
            count = nbytes // size if size != self.page_bytes else -(-nbytes // size)
            plan += [size] * count
            nbytes -= count * size
        return plan

    def acquire(self, sizes: Sequence[int], salt: Hashable = None) -> list[Page]:
        """Take one page of each size for the tenant ``salt``, all or none.

        The caller scrubs those that are dirty before it lets anybody read them, and says so by ``scrubbed``.

        Raises: OutOfPagesError, or the driver's error, with the pool as it was.
        """
        self.check_process()
        with self.lock:
            pages: list[Page] = []
            missing_bytes = asked_bytes = sum(sizes)
            try:
                for nbytes in sizes:
                    pages.append(self._acquire_one(nbytes, missing_bytes, asked_bytes, salt))
                    missing_bytes -= nbytes
            except BaseException:
                self.drop(pages)
                raise
            return pages

    def share(self, pages: Iterable[Page]) -> None:
        """Add one reference to each page."""
        with self.lock:
            for page in pages:
                page.num_refs += 1

    def drop(self, pages: Iterable[Page]) -> None:
        """Remove one reference from each page; one that has none left is pooled. No driver call, cannot fail.

        The caller has unmapped its address, and the device is done with it.
        """
        with self.lock:
            for page in pages:
                page.num_refs -= 1
                if page.num_refs == 0:
                    self._pages.remove(page)
                    if page.is_dirty:
                        self._tenants.setdefault(page.handle, _UNKNOWN)
                    self.ledger.put(page.handle, page.nbytes)

    def hold(self, pages: Iterable[Page]) -> None:
        """Keep pages, mapped or not, by one more reference to each."""
        with self.lock:
            for page in pages:
                page.num_refs += 1
                page.num_held += 1
                if page.num_held == 1:
                    self.held_bytes += page.nbytes

    def let_go(self, pages: Sequence[Page]) -> None:
        """The opposite of ``hold``. Cannot fail."""
        with self.lock:
            for page in pages:
                page.num_held -= 1
                if page.num_held == 0:
                    self.held_bytes -= page.nbytes
            self.drop(pages)

    def scrubbed(self, pages: Iterable[Page]) -> None:
        """Note that the dirty ones of these pages hold zeros now."""
        with self.lock:
            for page in pages:
                if page.is_dirty:
                    page.is_dirty = False
                    self.scrubbed_bytes += page.nbytes
                    self._belongs_to(page.handle, page.salt)

    def trim(self, keep_bytes: int = 0) -> int:
        """Destroy pooled pages, the largest first, until at most ``keep_bytes`` of them stay; returns bytes freed.

        Raises: DriverError with the refused page still pooled.
        """
        if self.is_foreign:
            return 0
        freed_bytes = 0
        with self.lock:
            while self.ledger.free_bytes > keep_bytes and (popped := self.ledger.pop_free()) is not None:
                handle, nbytes = popped
                try:
                    self.driver.destroy(handle, nbytes)
                except BaseException:
                    self.ledger.put(handle, nbytes)
                    raise
                self._tenants.pop(handle, None)
                self.ledger.uncharge(nbytes)
                freed_bytes += nbytes
        return freed_bytes

    def live_pages(self) -> frozenset[Page]:
        """The pages that at least one range maps."""
        with self.lock:
            return frozenset(self._pages)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is counted exactly once and has its references."""
        with self.lock:
            live_bytes = sum(page.nbytes for page in self._pages)
            handles = [page.handle for page in self._pages]
            assert all(page.num_refs > 0 for page in self._pages), "a live page has no reference"
            assert all(0 <= page.num_held <= page.num_refs for page in self._pages), "a hold is not a reference"
            held_bytes = sum(page.nbytes for page in self._pages if page.num_held)
            assert held_bytes == self.held_bytes, f"{held_bytes} bytes are held and {self.held_bytes} counted"
            assert len(set(handles)) == len(handles), "two live pages have one handle"
            counts = self.ledger.counts()
            assert live_bytes + counts.free_bytes + counts.torch_bytes == counts.committed_bytes, (
                f"{live_bytes} live + {counts.free_bytes} pooled + {counts.torch_bytes} torch bytes are not the "
                f"{counts.committed_bytes} committed"
            )

    def _acquire_one(self, nbytes: int, missing_bytes: int, asked_bytes: int, salt: Hashable) -> Page:
        taken = self.ledger.take(nbytes)
        if taken is Take.OVER_BUDGET:
            self.reclaim(self._shortfall_bytes(missing_bytes))
            taken = self.ledger.take(nbytes)
        if taken is Take.OVER_BUDGET:
            shortfall_bytes = self._shortfall_bytes(missing_bytes)
            self.trim(max(self.ledger.free_bytes - shortfall_bytes, 0))
            taken = self.ledger.take(nbytes)
        if taken is Take.OVER_BUDGET:
            raise OutOfPagesError(self.device, asked_bytes, self.ledger.committed_bytes, self.budget_bytes)
        handle = self._create(nbytes, missing_bytes, asked_bytes) if taken is Take.CHARGED else taken
        assert isinstance(handle, int)
        page = Page(handle, nbytes, salt, self._is_dirty(handle, taken is Take.CHARGED, salt))
        self._pages.add(page)
        return page

    def _is_dirty(self, handle: int, is_new: bool, salt: Hashable) -> bool:
        """Whether the page may show what another tenant wrote; where not, it is ``salt``'s from now on."""
        self._has_tenants |= salt is not None
        if not self._scrubs or not self._has_tenants:
            return False
        if is_new:
            self._tenants.pop(handle, None)  # of memory that is gone and had the same number
            is_dirty = not self.driver.zeroes_pages
        else:
            is_dirty = self.is_lent_to_torch or self._tenants.get(handle) != salt
        if not is_dirty:
            self._belongs_to(handle, salt)
        return is_dirty

    def _belongs_to(self, handle: int, salt: Hashable) -> None:
        if salt is None:
            self._tenants.pop(handle, None)
        else:
            self._tenants[handle] = salt

    def _create(self, nbytes: int, missing_bytes: int, asked_bytes: int) -> int:
        """Create a page for bytes that are already charged; uncharges them on failure."""
        try:
            try:
                return self.driver.create(nbytes)
            except DriverError as error:
                if not error.is_out_of_memory:
                    raise
            self.reclaim(missing_bytes)
            self.trim(max(self.ledger.free_bytes - missing_bytes, 0))
            try:
                return self.driver.create(nbytes)
            except DriverError as error:
                if not error.is_out_of_memory:
                    raise
                # The device's limit, not the budget's: the page itself is charged already, and was not had.
                committed_bytes = self.ledger.committed_bytes - nbytes
                raise OutOfPagesError(self.device, asked_bytes, committed_bytes, None) from error
        except BaseException:
            self.ledger.uncharge(nbytes)
            raise

    def reclaim(self, nbytes: float = math.inf) -> None:
        """Have at least ``nbytes`` pooled, if that can be done without touching a live range."""
        for relieve in [*self.reclaimers, *self.evictors]:
            relieve(nbytes)

    def _shortfall_bytes(self, missing_bytes: int) -> int:
        """How much must go back to the system before ``missing_bytes`` fit the budget, which may have been lowered."""
        counts = self.ledger.counts()
        return 0 if counts.budget_bytes is None else counts.committed_bytes + missing_bytes - counts.budget_bytes


_UNKNOWN = object()  # stands for a tenant that is like no other
_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def _renew_locks_in_child() -> None:
    # Another thread of the parent may have held one, and does not exist here to release it.
    for pool in _pools:
        pool.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks_in_child)
