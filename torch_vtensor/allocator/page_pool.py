"""PagePool: the physical pages of one device, shared by count, under one byte budget."""

from __future__ import annotations

import enum
import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, KeysView, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.ledger import Ledger, Take
from torch_vtensor.allocator.offload_pool import OffloadPool
from torch_vtensor.allocator.recorder import Sample
from torch_vtensor.allocator.timed_driver import CallStats, TimedDriver
from torch_vtensor.errors import DriverError, ForkedProcessError, OutOfPagesError
from torch_vtensor.settings import parse_bytes

if TYPE_CHECKING:
    from torch_vtensor.allocator.address_range import AddressRange
    from torch_vtensor.allocator.recorder import Recorder
    from torch_vtensor.allocator.tiers import Rounds, Sleeper
    from torch_vtensor.status import StatusRecord

__all__ = ["Page", "PagePool", "PoolStats", "Tier", "read_budget"]


def read_budget(budget_bytes: int | str | None) -> int | None:
    """A budget in bytes, given so or as text such as "8GiB"; None for no limit.

    Raises: ValueError for less than one byte, or a text that is no size; TypeError for anything else.
    """
    try:
        read = parse_bytes(budget_bytes) if isinstance(budget_bytes, str) else budget_bytes
    except ValueError as error:
        raise ValueError(f"budget_bytes: {error}") from None
    if read is not None and (isinstance(read, bool) or not isinstance(read, int)):
        raise TypeError(f"budget_bytes is {budget_bytes!r}: give a number of bytes, a text such as '8GiB', or None")
    if read is not None and read < 1:
        raise ValueError(f"budget_bytes is {budget_bytes}: give at least one byte, or None for no limit")
    return read


class Tier(enum.Enum):
    """Where the bytes of a page are: in the device's memory; outside of it, until used or until woken; or nowhere."""

    DEVICE = enum.auto()
    OFFLOADED = enum.auto()
    ASLEEP = enum.auto()
    DISCARDED = enum.auto()


class Page:
    """One unit of physical memory with ``num_refs`` references: of ranges that map it, and ``num_held`` of holders.

    ``salt`` names the tenant whose memory it is. A dirty page may still show what another tenant wrote: it is scrubbed
    before anybody can read it.
    """

    __slots__ = ("handle", "is_dirty", "nbytes", "num_held", "num_refs", "salt", "tier")

    def __init__(
        self,
        handle: int,
        nbytes: int,
        salt: Hashable = None,
        is_dirty: bool = False,
        tier: Tier = Tier.DEVICE,
    ) -> None:
        self.handle = handle
        self.nbytes = nbytes
        self.tier = tier
        self.num_refs = 1
        self.num_held = 0
        self.salt = salt
        self.is_dirty = is_dirty

    @property
    def is_outside(self) -> bool:
        """Whether its bytes lie outside the device."""
        return self.tier in (Tier.OFFLOADED, Tier.ASLEEP)

    @property
    def is_mappable(self) -> bool:
        """Whether it has memory that can be mapped: what sleeps may have some that is for copies alone."""
        return self.tier is not Tier.DISCARDED and (self.tier is Tier.DEVICE or OffloadPool.is_mappable(self.handle))


