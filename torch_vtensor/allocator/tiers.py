"""Pages leave the device and come back, under addresses that stay, so that views and captured graphs stay valid.

    sleep      [ 7 ][ 2 ]  ──copy──>  pages outside the device;  the addresses have nothing behind them
    offload    [ 7 ][ 2 ]  ──copy──>  the same, mapped at the same addresses: reads and writes go on, slower
    discard    [ 7 ][ 2 ]             what they held is gone; they come back as zeros
    wake, prefetch                    new pages of the device, filled, and mapped at the same addresses

Every move has the same steps, for all of its pages at once. Up to the one in the middle, which cannot fail, the old
memory has everything; from there on, the new one has.

    1  take the new memory            2  copy, over addresses of its own, and wait for the device
    3  unmap the old memory           4  exchange what the pages stand for           5  map the new memory

Nothing moves under somebody's hands: who writes to a range, or reads while others may move it, holds its lease. What
is idle and leased stays; ``sleep`` waits. A page that several ranges map moves once. What the driver refuses in step 3
or 5 is tried again at once; a range of which a page could still not be mapped sleeps, with all of its rows, until
``wake`` succeeds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.page_copy import Transfer, copy_pages
from torch_vtensor.allocator.page_pool import Page, PagePool, Tier
from torch_vtensor.errors import DriverError, OffloadLimitError, VTensorError

if TYPE_CHECKING:
    from torch_vtensor.allocator.growth import GrowthScheduler

__all__ = [
    "PREFIX_TAG",
    "Leases",
    "Rounds",
    "Sleeper",
    "between_uses",
    "call",
    "check_can_move",
    "has_tag",
    "offload",
    "offload_idle",
    "prefetch",
    "put_to_sleep",
    "wake",
]


class Sleeper(Protocol):
    """Who has memory of a pool beside its ranges, and can do without it for a while."""

    @property
    def is_asleep(self) -> bool:
        """Whether any of it sleeps."""

    def sleep(self, scheduler: GrowthScheduler, tags: Collection[str] | None, discard: Collection[str] | None) -> None:
        """As ``put_to_sleep``."""

    def wake(self, scheduler: GrowthScheduler, tags: Collection[str] | None) -> None:
        """As ``wake``."""


class Rounds:
    """Work over a pool's memory, round after round or once: none begins while the memory moves.

    Who runs them holds ``lock`` in each one, taken before the pool's, and looks first at what sleeps.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.num_discards = 0
        """How often rows were discarded."""


_MOST_SECONDS = 10.0  # that a call waits before it begins: a mover may wait for a lease that the caller has


class _Calls:
    """Calls of generate() under way in this process, on whatever device: a device may get its pool in one of them."""

    def __init__(self) -> None:
        self.running: list[Rounds] = []
        self.of_thread = threading.local()
        self._changed = threading.Condition()
        self._num_movers = 0
        self._mover_inside: int | None = None  # the thread that moves memory from inside a call of its own

    def begin(self, rounds: Rounds, is_inside: bool) -> None:
        """Note a call, which is inside another one of its thread, or begins once nobody waits for calls to end."""
        with self._changed:
            if not is_inside:
                self._changed.wait_for(lambda: self._num_movers == 0, _MOST_SECONDS)
            self.running.append(rounds)

    @contextmanager
    def no_more(self) -> Iterator[None]:
        """A block in which no call begins, but inside another one of its thread.

        Raises: VTensorError inside a call, if another thread does the same: each would wait for the other's to end.
        """
        thread = threading.get_ident() if getattr(self.of_thread, "depth", 0) else None
        with self._changed:
            before = self._mover_inside
            if thread is not None and before not in (None, thread):
                raise VTensorError(
                    "another thread moves memory from inside generate() and waits for this call of it to end: sleep or "
                    "wake after the call."
                )
            self._num_movers += 1
            self._mover_inside = before or thread
        try:
            yield
        finally:
            with self._changed:
                self._num_movers -= 1
                if thread is not None:
                    self._mover_inside = before
                self._changed.notify_all()


_calls = _Calls()


