"""The native allocator on a CUDA driver without a GPU: no memory is lost, and none is taken from a running kernel."""

import ctypes
import operator
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import (
    CAPTURING,
    CAPTURING_IMPLICITLY,
    CAPTURING_UNNOTICED,
    HERE,
    INVALID_VALUE,
    LARGE_PAGE,
    MIB,
    NATIVE,
    NOT_CAPTURING,
    OUT_OF_MEMORY,
    PAGE,
    FakeCuda,
    FakeDriver,
    TorchCalls,
    build,
    compile_c,
)

from torch_vtensor.allocator.ledger import Ledger
from torch_vtensor.allocator.native_allocator import NativeAllocator, TorchPoolStats
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.errors import DriverError, OutOfPagesError
from torch_vtensor.status import StatusFile, processes

DEVICE = torch.device("cuda", 0)
DEFAULT_STREAM, STREAM, OTHER_STREAM = 0, 0x51, 0x52
UNDO_CALLS = ["cuMemUnmap", "cuMemRelease", "cuMemAddressFree"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("native"))


class Torch(TorchCalls):
    """Torch on the fake device, its counts beginning with the test."""

    def __init__(self, fake: FakeCuda, library: Path, driver: Path) -> None:
        super().__init__(library, driver)
        self.fake = fake
        self._before = super().stats(0)

    def stats(self, device_index: int) -> TorchPoolStats:
        now = super().stats(device_index)
        return TorchPoolStats(*map(operator.sub, now, self._before)) if device_index == 0 else now

    def use(self, ledger: Ledger) -> None:
        self.attach(DEVICE, ledger, (PAGE, LARGE_PAGE), peers=[1])

    def alloc(self, nbytes: int, stream: int = STREAM, device: int = 0) -> int | None:
        return super().alloc(nbytes, stream, device)

    def free(self, address: int | None, nbytes: int, stream: int = STREAM, device: int = 0) -> None:
        super().free(address, nbytes, stream, device)

    def run(self, nbytes: int, stream: int = STREAM) -> int:
        """A segment that a kernel on the stream is using."""
        address = self.alloc(nbytes, stream)
        assert address is not None
        self.fake.launch(stream, address, nbytes)
        return address


@pytest.fixture
def fake(built: tuple[Path, Path]) -> Iterator[FakeCuda]:
    fake = FakeCuda(built[0])
    fake.reset()
    yield fake
    fake.check_sound()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def allocator(fake: FakeCuda, built: tuple[Path, Path], ledger: Ledger) -> Iterator[Torch]:
    allocator = Torch(fake, built[1], built[0])
    allocator.use(ledger)
    yield allocator
    fake.fail_nothing()
    for stream in (DEFAULT_STREAM, STREAM, OTHER_STREAM):
        fake.set_capture(stream, NOT_CAPTURING)
    assert allocator.detach(0) == 0
    counts = fake.counts()
    assert (counts.num_reserved, counts.num_mapped, counts.num_events) == (0, 0, 0)
    stats = allocator.stats(0)
    assert (stats.live_segments, stats.live_bytes, stats.pending_segments, stats.pending_bytes) == (0, 0, 0, 0)
    assert ledger.torch_bytes == 0


@pytest.mark.parametrize(
    ("nbytes", "num_large", "num_small"),
    [
        (1, 0, 1),
        (PAGE, 0, 1),
        (PAGE + 1, 0, 2),
        (LARGE_PAGE - PAGE, 0, 15),
        (LARGE_PAGE, 1, 0),
        (LARGE_PAGE + 1, 1, 1),
        (100 * MIB, 3, 2),
    ],
)
def test_segment_takes_large_pages_for_the_bulk_and_one_access_call(
    fake: FakeCuda, allocator: Torch, ledger: Ledger, nbytes: int, num_large: int, num_small: int
) -> None:
    address = allocator.run(nbytes)
    counts = ledger.counts()
    assert counts.num_pages == num_large + num_small
    assert counts.torch_bytes == counts.committed_bytes == num_large * LARGE_PAGE + num_small * PAGE
    assert fake.num_calls("cuMemMap") == fake.num_calls("cuMemCreate") == num_large + num_small
    assert fake.num_calls("cuMemAddressReserve") == fake.num_calls("cuMemSetAccess") == 1
    fake.finish(STREAM)
    allocator.free(address, nbytes)
    counts = ledger.counts()
    assert (counts.torch_bytes, counts.free_bytes) == (0, counts.committed_bytes)


