"""Pages change their memory, a chunk at a time: the host unmaps and maps some while the device copies others.

    leave     copy from where they are mapped | unmap, exchange, map again what is to be
    arrive    unmap, map the new memory, copy to it | once all is copied: exchange, and let it be used

What leaves is exchanged as it goes, so that the memory it had can be returned meanwhile. What arrives is at its own
addresses from the start, but nobody's until all of it is there.

Neighbours that leave together become one page if there are pages of their size: to map or unmap that one takes as long
as each of them. So what grew in small steps moves as fast, from the first time that it came back on, as what did not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.page_copy import Piece, Transfer, copy_pieces
from torch_vtensor.allocator.page_pool import Page, Tier
from torch_vtensor.errors import DriverError

if TYPE_CHECKING:
    from torch_vtensor.allocator.growth import GrowthScheduler

__all__ = ["Arrival", "Place", "Places", "Unit", "arrive", "leave", "units_of"]


class Place(NamedTuple):
    """Where a page belongs."""

    range: AddressRange
    ptr: int
    page: Page

    @property
    def is_vacant(self) -> bool:
        """Whether the page is not mapped there."""
        return self.range.is_vacant(self.ptr)


Places = Mapping[Page, Sequence[Place]]
"""All of those of every page."""


@dataclass(frozen=True, eq=False, slots=True)
class Unit:
    """What gets other memory at once: a page, or in each strip of a range the neighbours that become one page.

    ``pages`` has those of each strip, of which the first lives on; ``offset`` is where they begin in the range.
    """

    pages: Sequence[Sequence[Page]]
    range: AddressRange | None = None
    offset: int = 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of the memory for each strip."""
        return [sum(page.nbytes for page in several) for several in self.pages]

    @property
    def all_pages(self) -> list[Page]:
        """Those of every strip."""
        return [page for several in self.pages for page in several]


def units_of(pages: Collection[Page], places: Places) -> list[Unit]:
    """Pages as units: neighbours that nobody shares, and that have the size of one page, in one of them."""
    wanted = dict.fromkeys(pages)
    units: list[Unit] = []
    for range_ in dict.fromkeys(place.range for page in pages for place in places[page]):
        run = range_.run(range(range_.num_strips))
        columns = zip(*run.strips, strict=True)
        are_own = [all(it in wanted and it.num_refs == 1 and not it.num_held for it in column) for column in columns]
        for start, stop in _neighbours(run.sizes, are_own, range_.pool.driver.page_sizes):
            unit = Unit([strip[start:stop] for strip in run.strips], range_, run.bounds[start])
            units.append(unit)
            for page in unit.all_pages:
                del wanted[page]
    return units + [Unit([[page]]) for page in wanted]


def _neighbours(
    sizes: Sequence[int], are_own: Sequence[bool], page_sizes: Collection[int]
) -> Iterator[tuple[int, int]]:
    """Where pages that have the size of one begin and end: as many in one as can be, from the first on."""
    start = 0
    while start < len(sizes):
        nbytes, stop, best = 0, start, start + 1
        while nbytes < max(page_sizes) and stop < len(sizes) and are_own[stop]:
            nbytes += sizes[stop]
            stop += 1
            best = stop if nbytes in page_sizes else best
        if best > start + 1:
            yield start, best
        start = best