@contextmanager
def call() -> Iterator[None]:
    """A block during which no memory moves, of a call of generate(); waits for what moves some now."""
    calls, rounds = _calls, Rounds()
    depth = getattr(calls.of_thread, "depth", 0)
    with rounds.lock:
        calls.begin(rounds, depth > 0)
        calls.of_thread.depth = depth + 1
        try:
            yield
        finally:
            calls.of_thread.depth = depth
            calls.running.remove(rounds)


def _start_afresh_in_child() -> None:
    global _calls
    _calls = _Calls()


os.register_at_fork(after_in_child=_start_afresh_in_child)


@contextmanager
def between_uses(pool: PagePool, tags: Collection[str] | None) -> Iterator[None]:
    """Hold the pool's lock while nobody is in a call or a round, or has a lease on a range with these tags (None: any).

    Raises: VTensorError inside a call of generate(), if another thread does the same.
    """
    awaited: threading.RLock | None = None
    with _calls.no_more():
        while True:
            with ExitStack() as held:
                if awaited is not None:  # with nothing held that its holder may be waiting for
                    held.enter_context(awaited)
                several = [*_calls.running, *pool.rounds]
                awaited = next((rounds.lock for rounds in several if not _taken(rounds.lock, held)), None)
                if awaited is None:
                    held.enter_context(pool.lock)
                    leases, ranges = Leases(held), [it for it in list(pool.ranges.values()) if has_tag(it.tag, tags)]
                    awaited = next((range_.lease for range_ in ranges if not leases.take(range_)), None)
                    if awaited is None and all(rounds in several for rounds in pool.rounds):  # nobody began meanwhile
                        yield
                        return


def _taken(lock: threading.RLock, held: ExitStack) -> bool:
    """Whether nobody else had the lock, which is held until ``held`` ends."""
    is_free = lock.acquire(blocking=False)
    if is_free:
        held.callback(lock.release)
    return is_free


class Leases:
    """The leases of ranges that nobody else uses, until ``held`` ends. Who takes some holds the pool's lock.

    Never waits: users take the pool's lock while they have a lease.
    """

    def __init__(self, held: ExitStack) -> None:
        self._held = held
        self._known: dict[AddressRange, bool] = {}

    def take(self, range_: AddressRange) -> bool:
        """Whether the range stays as it is until then, as far as users go."""
        if range_ not in self._known:
            self._known[range_] = _taken(range_.lease, self._held)
        return self._known[range_]


_Places = dict[Page, list[tuple[AddressRange, int]]]
PREFIX_TAG = "kv_cache"
"""By which pages sleep that only a prefix tree holds."""


def put_to_sleep(scheduler: GrowthScheduler, tags: Collection[str] | None, discard: Collection[str] | None) -> None:
    """Unmap the ranges with these tags (None: all), and take what then nobody maps from the device.

    Args:
        discard: tags whose pages lose what they hold (None: all), unless a prefix tree holds them.

    Effects: waits for the device. Views of these ranges must not be used until ``wake``.
    Raises:  OffloadLimitError or DriverError, with every range as it was, or awake.
    """
    pool = scheduler.pool
    with pool.lock:
        places = _places_of(pool)
        ranges = {range_ for range_ in pool.ranges.values() if has_tag(range_.tag, tags)}
        leaving, unmapped = [], []
        for page, at in places.items():
            mapped = [(range_, ptr) for range_, ptr in at if not range_.is_vacant(ptr)]
            going = [(range_, ptr) for range_, ptr in mapped if range_ in ranges]
            unmapped += [(range_, ptr, page) for range_, ptr in going]
            is_prefix_only = page.num_held > 0 and not at
            if len(going) == len(mapped) and (going or (is_prefix_only and has_tag(PREFIX_TAG, tags))):
                leaving.append(page)
        lost = dict.fromkeys(page for page in leaving if _is_discarded(page, places[page], discard))
        kept = [page for page in leaving if page.tier is Tier.DEVICE and page not in lost]
        new = pool.outside([page.nbytes for page in kept], Tier.ASLEEP)
        new += pool.discarded([page.nbytes for page in lost])
        _move(scheduler, [*kept, *lost], new, unmapped, [], places)