class PoolStats(NamedTuple):
    """Where a device's bytes are, exactly.

    ``committed_bytes = live_bytes + prefix_bytes + parked_bytes + pooled_bytes + torch_bytes`` is the device's memory.
    Beside it, ``offloaded_bytes`` of pages lie outside the device, and ``offload_pooled_bytes`` are kept there for
    others. A page that several tensors or views map counts once in ``live_bytes`` and once in ``shared_bytes``; what is
    still mapped but in no use is parked; what only a prefix tree keeps is a prefix. ``scrubbed_bytes`` were overwritten
    with zeros so far, because they passed from one tenant to another.
    """

    reserved_bytes: int
    committed_bytes: int
    live_bytes: int
    shared_bytes: int
    prefix_bytes: int
    parked_bytes: int
    pooled_bytes: int
    torch_bytes: int
    offloaded_bytes: int
    offload_pooled_bytes: int
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

    A page whose last reference is dropped stays in the pool, because taking a pooled page costs no driver call; its
    ``keepers`` hear of it, and see to it that what nobody takes goes back to the system.
    Under pressure the pool first asks its ``reclaimers`` (parked ranges give their pages back), then its ``evictors``
    (prefixes that nobody uses go), then destroys pooled pages of other sizes, then asks its ``offloaders`` (what is
    idle leaves the device), then, where it is the device that is full, other processes, and only then raises.

    Args:
        driver: the device's memory.
        budget_bytes: the most physical memory to hold, pooled pages included; None for what the device has.
        offload_bytes: the most memory outside the device to offload to; None for what the system gives.
        scrub: whether memory that passes from one tenant to another is overwritten with zeros first.

    Source: vTensor (arXiv 2407.15309) section 4.2, the pTree of physical chunks. Here a page also counts the ranges
        that share it, and the torch allocator takes from the same ledger.
    """

    def __init__(
        self,
        driver: Driver,
        budget_bytes: int | None = None,
        *,
        offload_bytes: int | None = None,
        scrub: bool = True,
    ) -> None:
        self.driver = TimedDriver(driver)
        self.device = driver.device
        self.page_bytes = driver.page_sizes[0]
        self.lock = threading.RLock()
        self.ledger = Ledger(budget_bytes)
        self._free_bytes_at_first = driver.free_bytes()
        self.reclaimers: list[Callable[[float], None]] = []
        self.evictors: list[Callable[[float], None]] = []
        self.offloaders: list[Callable[[float], None]] = []
        self.keepers: list[Callable[[], None]] = []
        """Called, with the lock, whenever pages may have been pooled, but for those that torch's allocator pools."""
        self.sleepers: list[Sleeper] = []
        self.rounds: list[Rounds] = []
        self.offloads = OffloadPool(self.driver, offload_bytes)
        self.ranges: weakref.WeakValueDictionary[int, AddressRange] = weakref.WeakValueDictionary()
        """Every range that may map pages, by the order in which they were made."""
        self.range_numbers = itertools.count()
        self.is_tiered = False
        """Whether any of its memory sleeps, is idle or offloaded: only then does a use have to look."""
        self.tags: set[str] = set()
        """Every tag that memory ever had, by which it can be put to sleep."""
        self.status: StatusRecord | None = None
        """Where other processes see this pool's figures, and ask for another budget, or for idle memory."""
        self.ask_others: Callable[[int], Iterator[None]] = lambda nbytes: iter(())
        """Asks other processes for so much of the device; an item whenever some may have come back."""
        self._listen: Callable[[], object] | None = None
        self._noted = (0, 0, 0)
        self.recorder: Recorder | None = None
        """Keeps what the pool held over time, if somebody wants to see it."""
        self.reserved_bytes = 0
        self.shared_bytes = 0
        self.held_bytes = 0
        self.scrubbed_bytes = 0
        self.num_mappings = 0
        self._scrubs = scrub
        self._has_tenants = False
        self.is_lent_to_torch = False
        """Whether torch's allocator takes pages and puts them back, which does not say whose they were."""
        self._tenants: dict[int, Hashable] = {}  # by handle, pooled ones included: who wrote there last, unless None
        self._pages: dict[Page, None] = {}
        self._pid = os.getpid()
        _pools.add(self)

    @property
    def budget_bytes(self) -> int | None:
        """The most bytes of physical memory to hold. Lowering it takes effect as memory is given back."""
        return self.ledger.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, value: int | None) -> None:
        with self.lock:
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
            if not sizes:  # what asks for nothing may be in the middle of something
                return []
            self._obey()
            pages: list[Page] = []
            missing_bytes = asked_bytes = sum(sizes)
            try:
                for nbytes in sizes:
                    pages.append(self._acquire_one(nbytes, missing_bytes, asked_bytes, salt))
                    missing_bytes -= nbytes
            except BaseException:
                self.drop(pages)
                raise
            self.publish()
            self.listen()
            return pages

    def share(self, pages: Iterable[Page]) -> None:
        """Add one reference to each page."""
        with self.lock:
            for page in pages:
                self._add_reference(page)

    def drop(self, pages: Iterable[Page]) -> None:
        """Remove one reference from each page; one that has none left is pooled. No driver call, cannot fail.

        The caller has unmapped its address, and the device is done with it.
        """
        with self.lock:
            for page in pages:
                page.num_refs -= 1
                if page.num_refs == 0:
                    del self._pages[page]
                    self._put(page)
                elif page.num_refs == 1:
                    self.shared_bytes -= page.nbytes
            self.publish()
            for keep in self.keepers:
                keep()

    def hold(self, pages: Iterable[Page]) -> None:
        """Keep pages, mapped or not, by one more reference to each."""
        with self.lock:
            for page in pages:
                self._add_reference(page)
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

    def scrubbed(self, pages: Sequence[Page]) -> None:
        """Note that the dirty ones of these pages hold zeros now."""
        with self.lock:
            for page in pages:
                if page.is_dirty:
                    self.scrubbed_bytes += page.nbytes
            self.overwritten(pages)

    def overwritten(self, pages: Iterable[Page]) -> None:
        """Note that nothing that was in these pages before can be seen any more."""
        with self.lock:
            for page in pages:
                if page.is_dirty:
                    page.is_dirty = False
                    self._belongs_to(page.handle, page.salt)

    def outside(self, sizes: Sequence[int], tier: Tier, *, mappable: bool = False) -> list[Page]:
        """New pages outside the device, all or none, for what device pages hold.

        Args:
            mappable: whether they can be mapped, as those that are offloaded always can.

        Raises: OffloadLimitError, or the driver's error, with the pool as it was.
        """
        with self.lock:
            return self._new_pages(self.offloads.take(sizes, mappable=mappable or tier is Tier.OFFLOADED), sizes, tier)

    def discarded(self, sizes: Sequence[int]) -> list[Page]:
        """New pages without memory, to take the place of what device pages hold."""
        with self.lock:
            return self._new_pages([-1] * len(sizes), sizes, Tier.DISCARDED)

    def exchange(self, page: Page, other: Page) -> None:
        """Let two pages, neither of them mapped, change their memory, its size and what is known of it."""
        with self.lock:
            for one, its in ((page, other.nbytes), (other, page.nbytes)):
                self.shared_bytes += its - one.nbytes if one.num_refs > 1 else 0
                self.held_bytes += its - one.nbytes if one.num_held else 0
            page.handle, other.handle = other.handle, page.handle
            page.nbytes, other.nbytes = other.nbytes, page.nbytes
            page.tier, other.tier = other.tier, page.tier
            page.is_dirty, other.is_dirty = other.is_dirty, page.is_dirty

    def trim(self, keep_bytes: int = 0) -> int:
        """Destroy pooled pages, the largest first, until at most ``keep_bytes`` of them stay; returns bytes freed.

        Raises: DriverError with the refused page still pooled.
        """
        with self.lock:
            return self._destroy(self.ledger.pop_free, self.ledger.free_bytes - keep_bytes)

    def trim_unwanted(self, nbytes: int) -> int:
        """Destroy pooled pages that nobody wants (``Ledger.watch``), the largest first, until ``nbytes`` are freed.

        Returns: bytes freed; fewer where no more are unwanted.
        Raises:  DriverError with the refused page still pooled, as one that is wanted.
        """
        with self.lock:
            return self._destroy(self.ledger.pop_unwanted, nbytes)

    def note_tiers(self) -> None:
        """Find out whether anything is left of what ``is_tiered`` stands for."""
        self.is_tiered = self.offloads.used_bytes > 0 or any(
            range_.is_idle or range_.is_asleep for range_ in list(self.ranges.values())
        )

    # Other processes

    def show(self, status: StatusRecord, listen: Callable[[], object]) -> None:
        """Show other processes what this one has here, and do what they ask for.

        Args:
            listen: called once, with the first page: has ``heed`` called when somebody asks.
        """
        self.status, self._listen = status, listen
        self.ledger.show(status.figures_address)

    def publish(self) -> None:
        """Note that what the pool holds has changed, for the recorder and for other processes. No system call."""
        if self.recorder is not None:
            self.recorder.note()
        noted = self.reserved_bytes, self.shared_bytes, self.offloads.used_bytes
        if noted != self._noted and self.status is not None and not self.is_foreign:
            self._noted = noted
            self.ledger.note(*noted)

    def sample(self, time_s: float) -> Sample:
        """What a recorder keeps of this moment."""
        counts = self.ledger.counts()
        return Sample(
            time_s,
            self.reserved_bytes,
            counts.committed_bytes,
            counts.free_bytes,
            counts.torch_bytes,
            self.shared_bytes,
            self.offloads.used_bytes,
            counts.budget_bytes,
        )

    def listen(self) -> None:
        """Be ready for what others ask for, from now on."""
        if self._listen is not None:
            listen, self._listen = self._listen, None
            listen()

    def heed(self) -> None:
        """Do what other processes have asked for since: take another budget, give idle memory back to the device."""
        if self.status is None or self.is_foreign:
            return
        with self.lock:
            self._obey()
            nbytes = self.status.asked_trim()
            if nbytes > 0:
                try:
                    self.reclaim(nbytes)
                    self.trim(max(self.ledger.free_bytes - nbytes, 0))
                finally:
                    self.status.trimmed()

    def live_pages(self) -> KeysView[Page]:
        """The pages that somebody has now, the oldest first."""
        with self.lock:
            return self._pages.copy().keys()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is counted exactly once and has its references."""
        with self.lock:
            live_bytes = sum(page.nbytes for page in self._pages if page.tier is Tier.DEVICE)
            offloaded_bytes = sum(page.nbytes for page in self._pages if page.is_outside)
            assert offloaded_bytes == self.offloads.used_bytes, (
                f"{offloaded_bytes} bytes are offloaded and {self.offloads.used_bytes} counted"
            )
            handles = [(page.tier, page.handle) for page in self._pages if page.tier is not Tier.DISCARDED]
            assert all(page.num_refs > 0 for page in self._pages), "a live page has no reference"
            assert all(0 <= page.num_held <= page.num_refs for page in self._pages), "a hold is not a reference"
            shared_bytes = sum(page.nbytes for page in self._pages if page.num_refs > 1)
            assert shared_bytes == self.shared_bytes, f"{shared_bytes} bytes are shared, {self.shared_bytes} counted"
            held_bytes = sum(page.nbytes for page in self._pages if page.num_held)
            assert held_bytes == self.held_bytes, f"{held_bytes} bytes are held and {self.held_bytes} counted"
            assert len(set(handles)) == len(handles), "two live pages have one handle"
            counts = self.ledger.counts()
            assert live_bytes + counts.free_bytes + counts.torch_bytes == counts.committed_bytes, (
                f"{live_bytes} live + {counts.free_bytes} pooled + {counts.torch_bytes} torch bytes are not the "
                f"{counts.committed_bytes} committed"
            )

    def _new_pages(self, handles: Sequence[int], sizes: Sequence[int], tier: Tier) -> list[Page]:
        pages = [Page(handle, nbytes, tier=tier) for handle, nbytes in zip(handles, sizes, strict=True)]
        self._pages.update(dict.fromkeys(pages))
        return pages

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
            self._offload(self._shortfall_bytes(missing_bytes))
            taken = self.ledger.take(nbytes)
        if taken is Take.OVER_BUDGET:
            shortfall_bytes = self._shortfall_bytes(missing_bytes)
            self.trim(max(self.ledger.free_bytes - shortfall_bytes, 0))
            taken = self.ledger.take(nbytes)
        if taken is Take.OVER_BUDGET:
            raise self._out_of_pages(asked_bytes, self.ledger.committed_bytes)
        handle = self._create(nbytes, missing_bytes, asked_bytes) if taken is Take.CHARGED else taken
        assert isinstance(handle, int)
        page = Page(handle, nbytes, salt, self._is_dirty(handle, taken is Take.CHARGED, salt))
        self._pages[page] = None
        return page

    def _destroy(self, pop: Callable[[], tuple[int, int] | None], nbytes: int) -> int:
        """Destroy what ``pop`` takes out of the pool until that are ``nbytes``, or more; returns the bytes."""
        freed_bytes = 0
        while not self.is_foreign and freed_bytes < nbytes and (popped := pop()) is not None:
            handle, page_bytes = popped
            try:
                self.driver.destroy(handle, page_bytes)
            except BaseException:
                self.ledger.put(handle, page_bytes)
                raise
            self._tenants.pop(handle, None)
            self.ledger.uncharge(page_bytes)
            freed_bytes += page_bytes
        self.publish()
        return freed_bytes

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
        refusal: DriverError | None = None
        try:
            for _ in self._ways_to_memory(missing_bytes):
                try:
                    return self.driver.create(nbytes)
                except DriverError as error:
                    if not error.is_out_of_memory:
                        raise
                    refusal = error
            # The device's limit, not the budget's: the page itself is charged already, and was not had.
            committed_bytes = self.ledger.committed_bytes - nbytes
            raise self._out_of_pages(asked_bytes, committed_bytes, is_device_full=True) from refusal
        except BaseException:
            self.ledger.uncharge(nbytes)
            raise
        finally:
            del refusal  # an error that its own traceback leads to would keep alive what else that does

    def _out_of_pages(self, asked_bytes: int, committed_bytes: int, is_device_full: bool = False) -> OutOfPagesError:
        return OutOfPagesError(
            self.device,
            asked_bytes,
            committed_bytes,
            self.budget_bytes,
            is_device_full=is_device_full,
            is_capturing=self.driver.is_capturing(),
        )

    def _ways_to_memory(self, missing_bytes: int) -> Iterator[None]:
        """Ways to have the device give more, each to be tried when the one before was in vain; the first is to ask."""
        yield
        for relieve in (self.reclaim, self._offload):
            relieve(missing_bytes)
            self.trim(max(self.ledger.free_bytes - missing_bytes, 0))
            yield
        yield from self.ask_others(missing_bytes)

    def _obey(self) -> None:
        """Take the budget that another process asked for, and return idle memory beyond it to the system."""
        asked = None if self.status is None else self.status.asked_budget()
        if asked is not None:
            self.budget_bytes = asked[0]
            for relieve in (self.reclaim, self._offload):
                shortfall_bytes = self._shortfall_bytes(0)
                if shortfall_bytes > 0:
                    relieve(shortfall_bytes)
                    self.trim(max(self.ledger.free_bytes - shortfall_bytes, 0))

    def _add_reference(self, page: Page) -> None:
        page.num_refs += 1
        if page.num_refs == 2:
            self.shared_bytes += page.nbytes

    def _put(self, page: Page) -> None:
        """Pool the memory of a page that nobody has any more."""
        if page.tier is Tier.DEVICE:
            if page.is_dirty:
                self._tenants.setdefault(page.handle, _UNKNOWN)
            self.ledger.put(page.handle, page.nbytes)
        elif page.is_outside:
            self.offloads.put(page.handle, page.nbytes)

    def _offload(self, nbytes: float) -> None:
        """Have at least ``nbytes`` pooled, if enough of what lives is idle and may leave the device."""
        for offload in self.offloaders:
            offload(nbytes)

    def make_room(self, nbytes: int) -> None:
        """Have so much of what is idle leave the device, or the pool, that ``nbytes`` more fit, if that can be done."""
        with self.lock:
            for relieve in (self.reclaim, self._offload):
                wanted_bytes = nbytes if self.budget_bytes is None else self._shortfall_bytes(nbytes)
                if self.ledger.free_bytes >= wanted_bytes:
                    break
                relieve(wanted_bytes)

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes more can be had without taking them from anybody."""
        counts, room_bytes = self.ledger.counts(), self.driver.free_bytes()
        if counts.budget_bytes is not None:
            room_bytes = min(room_bytes, counts.budget_bytes - counts.committed_bytes)
        return room_bytes + counts.free_bytes >= nbytes

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
        pool.ledger.show(None)  # in the parent's file


os.register_at_fork(after_in_child=_renew_locks_in_child)
