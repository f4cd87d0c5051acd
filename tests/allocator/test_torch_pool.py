"""memory_pool() and release_idle(), on a model of torch's caching allocator and a CUDA driver without a GPU."""

import functools
import gc
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda import LARGE_PAGE, PAGE, FakeCuda, FakeDriver, TorchCalls, build
from fake_torch import FakeTensor, FakeTorch

from torch_vtensor.allocator import _torch_compat, torch_pool
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.native_allocator import NativeAllocator
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.torch_pool import memory_pool, release_idle, torch_pool_stats
from torch_vtensor.errors import DriverError, OutOfPagesError, VTensorError


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without CUDA")
def test_machine_without_cuda_is_told_what_to_do() -> None:
    for use in (lambda: memory_pool().__enter__(), lambda: release_idle("cuda"), torch_pool_stats):
        with pytest.raises(VTensorError, match=r"needs a CUDA GPU, and torch .* Leave the `with` out on this machine"):
            use()
    assert release_idle() == 0, "trim() may ask on every machine"


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"device is 'cpu'; memory_pool\(\) serves CUDA devices"), memory_pool("cpu"):
        pass


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least one byte"), memory_pool(budget_bytes=0):
        pass


def test_private_names_of_torch_are_where_they_were() -> None:
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch._C, name), name
    assert "allocator" in inspect.signature(torch.cuda.MemPool.__init__).parameters


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture
def fake(built: tuple[Path, Path]) -> Iterator[FakeCuda]:
    fake = FakeCuda(built[0])
    fake.reset()
    yield fake
    fake.check_sound()


@pytest.fixture
def pool(fake: FakeCuda) -> PagePool:
    return PagePool(FakeDriver(fake))


@pytest.fixture
def fake_torch(
    fake: FakeCuda, built: tuple[Path, Path], pool: PagePool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeTorch]:
    """memory_pool() on the model and the fake driver, as on a machine with one GPU."""
    driver, library = built
    calls = TorchCalls(library, driver)
    model = FakeTorch(calls)
    for name in ("create_memory_pool", "retire_memory_pool", "start_routing", "stop_routing"):
        monkeypatch.setattr(_torch_compat, name, getattr(model, name))
    for name, answer in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_allocator_backend": lambda: "native",
        "is_current_stream_capturing": lambda: model.is_capturing,
        "empty_cache": model.empty_cache,
        "CUDAPluggableAllocator": lambda path, alloc, free: (path, alloc, free),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch_pool, "default_pool", lambda device: pool)
    monkeypatch.setattr(torch_pool, "NativeAllocator", functools.partial(NativeAllocator, driver=str(driver)))
    monkeypatch.setattr(torch_pool.native, "library_path", lambda: library)
    for name, value in {"_native": None, "_allocator": None, "_pools": {}}.items():
        monkeypatch.setattr(torch_pool, name, value)
    yield model
    pool.budget_bytes = None
    gc.collect()  # a caught exception and its frames, with the tensors in them, are a cycle
    release_idle()
    pool.check_integrity()
    assert calls.detach(0) == 0, "a test left a tensor alive"
    assert pool.ledger.torch_bytes == 0
    pool.trim()
    assert fake.counts().num_handles == 0


def test_only_this_thread_and_only_inside_the_block(fake_torch: FakeTorch, pool: PagePool) -> None:
    in_thread: list[object] = []
    with memory_pool() as entered:
        assert entered is pool
        thread = threading.Thread(target=lambda: in_thread.append(fake_torch.empty(PAGE)))
        thread.start()
        thread.join()
        tensor = fake_torch.empty(PAGE)
    assert tensor is not None
    assert in_thread == [None]
    assert fake_torch.empty(PAGE) is None
    assert pool.ledger.torch_bytes == torch_pool_stats().live_bytes == PAGE


def test_next_block_finds_the_memory_of_the_last_one(fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool) -> None:
    for _ in range(10):
        with memory_pool():
            assert fake_torch.empty(LARGE_PAGE) is not None
    assert fake_torch.num_pools_made == fake.num_calls("cuMemMap") == 1
    assert pool.ledger.torch_bytes == LARGE_PAGE


