"""OffloadPool: memory outside a device that keeps what its pages held: taken, pooled, and given back to the system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_vtensor.allocator.timed_driver import TimedDriver
from torch_vtensor.errors import DriverError, OffloadLimitError

__all__ = ["OffloadPool"]


@dataclass(slots=True)
class _Place:
    """Addresses of a handle, and how far it is mapped there."""

    ptr: int
    is_mapped: bool = False
    is_accessible: bool = False


class OffloadPool:
    """Handles of memory outside a device, under a limit of their own. Who uses it holds the page pool's lock.

    What is put back stays pooled, because making it is slow: pinning 256 MiB for a GPU takes 60 ms. For the same reason
    each handle has addresses of its own, at which it stays mapped, where the driver says so. What is to be copied only
    is pinned, where there is a way to that: its handle is its address, below zero.

    Args:
        driver: the device's memory.
        limit_bytes: the most to have in use and pooled together; None for what the system gives.
    """

    def __init__(self, driver: TimedDriver, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.pooled_bytes = 0
        self._driver = driver
        self._pooled: dict[tuple[int, bool], list[int]] = {}  # by size, and whether they can be mapped
        self._places: dict[int, _Place] = {}

    def take(self, sizes: Sequence[int], *, mappable: bool) -> list[int]:
        """A handle of each size, all or none.

        Args:
            mappable: whether they are to be mapped beside the device's memory, too.

        Raises: OffloadLimitError, or the driver's error, with nothing taken.
        """
        if self.limit_bytes is not None and self.used_bytes + sum(sizes) > self.limit_bytes:
            raise OffloadLimitError(self._driver.device, sum(sizes), self.used_bytes, self.limit_bytes)
        spared: dict[tuple[int, bool], int] = {}  # pooled ones that will do
        missing: list[int] = []
        for nbytes, num in Counter(sizes).items():
            for is_mappable in [True] if mappable else [False, True]:
                spared[nbytes, is_mappable] = min(len(self._of(nbytes, is_mappable)), num)
                num -= spared[nbytes, is_mappable]
            missing += [nbytes] * num
        if missing:
            self._make_room(sum(sizes), sum(missing), spared)
            if self._driver.pins is not None and not mappable:
                self._driver.pins.pin(missing, self._keep_pinned)
        handles: list[int] = []
        try:
            for nbytes in sizes:
                handles.append(self._take_one(nbytes, mappable))
        except BaseException:
            for handle, nbytes in zip(handles, sizes, strict=False):
                self.put(handle, nbytes)
            raise
        return handles

    @staticmethod
    def is_mappable(handle: int) -> bool:
        """Whether a handle of this pool can be mapped, or has its one address for good."""
        return handle >= 0

    def ptr_of(self, handle: int) -> int | None:
        """Where a handle of this pool is for copies; None if it is mapped nowhere."""
        if not self.is_mappable(handle):
            return -handle
        place = self._places.get(handle)
        return place.ptr if place is not None and place.is_accessible else None

    def put(self, handle: int, nbytes: int) -> None:
        """Pool what nobody uses any more. No driver call, cannot fail."""
        self.used_bytes -= nbytes
        self.pooled_bytes += nbytes
        self._of(nbytes, self.is_mappable(handle)).append(handle)

    def trim(self) -> int:
        """Destroy what is pooled; returns bytes given back.

        Raises: DriverError with the refused handle still pooled.
        """
        return self._trim(0, {})

    def _trim(self, keep_bytes: int, spared: Mapping[tuple[int, bool], int]) -> int:
        """As ``trim``, until at most ``keep_bytes`` beyond what is spared stay."""
        left_bytes = self.pooled_bytes - sum(nbytes * num for (nbytes, _), num in spared.items())
        freed_bytes = 0
        for (nbytes, is_mappable), handles in self._pooled.items():
            while len(handles) > spared.get((nbytes, is_mappable), 0) and left_bytes > keep_bytes:
                if is_mappable:
                    self._unmap(handles[-1], nbytes)
                    self._driver.destroy(handles[-1], nbytes)
                elif self._driver.pins is not None:
                    self._driver.pins.unpin(-handles[-1], nbytes)
                handles.pop()
                self.pooled_bytes -= nbytes
                left_bytes -= nbytes
                freed_bytes += nbytes
        return freed_bytes

    def _make_room(self, wanted_bytes: int, new_bytes: int, spared: Mapping[tuple[int, bool], int]) -> None:
        """Have no more pooled that will not do than the limit, or else the system, leaves room for."""
        if self.limit_bytes is not None:
            self._trim(self.limit_bytes - self.used_bytes - wanted_bytes, spared)
        try:
            self._driver.check_offload(new_bytes)
        except DriverError:
            if not self._trim(0, spared):
                raise
            self._driver.check_offload(new_bytes)

    def _of(self, nbytes: int, is_mappable: bool) -> list[int]:
        return self._pooled.setdefault((nbytes, is_mappable), [])

    def _keep_pinned(self, ptr: int, nbytes: int) -> None:
        self._of(nbytes, False).append(-ptr)
        self.pooled_bytes += nbytes

    def _take_one(self, nbytes: int, mappable: bool) -> int:
        is_mappable = mappable or not self._of(nbytes, False)
        handles = self._of(nbytes, is_mappable)
        if is_mappable:
            if not handles:
                handles.append(self._driver.create_offloaded(nbytes))
                self.pooled_bytes += nbytes
            self._map(handles[-1], nbytes)
        self.pooled_bytes -= nbytes
        self.used_bytes += nbytes
        return handles.pop()

    def _map(self, handle: int, nbytes: int) -> None:
        """Raises: DriverError; what is left to do is done the next time."""
        if not self._driver.keeps_offloaded_mapped:
            return
        place = self._places.get(handle)
        if place is None:
            place = self._places[handle] = _Place(self._driver.reserve(nbytes))
        if not place.is_mapped:
            self._driver.map(place.ptr, nbytes, handle)
            place.is_mapped = True
        if not place.is_accessible:
            self._driver.set_access(place.ptr, nbytes)
            place.is_accessible = True

    def _unmap(self, handle: int, nbytes: int) -> None:
        """Raises: DriverError; what is left to do is done the next time."""
        place = self._places.get(handle)
        if place is None:
            return
        if place.is_mapped:
            self._driver.unmap(place.ptr, nbytes)
            place.is_mapped = place.is_accessible = False
        self._driver.release(place.ptr, nbytes)
        del self._places[handle]
