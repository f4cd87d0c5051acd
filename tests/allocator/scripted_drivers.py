"""Host drivers whose device, refusals and pauses a test decides."""

import threading
from collections import deque

from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.pinned_memory import PinnedMemory
from torch_vtensor.errors import DriverError

PAGE = 4096
OFFLOAD_FOLDER = "/dev/shm"  # a disk takes milliseconds for every page that is given back


class ManualFence:
    """Passed when the test says so."""

    def __init__(self, driver: "ManualDriver") -> None:
        self._driver = driver
        self.has_passed = False
        self.num_waits = self.num_ordered = 0

    def passed(self) -> bool:
        assert not self._driver.capturing, "asking a fence breaks a capture"
        return self.has_passed

    def wait(self) -> None:
        self.num_waits += 1
        self.has_passed = True

    def order_after(self) -> None:
        self.num_ordered += 1


class ManualDriver(HostDriver):
    """Host memory under a device whose work ends, and whose stream is captured, when the test says so."""

    def __init__(self, page_bytes: int = PAGE) -> None:
        super().__init__(page_bytes, OFFLOAD_FOLDER)
        self.fences: list[ManualFence] = []
        self.capturing = False
        self.capturer: threading.Thread | None = None  # None: whoever asks
        self.graph_owners: list[object] = []
        self.ended_owners: list[object] = []

    def fence(self) -> ManualFence:
        assert not self.capturing, "a fence breaks a capture"
        self.fences.append(ManualFence(self))
        return self.fences[-1]

    def finish_work(self) -> None:
        for fence in self.fences:
            fence.has_passed = True

    def is_capturing(self) -> bool:
        return self.capturing

    def is_capturing_here(self) -> bool:
        return self.capturing and self.capturer in (None, threading.current_thread())

    def retain_in_capture(self, owner: object) -> None:
        if self.capturing:
            self.graph_owners.append(owner)

    def end_graphs(self) -> None:
        self.ended_owners, self.graph_owners = self.graph_owners, []

    def collect(self) -> None:
        self.ended_owners.clear()


class FailingDriver(HostDriver):
    """Refuses the calls on memory number ``fail_at`` to ``fail_at + num_failures - 1``, counted from 0.

    Of all kinds of calls, or of one ``kind``.
    """

    has_pins = False

    def __init__(
        self, fail_at: int | None = None, num_failures: int = 1, code: str = "EIO", kind: str | None = None
    ) -> None:
        super().__init__(PAGE, OFFLOAD_FOLDER)
        self._lock = threading.Lock()
        if self.has_pins:
            self.pins = PinnedMemory(
                self.device,
                lambda ptr, nbytes: self._count("register", nbytes),
                lambda ptr, nbytes: self._count("unregister", nbytes),
            )
        self.calls: list[str] = []
        self.refused: list[str] = []
        self.fail_at, self._num_failures, self._code, self._kind = fail_at, num_failures, code, kind

    def _count(self, name: str, nbytes: int) -> None:
        with self._lock:  # several threads pin memory
            number = len(self.calls) if self._kind is None else self.calls.count(name)
            self.calls.append(name)
        if (
            self.fail_at is not None
            and self._kind in (None, name)
            and self.fail_at <= number < self.fail_at + self._num_failures
        ):
            self.refused.append(name)
            raise DriverError(name, self._code, self.device, nbytes)

    def reserve(self, nbytes: int) -> int:
        self._count("reserve", nbytes)
        return super().reserve(nbytes)

    def release(self, ptr: int, nbytes: int) -> None:
        self._count("release", nbytes)
        super().release(ptr, nbytes)

    def create(self, nbytes: int) -> int:
        self._count("create", nbytes)
        return super().create(nbytes)

    def create_offloaded(self, nbytes: int) -> int:
        self._count("create_offloaded", nbytes)
        return super().create_offloaded(nbytes)

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        self._count("copy", nbytes)
        super().copy(target_ptr, source_ptr, nbytes)

    def destroy(self, handle: int, nbytes: int) -> None:
        self._count("destroy", nbytes)
        super().destroy(handle, nbytes)

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        self._count("map", nbytes)
        super().map(ptr, nbytes, handle)

    def set_access(self, ptr: int, nbytes: int) -> None:
        self._count("set_access", nbytes)
        super().set_access(ptr, nbytes)

    def unmap(self, ptr: int, nbytes: int) -> None:
        self._count("unmap", nbytes)
        super().unmap(ptr, nbytes)


class LateDriver(HostDriver):
    """Copies when somebody waits for that, as late as a device may, and no memory may be unmapped before."""

    def __init__(self) -> None:
        super().__init__(PAGE, OFFLOAD_FOLDER)
        self.num_unmapped_meanwhile = self.num_copies = 0
        self._queued: deque[tuple[int, int, int]] = deque()

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        self.num_copies += 1
        self._queued.append((target_ptr, source_ptr, nbytes))

    def copied(self) -> "_LateFence":
        return _LateFence(self, self.num_copies)

    fence = copied

    def finish(self, number: int) -> None:
        while self.num_copies - len(self._queued) < number:
            super().copy(*self._queued.popleft())

    def unmap(self, ptr: int, nbytes: int) -> None:
        for *sides, copied_bytes in self._queued:
            assert not any(side < ptr + nbytes and ptr < side + copied_bytes for side in sides), "it is still copied"
        self.num_unmapped_meanwhile += bool(self._queued)
        super().unmap(ptr, nbytes)


class _LateFence:
    def __init__(self, driver: LateDriver, number: int) -> None:
        self._driver, self._number = driver, number

    def passed(self) -> bool:
        self.wait()
        return True

    def wait(self) -> None:
        self._driver.finish(self._number)

    def order_after(self) -> None:
        self.wait()


class PausingDriver(HostDriver):
    """Stops the scheduler's thread inside ``create`` until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def create(self, nbytes: int) -> int:
        if threading.current_thread().name == "torch_vtensor growth":
            self.entered.set()
            assert self.go_on.wait(60)
        return super().create(nbytes)
