"""PinnedMemory: memory of the host that a GPU copies to and from, and nothing else. It is had sooner than any other:

memory that can be mapped, by cuMemCreate                     4-5 GB/s, from any number of threads
pages of the system, touched by 8 threads, then registered    15 GB/s
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import torch

from torch_vtensor.allocator.driver import round_up
from torch_vtensor.errors import DriverError

__all__ = ["PinnedMemory"]

_NUM_THREADS = 8
_HUGE_PAGE_BYTES = 2 * 2**20


class PinnedMemory:
    """Pins and unpins memory for a device.

    Args:
        register: has the device's driver pin so many bytes at an address; may be called from any thread.
        unregister: the opposite.
        cpus: those beside which the memory is to lie; none: wherever.
    """

    def __init__(
        self,
        device: torch.device,
        register: Callable[[int, int], object],
        unregister: Callable[[int, int], object],
        cpus: frozenset[int] = frozenset(),
    ) -> None:
        self._device = device
        self._register = register
        self._unregister = unregister
        self._cpus = cpus
        self._mappings: dict[int, mmap.mmap] = {}
        _living.add(self)

    def pin(self, sizes: Sequence[int], keep: Callable[[int, int], object]) -> None:
        """Call ``keep`` with the address and the size of each piece of new memory that can be had.

        Raises: DriverError in the end, if that is less than was asked for.
        """
        threads = ThreadPoolExecutor(_NUM_THREADS, initializer=self._stay_near)
        waiting = [threads.submit(self._pin, nbytes) for nbytes in sizes]
        try:
            wait(waiting)
        finally:  # also of what is interrupted here
            threads.shutdown(cancel_futures=True)
            for it, nbytes in zip(waiting, sizes, strict=True):
                if not it.cancelled() and it.exception() is None:
                    keep(it.result(), nbytes)
        for it in waiting:
            it.result()

    def leave_to_parent(self) -> None:
        """Forget all of it, in a child process: what lies at its addresses there is somebody else's."""
        for mapping in self._mappings.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))  # whose end would unmap them
        self._mappings = {}

    def unpin(self, ptr: int, nbytes: int) -> None:
        """Give memory back to the system.

        Raises: DriverError, with the memory as it was.
        """
        self._unregister(ptr, nbytes)
        self._mappings.pop(ptr).close()

    def _stay_near(self) -> None:
        """Memory lies beside the CPU that is the first to touch it."""
        if near := self._cpus & os.sched_getaffinity(0):
            os.sched_setaffinity(0, near)

    def _pin(self, nbytes: int) -> int:
        try:
            mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise DriverError("mmap", code, self._device, nbytes) from error
        ptr = round_up(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), _HUGE_PAGE_BYTES)
        try:
            mapping.madvise(mmap.MADV_DONTFORK)  # a child's copy of it would be what the device does not write to
            with suppress(OSError):  # a system without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            ctypes.memset(ptr, 0, nbytes)
            self._register(ptr, nbytes)
        except BaseException:
            mapping.close()
            raise
        self._mappings[ptr] = mapping
        return ptr


_living: weakref.WeakSet[PinnedMemory] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for it in list(_living):
        it.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