def test_nested_blocks_and_threads_have_pools_of_their_own(fake_torch: FakeTorch) -> None:
    both_inside = threading.Barrier(2)

    def nest() -> None:
        with memory_pool():
            outer = fake_torch.empty(PAGE)
            with memory_pool("cuda:0"):
                both_inside.wait(timeout=30)
                assert fake_torch.empty(PAGE) is not None
            assert outer is not None
            assert fake_torch.empty(PAGE) is not None

    threads = [threading.Thread(target=nest) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake_torch.num_pools_made == 4


def test_release_idle_gives_back_dead_tensors_only(fake_torch: FakeTorch, pool: PagePool) -> None:
    with memory_pool():
        dead, alive = fake_torch.empty(LARGE_PAGE), fake_torch.empty(PAGE)
    assert release_idle() == 0, "both are alive"
    del dead
    assert release_idle(0) == LARGE_PAGE
    assert pool.ledger.torch_bytes == PAGE
    assert release_idle() == 0
    with memory_pool():
        assert fake_torch.empty(LARGE_PAGE) is not None, "a retired pool is not used again"
    del alive
    assert release_idle() == LARGE_PAGE + PAGE, "what outlived its pool comes back as well"
    assert fake_torch._uses == {}
    emptied_before = fake_torch.num_caches_emptied
    assert release_idle() == 0
    assert fake_torch.num_caches_emptied == emptied_before, "torch's own cache is left alone where nothing is ours"


def test_release_idle_leaves_open_blocks_alone(fake_torch: FakeTorch) -> None:
    with memory_pool():
        fake_torch.empty(PAGE)
        assert release_idle() == 0
        assert fake_torch.empty(PAGE) is not None
    assert release_idle() == PAGE


def test_release_idle_waits_for_the_device_only_if_asked(fake_torch: FakeTorch, fake: FakeCuda) -> None:
    with memory_pool():
        tensor = fake_torch.empty(PAGE)
        assert tensor is not None
        fake.launch(0, tensor.address, PAGE)
        del tensor
    assert release_idle(wait=False) == 0
    stats = torch_pool_stats()
    assert (stats.live_bytes, stats.pending_bytes, stats.num_device_waits) == (0, PAGE, stats.num_device_waits)
    assert release_idle(wait=True) == PAGE
    assert torch_pool_stats().num_device_waits == stats.num_device_waits + 1


def fail_after(tensor: object) -> None:
    raise KeyError(tensor)


def test_exception_leaves_nothing_behind(fake_torch: FakeTorch) -> None:
    for _ in range(3):
        with pytest.raises(KeyError), memory_pool():
            fail_after(fake_torch.empty(PAGE))
    assert fake_torch.num_pools_made == 1
    assert fake_torch.empty(PAGE) is None


def test_exhausted_budget_is_named_and_everything_still_works(fake_torch: FakeTorch, pool: PagePool) -> None:
    with memory_pool(budget_bytes=3 * PAGE):
        kept = fake_torch.empty(2 * PAGE)
    assert pool.budget_bytes == 3 * PAGE
    with pytest.raises(OutOfPagesError) as caught, memory_pool(), memory_pool():
        fake_torch.empty(LARGE_PAGE)
    error = caught.value
    assert (error.asked_bytes, error.committed_bytes, error.budget_bytes) == (LARGE_PAGE, 2 * PAGE, 3 * PAGE)
    assert type(error.__cause__) is torch.OutOfMemoryError, "named once, by the inner block"
    with memory_pool():
        with pytest.raises(torch.OutOfMemoryError):
            fake_torch.empty(LARGE_PAGE)
        assert fake_torch.empty(PAGE) is not None
    assert kept is not None


def test_full_device_is_named_with_what_helps(fake_torch: FakeTorch, fake: FakeCuda) -> None:
    fake.set_memory(PAGE)
    with pytest.raises(OutOfPagesError, match="the device has no more") as caught, memory_pool(budget_bytes="32MiB"):
        fake_torch.empty(2 * PAGE)
    assert (caught.value.asked_bytes, caught.value.budget_bytes) == (2 * PAGE, LARGE_PAGE)
    assert caught.value.is_device_full
    assert "torch.cuda.empty_cache()" in str(caught.value)
    assert "raise the budget" not in str(caught.value)


def test_broken_driver_is_named_and_not_called_lack_of_memory(fake_torch: FakeTorch, fake: FakeCuda) -> None:
    fake.fail(every="cuMemSetAccess")
    with (
        pytest.raises(DriverError, match="cuMemSetAccess failed with CUDA_ERROR_INVALID_VALUE on cuda:0"),
        memory_pool(),
    ):
        fake_torch.empty(PAGE)
    fake.fail_nothing()


def test_lack_of_torchs_own_memory_is_not_ours(fake_torch: FakeTorch) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, memory_pool():
        raise torch.OutOfMemoryError("of another allocator")
    assert not isinstance(caught.value, OutOfPagesError)


def test_page_pool_gets_dead_tensors_memory_when_it_needs_it(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool
) -> None:
    pool.budget_bytes = 3 * LARGE_PAGE
    with memory_pool():
        alive, dead, busy = fake_torch.empty(LARGE_PAGE), fake_torch.empty(LARGE_PAGE), fake_torch.empty(LARGE_PAGE, 7)
    with pytest.raises(OutOfPagesError):
        pool.acquire([PAGE])
    assert busy is not None
    fake.launch(7, busy.address, LARGE_PAGE)
    del dead, busy
    waits_before = torch_pool_stats().num_device_waits
    pages = pool.acquire([LARGE_PAGE])
    assert torch_pool_stats().num_device_waits == waits_before
    pages += pool.acquire([LARGE_PAGE])
    assert torch_pool_stats().num_device_waits > waits_before
    with pytest.raises(OutOfPagesError):
        pool.acquire([PAGE])
    assert alive is not None
    pool.drop(pages)
    pool.check_integrity()


def test_pooled_pages_are_used_before_torchs_cache(fake_torch: FakeTorch, pool: PagePool) -> None:
    pool.budget_bytes = 2 * LARGE_PAGE
    with memory_pool():
        fake_torch.empty(LARGE_PAGE)
    pool.drop(pool.acquire([PAGE] * 16))
    pages = pool.acquire([LARGE_PAGE])
    assert fake_torch.num_caches_emptied == 0
    pool.drop(pages)


def test_released_pools_are_made_anew(fake_torch: FakeTorch) -> None:
    for num_made in range(1, 20):
        with memory_pool():
            fake_torch.empty(PAGE)
        assert release_idle() == PAGE
        assert fake_torch.num_pools_made == num_made


@pytest.fixture
def scheduler(pool: PagePool) -> GrowthScheduler:
    return GrowthScheduler(pool)


SIZES = (PAGE, 20 * 2**20, LARGE_PAGE + 3 * PAGE)


def make_weights(fake_torch: FakeTorch, fake: FakeCuda, tag: str = "weights") -> list[tuple[FakeTensor, int, int]]:
    """Tensors in segments of their own, with what their first page holds."""
    made = []
    with memory_pool(tag=tag):
        for nbytes in SIZES:
            tensor = fake_torch.empty(nbytes)
            assert tensor is not None
            content = 1000 * len(made) + len(tag)
            fake.write(tensor.address, nbytes, content)
            made.append((tensor, nbytes, content))
    return made


def holds(fake: FakeCuda, made: list[tuple[FakeTensor, int, int]]) -> bool:
    return all(
        fake.read(tensor.address, nbytes) == list(range(content, content + len(fake.read(tensor.address, nbytes))))
        for tensor, nbytes, content in made
    )


def test_tensors_sleep_and_wake_by_tag(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool, scheduler: GrowthScheduler
) -> None:
    weights, others = make_weights(fake_torch, fake), make_weights(fake_torch, fake, "adapter")
    nbytes = sum(SIZES)
    assert scheduler.sleep(["weights"]) == nbytes == pool.offloads.used_bytes
    assert (pool.ledger.torch_bytes, torch_pool_stats().asleep_bytes) == (nbytes, nbytes)
    assert holds(fake, others)
    assert scheduler.sleep(["weights"]) == 0
    assert scheduler.sleep() == nbytes
    assert pool.ledger.committed_bytes == 0
    assert scheduler.wake() == 2 * nbytes
    assert (pool.offloads.used_bytes, torch_pool_stats().asleep_bytes) == (0, 0)
    assert holds(fake, weights)
    assert holds(fake, others)
    scheduler.sleep(discard=["adapter"])
    scheduler.wake()
    assert holds(fake, weights)
    assert not any(content for tensor, nbytes, _ in others for content in fake.read(tensor.address, nbytes))
    scheduler.trim()


def test_tensors_that_die_asleep_leave_nothing(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool, scheduler: GrowthScheduler
) -> None:
    weights = make_weights(fake_torch, fake)
    scheduler.sleep()
    del weights[1:]
    release_idle()
    assert scheduler.wake() == SIZES[0]
    assert holds(fake, weights)
    assert pool.offloads.used_bytes == 0
    scheduler.trim()


def test_a_newborn_segment_keeps_its_bytes_where_a_sleeping_one_died(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool, scheduler: GrowthScheduler
) -> None:
    old = make_weights(fake_torch, fake)
    addresses = [tensor.address for tensor, _, _ in old]
    scheduler.sleep()
    del old
    fake_torch.release_all()  # torch frees segments of its own accord as well
    new = make_weights(fake_torch, fake, "born later")
    assert sorted(tensor.address for tensor, _, _ in new) == sorted(addresses)
    scheduler.wake()
    assert holds(fake, new)
    scheduler.trim()


def test_host_memory_of_segments_that_died_asleep_goes_with_trim(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool, scheduler: GrowthScheduler
) -> None:
    weights = make_weights(fake_torch, fake)
    scheduler.sleep()
    del weights
    release_idle()
    assert pool.offloads.used_bytes == 0
    scheduler.trim()
    assert pool.offloads.pooled_bytes == 0


def test_waking_makes_room_and_without_any_changes_nothing(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool, scheduler: GrowthScheduler
) -> None:
    weights = make_weights(fake_torch, fake)
    scheduler.sleep()
    pool.budget_bytes = sum(SIZES)
    taken = pool.acquire([LARGE_PAGE, PAGE])
    with pytest.raises(OutOfPagesError) as caught:
        scheduler.wake()
    assert caught.value.budget_bytes == sum(SIZES)
    assert torch_pool_stats().asleep_bytes == sum(SIZES)
    pool.drop(taken)
    with memory_pool():
        fake_torch.empty(LARGE_PAGE)  # dead at once, but cached
    scheduler.wake()
    assert holds(fake, weights)
    scheduler.trim()


def test_every_call_of_sleeping_and_waking_may_fail(
    fake_torch: FakeTorch, fake: FakeCuda, pool: PagePool, scheduler: GrowthScheduler
) -> None:
    """The segments are as they were, or awake, and trying again works."""
    weights = make_weights(fake_torch, fake)
    for sleeps in (True, False) * 2:
        nth, failed = 0, True
        while failed:
            nth += 1
            fake.fail(nth)
            step = scheduler.sleep if sleeps else scheduler.wake
            try:
                step()
            except (DriverError, OutOfPagesError):
                failed = fake.fail_nothing()
                assert failed
                asleep_bytes = torch_pool_stats().asleep_bytes
                assert asleep_bytes == 0 or not sleeps
                scheduler.settle()
                scheduler.reap()
                if sleeps:
                    assert holds(fake, weights)
            else:
                failed = fake.fail_nothing()
                if failed:  # it failed where that does no harm
                    (scheduler.wake if sleeps else scheduler.sleep)()
        assert (torch_pool_stats().asleep_bytes > 0) is sleeps
    assert holds(fake, weights)
    scheduler.settle()
    scheduler.trim()


def test_capture_and_other_backends_are_refused(fake_torch: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch.is_capturing = True
    with pytest.raises(VTensorError, match=r"captures a CUDA graph.*Open it before the capture"), memory_pool():
        pass
    monkeypatch.setattr(torch_pool, "_pools", {})
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(VTensorError, match=r"backend is 'cudaMallocAsync'.*PYTORCH_ALLOC_CONF"), memory_pool():
        pass