def test_pooled_pages_are_reused_without_creating_any(fake: FakeCuda, allocator: Torch) -> None:
    for _ in range(1000):
        address = allocator.run(50 * MIB)
        fake.finish(STREAM)
        allocator.free(address, 50 * MIB)
    assert fake.num_calls("cuMemCreate") == fake.counts().num_handles == 10
    stats = allocator.stats(0)
    assert (stats.num_allocs, stats.num_frees, stats.num_failures, stats.num_device_waits) == (1000, 1000, 0, 0)


@pytest.mark.parametrize("stream", [DEFAULT_STREAM, STREAM])
def test_freed_memory_stays_mapped_until_its_stream_is_done(
    fake: FakeCuda, allocator: Torch, ledger: Ledger, stream: int
) -> None:
    address = allocator.run(PAGE, stream)
    allocator.free(address, PAGE, stream)
    for _ in range(3):
        assert allocator.drain(0, wait=False) == 1
    assert fake.num_calls("cuMemUnmap") == 0
    assert (ledger.torch_bytes, ledger.free_bytes) == (PAGE, 0)
    assert allocator.stats(0)[:4] == (0, 0, 1, PAGE)
    fake.launch(stream, address, PAGE)  # later work is not waited for: no one may use the memory by now
    fake.finish(stream)
    assert allocator.drain(0, wait=False) == 0
    assert (ledger.torch_bytes, ledger.free_bytes) == (0, PAGE)


def test_work_on_the_default_stream_is_waited_for_as_well(fake: FakeCuda, allocator: Torch) -> None:
    address = allocator.alloc(PAGE, STREAM)
    fake.launch(DEFAULT_STREAM, address, PAGE)
    allocator.free(address, PAGE, STREAM)
    assert allocator.drain(0, wait=False) == 1
    fake.finish(DEFAULT_STREAM)
    assert allocator.drain(0, wait=False) == 0


def test_next_call_of_torch_gives_back_what_is_done(fake: FakeCuda, allocator: Torch, ledger: Ledger) -> None:
    first, second = allocator.run(PAGE, STREAM), allocator.run(LARGE_PAGE, OTHER_STREAM)
    allocator.free(first, PAGE, STREAM)
    fake.finish(STREAM)
    allocator.free(second, LARGE_PAGE, OTHER_STREAM)
    assert ledger.free_bytes == PAGE, "a free gives back what was freed before"
    fake.finish(OTHER_STREAM)
    address = allocator.alloc(PAGE)
    assert ledger.free_bytes == LARGE_PAGE, "and so does an alloc"
    allocator.free(address, PAGE)


@pytest.mark.parametrize("capture", [CAPTURING, CAPTURING_IMPLICITLY, CAPTURING_UNNOTICED])
@pytest.mark.parametrize("captured", [STREAM, DEFAULT_STREAM])
def test_capture_is_left_alone_and_waited_for(fake: FakeCuda, allocator: Torch, capture: int, captured: int) -> None:
    address = allocator.run(PAGE)
    fake.set_capture(captured, capture)
    allocator.free(address, PAGE)
    fake.finish(STREAM)
    for wait in (False, True):
        assert allocator.drain(0, wait) == 1
    assert fake.num_calls("cuMemUnmap") == fake.num_calls("cuCtxSynchronize") == 0
    fake.set_capture(captured, NOT_CAPTURING)
    assert allocator.drain(0, wait=False) == 0


