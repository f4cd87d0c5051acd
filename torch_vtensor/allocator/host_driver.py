"""HostDriver: the allocator's semantics on the Linux CPU, by memfd pages mapped with MAP_FIXED.

    reserve   mmap(PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE): reads of a hole give zeros, writes fault
    create    an extent of one memfd, allocated with fallocate so that running out of memory is an error now
    map       mmap(MAP_FIXED|MAP_SHARED) of that extent, so the same page can appear at several addresses
    unmap     the anonymous mapping again
    destroy   fallocate(PUNCH_HOLE): the bytes go back to the system

All pages live in one file, because a file descriptor a page would exhaust the process's limit, and because
neighbouring extents at neighbouring addresses merge into one kernel mapping (``vm.max_map_count`` is 65,530).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from bisect import insort
from collections.abc import Callable
from pathlib import Path

import torch

from torch_vtensor.allocator.driver import round_up
from torch_vtensor.errors import DriverError

__all__ = ["HostDriver"]

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class _PassedFence:
    """The CPU works in program order: whatever was submitted is done."""

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def order_after(self) -> None:
        return None


class HostDriver:
    """Virtual memory of this process, with physical pages in a memfd.

    Args:
        page_bytes: the granularity; a power of two and a multiple of the system's page (default 64 KiB).

    Raises: ValueError for a page size that the system cannot map.
    """

    growth_fraction = 0.125
    zeroes_pages = True

    def __init__(self, page_bytes: int = 64 * 1024) -> None:
        if page_bytes < mmap.PAGESIZE or page_bytes & (page_bytes - 1):
            raise ValueError(
                f"page_bytes is {page_bytes}: it must be a power of two and at least the system's {mmap.PAGESIZE}"
            )
        self.device = torch.device("cpu")
        self.page_sizes: tuple[int, ...] = (page_bytes, 4 * page_bytes, 16 * page_bytes)
        self._fd = os.memfd_create("torch_vtensor", os.MFD_CLOEXEC)
        self._file_bytes = 0
        self._free_extents: dict[int, list[int]] = {}
        self._reservations: dict[int, int] = {}

    def __del__(
        self, munmap: Callable[[int, int], int] = _munmap, close: Callable[[int], None] = os.close
    ) -> None:  # bound here, because module names may be gone when the interpreter ends
        # Views keep their driver alive, so nothing here can be read any more.
        for ptr, nbytes in getattr(self, "_reservations", {}).items():
            munmap(ptr, nbytes)
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            close(fd)

    def physical_bytes(self) -> int:
        """Bytes of physical memory that the system counts for this driver's pages right now."""
        return os.fstat(self._fd).st_blocks * 512

    def reserve(self, nbytes: int) -> int:
        # One granule more than asked: mmap aligns to 4 KiB, an address range to the page.
        granularity = self.page_sizes[0]
        raw = self._map_anonymous(None, nbytes + granularity, 0, "reserve")
        ptr = round_up(raw, granularity)
        if ptr > raw:
            _munmap(raw, ptr - raw)
        tail = raw + granularity - ptr
        if tail:
            _munmap(ptr + nbytes, tail)
        self._reservations[ptr] = nbytes
        return ptr

    def release(self, ptr: int, nbytes: int) -> None:
        if _munmap(ptr, nbytes) != 0:
            raise self._error("munmap", nbytes)
        del self._reservations[ptr]

    def create(self, nbytes: int) -> int:
        free = self._free_extents.get(nbytes)
        offset = free[0] if free else self._file_bytes
        self._allocate(0, offset, nbytes, "fallocate")
        if free:
            del free[0]
        else:
            self._file_bytes += nbytes
        return offset

    def destroy(self, handle: int, nbytes: int) -> None:
        self._allocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, handle, nbytes, "fallocate(PUNCH_HOLE)")
        insort(self._free_extents.setdefault(nbytes, []), handle)

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        # Without access until set_access, as on the GPU, so that a forgotten call shows on every machine.
        if _mmap(ptr, nbytes, mmap.PROT_READ, _MAP_FIXED | mmap.MAP_SHARED, self._fd, handle) == _MAP_FAILED:
            raise self._error("mmap", nbytes, _MAP_COUNT_HINT)

    def set_access(self, ptr: int, nbytes: int) -> None:
        if _libc.mprotect(ctypes.c_void_p(ptr), ctypes.c_size_t(nbytes), mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise self._error("mprotect", nbytes, _MAP_COUNT_HINT)

    def unmap(self, ptr: int, nbytes: int) -> None:
        self._map_anonymous(ptr, nbytes, _MAP_FIXED, "unmap")

    def tensor(self, ptr: int, nbytes: int, owner: object) -> torch.Tensor:
        buffer = (ctypes.c_char * max(nbytes, 1)).from_address(ptr)  # torch takes no empty buffer
        buffer.owner = owner  # type: ignore[attr-defined]  # the storage keeps the buffer, the buffer the owner
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
        return flat if nbytes else flat[:0]

    def free_bytes(self) -> int:
        told = Path("/proc/meminfo").read_text(encoding="ascii")  # sysconf leaves out what files are cached in
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", told, re.MULTILINE)
        if available is None:  # before Linux 3.14
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return int(available[1]) * 1024

    def fence(self) -> _PassedFence:
        return _PassedFence()

    def is_capturing(self) -> bool:
        return False

    def prepare_thread(self) -> None:
        return None

    def retain_in_capture(self, owner: object) -> None:
        return None

    def collect(self) -> None:
        return None

    def _allocate(self, mode: int, offset: int, nbytes: int, call: str) -> None:
        while _fallocate(self._fd, mode, offset, nbytes) != 0:
            if ctypes.get_errno() != errno.EINTR:  # a signal's handler ran, nothing else happened
                raise self._error(call, nbytes)

    def _map_anonymous(self, ptr: int | None, nbytes: int, flags: int, call: str) -> int:
        flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _mmap(ptr, nbytes, mmap.PROT_READ, flags, -1, 0)
        if address is None or address == _MAP_FAILED:
            raise self._error(f"mmap ({call})", nbytes, _MAP_COUNT_HINT)
        return int(address)

    def _error(self, call: str, nbytes: int, hint: str = "") -> DriverError:
        code = ctypes.get_errno()
        return DriverError(call, errno.errorcode.get(code, str(code)), self.device, nbytes, hint)


_MAP_COUNT_HINT = "if vm.max_map_count is reached, use larger pages (TORCH_VTENSOR_PAGE_BYTES) or raise that limit"