def leave(
    scheduler: GrowthScheduler,
    kept: Sequence[Unit],
    tier: Tier,
    places: Places,
    *,
    lost: Sequence[Unit] = (),
    unmapped: Sequence[Place] = (),
) -> None:
    """Unmap units wherever they are mapped and move them to ``tier``: offloaded ones are mapped again.

    Args:
        lost: what is discarded instead.
        unmapped: what is only unmapped.

    Effects: waits for the device. The memory of what is not mapped again goes back to the system.
    Raises:  OffloadLimitError with nothing changed; DriverError with each of the ``kept`` units as it was or in
        ``tier``, and all others as they were.
    """
    if not (kept or lost or unmapped):
        return
    pool = scheduler.pool
    outside = iter(pool.outside([nbytes for unit in kept for nbytes in unit.sizes], tier))
    left = {unit: [next(outside) for _ in unit.pages] for unit in kept}  # with their new memory
    left |= {unit: pool.discarded(unit.sizes) for unit in lost}
    for unit in left:
        pool.share(unit.all_pages)  # what ended meanwhile may be noticed in between

    def copied(pages: Sequence[Page], new: Page) -> list[Transfer]:
        mapped_at = next((place.ptr for place in places[pages[0]] if not place.is_vacant), None)
        return [Transfer(pages[0] if mapped_at is None else mapped_at, new, new.nbytes)]

    def vacate(pages: Iterable[Page]) -> None:
        for page in pages:
            for place in places[page]:
                place.range.vacate(place.ptr, page)

    def exchange(unit: Unit) -> None:
        new = left.pop(unit)
        for pages, it in zip(unit.pages, new, strict=True):
            pool.exchange(pages[0], it)
        if unit.range is not None:
            unit.range.merge(unit.offset, len(unit.pages[0]))
        pool.drop(new)
        pool.drop(unit.all_pages)

    def end(unit: Unit, strip: int) -> None:
        vacate(unit.pages[strip])
        if strip == len(unit.pages) - 1:
            exchange(unit)
            if tier is Tier.OFFLOADED:
                _occupy(place for pages in unit.pages for place in places[pages[0]])
            else:
                with suppress(DriverError):  # who has it sleep sees to what is left
                    pool.trim()

    def end_others() -> None:
        for place in unmapped:
            place.range.vacate(place.ptr, place.page)
        for unit in lost:
            vacate(unit.all_pages)
        for unit in lost:  # of which nothing is lost if something is refused
            exchange(unit)

    pieces = [
        Piece(new.nbytes, partial(copied, pages, new), partial(end, unit, strip))
        for unit in kept
        for strip, (pages, new) in enumerate(zip(unit.pages, left[unit], strict=True))
    ]
    try:
        pool.driver.fence().wait()  # whatever still writes to the pages, or reads
        copy_pieces(scheduler, [*pieces, Piece(0, list, end_others)])
    except BaseException:
        before = [*unmapped, *(place for unit in left for page in unit.all_pages for place in places[page])]
        with suppress(DriverError):
            _occupy(place for place in before if place.is_vacant)
        raise
    finally:
        for unit, new in left.items():
            pool.drop(new)
            pool.drop(unit.all_pages)


class Arrival(NamedTuple):
    """A page and the ``new`` one whose memory it gets; None: it is only mapped."""

    page: Page
    new: Page | None
    unmapped: Sequence[Place]
    """Where it is mapped now, and is not to be any more."""
    mapped: Sequence[Place]
    """Where it is mapped then."""


def arrive(scheduler: GrowthScheduler, arrivals: Sequence[Arrival]) -> None:
    """Give pages the memory of new ones, with what they hold, or zeros if that was discarded; drops the new ones.

    Effects: waits for the device.
    Raises:  DriverError, with all as it was.
    """
    pool = scheduler.pool
    pages, new = [it.page for it in arrivals], [it.new for it in arrivals if it.new is not None]
    begun: list[Arrival] = []

    def begin(it: Arrival) -> list[Transfer]:
        begun.append(it)
        for place in it.unmapped:
            place.range.vacate(place.ptr, it.page)
        for place in it.mapped:
            _twice(partial(place.range.prepare, place.ptr, it.new or it.page))
        if it.new is None:
            return []
        source = None if it.page.tier is Tier.DISCARDED else it.page
        return [Transfer(source, it.mapped[0].ptr if it.mapped else it.new, it.new.nbytes)]

    pool.share(pages)  # what ended meanwhile may be noticed in between
    try:
        if arrivals:
            pool.driver.fence().wait()  # whatever still writes to the pages, or reads
        copy_pieces(scheduler, [Piece(it.page.nbytes if it.new else 0, partial(begin, it)) for it in arrivals])
        pool.overwritten(new)
        for it in arrivals:
            if it.new is not None:
                pool.exchange(it.page, it.new)
            for place in it.mapped:
                place.range.admit(place.ptr)
    except BaseException:
        for it in begun:
            for place in it.mapped:
                if place.is_vacant:
                    with suppress(DriverError):
                        _twice(partial(place.range.vacate, place.ptr, it.page))
        with suppress(DriverError):
            _occupy(place for it in begun for place in it.unmapped if place.is_vacant)
        raise
    finally:
        pool.drop(new)
        pool.drop(pages)


def _occupy(places: Iterable[Place]) -> None:
    """Map pages at vacant places; raises the first refusal, with the others mapped."""
    refusals: list[DriverError] = []
    for place in places:
        try:
            _twice(partial(place.range.occupy, place.ptr, place.page))
        except DriverError as error:
            refusals.append(error)
    try:
        if refusals:
            raise refusals[0]
    finally:
        refusals.clear()  # as in PagePool


def _twice(call: Callable[[], None]) -> None:
    """Do what may be refused, again at once if it is."""
    try:
        call()
    except DriverError:
        call()