def wake(scheduler: GrowthScheduler, tags: Collection[str] | None) -> None:
    """Map the ranges with these tags (None: all) at their addresses again, with all that they held.

    Effects: waits for the device. Rows that were discarded are zeros. What was offloaded before is so again, and what
        somebody uses outside the device stays there.
    Raises:  OutOfPagesError or DriverError, with every range as it was, or awake.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        leases = Leases(held)
        coming = [
            page
            for page, at in _places_of(pool).items()
            if page.tier in (Tier.ASLEEP, Tier.DISCARDED)
            and _may_move(at, leases)
            and (
                any(_wakes(range_, ptr, tags) for range_, ptr in at)
                if at
                else page.num_held > 0 and has_tag(PREFIX_TAG, tags)
            )
        ]
        _bring_back(scheduler, coming, lambda range_, ptr: _wakes(range_, ptr, tags))


def offload(scheduler: GrowthScheduler, ranges: Collection[AddressRange]) -> int:
    """Move the pages of idle ranges to outside the device, at the same addresses; returns the bytes that left it.

    Pages that a range maps which is not idle, or in use by another thread, stay.

    Effects: waits for the device.
    Raises:  OffloadLimitError or DriverError, with every row where it was, or outside the device.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        check_can_move(pool)
        places, leases = _places_of(pool), Leases(held)
        pages = [
            page
            for page, at in places.items()
            if page.tier is Tier.DEVICE
            and any(range_ in ranges for range_, _ in at)
            and all(range_.is_idle and not range_.is_asleep and leases.take(range_) for range_, _ in at)
        ]
        unmapped = [(range_, ptr, page) for page in pages for range_, ptr in places[page]]
        new = pool.outside([page.nbytes for page in pages], Tier.OFFLOADED)
        _move(scheduler, pages, new, unmapped, unmapped, places)
        return sum(page.nbytes for page in pages)


