"""HostDriver: the allocator's semantics on the Linux CPU, by memfd pages mapped with MAP_FIXED.

    reserve   mmap(PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE): reads of a hole give zeros, writes fault
    create    an extent of one memfd, allocated with fallocate so that running out of memory is an error now;
              of one unnamed file on a disk for what is offloaded
    map       mmap(MAP_FIXED|MAP_SHARED) of that extent, so the same page can appear at several addresses
    unmap     the anonymous mapping again
    destroy   fallocate(PUNCH_HOLE): the bytes go back to the system

All pages live in one file (those offloaded in another), because a file descriptor a page would exhaust the process's
limit, and because neighbouring extents at neighbouring addresses merge into one kernel mapping (``vm.max_map_count`` is
65,530).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import tempfile
from bisect import insort
from collections.abc import Callable
from pathlib import Path

import torch

from torch_vtensor.allocator.driver import Pins, round_up
from torch_vtensor.errors import DriverError

__all__ = ["HostDriver"]

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_OFFLOADED = 1 << 62  # a handle is an offset into a file; this bit tells which
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


class _PageFile:
    """Extents of a file that take space from ``create`` to ``destroy``; closed with its last reference."""

    def __init__(self, fd: int, device: torch.device) -> None:
        self.fd = fd
        self._device = device
        self._file_bytes = 0
        self._free_extents: dict[int, list[int]] = {}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here, as in HostDriver
        close(self.fd)

    def physical_bytes(self) -> int:
        """What the system counts for the extents right now."""
        return os.fstat(self.fd).st_blocks * 512

    def create(self, nbytes: int) -> int:
        """The offset of an extent that has space."""
        free = self._free_extents.get(nbytes)
        offset = free[0] if free else self._file_bytes
        self._allocate(0, offset, nbytes, "fallocate")
        if free:
            del free[0]
        else:
            self._file_bytes += nbytes
        return offset

    def destroy(self, offset: int, nbytes: int) -> None:
        """Give the extent's space back; it may become another one of the same size."""
        self._allocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nbytes, "fallocate(PUNCH_HOLE)")
        insort(self._free_extents.setdefault(nbytes, []), offset)

    def _allocate(self, mode: int, offset: int, nbytes: int, call: str) -> None:
        while _fallocate(self.fd, mode, offset, nbytes) != 0:
            if ctypes.get_errno() != errno.EINTR:  # a signal's handler ran, nothing else happened
                raise _error(call, nbytes, self._device)


class HostDriver:
    """Virtual memory of this process, with physical pages in a memfd.

    Args:
        page_bytes: the granularity; a power of two and a multiple of the system's page (default 64 KiB).
        offload_folder: where the unnamed file for offloaded pages is; on a disk, or nothing is won.

    Raises: ValueError for a page size that the system cannot map.
    """

    keeps_offloaded_mapped = False
    pins: Pins | None = None
    growth_fraction = 0.125
    zeroes_pages = True
    fences_break_captures = False

    def __init__(self, page_bytes: int = 64 * 1024, offload_folder: str = "/var/tmp") -> None:
        if page_bytes < mmap.PAGESIZE or page_bytes & (page_bytes - 1):
            raise ValueError(
                f"page_bytes is {page_bytes}: it must be a power of two and at least the system's {mmap.PAGESIZE}"
            )
        self.device = torch.device("cpu")
        self.page_sizes: tuple[int, ...] = (page_bytes, 4 * page_bytes, 16 * page_bytes)
        self._memory = _PageFile(os.memfd_create("torch_vtensor", os.MFD_CLOEXEC), self.device)
        self._offload_folder = offload_folder
        self._offloaded: _PageFile | None = None
        self._reservations: dict[int, int] = {}

    def __del__(
        self, munmap: Callable[[int, int], int] = _munmap
    ) -> None:  # bound here, because module names may be gone when the interpreter ends
        # Views keep their driver alive, so nothing here can be read any more.
        for ptr, nbytes in getattr(self, "_reservations", {}).items():
            munmap(ptr, nbytes)

    def physical_bytes(self) -> int:
        """Bytes of physical memory that the system counts for this driver's pages right now."""
        return self._memory.physical_bytes()

    def offloaded_bytes(self) -> int:
        """Bytes of disk that the system counts for this driver's offloaded pages right now."""
        return self._offloaded.physical_bytes() if self._offloaded is not None else 0

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
            raise _error("munmap", nbytes, self.device)
        del self._reservations[ptr]

    def create(self, nbytes: int) -> int:
        return self._memory.create(nbytes)

    def check_offload(self, nbytes: int) -> None:
        return None  # a disk that is full refuses, and nothing else happens

    def create_offloaded(self, nbytes: int) -> int:
        if self._offloaded is None:
            try:
                with tempfile.TemporaryFile(prefix="torch_vtensor", dir=self._offload_folder) as file:
                    self._offloaded = _PageFile(os.dup(file.fileno()), self.device)
            except OSError as error:
                code = errno.errorcode.get(error.errno or 0, str(error.errno))
                hint = f"no file can be made in {self._offload_folder}; name another folder by {_FOLDER_SETTING}"
                raise DriverError("open", code, self.device, nbytes, hint) from error
        return self._offloaded.create(nbytes) | _OFFLOADED

    def destroy(self, handle: int, nbytes: int) -> None:
        file, offset = self._extent(handle)
        file.destroy(offset, nbytes)

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        # Without access until set_access, as on the GPU, so that a forgotten call shows on every machine.
        file, offset = self._extent(handle)
        if _mmap(ptr, nbytes, mmap.PROT_READ, _MAP_FIXED | mmap.MAP_SHARED, file.fd, offset) == _MAP_FAILED:
            raise _error("mmap", nbytes, self.device, _MAP_COUNT_HINT)

    def set_access(self, ptr: int, nbytes: int) -> None:
        if _libc.mprotect(ctypes.c_void_p(ptr), ctypes.c_size_t(nbytes), mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise _error("mprotect", nbytes, self.device, _MAP_COUNT_HINT)

    def unmap(self, ptr: int, nbytes: int) -> None:
        self._map_anonymous(ptr, nbytes, _MAP_FIXED, "unmap")

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        ctypes.memmove(target_ptr, source_ptr, nbytes)

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

    def copied(self) -> _PassedFence:
        return _PassedFence()

    def is_capturing(self) -> bool:
        return False

    def is_capturing_here(self) -> bool:
        return False

    def prepare_thread(self) -> None:
        return None

    def retain_in_capture(self, owner: object) -> None:
        return None

    def collect(self) -> None:
        return None

    def _extent(self, handle: int) -> tuple[_PageFile, int]:
        if not handle & _OFFLOADED:
            return self._memory, handle
        assert self._offloaded is not None
        return self._offloaded, handle & ~_OFFLOADED

    def _map_anonymous(self, ptr: int | None, nbytes: int, flags: int, call: str) -> int:
        flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _mmap(ptr, nbytes, mmap.PROT_READ, flags, -1, 0)
        if address is None or address == _MAP_FAILED:
            raise _error(f"mmap ({call})", nbytes, self.device, _MAP_COUNT_HINT)
        return int(address)


def _error(call: str, nbytes: int, device: torch.device, hint: str = "") -> DriverError:
    code = ctypes.get_errno()
    return DriverError(call, errno.errorcode.get(code, str(code)), device, nbytes, hint)


_FOLDER_SETTING = "TORCH_VTENSOR_OFFLOAD_FOLDER"
_MAP_COUNT_HINT = "if vm.max_map_count is reached, use larger pages (TORCH_VTENSOR_PAGE_BYTES) or raise that limit"
