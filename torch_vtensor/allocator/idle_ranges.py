"""IdleRanges: what nothing refers to any more, still mapped, until it is adopted or goes back to the pool.

parked      whole and nobody else's: the next sequence of its tenant may adopt it, mapped as it is
retired     to be unmapped once the device is done with it, whose pages are pooled then
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.driver import Fence
from torch_vtensor.allocator.page_pool import PagePool, Tier

__all__ = ["IdleRanges", "Left", "Uses"]

_LIVE_FRACTION = 5  # idle memory of 1/5 of what is live may stay, so that no more than 1.2 times what is live is kept


class _Idle(NamedTuple):
    """A range that nothing refers to, usable again after ``fence``."""

    range: AddressRange
    fence: Fence
    since: float


class Left(enum.Enum):
    """What there is to do after `give_back`: nothing; something that may become unwanted; or more at once."""

    NOTHING = enum.auto()
    WANTED = enum.auto()
    MORE = enum.auto()


class Uses(NamedTuple):
    """What the device's pages are there for, as in ``PoolStats``."""

    live_bytes: int
    shared_bytes: int
    prefix_bytes: int
    parked_bytes: int


class IdleRanges:
    """The idle ranges of a pool, the oldest first. Who uses it holds the pool's lock."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.num_device_waits = 0
        self._parked: list[_Idle] = []
        self._retired: list[_Idle] = []
        self._left: tuple[int, int, int] | None = None
        """Bytes left to `give_back`, and what there was then: to find that out takes a look at every page."""

    @property
    def has_retired(self) -> bool:
        """Whether anything waits to be unmapped."""
        return bool(self._retired)

    @property
    def has_memory(self) -> bool:
        """Whether anything is parked, retired or pooled."""
        return bool(self._parked or self._retired) or self.pool.ledger.free_bytes > 0

    def put(self, range_: AddressRange, fence: Fence, now: float) -> None:
        """Keep what died, to be adopted if that can be. No driver call.

        Args:
            fence: behind the work that may still use it.
            now: the time, in seconds.
        """
        adoptable = (
            range_.is_whole and range_.committed_bytes > 0 and range_.exclusive_from() == 0 and range_.is_on_device
        )
        range_.is_idle, range_.away_at = False, None
        (self._parked if adoptable else self._retired).append(_Idle(range_, fence, now))

    def adopt(self, num_strips: int, strip_bytes: int, most_bytes: int, salt: Hashable) -> AddressRange | None:
        """The range parked last of a tenant that has the addresses, and at most ``most_bytes`` a strip committed.

        Effects: the current stream's next work comes after that which used it. No driver call on memory.
        """
        for index in range(len(self._parked) - 1, -1, -1):
            parked = self._parked[index].range
            fits = parked.num_strips == num_strips and parked.strip_bytes >= strip_bytes
            if fits and parked.committed_bytes <= most_bytes and parked.salt == salt:
                self._parked[index].fence.order_after()
                del self._parked[index]
                return parked
        return None

    def uses(self) -> Uses:
        """What the pages that somebody has are there for."""
        pages = [page for page in self.pool.live_pages() if page.tier is Tier.DEVICE]
        idle_refs = Counter(page for idle in self._parked + self._retired for page in idle.range.pages)
        parked_bytes = sum(page.nbytes for page in pages if page.num_refs == idle_refs[page])
        prefixes = [page for page in pages if page.num_held and page.num_refs - idle_refs[page] == page.num_held]
        prefix_bytes = sum(page.nbytes for page in prefixes)
        num_uses = {page: page.num_refs - idle_refs[page] - max(page.num_held - 1, 0) for page in pages}
        return Uses(
            live_bytes=sum(page.nbytes for page in pages) - parked_bytes - prefix_bytes,
            shared_bytes=sum(page.nbytes for page in pages if num_uses[page] > 1),
            prefix_bytes=prefix_bytes,
            parked_bytes=parked_bytes,
        )

    def is_more_than(self, nbytes: int) -> bool:
        """Whether more than ``nbytes`` are parked or pooled."""
        return self._num_parked_bytes() + self.pool.ledger.free_bytes > nbytes

    def shrink(self, most_bytes: int, keep_bytes: int) -> None:
        """Unmap what is retired and, if more than ``most_bytes`` are parked or pooled, return all but ``keep_bytes``.

        Effects: nothing that the device is not done with; never waits for it.
        Raises:  DriverError, with what is left kept.
        """
        self.empty_retired(wait=False)
        if not self.is_more_than(most_bytes):
            return
        # Pooled pages first: a parked range saves its adopter the mapping as well.
        self.pool.trim(max(keep_bytes - self._num_parked_bytes(), 0))
        while self._parked and self._num_parked_bytes() > keep_bytes:
            self._retired.append(self._parked.pop(0))
            self.empty_retired(wait=False)
            self.pool.trim(max(keep_bytes - self._num_parked_bytes(), 0))

    def give_back(self, since: float, most_bytes: int) -> Left:
        """Return what nobody wants to the system, as far as more is idle than a fifth of what is live.

        That is pooled pages that are unwanted (``Ledger.watch``), then ranges parked since ``since`` or longer, those
        first that have been the longest.

        Args:
            most_bytes: stop when so many were returned.

        Effects: what is retired is unmapped. Nothing that the device is not done with; never waits for it.
        Raises:  DriverError, with what is left kept.
        """
        ledger = self.pool.ledger
        self.empty_retired(wait=False)
        if not (ledger.counts().unwanted_bytes or self._is_unwanted(since)):
            self._left = None
            return Left.WANTED if self.has_memory else Left.NOTHING
        left, self._left = self._left, None
        if left is not None and left[1:] == (len(self._parked), ledger.free_bytes):
            excess_bytes = left[0]
        else:
            uses = self.uses()
            excess_bytes = uses.parked_bytes + ledger.free_bytes - uses.live_bytes // _LIVE_FRACTION
        enough_bytes, freed_bytes = min(excess_bytes, most_bytes), 0
        while True:
            freed_bytes += self.pool.trim_unwanted(enough_bytes - freed_bytes)
            if freed_bytes >= enough_bytes:
                if freed_bytes >= excess_bytes:
                    return Left.NOTHING
                self._left = excess_bytes - freed_bytes, len(self._parked), ledger.free_bytes
                return Left.MORE
            if not self._is_unwanted(since):
                return Left.WANTED
            oldest = self._parked.pop(0)
            self._retired.append(oldest)
            sizes = Counter(page.nbytes for page in oldest.range.pages)
            self.empty_retired(wait=False)
            for nbytes, num_pages in sizes.items():
                ledger.give_up(nbytes, num_pages)

    def reclaim(self, nbytes: float) -> None:
        """Unmap until ``nbytes`` are pooled; waits for the device only if it must.

        Raises: DriverError, with what is left kept.
        """
        for wait in (False, True):
            self.empty_retired(wait, nbytes)
            for idle in list(self._parked):
                if self.pool.ledger.free_bytes >= nbytes:
                    return
                if wait or idle.fence.passed():
                    self._parked.remove(idle)
                    self._retired.append(idle)
                    self.empty_retired(wait, nbytes)

    def empty(self) -> None:
        """Unmap all; waits for the device.

        Raises: DriverError, with what is left kept.
        """
        self._retired += self._parked
        self._parked.clear()
        self.empty_retired(wait=True)

    def empty_retired(self, wait: bool, enough_bytes: float = math.inf) -> None:
        """Unmap what is retired until ``enough_bytes`` are pooled; by age, so that heads come before their rest.

        Args:
            wait: for the device, if it is not done with something; otherwise that stays.

        Raises: DriverError, with what is left kept.
        """
        remaining: list[_Idle] = []
        try:
            while self._retired and self.pool.ledger.free_bytes < enough_bytes:
                idle = self._retired[0]
                passed = idle.fence.passed()
                if idle.range.num_heads or not (passed or wait):
                    remaining.append(self._retired.pop(0))
                    continue
                if not passed:
                    self.num_device_waits += 1
                    idle.fence.wait()
                idle.range.empty()
                idle.range.release()
                self._retired.pop(0)
        finally:
            self._retired[:0] = remaining
            if self.pool.is_tiered:
                self.pool.note_tiers()

    def _is_unwanted(self, since: float) -> bool:
        """Whether the range that was parked first has been since then, and the device is done with it."""
        return bool(self._parked) and self._parked[0].since <= since and self._parked[0].fence.passed()

    def _num_parked_bytes(self) -> int:
        return sum(idle.range.committed_bytes * idle.range.num_strips for idle in self._parked)