def test_segments_are_made_during_a_capture(fake: FakeCuda, allocator: Torch) -> None:
    fake.set_capture(STREAM, CAPTURING)
    address = allocator.run(LARGE_PAGE)
    fake.set_capture(STREAM, NOT_CAPTURING)
    fake.finish(STREAM)
    allocator.free(address, LARGE_PAGE)


def test_drain_waits_when_asked_to(fake: FakeCuda, allocator: Torch) -> None:
    for stream in (STREAM, OTHER_STREAM):
        allocator.free(allocator.run(PAGE, stream), PAGE, stream)
    assert allocator.drain(0, wait=False) == 2
    assert allocator.drain(0, wait=True) == 0
    assert allocator.stats(0).num_device_waits == 1
    assert allocator.drain(0, wait=True) == 0
    assert allocator.stats(0).num_device_waits == 1, "there was nothing to wait for"


def test_what_another_thread_waits_for_is_given_back_once_nobody_watches(fake: FakeCuda, allocator: Torch) -> None:
    address = allocator.run(PAGE)
    with allocator.watched(0):
        allocator.free(address, PAGE)
        fake.set_stuck(True)
        thread = threading.Thread(target=lambda: allocator.drain(0, wait=True))
        thread.start()
        while not fake.num_waiting():
            time.sleep(0.001)
    fake.set_stuck(False)
    thread.join()
    assert allocator.drain(0, wait=False) == 0
    assert [segment.number for segment in allocator.segments(0)] == []


def test_segments_have_numbers_although_addresses_are_used_again(fake: FakeCuda, allocator: Torch) -> None:
    first = allocator.alloc(PAGE)
    (before,) = allocator.segments(0)
    allocator.free(first, PAGE)
    second = allocator.alloc(PAGE)
    (after,) = allocator.segments(0)
    assert first == second == before.address == after.address
    assert before.number != after.number
    allocator.free(second, PAGE)


@pytest.mark.parametrize("refused", ["cuStreamIsCapturing", "cuEventCreate", "cuEventRecord"])
def test_stream_that_takes_no_event_is_waited_for_by_its_context(
    fake: FakeCuda, allocator: Torch, refused: str
) -> None:
    address = allocator.run(PAGE)
    fake.fail(every=refused)
    allocator.free(address, PAGE)
    assert allocator.drain(0, wait=False) == 1
    assert allocator.drain(0, wait=True) == 0
    assert fake.num_calls("cuCtxSynchronize") > 0


def test_broken_context_keeps_the_memory(fake: FakeCuda, allocator: Torch) -> None:
    address = allocator.run(PAGE)
    allocator.free(address, PAGE)
    fake.fail(every="cuEventQuery cuEventSynchronize cuCtxSynchronize", code=700)
    assert allocator.drain(0, wait=True) == 1
    assert fake.num_calls("cuMemUnmap") == 0


