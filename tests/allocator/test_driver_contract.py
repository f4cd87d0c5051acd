"""What every Driver promises, on every driver: the allocator above relies on this and on nothing else."""

import ctypes
import errno
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from torch_vtensor.allocator import host_driver
from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.errors import DriverError

MIB = 2**20

HOST = ["host-4KiB", "host-64KiB", "host-2MiB"]


@pytest.fixture(params=[*HOST, pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Driver:
    if request.param == "cuda":
        from torch_vtensor.allocator.cuda_driver import CudaDriver

        return CudaDriver("cuda")
    return HostDriver({"host-4KiB": 4 * 1024, "host-64KiB": 64 * 1024, "host-2MiB": 2 * 2**20}[request.param])


class Owner:
    """Something that a tensor can keep alive."""


@contextmanager
def reserved(driver: Driver, nbytes: int) -> Iterator[int]:
    ptr = driver.reserve(nbytes)
    yield ptr
    driver.release(ptr, nbytes)


@contextmanager
def page(driver: Driver, nbytes: int) -> Iterator[int]:
    handle = driver.create(nbytes)
    yield handle
    driver.destroy(handle, nbytes)


@contextmanager
def mapped(driver: Driver, ptr: int, nbytes: int, handle: int) -> Iterator[torch.Tensor]:
    driver.map(ptr, nbytes, handle)
    driver.set_access(ptr, nbytes)
    yield driver.tensor(ptr, nbytes, Owner())
    driver.fence().wait()
    driver.unmap(ptr, nbytes)


def taken_bytes(driver: Driver, free_before: int = 0) -> int:
    """Physical memory in use, since ``free_before`` where only the device's own figure can be had."""
    if isinstance(driver, HostDriver):
        return driver.physical_bytes()
    taken = free_before - free_bytes(driver)  # loading a kernel takes some too, on its first launch
    return round(taken / driver.page_sizes[-1]) * driver.page_sizes[-1]


def free_bytes(driver: Driver) -> int:
    """What the device has, without what torch keeps of tensors that are gone."""
    if isinstance(driver, HostDriver):
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(driver.device)[0]


def test_page_sizes_ascend_and_each_divides_the_next(driver: Driver) -> None:
    assert driver.page_sizes[0] > 0
    assert all(small < large and large % small == 0 for small, large in pairwise(driver.page_sizes))
    assert driver.free_bytes() >= driver.page_sizes[-1]
    assert 0 <= driver.growth_fraction < 1


def test_reserving_takes_aligned_addresses_and_no_memory(driver: Driver) -> None:
    before = free_bytes(driver)
    with reserved(driver, 2**40) as ptr:
        assert ptr % driver.page_sizes[0] == 0
        assert taken_bytes(driver, before) == 0


def test_one_page_at_two_addresses_is_one_memory(driver: Driver) -> None:
    size = driver.page_sizes[0]
    with (
        reserved(driver, size) as first,
        reserved(driver, 3 * size) as second,
        page(driver, size) as handle,
        mapped(driver, first, size, handle) as a,
        mapped(driver, second + size, size, handle) as b,
    ):
        a.fill_(7)
        assert torch.equal(b, torch.full_like(b, 7))
        b[size // 2 :].fill_(9)
        assert a[size // 2 - 1].item() == 7
        assert a[-1].item() == 9


def test_bytes_belong_to_the_page_and_not_to_the_address(driver: Driver) -> None:
    size = driver.page_sizes[0]
    with reserved(driver, 2 * size) as ptr, page(driver, size) as one, page(driver, size) as other:
        with mapped(driver, ptr, size, one) as view:
            view.fill_(1)
        with mapped(driver, ptr, size, other) as view:
            view.fill_(2)
        with mapped(driver, ptr, size, other) as a, mapped(driver, ptr + size, size, one) as b:
            assert (a[0].item(), a[-1].item()) == (2, 2)
            assert (b[0].item(), b[-1].item()) == (1, 1)


def test_pages_of_all_sizes_in_a_row_read_as_one_tensor(driver: Driver) -> None:
    total = sum(driver.page_sizes)
    ptr, offset, handles = driver.reserve(total), 0, []
    for size in driver.page_sizes:
        handles.append((ptr + offset, size, driver.create(size)))
        driver.map(*handles[-1])
        offset += size
    driver.set_access(ptr, total)
    whole = driver.tensor(ptr, total, Owner()).view(torch.int64)
    expected = torch.arange(total // 8, device=driver.device)
    whole.copy_(expected)
    assert torch.equal(whole, expected)
    driver.fence().wait()
    for address, size, handle in handles:
        driver.unmap(address, size)
        driver.destroy(handle, size)
    driver.release(ptr, total)


def test_memory_is_taken_by_create_and_returned_by_destroy(driver: Driver) -> None:
    size = driver.page_sizes[-1]
    before = free_bytes(driver)
    with reserved(driver, size) as ptr:
        with page(driver, size) as handle:
            assert taken_bytes(driver, before) == size
            with mapped(driver, ptr, size, handle) as view:
                view.fill_(1)
                assert taken_bytes(driver, before) == size
            assert taken_bytes(driver, before) == size
        assert taken_bytes(driver, before) == 0
        with page(driver, size) as handle, mapped(driver, ptr, size, handle) as view:
            assert view.fill_(3)[-1].item() == 3
    assert taken_bytes(driver, before) == 0


def test_offloaded_memory_is_outside_the_device_and_maps_like_any_other(driver: Driver) -> None:
    size = driver.page_sizes[-1]
    before = free_bytes(driver)
    with reserved(driver, 2 * size) as ptr:
        handle, other = driver.create_offloaded(size), driver.create_offloaded(driver.page_sizes[0])
        assert taken_bytes(driver, before) == 0
        with mapped(driver, ptr, size, handle) as view:
            view.copy_(torch.arange(size, device=driver.device).to(torch.uint8))
            with mapped(driver, ptr + size, size, handle) as same:
                assert torch.equal(view, same)
            assert taken_bytes(driver, before) == 0
        with page(driver, size) as inside, mapped(driver, ptr + size, size, inside) as neighbour:
            neighbour.fill_(3)
            with mapped(driver, ptr, size, handle):  # one tensor over memory of both kinds
                whole = driver.tensor(ptr, 2 * size, Owner())
                assert torch.equal(whole[:size], torch.arange(size, device=driver.device).to(torch.uint8))
                assert whole[size:].unique().tolist() == [3]
                whole[size - 100 : size + 100] += 1
                assert whole[size - 1].item() == 0
                assert whole[size].item() == 4
        for it, nbytes in ((handle, size), (other, driver.page_sizes[0])):
            driver.destroy(it, nbytes)
    if isinstance(driver, HostDriver):
        assert driver.offloaded_bytes() == 0


def test_copies_go_between_the_device_and_offloaded_memory(driver: Driver) -> None:
    size = driver.page_sizes[0]
    with reserved(driver, 3 * size) as ptr, page(driver, size) as first, page(driver, size) as last:
        handle = driver.create_offloaded(size)
        with (
            mapped(driver, ptr, size, first) as source,
            mapped(driver, ptr + size, size, handle) as kept,
            mapped(driver, ptr + 2 * size, size, last) as target,
        ):
            source.copy_((torch.arange(size, device=driver.device) * 7).to(torch.uint8))
            expected = source.clone()
            driver.copy(ptr + size, ptr, size)
            source.zero_()  # behind the copy
            driver.copy(ptr + 2 * size, ptr + size, size)
            assert torch.equal(target, expected)
            assert torch.equal(kept, expected)
        driver.destroy(handle, size)


@pytest.mark.parametrize("driver", HOST, indirect=True)
def test_a_hole_reads_as_zeros(driver: Driver) -> None:
    size = driver.page_sizes[0]
    with reserved(driver, 3 * size) as ptr, page(driver, size) as handle:
        with mapped(driver, ptr + size, size, handle) as view:
            view.fill_(5)
            whole = driver.tensor(ptr, 3 * size, Owner())
            assert whole.sum().item() == 5 * size
        assert whole.sum().item() == 0


def test_the_last_view_and_nothing_else_lets_go_of_the_owner(driver: Driver) -> None:
    size = driver.page_sizes[0]
    with reserved(driver, size) as ptr, page(driver, size) as handle, mapped(driver, ptr, size, handle):
        owner = Owner()
        alive = weakref.ref(owner)
        flat = driver.tensor(ptr, size, owner)
        assert (flat.dtype, flat.shape, flat.data_ptr(), flat.device) == (torch.uint8, (size,), ptr, driver.device)
        assert flat.untyped_storage().nbytes() == size
        view = flat.view(torch.bfloat16).as_strided((4, 2), (8, 1), 16)[1:].t()
        del owner, flat
        gc.collect()
        assert alive() is not None
        view.fill_(1)
        detached = view.detach()
        del view
        assert alive() is not None
        del detached
        assert alive() is None


def test_an_empty_tensor_needs_no_memory(driver: Driver) -> None:
    with reserved(driver, driver.page_sizes[0]) as ptr:
        empty = driver.tensor(ptr, 0, Owner())
        assert (empty.dtype, empty.shape, empty.device) == (torch.uint8, (0,), driver.device)
        assert empty.view(torch.float32).as_strided((0, 3), (3, 1)).clone().shape == (0, 3)


def test_refusals_name_call_code_device_and_bytes(driver: Driver) -> None:
    size = driver.page_sizes[0]
    before = free_bytes(driver)
    with pytest.raises(DriverError) as no_addresses:
        driver.reserve(2**60)
    assert 2**60 <= no_addresses.value.nbytes <= 2**60 + size
    with reserved(driver, 2 * size) as ptr, page(driver, size) as handle:
        with pytest.raises(DriverError) as misaligned:
            driver.map(ptr + 1, size, handle)
        for error in (no_addresses.value, misaligned.value):
            assert error.device == driver.device
            for part in (error.call, error.code, str(error.device), str(error.nbytes)):
                assert part
                assert part in str(error)
        with mapped(driver, ptr, size, handle) as view:  # and the driver works as before
            assert view.fill_(1)[0].item() == 1
    assert taken_bytes(driver, before) == 0


def test_a_signal_during_a_call_does_not_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux may break off an allocation for any signal that arrives meanwhile, as a profiler sends all the time."""
    driver, allocate, interrupted = HostDriver(4096), host_driver._fallocate, []

    def allocate_at_the_second_try(*arguments: int) -> int:
        if len(interrupted) % 2 == 0:
            interrupted.append(arguments)
            ctypes.set_errno(errno.EINTR)
            return -1
        interrupted.append(arguments)
        return allocate(*arguments)

    monkeypatch.setattr(host_driver, "_fallocate", allocate_at_the_second_try)
    with page(driver, 4096):
        assert driver.physical_bytes() == 4096
    assert driver.physical_bytes() == 0
    assert len(interrupted) == 4


@pytest.mark.parametrize("kind", ["fence", "copied"])
def test_a_fence_passes_and_orders(driver: Driver, kind: str) -> None:
    fence = getattr(driver, kind)()
    fence.order_after()
    fence.wait()
    assert fence.passed()
    assert not driver.is_capturing()
    assert not driver.is_capturing_here()


def test_another_thread_can_use_the_driver_after_preparing(driver: Driver) -> None:
    size, seen = driver.page_sizes[0], []

    def work() -> None:
        driver.prepare_thread()
        with reserved(driver, size) as ptr, page(driver, size) as handle, mapped(driver, ptr, size, handle) as view:
            seen.append(int(view.fill_(4).sum().item()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(4 * size)]


@pytest.mark.gpu
def test_copies_are_done_while_another_stream_works_on() -> None:
    from torch_vtensor.allocator.cuda_driver import CudaDriver

    driver, stream, copies = CudaDriver("cuda"), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    with torch.cuda.stream(copies):
        driver.copied().wait()
    assert not stream.query()
    with torch.cuda.stream(stream):
        copied = driver.copied()
    assert not copied.passed()
    copied.wait()
    assert stream.query()


@pytest.mark.gpu
def test_what_is_pinned_is_good_for_copies() -> None:
    from torch_vtensor.allocator.cuda_driver import CudaDriver

    driver, sizes, pinned = CudaDriver("cuda"), [2 * MIB, 32 * MIB, 2 * MIB], list[tuple[int, int]]()
    assert driver.pins is not None
    driver.pins.pin(sizes, lambda ptr, nbytes: pinned.append((ptr, nbytes)))
    assert [nbytes for _, nbytes in pinned] == sizes
    given, back = (torch.randint(256, (32 * MIB,), dtype=torch.uint8, device="cuda") for _ in range(2))
    for ptr, nbytes in pinned:
        driver.copy(ptr, given.data_ptr(), nbytes)
        driver.copy(back.data_ptr(), ptr, nbytes)
        assert torch.equal(back[:nbytes], given[:nbytes])
        driver.copied().wait()
        driver.pins.unpin(ptr, nbytes)


@pytest.mark.gpu
def test_a_fence_covers_every_stream() -> None:
    from torch_vtensor.allocator.cuda_driver import CudaDriver

    driver, stream = CudaDriver("cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
    fence = driver.fence()
    assert not fence.passed()
    fence.wait()
    assert fence.passed()
    assert stream.query()


@pytest.mark.gpu
def test_a_graph_keeps_the_owner_until_it_is_gone() -> None:
    from torch_vtensor.allocator.cuda_driver import CudaDriver

    driver, graph, owner = CudaDriver("cuda"), torch.cuda.CUDAGraph(), Owner()
    alive, x = weakref.ref(owner), torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        assert driver.is_capturing()
        driver.retain_in_capture(owner)
    assert not driver.is_capturing()
    del owner
    driver.collect()
    graph.replay()
    torch.cuda.synchronize()
    driver.collect()
    assert alive() is not None
    graph.reset()
    del graph
    deadline = time.monotonic() + 10
    while alive() is not None and time.monotonic() < deadline:  # the driver tells on a thread of its own
        driver.collect()
        time.sleep(0.01)
    assert alive() is None
