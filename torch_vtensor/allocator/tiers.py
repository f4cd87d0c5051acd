"""Pages leave the device and come back, under addresses that stay, so that views and captured graphs stay valid.

    sleep      [ 7 ][ 2 ]  ──copy──>  pages outside the device;  the addresses have nothing behind them
    offload    [ 7 ][ 2 ]  ──copy──>  the same, mapped at the same addresses: reads and writes go on, slower
    discard    [ 7 ][ 2 ]             what they held is gone; they come back as zeros
    wake, prefetch                    new pages of the device, filled, and mapped at the same addresses

All the new memory is taken first. Then every page moves on its own (``moves``): until its memory is exchanged, which
cannot fail, the old one has everything, and from there on the new one.

Nothing moves under somebody's hands: who writes to a range, or reads while others may move it, holds its lease. What
is idle and leased stays; ``sleep`` waits. A page that several ranges map moves once. What the driver refuses to map is
tried again at once; a range of which a page could still not be mapped sleeps, with all of its rows, until ``wake``
succeeds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.captures import no_captures, outside_captures
from torch_vtensor.allocator.moves import Arrival, Place, arrive, leave, units_of
from torch_vtensor.allocator.page_pool import Page, PagePool, Tier
from torch_vtensor.errors import DriverError, OffloadLimitError, OutOfPagesError, VTensorError

if TYPE_CHECKING:
    from torch_vtensor.allocator.growth import GrowthScheduler

__all__ = [
    "PREFIX_TAG",
    "Leases",
    "Rounds",
    "Sleeper",
    "between_uses",
    "call",
    "has_tag",
    "keep_captures_out",
    "make_mappable",
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

    Nor does another thread capture a graph: see `outside_captures`.

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
                    held.enter_context(outside_captures(pool.driver, pool.lock))
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


PREFIX_TAG = "kv_cache"
"""By which pages sleep that only a prefix tree holds."""


def put_to_sleep(scheduler: GrowthScheduler, tags: Collection[str] | None, discard: Collection[str] | None) -> None:
    """Unmap the ranges with these tags (None: all), and take what then nobody maps from the device.

    Args:
        discard: tags whose pages lose what they hold (None: all), unless a prefix tree holds them.

    Effects: waits for the device. Views of these ranges must not be used until ``wake``.
    Raises:  OffloadLimitError or DriverError, with every range as it was, or awake; or asleep, where the device had no
        memory for it any more: ``wake`` it later.
    """
    pool = scheduler.pool
    with pool.lock:
        places = _places_of(pool)
        ranges = {range_ for range_ in pool.ranges.values() if has_tag(range_.tag, tags)}
        leaving, unmapped = [], []
        for page, at in places.items():
            mapped = [place for place in at if not place.is_vacant]
            going = [place for place in mapped if place.range in ranges]
            is_prefix_only = page.num_held > 0 and not at
            if len(going) == len(mapped) and (going or (is_prefix_only and has_tag(PREFIX_TAG, tags))):
                leaving.append(page)
            unmapped += going
        lost = dict.fromkeys(page for page in leaving if _is_discarded(page, places[page], discard))
        kept = dict.fromkeys(page for page in leaving if page.tier is Tier.DEVICE and page not in lost)
        only_unmapped = [place for place in unmapped if place.page not in lost and place.page not in kept]
        try:
            leave(
                scheduler,
                units_of(kept, places),
                Tier.ASLEEP,
                places,
                lost=units_of(lost, places),
                unmapped=only_unmapped,
            )
        except BaseException:
            before = {(place.range, place.ptr) for place in unmapped}
            gone = [page for page in pool.live_pages() if page in kept and page.tier is Tier.ASLEEP]
            with suppress(VTensorError):
                _bring_back(scheduler, gone, lambda place: (place.range, place.ptr) in before)
            raise


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
            and (any(_wakes(place, tags) for place in at) if at else page.num_held > 0 and has_tag(PREFIX_TAG, tags))
        ]
        _bring_back(scheduler, coming, lambda place: _wakes(place, tags))


def offload(scheduler: GrowthScheduler, ranges: Collection[AddressRange]) -> int:
    """Move the pages of idle ranges to outside the device, at the same addresses; returns the bytes that left it.

    Pages that a range maps which is not idle, or in use by another thread, stay.

    Effects: waits for the device.
    Raises:  OffloadLimitError or DriverError, with every row where it was, or outside the device.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        places, leases = _places_of(pool), Leases(held)
        pages = [
            page
            for page, at in places.items()
            if page.tier is Tier.DEVICE
            and any(place.range in ranges for place in at)
            and all(place.range.is_idle and not place.range.is_asleep and leases.take(place.range) for place in at)
        ]
        left_bytes = sum(page.nbytes for page in pages)
        leave(scheduler, units_of(pages, places), Tier.OFFLOADED, places)
        return left_bytes


