"""OffloadPool: memory outside a device that keeps what its pages held: taken, pooled, and given back to the system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch_vtensor.allocator.timed_driver import TimedDriver
from torch_vtensor.errors import OffloadLimitError

__all__ = ["OffloadPool"]


@dataclass(slots=True)
class _Place:
    """Addresses of a handle, and how far it is mapped there."""

    ptr: int
    is_mapped: bool = False
    is_accessible: bool = False


class OffloadPool:
    """Handles of offloaded memory, under a limit of their own. Who uses it holds the page pool's lock.

    What is put back stays pooled, because making it is slow: pinning 256 MiB for a GPU takes 60 ms. For the same reason
    each handle has addresses of its own, at which it stays mapped, where the driver says so.

    Args:
        driver: the device's memory.
        limit_bytes: the most to have in use and pooled together; None for what the system gives.
    """

    def __init__(self, driver: TimedDriver, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.pooled_bytes = 0
        self._driver = driver
        self._pooled: dict[int, list[int]] = {}
        self._places: dict[int, _Place] = {}

    def take(self, sizes: Sequence[int]) -> list[int]:
        """A handle of each size, all or none.

        Raises: OffloadLimitError, or the driver's error, with nothing taken.
        """
        if self.limit_bytes is not None and self.used_bytes + sum(sizes) > self.limit_bytes:
            raise OffloadLimitError(self._driver.device, sum(sizes), self.used_bytes, self.limit_bytes)
        num_wanted = Counter(sizes)
        new_bytes = sum(nbytes * max(num - len(self._pooled.get(nbytes, ())), 0) for nbytes, num in num_wanted.items())
        if new_bytes:
            self._driver.check_offload(new_bytes)
        handles: list[int] = []
        try:
            for nbytes in sizes:
                handles.append(self._take_one(nbytes))
        except BaseException:
            for handle, nbytes in zip(handles, sizes, strict=False):
                self.put(handle, nbytes)
            raise
        return handles

    def ptr_of(self, handle: int) -> int | None:
        """Where a handle of this pool is mapped for copies; None if it is nowhere."""
        place = self._places.get(handle)
        return place.ptr if place is not None and place.is_accessible else None

    def put(self, handle: int, nbytes: int) -> None:
        """Pool what nobody uses any more. No driver call, cannot fail."""
        self.used_bytes -= nbytes
        self.pooled_bytes += nbytes
        self._pooled.setdefault(nbytes, []).append(handle)

    def trim(self, keep_bytes: int = 0) -> int:
        """Destroy what is pooled until at most ``keep_bytes`` of it stay; returns bytes given back.

        Raises: DriverError with the refused handle still pooled.
        """
        freed_bytes = 0
        for nbytes, handles in self._pooled.items():
            while handles and self.pooled_bytes > keep_bytes:
                self._unmap(handles[-1], nbytes)
                self._driver.destroy(handles[-1], nbytes)
                handles.pop()
                self.pooled_bytes -= nbytes
                freed_bytes += nbytes
        return freed_bytes

    def _take_one(self, nbytes: int) -> int:
        handles = self._pooled.setdefault(nbytes, [])
        if not handles:
            if self.limit_bytes is not None:  # pooled memory of other sizes makes room
                self.trim(max(self.limit_bytes - self.used_bytes - nbytes, 0))
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
