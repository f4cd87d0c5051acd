"""NativeAllocator: the C half of memory_pool(), which torch calls under its own lock and without the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_vtensor.allocator.ledger import Ledger
from torch_vtensor.errors import DriverError

__all__ = ["Failure", "NativeAllocator", "TorchPoolStats", "read_failure"]


class TorchPoolStats(NamedTuple):
    """What the native allocator of one device holds and has done, exactly.

    A segment is what torch's caching allocator asks for at once: 2 MiB, 20 MiB, or a large tensor's own size. Pending
    segments were released by torch, but the device may still use them.
    """

    live_segments: int
    live_bytes: int
    pending_segments: int
    pending_bytes: int
    num_allocs: int
    num_frees: int
    num_failures: int
    num_device_waits: int


class Failure(NamedTuple):
    """Why the calling thread's latest call failed; ``num_failures`` counts the allocations that did."""

    num_failures: int
    asked_bytes: int
    nbytes: int
    call: str
    code: str


class _Config(ctypes.Structure):
    _fields_ = (
        ("driver", ctypes.c_char_p),
        ("device", ctypes.c_int32),
        ("num_peers", ctypes.c_int32),
        ("peers", ctypes.POINTER(ctypes.c_int32)),
        ("ledger", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        ("large_page_bytes", ctypes.c_int64),
    )


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in TorchPoolStats._fields)


class _Failure(ctypes.Structure):
    _fields_ = (
        ("num_failures", ctypes.c_int64),
        ("asked_bytes", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("call", ctypes.c_char_p),
        ("code", ctypes.c_char_p),
    )


class NativeAllocator:
    """The C functions behind torch's allocations. They let go of the GIL: a call may wait for a lock or the device."""

    def __init__(self, library_path: str, driver: str = "libcuda.so.1") -> None:
        self.path = library_path
        self._driver = driver
        self._library = ctypes.CDLL(library_path)
        self._library.vtp_torch_detach.restype = ctypes.c_int64
        self._library.vtp_torch_drain.restype = ctypes.c_int64

    def attach(self, device: torch.device, ledger: Ledger, page_sizes: Sequence[int], peers: Sequence[int]) -> None:
        """Make segments of ``device`` from pages of ``ledger``, from now on.

        Raises: DriverError where the CUDA driver cannot be opened.
        """
        config = _Config(
            driver=self._driver.encode(),
            device=device.index,
            num_peers=len(peers),
            peers=(ctypes.c_int32 * len(peers))(*peers),
            ledger=ledger.address,
            page_bytes=page_sizes[0],
            large_page_bytes=page_sizes[-1],
        )
        if not self._library.vtp_torch_attach(ctypes.byref(config)):
            failure = self.failure()
            raise DriverError(failure.call, failure.code, device, 0, f"while opening {self._driver}")

    def detach(self, device_index: int) -> int:
        """Make no more segments; give back what torch has released. Returns how many segments torch still uses."""
        return int(self._library.vtp_torch_detach(device_index))

    def drain(self, device_index: int, wait: bool) -> int:
        """Give back what torch has released and the device is done with; returns how many segments stay pending."""
        return int(self._library.vtp_torch_drain(device_index, wait))

    def stats(self, device_index: int) -> TorchPoolStats:
        """All counts at one moment."""
        counts = _Counts()
        self._library.vtp_torch_read(device_index, ctypes.byref(counts))
        return TorchPoolStats(*(getattr(counts, name) for name in TorchPoolStats._fields))

    def failure(self) -> Failure:
        """The calling thread's latest failure."""
        return read_failure(self._library)


def read_failure(library: ctypes.CDLL) -> Failure:
    """The calling thread's latest failure in the compiled library."""
    failure = _Failure()
    library.vtp_torch_read_failure(ctypes.byref(failure))
    call, code = (failure.call or b"").decode(), (failure.code or b"").decode()
    return Failure(failure.num_failures, failure.asked_bytes, failure.bytes, call, code)
