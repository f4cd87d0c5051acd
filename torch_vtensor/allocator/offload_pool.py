"""OffloadPool: memory outside a device that keeps what its pages held: taken, pooled, and given back to the system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from torch_vtensor.allocator.timed_driver import TimedDriver
from torch_vtensor.errors import OffloadLimitError

__all__ = ["OffloadPool"]


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
        self._ptrs: dict[int, int] = {}
        self._unmapped: dict[int, int] = {}  # addresses that the driver has not taken back yet

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
        return self._ptrs.get(handle)

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
        handles = self._pooled.get(nbytes)
        if handles:
            self.pooled_bytes -= nbytes
            handle = handles.pop()
        else:
            if self.limit_bytes is not None:  # pooled memory of other sizes makes room
                self.trim(max(self.limit_bytes - self.used_bytes - nbytes, 0))
            handle = self._driver.create_offloaded(nbytes)
            try:
                self._map(handle, nbytes)
            except BaseException:
                self._driver.destroy(handle, nbytes)
                raise
        self.used_bytes += nbytes
        return handle

    def _map(self, handle: int, nbytes: int) -> None:
        if not self._driver.keeps_offloaded_mapped:
            return
        with ExitStack() as undo:
            ptr = self._driver.reserve(nbytes)
            undo.callback(self._driver.release, ptr, nbytes)
            self._driver.map(ptr, nbytes, handle)
            undo.callback(self._driver.unmap, ptr, nbytes)
            self._driver.set_access(ptr, nbytes)
            undo.pop_all()
        self._ptrs[handle] = ptr

    def _unmap(self, handle: int, nbytes: int) -> None:
        """Raises: DriverError; what is left to do is done the next time."""
        if handle in self._ptrs:
            self._driver.unmap(self._ptrs[handle], nbytes)
            self._unmapped[handle] = self._ptrs.pop(handle)
        if handle in self._unmapped:
            self._driver.release(self._unmapped[handle], nbytes)
            del self._unmapped[handle]