def prefetch(scheduler: GrowthScheduler, ranges: Collection[AddressRange]) -> int:
    """Bring the pages of these ranges back to the device, at the same addresses; returns the bytes.

    Pages that another range maps as well, which is not idle, stay.

    Effects: waits for the device.
    Raises:  OutOfPagesError or DriverError, with every row where it was, or on the device.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        leases = Leases(held)
        wanted = [
            page
            for page, at in _places_of(pool).items()
            if page.is_outside and any(place.range in ranges for place in at) and _may_move(at, leases, ranges)
        ]
        _bring_back(scheduler, wanted, lambda place: False)
        return sum(page.nbytes for page in wanted)


def make_mappable(scheduler: GrowthScheduler, pages: Iterable[Page]) -> None:
    """Move those of the pages that sleep where they cannot be mapped: to the device or, without room, to outside of it.

    Effects: waits for the device if there are any.
    Raises:  OffloadLimitError or DriverError, or VTensorError while a graph is being captured, with all as it was.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        asleep = [page for page in dict.fromkeys(pages) if page.tier is Tier.ASLEEP and not page.is_mappable]
        if not asleep:
            return
        keep_captures_out(pool, held)
        try:
            _bring_back(scheduler, asleep, lambda place: False)
        except OutOfPagesError:
            new = pool.outside([page.nbytes for page in asleep], Tier.ASLEEP, mappable=True)
            arrive(scheduler, [Arrival(page, it, [], []) for page, it in zip(asleep, new, strict=True)])


def offload_idle(scheduler: GrowthScheduler, nbytes: float) -> None:
    """Offload idle ranges, the one that is so the longest first, until ``nbytes`` are pooled or none is left.

    Effects: nothing while a graph is being captured; stops at what cannot be offloaded, without an error.
    """
    pool = scheduler.pool
    with pool.lock, ExitStack() as held:
        if not no_captures(pool.driver, held):
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


def _places_of(pool: PagePool) -> dict[Page, list[Place]]:
    """Where every page belongs; one that only a prefix tree holds, or a ``Sleeper``, belongs nowhere."""
    places: dict[Page, list[Place]] = {page: [] for page in pool.live_pages()}
    for range_ in list(pool.ranges.values()):
        for ptr, page in range_.places():
            places[page].append(Place(range_, ptr, page))
    return places


def has_tag(tag: str, tags: Collection[str] | None) -> bool:
    """Whether ``tag`` is among ``tags``, which are all that there are if None."""
    return tags is None or tag in tags


def _wakes(place: Place, tags: Collection[str] | None) -> bool:
    return place.is_vacant and has_tag(place.range.tag, tags)


def _may_move(at: list[Place], leases: Leases, own: Collection[AddressRange] = ()) -> bool:
    """Whether a page may be unmapped for a moment wherever it is mapped: nobody but the caller uses it there."""
    return all(
        place.range in own or place.is_vacant or (place.range.is_idle and leases.take(place.range)) for place in at
    )


def _is_discarded(page: Page, at: list[Place], discard: Collection[str] | None) -> bool:
    return page.num_held == 0 and all(has_tag(place.range.tag, discard) for place in at)


def keep_captures_out(pool: PagePool, held: ExitStack) -> None:
    """Have no other thread begin to capture a graph until ``held`` ends: memory moves behind fences. Waits for nothing.

    Raises: VTensorError while a graph is being captured, ForkedProcessError in a child process.
    """
    pool.check_process()
    if not no_captures(pool.driver, held):
        whose = "a graph is" if pool.driver.is_capturing_here() else "another thread's graph is still"
        raise VTensorError(
            f"memory on {pool.device} cannot change places while {whose} being captured: sleep, wake, offload or "
            "prefetch before the capture, or after it."
        )


def _bring_back(scheduler: GrowthScheduler, pages: list[Page], is_mapped: Callable[[Place], bool]) -> None:
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
        new_of = dict(zip((page for of_tenant in pages_of.values() for page in of_tenant), new, strict=True))
        arrivals = []
        for page, at in _places_of(pool).items():
            woken = [place for place in at if is_mapped(place)]
            unmapped = [place for place in at if page in new_of and not place.is_vacant]
            if page in new_of or woken:
                arrivals.append(Arrival(page, new_of.get(page), unmapped, [*unmapped, *woken]))
        arrive(scheduler, arrivals)
    finally:
        pool.drop(pages)
