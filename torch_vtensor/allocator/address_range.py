"""AddressRange: one reserved interval of addresses, and which page backs which part of it.

    strip 0                           strip 1                           ...
    |## committed ##|                 |## committed ##|
    ^               ^                 ^
    0         committed_bytes     strip_bytes          (offsets, the same in every strip)

A range has one or more equal strips that grow in step, each from its own start: the rows of one slot, or of one head.

While a range sleeps, pages that back it are not mapped: their places are vacant. What is mapped at a page's place is
the memory that the page has now, because a page changes its memory only while it is mapped nowhere.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

from torch_vtensor.allocator.driver import round_up
from torch_vtensor.allocator.page_pool import Page, PagePool, Tier
from torch_vtensor.allocator.page_run import PageRun
from torch_vtensor.errors import DriverError

__all__ = ["AddressRange"]

_MOST_BYTES = 2**62


class AddressRange:
    """Reserves ``num_strips`` strips of ``strip_bytes`` addresses each, none of it backed by memory yet.

    Args:
        pool: where pages come from and go to.
        num_strips: how many parts grow in step.
        strip_bytes: addresses a strip; rounded up to whole pages.
        salt: the tenant whose memory it is.
        tag: by which it can be put to sleep apart from others.

    Raises: DriverError if the addresses cannot be had.
    """

    def __init__(
        self, pool: PagePool, num_strips: int, strip_bytes: int, salt: Hashable = None, tag: str = "kv_cache"
    ) -> None:
        self.pool = pool
        self.salt = salt
        self.tag = tag
        self.is_idle = False
        """Whether its memory may leave the device when that is short of memory: nobody uses it for now."""
        self.idle_since = 0
        self.away_at: int | None = None
        """Where it ended when its pages last found no room on the device, where they belong; None: they are there."""
        self.lease = threading.RLock()
        """Held by who writes or reads, lest its memory moves meanwhile; always taken before the pool's lock."""
        self.num_strips = num_strips
        self.strip_bytes = round_up(strip_bytes, pool.page_bytes)
        self.reserved_bytes = self.num_strips * self.strip_bytes
        if self.reserved_bytes > _MOST_BYTES:  # a driver would see the lowest 64 bits of it
            raise DriverError(
                "reserve", "ENOMEM", pool.device, self.reserved_bytes, "addresses have 64 bits; ask for less"
            )
        self.num_heads = 0  # detached and not yet emptied: the addresses are theirs too
        self._rest: AddressRange | None = None  # of a head: the range that it was detached from
        self._bounds = [0]  # page i of every strip backs offsets [_bounds[i], _bounds[i + 1])
        self._pages: list[list[Page]] = [[] for _ in range(num_strips)]
        self._strays: list[tuple[int, Page]] = []  # mapped, but not (yet) part of the range
        self._vacant: dict[int, bool] = {}  # places whose page is not usable there; True: something is mapped
        self.base_ptr = pool.driver.reserve(self.reserved_bytes)
        pool.tags.add(tag)
        pool.reserved_bytes += self.reserved_bytes
        pool.ranges[next(pool.range_numbers)] = self

    @property
    def head_bytes(self) -> int:
        """The first backed offset of every strip; above 0 once the front was given back."""
        return self._bounds[0]

    @property
    def committed_bytes(self) -> int:
        """The end of what is backed, as an offset in every strip."""
        return self._bounds[-1]

    @property
    def is_whole(self) -> bool:
        """True unless the front was given back, or this is such a front."""
        return self.head_bytes == 0 and self.reserved_bytes > 0

    @property
    def pages(self) -> list[Page]:
        """Every page that this range maps, strip by strip."""
        return [page for strip in self._pages for page in strip]

    @property
    def is_asleep(self) -> bool:
        """True while a page that backs it is not mapped."""
        return bool(self._vacant)

    @property
    def is_on_device(self) -> bool:
        """True while the device has all of its pages, mapped."""
        return not self._vacant and all(page.tier is Tier.DEVICE for page in self.pages)

    @property
    def outside_bytes(self) -> int:
        """Bytes of its pages that lie outside the device."""
        return sum(page.nbytes for page in set(self.pages) if page.is_outside)

    def note_away(self) -> None:
        """Remember whether pages are outside the device that were to be on it."""
        self.away_at = self.committed_bytes if self.outside_bytes else None

    def places(self) -> Iterator[tuple[int, Page]]:
        """The address of every page of this range, vacant ones included."""
        for strip, pages in enumerate(self._pages):
            for offset, page in zip(self._bounds, pages, strict=False):
                yield self._address(strip, offset), page

    def is_vacant(self, ptr: int) -> bool:
        """Whether the page that belongs at ``ptr`` is not mapped there."""
        return ptr in self._vacant

    def vacate(self, ptr: int, page: Page) -> None:
        """Unmap the page at ``ptr``, whose place it stays.

        Raises: DriverError, with the page still mapped.
        """
        if self._vacant.get(ptr, True):
            self.pool.driver.unmap(ptr, page.nbytes)
            self.pool.num_mappings -= 1
            self._vacant[ptr] = False

    def prepare(self, ptr: int, page: Page) -> None:
        """Map a page at a vacant place, which stays vacant until ``admit``: for those alone who fill the page.

        Raises: DriverError, with the place still vacant.
        """
        self.vacate(ptr, page)  # what an earlier failure left
        self.pool.driver.map(ptr, page.nbytes, page.handle)
        self.pool.num_mappings += 1
        self._vacant[ptr] = True
        self.pool.driver.set_access(ptr, page.nbytes)

    def admit(self, ptr: int) -> None:
        """Let everybody use what was prepared at ``ptr``, which is the memory of the page that belongs there."""
        del self._vacant[ptr]

    def occupy(self, ptr: int, page: Page) -> None:
        """Map the page at ``ptr`` again.

        Raises: DriverError, with the place still vacant.
        """
        self.prepare(ptr, page)
        self.admit(ptr)

    def merge(self, offset: int, num_pages: int) -> None:
        """Have the page that begins at ``offset`` of each strip, which grew by them, replace those behind it.

        Args:
            num_pages: how many they are, that one included: neither mapped nor anybody else's.

        Effects: the others are dropped. Cannot fail.
        """
        first = self._bounds.index(offset)
        bounds, pages, dropped = list(self._bounds), [list(strip) for strip in self._pages], []
        for index in range(self.num_strips):
            for later in range(first + 1, first + num_pages):
                is_mapped = self._vacant.pop(self._address(index, bounds[later]))
                assert not is_mapped, "pages are merged only while they are not mapped"
            dropped += pages[index][first + 1 : first + num_pages]
            del pages[index][first + 1 : first + num_pages]
        del bounds[first + 1 : first + num_pages]
        self._pages, self._bounds = pages, bounds
        self.pool.drop(dropped)

    def commit(self, nbytes: int, *, ahead: bool = False) -> None:
        """Back every strip up to offset ``nbytes`` (rounded up to a page) with pages of its own.

        Args:
            ahead: leave pages that need scrubbing to a later commit by the one whose stream will write to them.

        Raises: OutOfPagesError or DriverError, with the range as it was.
        """
        with self.pool.lock:  # from here on, as the scheduler's thread may be committing too
            assert self.reserved_bytes > 0, "a detached head does not grow"
            missing = min(nbytes, self.strip_bytes) - self.committed_bytes
            if missing <= 0 or (ahead and self.is_asleep):
                return
            self._unmap_strays()
            plan = self.pool.page_plan(missing)
            pages = self._acquire(plan, self.num_strips, ahead)
            if pages:
                self._map(pages)

    def commit_shared(self, source: AddressRange, source_strips: Sequence[int], nbytes: int) -> int:
        """Map the whole pages below offset ``nbytes`` of ``source``'s strips into this empty range.

        Strip i shares the pages of ``source_strips[i]``. Returns the offset up to which pages are shared.

        Raises: DriverError, with both ranges as they were.
        """
        with self.pool.lock:
            run = source.run(source_strips).whole_until(nbytes)
            self.commit_run(run.bounds, run.strips)
        return self.committed_bytes

    def commit_run(self, bounds: Sequence[int], strips: Sequence[Sequence[Page] | None]) -> None:
        """Map pages [``bounds[0]``, ``bounds[-1]``) into this empty range: a strip's given ones or, for None, new ones.

        Raises: OutOfPagesError or DriverError, with the range as it was.
        """
        assert self.committed_bytes == 0 and len(strips) == self.num_strips and bounds[-1] <= self.strip_bytes
        assert all(page.is_mappable for strip in strips if strip is not None for page in strip)
        with self.pool.lock:
            self._unmap_strays()
            sizes = [end - start for start, end in pairwise(bounds)]
            new = iter(self._acquire(sizes, sum(strip is None for strip in strips)))
            self.pool.share(page for strip in strips if strip is not None for page in strip)
            self._bounds = [bounds[0]]
            try:
                self._map([next(new) if strip is None else list(strip) for strip in strips])
            except BaseException:
                self._bounds = [0]
                raise

    def run(self, strips: Sequence[int]) -> PageRun:
        """The pages behind these strips."""
        with self.pool.lock:
            return PageRun(tuple(self._bounds), tuple(tuple(self._pages[strip]) for strip in strips))

    def detach_head(self, nbytes: int) -> AddressRange | None:
        """Hand the whole pages below offset ``nbytes`` to a new range over the same addresses, to be emptied later.

        They stay mapped until then, because views and the device may still read them. The new range owns no
        addresses, so this one must not be released before it. Returns None if no whole page lies below.
        """
        with self.pool.lock:
            num_pages = sum(end <= nbytes for end in self._bounds[1:])
            if num_pages == 0:
                return None
            head = AddressRange.__new__(AddressRange)
            head.pool, head.num_strips, head.strip_bytes = self.pool, self.num_strips, self.strip_bytes
            head.salt, head.tag, head.lease = self.salt, self.tag, self.lease
            head.is_idle, head.idle_since, head.away_at = self.is_idle, self.idle_since, None
            head.base_ptr, head.reserved_bytes = self.base_ptr, 0
            head.num_heads, head._rest = 0, self
            head._bounds = self._bounds[: num_pages + 1]
            head._pages, head._strays = [strip[:num_pages] for strip in self._pages], []
            self._bounds = self._bounds[num_pages:]
            self._pages = [strip[num_pages:] for strip in self._pages]
            head._vacant = {ptr: self._vacant.pop(ptr) for ptr, _ in head.places() if ptr in self._vacant}
            self.num_heads += 1
            self.pool.ranges[next(self.pool.range_numbers)] = head
            return head

    def exclusive_from(self) -> int:
        """The offset from which on no page of this range is mapped by another one."""
        with self.pool.lock:
            for index in range(len(self._bounds) - 2, -1, -1):
                if any(strip[index].num_refs > 1 for strip in self._pages):
                    return self._bounds[index + 1]
            return 0

    def common_heads(self) -> list[tuple[list[int], int]]:
        """Strips that begin with the same pages, and the offset up to which they do."""
        with self.pool.lock:
            by_first: dict[int, list[int]] = {}
            for strip, pages in enumerate(self._pages):
                if pages:
                    by_first.setdefault(id(pages[0]), []).append(strip)
            heads = []
            for strips in by_first.values():
                if len(strips) > 1:
                    side_by_side = zip(*(self._pages[strip] for strip in strips), strict=True)
                    common = itertools.takewhile(lambda pages: all(page is pages[0] for page in pages), side_by_side)
                    heads.append((strips, self._bounds[sum(1 for _ in common)]))
            return heads

    def empty(self) -> None:
        """Unmap everything and drop the pages. The device must be done with them.

        Raises: DriverError; strips already emptied stay so, and the call can be repeated.
        """
        with self.pool.lock:
            self._unmap_strays()
            start, nbytes = self.head_bytes, self.committed_bytes - self.head_bytes
            at_once = self.is_on_device
            if not at_once:  # what is mapped of them, one by one: no call for memory of two kinds
                for ptr, page in self.places():
                    self.vacate(ptr, page)
            for strip, pages in enumerate(self._pages):
                if pages:
                    if at_once:
                        self.pool.driver.unmap(self._address(strip, start), nbytes)
                        self.pool.num_mappings -= len(pages)
                    self._pages[strip] = []
                    self.pool.drop(pages)
            self._vacant.clear()
            self._bounds = [0]

    def release(self) -> int:
        """Give the addresses of an empty range back; returns how many bytes of them."""
        assert self.committed_bytes == 0 and self.num_heads == 0, "a range is released after it and its heads are empty"
        released_bytes = self.reserved_bytes
        if released_bytes:
            self.pool.driver.release(self.base_ptr, released_bytes)
            self.pool.reserved_bytes -= released_bytes
        self.reserved_bytes = 0
        if self._rest is not None:
            self._rest.num_heads -= 1
            self._rest = None
        return released_bytes

    def _address(self, strip: int, offset: int) -> int:
        return self.base_ptr + strip * self.strip_bytes + offset

    def _acquire(self, sizes: list[int], num_strips: int, ahead: bool = False) -> list[list[Page]]:
        """New pages of these sizes for each of ``num_strips`` strips; none if they would have to be scrubbed ahead."""
        pages = self.pool.acquire(sizes * num_strips, self.salt)
        if any(page.is_dirty for page in pages):
            is_capturing = self.pool.driver.is_capturing()
            if ahead or is_capturing:
                self.pool.drop(pages)
                if ahead:
                    return []
                raise DriverError(
                    "scrub", "CAPTURING", self.pool.device, sum(sizes) * num_strips,
                    "memory of another tenant cannot be overwritten while a graph is being captured; commit it before",
                )  # fmt: skip
        return [pages[i * len(sizes) : (i + 1) * len(sizes)] for i in range(num_strips)]

    def _map(self, pages: list[list[Page]]) -> None:
        """Map the same number of pages, of the same sizes, behind the end of every strip, or drop them all.

        If the driver fails in the undoing as well, what it left mapped is undone by the next ``commit`` or ``empty``.
        """
        driver, start = self.pool.driver, self.committed_bytes
        bounds = [start]
        for page in pages[0]:
            bounds.append(bounds[-1] + page.nbytes)
        if len(bounds) == 1:
            return
        unmapped = [page for strip_pages in reversed(pages) for page in reversed(strip_pages)]
        try:
            for strip, strip_pages in enumerate(pages):
                for offset, page in zip(bounds, strip_pages, strict=False):
                    driver.map(self._address(strip, offset), page.nbytes, page.handle)
                    self._strays.append((self._address(strip, offset), unmapped.pop()))
                    self.pool.num_mappings += 1
                if all(page.tier is Tier.DEVICE for page in strip_pages):
                    driver.set_access(self._address(strip, start), bounds[-1] - start)
                else:  # no call for memory of two kinds
                    for offset, page in zip(bounds, strip_pages, strict=False):
                        driver.set_access(self._address(strip, offset), page.nbytes)
            for ptr, page in self._strays:
                if page.is_dirty:
                    driver.tensor(ptr, page.nbytes, self).zero_()
            self.pool.scrubbed([page for _, page in self._strays])
        except BaseException:
            self.pool.drop(unmapped)
            with suppress(DriverError):
                self._unmap_strays()
            raise
        self._strays.clear()
        for strip, strip_pages in enumerate(pages):
            self._pages[strip] += strip_pages
        self._bounds += bounds[1:]

    def _unmap_strays(self) -> None:
        while self._strays:
            ptr, page = self._strays[-1]
            self.pool.driver.unmap(ptr, page.nbytes)
            self._strays.pop()
            self.pool.num_mappings -= 1
            self.pool.drop([page])

    def check_integrity(self) -> None:
        """Raise AssertionError unless offsets are contiguous and every strip has the same page sizes."""
        sizes = [end - start for start, end in pairwise(self._bounds)]
        assert self._vacant.keys() <= {ptr for ptr, _ in self.places()}, "a vacant place is of no page"
        for strip in self._pages:
            assert [page.nbytes for page in strip] == sizes, "a strip's pages do not match the range's offsets"