def prefetch(scheduler: GrowthScheduler, ranges: Collection[AddressRange]) -> int:
    """Bring the pages of these ranges back to the device, at the same addresses; returns the bytes.

    Pages that another range maps as well, which is not idle, stay.

    Effects: waits for the device.
    Raises:  OutOfPagesError or DriverError, with every row where it was, or on the device.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        check_can_move(pool)
        leases = Leases(held)
        wanted = [
            page
            for page, at in _places_of(pool).items()
            if page.is_outside and any(range_ in ranges for range_, _ in at) and _may_move(at, leases, ranges)
        ]
        _bring_back(scheduler, wanted, lambda range_, ptr: False)
        return sum(page.nbytes for page in wanted)


def offload_idle(scheduler: GrowthScheduler, nbytes: float) -> None:
    """Offload idle ranges, the one that is so the longest first, until ``nbytes`` are pooled or none is left.

    Effects: nothing while a graph is being captured; stops at what cannot be offloaded, without an error.
    """
    pool = scheduler.pool
    with pool.lock:
        if pool.driver.is_capturing():
            return
        idle = [range_ for range_ in pool.ranges.values() if range_.is_idle and not range_.is_asleep]
        for range_ in sorted(idle, key=lambda range_: range_.idle_since):
            if pool.ledger.free_bytes >= nbytes:
                return
            try:
                offload(scheduler, [range_])
            except OffloadLimitError:
                return
            except DriverError as error:
                if not error.is_out_of_memory:
                    raise
                return


def _places_of(pool: PagePool) -> _Places:
    """Where every page belongs; one that only a prefix tree holds, or a ``Sleeper``, belongs nowhere."""
    places: _Places = {page: [] for page in pool.live_pages()}
    for range_ in list(pool.ranges.values()):
        for ptr, page in range_.places():
            places[page].append((range_, ptr))
    return places


def has_tag(tag: str, tags: Collection[str] | None) -> bool:
    """Whether ``tag`` is among ``tags``, which are all that there are if None."""
    return tags is None or tag in tags


def _wakes(range_: AddressRange, ptr: int, tags: Collection[str] | None) -> bool:
    return range_.is_vacant(ptr) and has_tag(range_.tag, tags)


def _may_move(at: list[tuple[AddressRange, int]], leases: Leases, own: Collection[AddressRange] = ()) -> bool:
    """Whether a page may be unmapped for a moment wherever it is mapped: nobody but the caller uses it there."""
    return all(range_ in own or range_.is_vacant(ptr) or (range_.is_idle and leases.take(range_)) for range_, ptr in at)


def _is_discarded(page: Page, at: list[tuple[AddressRange, int]], discard: Collection[str] | None) -> bool:
    return page.num_held == 0 and all(has_tag(range_.tag, discard) for range_, _ in at)


def check_can_move(pool: PagePool) -> None:
    """Raise VTensorError while a graph is being captured, ForkedProcessError in a child process."""
    pool.check_process()
    if pool.driver.is_capturing():
        raise VTensorError(
            f"memory on {pool.device} cannot change places while a graph is being captured: sleep, wake, offload or "
            "prefetch before the capture, or after it."
        )


def _bring_back(scheduler: GrowthScheduler, pages: list[Page], is_mapped: Callable[[AddressRange, int], bool]) -> None:
    """Give ``pages`` memory of the device again, wherever they are mapped, and map all vacant places that are to be."""
    pool = scheduler.pool
    pool.share(pages)  # to take memory for them may let go of prefixes, and empty ranges that ended
    try:
        pages_of: dict[Hashable, list[Page]] = {}
        for page in pages:
            pages_of.setdefault(page.salt, []).append(page)
        new: list[Page] = []
        try:
            for salt, of_tenant in pages_of.items():
                new += pool.acquire([page.nbytes for page in of_tenant], salt)
        except BaseException:
            pool.drop(new)
            raise
        pages = [page for of_tenant in pages_of.values() for page in of_tenant]
        places = _places_of(pool)
        unmapped = [(range_, ptr, page) for page in pages for range_, ptr in places[page] if not range_.is_vacant(ptr)]
        woken = [(range_, ptr, page) for page, at in places.items() for range_, ptr in at if is_mapped(range_, ptr)]
        _move(scheduler, pages, new, unmapped, unmapped + woken, places)
    finally:
        pool.drop(pages)


def _move(
    scheduler: GrowthScheduler,
    pages: Sequence[Page],
    new: Sequence[Page],
    unmapped: Sequence[tuple[AddressRange, int, Page]],
    mapped: Sequence[tuple[AddressRange, int, Page]],
    places: _Places,
) -> None:
    """Exchange the memory of ``pages`` for that of ``new``, which are dropped, by the steps above.

    Args:
        unmapped: places to unmap before; those of ``pages``, and maybe more.
        mapped: places to map after.

    Raises: DriverError; where nothing was exchanged yet, with everything mapped that was.
    """
    pool = scheduler.pool
    pool.share(pages)  # what ended meanwhile may be noticed in between
    try:
        filled = [(page, it) for page, it in zip(pages, new, strict=True) if it.tier is not Tier.DISCARDED]
        if filled or unmapped:
            pool.driver.fence().wait()  # whatever still writes to the pages, or reads
        if filled:
            _fill(scheduler, filled, places)
        try:
            for range_, ptr, page in unmapped:
                range_.vacate(ptr, page)
        except BaseException:
            with suppress(DriverError):
                _map((range_, ptr, page) for range_, ptr, page in unmapped if range_.is_vacant(ptr))
            raise
        for page, it in zip(pages, new, strict=True):
            pool.exchange(page, it)
        _map(mapped)
    finally:
        pool.drop(new)
        pool.drop(pages)


def _map(places: Iterable[tuple[AddressRange, int, Page]]) -> None:
    """Map pages at vacant places, twice those that are refused; raises the first refusal, with the others mapped."""
    refused = []
    for place in places:
        try:
            place[0].occupy(*place[1:])
        except DriverError:
            refused.append(place)
    refusals: list[DriverError] = []
    for range_, ptr, page in refused:
        try:
            range_.occupy(ptr, page)
        except DriverError as error:
            refusals.append(error)
    try:
        if refusals:
            raise refusals[0]
    finally:
        refusals.clear()  # as in PagePool


def _fill(scheduler: GrowthScheduler, filled: Sequence[tuple[Page, Page]], places: _Places) -> None:
    """Copy what the first page of each pair holds to the second, zeros where it has nothing; waits for the device."""
    transfers = []
    for page, it in filled:
        mapped_at = next((ptr for range_, ptr in places[page] if not range_.is_vacant(ptr)), None)
        source = None if page.tier is Tier.DISCARDED else page if mapped_at is None else mapped_at
        transfers.append(Transfer(source, it, it.nbytes))
    copy_pages(scheduler, transfers)
    scheduler.pool.overwritten([it for _, it in filled])
