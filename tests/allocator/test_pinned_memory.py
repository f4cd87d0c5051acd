"""Memory for copies alone: had in parallel, kept as far as it was had, and no use for anything else."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from scripted_drivers import PAGE, FailingDriver
from vtensors import assert_all_given_back, pages

from torch_vtensor.allocator import pinned_memory
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_memory import cpus_of_node
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.pinned_memory import PinnedMemory
from torch_vtensor.errors import DriverError

DEVICE = torch.device("cpu")
MIB = 2**20


class Registry:
    """What a device's driver has pinned."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.refused_bytes: list[int] = []

    def register(self, ptr: int, nbytes: int) -> None:
        if nbytes in self.refused_bytes:
            raise DriverError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY", DEVICE, nbytes)
        assert ctypes.string_at(ptr + nbytes - 1, 1) == b"\0"
        self.pinned[ptr] = nbytes

    def unregister(self, ptr: int, nbytes: int) -> None:
        if nbytes in self.refused_bytes:
            raise DriverError("cuMemHostUnregister", "CUDA_ERROR_UNKNOWN", DEVICE, nbytes)
        assert self.pinned.pop(ptr) == nbytes


def test_as_much_is_kept_as_was_had() -> None:
    registry, kept = Registry(), list[tuple[int, int]]()
    memory = PinnedMemory(DEVICE, registry.register, registry.unregister, frozenset(os.sched_getaffinity(0)))
    registry.refused_bytes = [3 * MIB]
    with pytest.raises(DriverError, match="cuMemHostRegister"):
        memory.pin([MIB, 3 * MIB, 4 * MIB], lambda ptr, nbytes: kept.append((ptr, nbytes)))
    assert dict(kept) == registry.pinned
    assert [nbytes for _, nbytes in kept] == [MIB, 4 * MIB]
    assert all(ptr % (2 * MIB) == 0 for ptr, _ in kept), "where huge pages begin"
    registry.refused_bytes = [MIB]
    with pytest.raises(DriverError, match="cuMemHostUnregister"):
        memory.unpin(*kept[0])
    ctypes.memset(kept[0][0], 1, MIB)  # still there
    registry.refused_bytes.clear()
    for it in kept:
        memory.unpin(*it)
    assert not registry.pinned


def test_what_was_had_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, kept = Registry(), list[tuple[int, int]]()
    memory = PinnedMemory(DEVICE, registry.register, registry.unregister)

    def interrupted(waiting: list[Future[int]]) -> None:
        waiting[0].result()
        raise KeyboardInterrupt

    monkeypatch.setattr(pinned_memory, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.pin([MIB] * 40, lambda ptr, nbytes: kept.append((ptr, nbytes)))
    assert kept
    assert dict(kept) == registry.pinned
    for it in kept:
        memory.unpin(*it)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_child_process_leaves_it_to_its_parent() -> None:
    """Where the parent's memory is, the child has its own by and by: that is not to be unmapped."""
    memory = PinnedMemory(DEVICE, lambda ptr, nbytes: None, lambda ptr, nbytes: None)
    kept: list[int] = []
    memory.pin([4 * MIB], lambda ptr, nbytes: kept.append(ptr))
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        arguments = ctypes.c_void_p(kept[0]), ctypes.c_size_t(4 * MIB), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1
        libc.mmap(*arguments, ctypes.c_long(0))
        del memory
        gc.collect()
        ctypes.memset(kept[0], 1, 4 * MIB)  # SIGSEGV where that is unmapped
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ctypes.memset(kept[0], 2, 4 * MIB)
    memory.unpin(kept[0], 4 * MIB)


def test_a_system_without_memory_is_named() -> None:
    memory = PinnedMemory(DEVICE, lambda ptr, nbytes: None, lambda ptr, nbytes: None)
    with pytest.raises(DriverError, match=r"mmap.*ENOMEM"):
        memory.pin([2**62], lambda ptr, nbytes: None)


def test_cpus_of_a_node(tmp_path: Path) -> None:
    (tmp_path / "sys/devices/system/node/node1").mkdir(parents=True)
    (tmp_path / "sys/devices/system/node/node1/cpulist").write_text("0-2,8,10-11\n")
    assert cpus_of_node(1, tmp_path) == {0, 1, 2, 8, 10, 11}
    assert cpus_of_node(0, tmp_path) == cpus_of_node(-1, tmp_path) == frozenset()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FailingDriver:
    monkeypatch.setattr(FailingDriver, "has_pins", True)
    return FailingDriver()


def test_what_sleeps_is_pinned_and_what_is_offloaded_can_be_mapped(driver: FailingDriver) -> None:
    scheduler = GrowthScheduler(PagePool(driver, offload_bytes=30 * PAGE), idle_bytes=0)
    vtensor = pages(scheduler, 20)
    vtensor.offload()
    scheduler.sleep()  # of which nothing more leaves the device
    scheduler.wake()
    vtensor.prefetch()
    assert "register" not in driver.calls
    scheduler.sleep()  # where it was before
    scheduler.wake()
    assert "register" not in driver.calls
    scheduler.pool.offloads.trim()
    scheduler.sleep()
    assert driver.calls.count("register") > 0
    assert driver.offloaded_bytes() == 0
    scheduler.wake()
    before = len(driver.calls)
    scheduler.sleep()
    scheduler.wake()
    assert "register" not in driver.calls[before:], "it is pooled"
    vtensor.offload()  # under the limit there is no room for both
    assert scheduler.stats().offloaded_bytes + scheduler.stats().offload_pooled_bytes <= 30 * PAGE
    assert vtensor.tensor().unique().tolist() == [1]
    vtensor.close()
    assert_all_given_back(scheduler)


def test_what_cannot_be_used_makes_room_before_the_host_refuses(
    driver: FailingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = GrowthScheduler(PagePool(driver), idle_bytes=0)
    vtensor = pages(scheduler, 20)
    scheduler.sleep()
    scheduler.wake()

    def check_offload(nbytes: int) -> None:
        if scheduler.pool.offloads.pooled_bytes >= least_bytes:
            raise DriverError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY", DEVICE, nbytes)

    monkeypatch.setattr(driver, "check_offload", check_offload)
    least_bytes = 1
    assert vtensor.offload() == 20 * PAGE
    assert vtensor.tensor().unique().tolist() == [1]
    vtensor.prefetch()
    scheduler.pool.offloads.trim()
    least_bytes = 0
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        vtensor.offload()
    assert vtensor.offloaded_bytes == 0
    vtensor.close()
    assert_all_given_back(scheduler)
