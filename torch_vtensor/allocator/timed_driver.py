"""TimedDriver: counts and times every driver call, so that "no driver call in steady state" can be checked."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import torch

from torch_vtensor.allocator.driver import Driver, Fence, Pins

__all__ = ["CallStats", "TimedDriver"]

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")
_SAMPLES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class CallStats:
    """How often a driver call was made, and what it cost the host, in microseconds, over the latest 4,096."""

    count: int
    p50_us: float
    p99_us: float


class _TimedPins:
    def __init__(self, driver: TimedDriver, inner: Pins) -> None:
        self._driver = driver
        self._inner = inner

    def pin(self, sizes: Sequence[int], keep: Callable[[int, int], object]) -> None:
        self._driver.timed("pin", self._inner.pin, sizes, keep)

    def unpin(self, ptr: int, nbytes: int) -> None:
        self._driver.timed("unpin", self._inner.unpin, ptr, nbytes)


class TimedDriver:
    """A Driver that counts and times the calls of the driver inside it."""

    def __init__(self, inner: Driver) -> None:
        self.inner = inner
        self.device = inner.device
        self.page_sizes = inner.page_sizes
        self.keeps_offloaded_mapped = inner.keeps_offloaded_mapped
        self.pins: Pins | None = None if inner.pins is None else _TimedPins(self, inner.pins)
        self.growth_fraction = inner.growth_fraction
        self.zeroes_pages = inner.zeroes_pages
        self.fences_break_captures = inner.fences_break_captures
        self.marks_ranges = False
        """Whether every call is a range of its own in a profile that reads NVTX."""
        self.num_calls_by_thread: Counter[int] = Counter()
        self._num_calls: Counter[str] = Counter()
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES_KEPT))

    def reserve(self, nbytes: int) -> int:
        return self.timed("reserve", self.inner.reserve, nbytes)

    def release(self, ptr: int, nbytes: int) -> None:
        self.timed("release", self.inner.release, ptr, nbytes)

    def create(self, nbytes: int) -> int:
        return self.timed("create", self.inner.create, nbytes)

    def check_offload(self, nbytes: int) -> None:
        self.inner.check_offload(nbytes)

    def create_offloaded(self, nbytes: int) -> int:
        return self.timed("create_offloaded", self.inner.create_offloaded, nbytes)

    def destroy(self, handle: int, nbytes: int) -> None:
        self.timed("destroy", self.inner.destroy, handle, nbytes)

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        self.timed("map", self.inner.map, ptr, nbytes, handle)

    def set_access(self, ptr: int, nbytes: int) -> None:
        self.timed("set_access", self.inner.set_access, ptr, nbytes)

    def unmap(self, ptr: int, nbytes: int) -> None:
        self.timed("unmap", self.inner.unmap, ptr, nbytes)

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        self.timed("copy", self.inner.copy, target_ptr, source_ptr, nbytes)

    def tensor(self, ptr: int, nbytes: int, owner: object) -> torch.Tensor:
        return self.inner.tensor(ptr, nbytes, owner)

    def free_bytes(self) -> int:
        return self.inner.free_bytes()

    def fence(self) -> Fence:
        return self.inner.fence()

    def copied(self) -> Fence:
        return self.inner.copied()

    def is_capturing(self) -> bool:
        return self.inner.is_capturing()

    def is_capturing_here(self) -> bool:
        return self.inner.is_capturing_here()

    def prepare_thread(self) -> None:
        self.inner.prepare_thread()

    def retain_in_capture(self, owner: object) -> None:
        self.inner.retain_in_capture(owner)

    def collect(self) -> None:
        self.inner.collect()

    def stats(self) -> dict[str, CallStats]:
        """Counts and times by call name, for the calls that were made."""
        result = {}
        for name, seconds in list(self._seconds.items()):
            ordered = sorted(seconds)
            p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
            result[name] = CallStats(self._num_calls[name], p50 * 1e6, p99 * 1e6)
        return result

    def timed(self, name: str, call: Callable[[*_Arguments], _T], *arguments: *_Arguments) -> _T:
        """Do a call that is to be counted and timed."""
        start = time.perf_counter()
        try:
            if self.marks_ranges:
                with torch.cuda.nvtx.range(f"torch_vtensor {name}"):
                    return call(*arguments)
            return call(*arguments)
        finally:
            self._seconds[name].append(time.perf_counter() - start)
            self._num_calls[name] += 1
            self.num_calls_by_thread[threading.get_ident()] += 1