@pytest.mark.parametrize("num_pooled", [0, 2])
@pytest.mark.parametrize("code", [INVALID_VALUE, OUT_OF_MEMORY])
@pytest.mark.parametrize("also_refused", ["", *UNDO_CALLS])
def test_alloc_undoes_itself_whichever_call_fails(
    fake: FakeCuda, allocator: Torch, ledger: Ledger, num_pooled: int, code: int, also_refused: str
) -> None:
    nbytes = LARGE_PAGE + 3 * PAGE
    num_calls = 0
    while True:
        pooled = [allocator.alloc(PAGE) for _ in range(num_pooled)]
        for address in pooled:
            allocator.free(address, PAGE)
        before = ledger.counts(), fake.counts().num_handles
        fake.fail(num_calls + 1, also_refused, code)
        address = allocator.alloc(nbytes)
        failure = allocator.failure()
        if not fake.fail_nothing():
            break
        num_calls += 1
        if address is None:
            assert failure.asked_bytes == nbytes
            assert failure.code == {INVALID_VALUE: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY"}[code]
            assert allocator.drain(0, wait=False) == 0, "what could not be undone then is undone now"
            assert fake.counts().num_reserved == fake.counts().num_mapped == ledger.torch_bytes == 0
            if not also_refused:
                assert (ledger.counts(), fake.counts().num_handles) == before
            address = allocator.alloc(nbytes)
            assert address is not None, "and the next alloc works"
        allocator.free(address, nbytes)
        while (popped := ledger.pop_free()) is not None:  # begin the next round without pooled pages
            FakeDriver(fake).destroy(*popped)
            ledger.uncharge(popped[1])
    assert address is not None
    allocator.free(address, nbytes)
    num_pages = 1 + 3
    # push and exchange, reserve, create and map each page (two are reused where they are pooled), set access
    assert num_calls == 2 + 1 + 2 * num_pages - num_pooled + 1


def test_free_loses_nothing_whichever_call_fails(fake: FakeCuda, allocator: Torch, ledger: Ledger) -> None:
    num_calls = 0
    while True:
        address = allocator.run(LARGE_PAGE + PAGE)
        fake.finish(STREAM)
        fake.fail(num_calls + 1)
        allocator.free(address, LARGE_PAGE + PAGE)
        was_called = allocator.stats(0).live_segments == 0
        if not fake.fail_nothing():
            break
        num_calls += 1
        if not was_called:  # the context could not be made current: torch's call had no effect
            allocator.free(address, LARGE_PAGE + PAGE)
        assert allocator.drain(0, wait=False) == 0
        assert (ledger.torch_bytes, ledger.free_bytes) == (0, LARGE_PAGE + PAGE)
    # push and exchange; capturing?, create, record for two streams; two queries; unmap and release addresses
    assert num_calls == 2 + 2 * 3 + 2 + 2


def test_over_budget_is_refused_without_a_driver_call(fake: FakeCuda, allocator: Torch, ledger: Ledger) -> None:
    ledger.budget_bytes = 10 * PAGE
    address = allocator.alloc(9 * PAGE)
    calls_before = fake.num_calls()
    assert allocator.alloc(2 * PAGE - 1) is None
    assert fake.num_calls() - calls_before == 4, "only entering and leaving"
    failure = allocator.failure()
    assert failure[1:] == (2 * PAGE - 1, 2 * PAGE, "vtp_ledger_take", "over budget")
    assert allocator.stats(0).num_failures == 1
    assert allocator.alloc(PAGE) is not None
    ledger.budget_bytes = None
    assert allocator.alloc(2 * PAGE) is not None
    assert address is not None
    for segment in list(live_segments(fake)):
        allocator.free(segment, 0)


def live_segments(fake: FakeCuda) -> Iterator[int]:
    """Addresses that the fake has reserved, in the order in which it gave them out: one granule lies between two."""
    address = 0x7F << 40
    for nbytes in (9 * PAGE, PAGE, 2 * PAGE):
        yield address
        address += nbytes + PAGE


def test_pressure_waits_for_the_device_before_it_refuses(fake: FakeCuda, allocator: Torch, ledger: Ledger) -> None:
    ledger.budget_bytes = 4 * PAGE
    busy = allocator.run(3 * PAGE)
    allocator.free(busy, 3 * PAGE)
    small = allocator.alloc(PAGE)
    assert allocator.stats(0).num_device_waits == 0, "there was room without waiting"
    large = allocator.alloc(2 * PAGE)
    assert large is not None
    assert allocator.stats(0).num_device_waits == 1
    assert allocator.alloc(2 * PAGE) is None
    assert allocator.stats(0).num_device_waits == 1, "nothing was pending any more"
    allocator.free(small, PAGE)
    allocator.free(large, 2 * PAGE)


@pytest.mark.parametrize("limit", ["budget", "device"])
def test_pressure_turns_pooled_pages_of_one_size_into_another(
    fake: FakeCuda, allocator: Torch, ledger: Ledger, limit: str
) -> None:
    if limit == "budget":
        ledger.budget_bytes = 2 * LARGE_PAGE
    else:
        fake.set_memory(2 * LARGE_PAGE)
    allocator.free(allocator.alloc(LARGE_PAGE - PAGE), LARGE_PAGE - PAGE)
    allocator.free(allocator.alloc(LARGE_PAGE), LARGE_PAGE)
    assert ledger.free_bytes == 2 * LARGE_PAGE - PAGE
    address = allocator.alloc(2 * LARGE_PAGE)
    assert address is not None
    assert ledger.counts()[:3] == (2 * LARGE_PAGE, 0, 2 * LARGE_PAGE)
    assert fake.counts().created_bytes == 2 * LARGE_PAGE
    assert allocator.alloc(PAGE) is None
    expected = {"budget": "over budget", "device": "CUDA_ERROR_OUT_OF_MEMORY"}[limit]
    assert allocator.failure().code == expected
    allocator.free(address, 2 * LARGE_PAGE)
    small = allocator.alloc(PAGE)
    assert small is not None, "the other way round"
    allocator.free(small, PAGE)


def test_page_pool_and_torch_share_pages_and_budget(fake: FakeCuda, allocator: Torch) -> None:
    pool = PagePool(FakeDriver(fake), 3 * LARGE_PAGE)
    allocator.use(pool.ledger)
    address = allocator.alloc(2 * LARGE_PAGE)
    pages = pool.acquire([LARGE_PAGE])
    pool.check_integrity()
    with pytest.raises(OutOfPagesError):
        pool.acquire([PAGE])
    allocator.free(address, 2 * LARGE_PAGE)
    pages += pool.acquire([LARGE_PAGE, LARGE_PAGE])
    assert fake.num_calls("cuMemCreate") == 3, "the pool took torch's pages"
    assert allocator.alloc(PAGE) is None
    pool.drop(pages)
    address = allocator.alloc(LARGE_PAGE)
    pool.check_integrity()
    assert pool.trim() == 2 * LARGE_PAGE
    allocator.free(address, LARGE_PAGE)
    assert pool.trim() == LARGE_PAGE
    assert fake.counts().num_handles == pool.ledger.committed_bytes == 0


def test_what_torch_takes_is_shown_to_other_processes(fake: FakeCuda, allocator: Torch, tmp_path: Path) -> None:
    """Also where nothing but torch's tensors is on the pages."""
    pool, file = PagePool(FakeDriver(fake)), StatusFile(tmp_path)
    pool.show(file.record("cuda:0"), lambda: None)
    allocator.use(pool.ledger)
    first = allocator.alloc(2 * LARGE_PAGE)
    for address in (first, allocator.alloc(LARGE_PAGE)):
        assert address is not None
        (shown,) = processes(tmp_path)
        assert shown.figures.torch_bytes == shown.figures.committed_bytes == pool.ledger.torch_bytes > 0
    allocator.free(address, LARGE_PAGE)  # the second
    (shown,) = processes(tmp_path)
    assert (shown.figures.torch_bytes, shown.figures.pooled_bytes) == (2 * LARGE_PAGE, LARGE_PAGE)
    pool.ledger.show(None)
    allocator.free(first, 2 * LARGE_PAGE)
    assert pool.trim() == 3 * LARGE_PAGE


def test_segments_outlive_detach_and_return_pages_to_their_own_ledger(
    fake: FakeCuda, allocator: Torch, ledger: Ledger
) -> None:
    first = allocator.run(PAGE)
    assert allocator.detach(0) == 1
    assert allocator.alloc(PAGE) is None
    assert allocator.failure().code == "the device was detached"
    other = Ledger()
    allocator.use(other)
    second = allocator.alloc(LARGE_PAGE)
    fake.finish(STREAM)
    allocator.free(first, PAGE)
    allocator.free(second, LARGE_PAGE)
    assert (ledger.free_bytes, other.free_bytes) == (PAGE, LARGE_PAGE)


def test_closing_a_ledger_leaves_segments_on_its_pages_alone(fake: FakeCuda, allocator: Torch) -> None:
    ledger = Ledger()
    allocator.use(ledger)
    address = allocator.run(PAGE)
    ledger.close()
    fake.finish(STREAM)
    allocator.free(address, PAGE)


def test_unknown_memory_and_devices_are_left_alone(fake: FakeCuda, allocator: Torch) -> None:
    for address in (None, 0x1234):
        allocator.free(address, PAGE)
    for device in (-1, 5, 10**6):
        assert allocator.alloc(PAGE, device=device) is None
        allocator.free(0x1234, PAGE, device=device)
        assert allocator.drain(device, wait=True) == allocator.detach(device) == 0
        assert sum(allocator.stats(device)) == 0
    assert allocator.alloc(0) is None
    assert allocator.stats(0).num_frees == 0


def test_failures_belong_to_the_thread_that_met_them(allocator: Torch, ledger: Ledger) -> None:
    before = allocator.failure().num_failures
    seen = []

    def fail_in_a_thread() -> None:
        assert allocator.alloc(PAGE) is None
        seen.append(allocator.failure())

    ledger.budget_bytes = 0
    thread = threading.Thread(target=fail_in_a_thread)
    thread.start()
    thread.join()
    assert seen[0] == (1, PAGE, PAGE, "vtp_ledger_take", "over budget")
    assert allocator.failure().num_failures == before


class NativeThread:
    """A thread that Python knows nothing of, at work while the calling one keeps the GIL."""

    def __init__(self, folder: Path) -> None:
        compile_c(folder / "libnativethread.so", "-O1", "-fPIC", "-shared", HERE / "native_thread.c")
        self._keeping_gil = ctypes.PyDLL(str(folder / "libnativethread.so"))
        self._letting_go = ctypes.CDLL(str(folder / "libnativethread.so"))
        self._keeping_gil.native_thread_run.argtypes = [
            *[ctypes.c_void_p] * 2, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip

    def run(self, functions: tuple[int | None, int | None], nbytes: int, num_rounds: int, ms: int) -> bool:
        """Allocate and free so often; returns whether every call came back in time, without the GIL."""
        in_time = bool(self._keeping_gil.native_thread_run(*functions, nbytes, STREAM, num_rounds, ms))
        if not in_time:
            self._letting_go.native_thread_join()
        return in_time

    @property
    def num_made(self) -> int:
        return int(self._letting_go.native_thread_num_made())


@pytest.fixture(scope="module")
def native_thread(tmp_path_factory: pytest.TempPathFactory) -> NativeThread:
    return NativeThread(tmp_path_factory.mktemp("native_thread"))


def test_a_function_that_takes_the_gil_is_noticed(native_thread: NativeThread) -> None:
    alloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)(lambda *_: None)
    address = ctypes.cast(alloc, ctypes.c_void_p).value
    assert not native_thread.run((address, None), PAGE, 1, ms=100)


@pytest.mark.parametrize("situation", ["new pages", "pages of what is freed", "over budget", "a broken driver"])
def test_alloc_and_free_never_take_the_gil(
    fake: FakeCuda, allocator: Torch, ledger: Ledger, native_thread: NativeThread, situation: str
) -> None:
    """torch holds the lock of its caching allocator meanwhile, which another thread may wait for with the GIL."""
    expected = 50
    if situation == "pages of what is freed":  # while a kernel uses it: the budget makes alloc wait for that kernel
        ledger.budget_bytes = LARGE_PAGE
        allocator.free(allocator.run(LARGE_PAGE), LARGE_PAGE)
        assert allocator.stats(0).pending_segments == 1
    elif situation == "over budget":
        ledger.budget_bytes = PAGE
        expected = 0
    elif situation == "a broken driver":
        fake.fail(every="cuMemSetAccess")
        expected = 0
    with allocator.watched(0):  # as sleep() and wake() do, with the GIL and without
        assert native_thread.run(allocator.functions, LARGE_PAGE, 50 if expected == 0 else 1, ms=60_000)
    before = native_thread.num_made
    assert native_thread.run(allocator.functions, LARGE_PAGE, 50, ms=60_000)
    assert native_thread.num_made == expected
    assert before == (expected > 0)


def test_missing_driver_is_named(built: tuple[Path, Path], tmp_path: Path) -> None:
    fresh = tmp_path / "fresh.so"  # a library that has opened no driver yet
    fresh.write_bytes(built[1].read_bytes())
    allocator = NativeAllocator(str(fresh), driver="libno_such_driver.so.1")
    with pytest.raises(DriverError, match=r"dlopen failed .* while opening libno_such_driver\.so\.1"):
        allocator.attach(DEVICE, Ledger(), (PAGE, LARGE_PAGE), peers=[])
    allocator = NativeAllocator(str(fresh), driver="libm.so.6")
    with pytest.raises(DriverError, match="cuInit failed with the driver has no such function"):
        allocator.attach(DEVICE, Ledger(), (PAGE, LARGE_PAGE), peers=[])


def test_lack_of_host_memory_is_named_and_loses_nothing(
    fake: FakeCuda, built: tuple[Path, Path], tmp_path: Path
) -> None:
    faulty = tmp_path / "faulty.c"
    faulty.write_text(
        "#include <stdlib.h>\n"
        "int fail_in;\n"
        "void *faulty_calloc(size_t n, size_t bytes) { return --fail_in == 0 ? NULL : calloc(n, bytes); }\n"
        "void *faulty_realloc(void *old, size_t bytes) { return --fail_in == 0 ? NULL : realloc(old, bytes); }\n"
    )
    objects = []
    for source in sorted(NATIVE.glob("*.c")):
        objects.append(tmp_path / f"{source.stem}.o")
        compile_c(objects[-1], "-fPIC", "-Dcalloc=faulty_calloc", "-Drealloc=faulty_realloc", "-c", source)
    compile_c(tmp_path / "faulty.so", "-fPIC", "-shared", faulty, *objects)
    allocator = Torch(fake, tmp_path / "faulty.so", built[0])
    library = allocator._library
    library.vtp_ledger_new.restype = ctypes.c_void_p
    fail_in = ctypes.c_int.in_dll(library, "fail_in")

    fail_in.value = 1
    assert library.vtp_ledger_new(ctypes.c_int64(-1)) is None
    ledger = SimpleNamespace(address=library.vtp_ledger_new(ctypes.c_int64(-1)))
    fail_in.value = 1
    with pytest.raises(DriverError, match="vtp_torch_attach failed with no host memory"):
        allocator.use(ledger)
    allocator.use(ledger)
    failed_calls = []
    for nth in (1, 2, 3, 1):  # the segment's notes; the ledger's class of pages, then room for its pages; and again
        fail_in.value = nth
        assert allocator.alloc(PAGE) is None
        assert allocator.failure().code == "no host memory"
        failed_calls.append(allocator.failure().call)
        assert fake.counts().num_reserved == fake.counts().num_handles == allocator.stats(0).pending_segments == 0
    assert failed_calls == ["vtp_torch_alloc", "vtp_ledger_take", "vtp_ledger_take", "vtp_torch_alloc"]
    fail_in.value = 0
    allocator.free(allocator.alloc(PAGE), PAGE)
    assert allocator.detach(0) == 0


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_threads_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1"]
    skip_without_sanitizer(tmp_path, flags)
    driver, _ = build(tmp_path, *flags)
    compile_c(tmp_path / "stress", *flags, *sorted(NATIVE.glob("*.c")), HERE / "stress.c")
    command = [str(tmp_path / "stress"), str(driver), "4", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found.pop("exercised") == "1"
    assert set(found.values()) == {"0"}, done.stdout


def skip_without_sanitizer(folder: Path, flags: list[str]) -> None:
    source, program = folder / "nothing.c", folder / "nothing"
    source.write_text("int main(void) { return 0; }\n")
    try:
        compile_c(program, *flags, source)
        subprocess.run([str(program)], check=True, capture_output=True)
    except (AssertionError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine's compiler or kernel cannot run {flags[0]}: {error}")


def find_cuda_h() -> Path | None:
    folders = [Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include")]
    folders += [folder for path in sys.path for folder in Path(path).glob("nvidia/*/include")]
    return next((folder / "cuda.h" for folder in folders if (folder / "cuda.h").is_file()), None)


@pytest.mark.skipif(find_cuda_h() is None, reason="no cuda.h of NVIDIA's on this machine to compare with")
def test_declarations_agree_with_cuda_h(tmp_path: Path) -> None:
    constants = {
        "CUDA_OK": "CUDA_SUCCESS",
        "CUDA_OUT_OF_MEMORY": "CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA_STREAM_CAPTURE_IMPLICIT": "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        "CUDA_CAPTURED_EVENT": "CUDA_ERROR_CAPTURED_EVENT",
        "CUDA_ALLOCATION_PINNED": "CU_MEM_ALLOCATION_TYPE_PINNED",
        "CUDA_LOCATION_DEVICE": "CU_MEM_LOCATION_TYPE_DEVICE",
        "CUDA_ACCESS_READ_WRITE": "CU_MEM_ACCESS_FLAGS_PROT_READWRITE",
        "CUDA_EVENT_DISABLE_TIMING": "CU_EVENT_DISABLE_TIMING",
        "CUDA_CAPTURE_MODE_RELAXED": "CU_STREAM_CAPTURE_MODE_RELAXED",
        "CUDA_CAPTURE_STATUS_NONE": "CU_STREAM_CAPTURE_STATUS_NONE",
    }
    sizes = {
        "cuda_result": "CUresult",
        "cuda_context": "CUcontext",
        "cuda_stream": "CUstream",
        "cuda_event": "CUevent",
        "cuda_module": "CUmodule",
        "cuda_function": "CUfunction",
        "cuda_location": "CUmemLocation",
        "cuda_access": "CUmemAccessDesc",
        "cuda_allocation": "CUmemAllocationProp",
        "uint64_t": "CUdeviceptr",
        "int": "CUdevice",
    }
    offsets = [
        ("cuda_location, id", "CUmemLocation, id"),
        ("cuda_access, flags", "CUmemAccessDesc, flags"),
        ("cuda_allocation, handle_types", "CUmemAllocationProp, requestedHandleTypes"),
        ("cuda_allocation, location", "CUmemAllocationProp, location"),
        ("cuda_allocation, win32_metadata", "CUmemAllocationProp, win32HandleMetaData"),
        ("cuda_allocation, flags", "CUmemAllocationProp, allocFlags"),
    ]
    cuda_h = find_cuda_h()
    lines = [f'#include "{cuda_h}"', f'#include "{NATIVE / "cuda_driver.h"}"']
    lines += [f'_Static_assert((int){ours} == (int){theirs}, "{ours}");' for ours, theirs in constants.items()]
    lines += [f'_Static_assert(sizeof({ours}) == sizeof({theirs}), "{ours}");' for ours, theirs in sizes.items()]
    lines += [f'_Static_assert(offsetof({ours}) == offsetof({theirs}), "{ours}");' for ours, theirs in offsets]
    source = tmp_path / "compare.c"
    source.write_text("\n".join(lines) + "\n")
    compile_c(tmp_path / "compare.o", "-c", source)
