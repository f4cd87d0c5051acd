"""NativeAllocator: the C half of memory_pool(), which torch calls under its own lock and without the GIL."""

from __future__ import annotations

import contextlib
import ctypes
import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from torch_vtensor.allocator.ledger import Ledger
from torch_vtensor.errors import DriverError

__all__ = ["Failure", "NativeAllocator", "Outcome", "Segment", "TorchPoolStats", "read_failure"]


class TorchPoolStats(NamedTuple):
    """What the native allocator of one device holds and has done, exactly.

    A segment is what torch's caching allocator asks for at once: 2 MiB, 20 MiB, or a large tensor's own size. Pending
    segments were released by torch, but the device may still use them. ``asleep_bytes`` of the live ones have no memory
    for now.
    """

    live_segments: int
    live_bytes: int
    pending_segments: int
    pending_bytes: int
    num_allocs: int
    num_frees: int
    num_failures: int
    num_device_waits: int
    asleep_bytes: int


class Segment(NamedTuple):
    """Memory that torch's caching allocator asked for at once, and has not freed."""

    address: int
    nbytes: int
    number: int
    """Of no other segment of the device, also where addresses are used again."""
    tag: int
    is_asleep: bool


class Outcome(enum.IntEnum):
    """What became of an attempt to put a segment to sleep, or to wake it."""

    FAILED = -1
    GONE = 0
    DONE = 1
    LACKS_MEMORY = 2


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


class _Segment(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("tag", ctypes.c_int32),
        ("is_asleep", ctypes.c_int32),
    )


class NativeAllocator:
    """The C functions behind torch's allocations. They let go of the GIL: a call may wait for a lock or the device."""

    def __init__(self, library_path: str, driver: str = "libcuda.so.1") -> None:
        self.path = library_path
        self._driver = driver
        self._library = ctypes.CDLL(library_path)
        self._library.vtp_torch_detach.restype = ctypes.c_int64
        self._library.vtp_torch_drain.restype = ctypes.c_int64
        self._library.vtp_torch_list.restype = ctypes.c_int64
        for function in (self._library.vtp_torch_sleep, self._library.vtp_torch_wake):
            function.argtypes = [ctypes.c_int, ctypes.c_uint64]

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

    def set_tag(self, device_index: int, tag: int) -> int:
        """Segments that this thread makes on the device have this tag from now on; returns the tag before."""
        return int(self._library.vtp_torch_set_tag(device_index, tag))

    def segments(self, device_index: int) -> list[Segment]:
        """All live segments."""
        return self._list(device_index, watch=False)

    @contextlib.contextmanager
    def watched(self, device_index: int) -> Iterator[list[Segment]]:
        """All live segments. Those that torch frees during the block stay mapped until its end; no such block in it."""
        try:
            yield self._list(device_index, watch=True)
        finally:
            self._library.vtp_torch_unwatch(device_index)

    def sleep(self, device_index: int, address: int) -> Outcome:
        """Unmap a segment, whose bytes are lost, and pool its pages; the device must be done with it."""
        return Outcome(self._library.vtp_torch_sleep(device_index, address))

    def wake(self, device_index: int, address: int) -> Outcome:
        """Map pages at a sleeping segment's addresses; what they hold is for the caller to write."""
        return Outcome(self._library.vtp_torch_wake(device_index, address))

    def stats(self, device_index: int) -> TorchPoolStats:
        """All counts at one moment."""
        counts = _Counts()
        self._library.vtp_torch_read(device_index, ctypes.byref(counts))
        return TorchPoolStats(*(getattr(counts, name) for name in TorchPoolStats._fields))

    def failure(self) -> Failure:
        """The calling thread's latest failure."""
        return read_failure(self._library)

    def _list(self, device_index: int, *, watch: bool) -> list[Segment]:
        capacity = 64
        while True:
            found = (_Segment * capacity)()
            num_segments = int(self._library.vtp_torch_list(device_index, found, capacity, watch))
            if num_segments <= capacity:
                return [
                    Segment(it.address, it.bytes, it.number, it.tag, bool(it.is_asleep)) for it in found[:num_segments]
                ]
            capacity = 2 * num_segments


def read_failure(library: ctypes.CDLL) -> Failure:
    """The calling thread's latest failure in the compiled library."""
    failure = _Failure()
    library.vtp_torch_read_failure(ctypes.byref(failure))
    call, code = (failure.call or b"").decode(), (failure.code or b"").decode()
    return Failure(failure.num_failures, failure.asked_bytes, failure.bytes, call, code)
