"""The tensors that the allocator's tests are about, and the proof that nothing of them is left behind."""

from collections.abc import Callable

import garbage
import torch
from scripted_drivers import PAGE

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.settings import IDLE_SECONDS

MakeScheduler = Callable[..., GrowthScheduler]  # the fixture of that name


class Clock:
    """The time that a test says it is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_asked = 0

    def __call__(self) -> float:
        self.num_asked += 1
        return self.now

    def pass_by(self, seconds: float, *schedulers: GrowthScheduler) -> None:
        """Let time pass, and the schedulers' threads do what is due then."""
        self.now += seconds
        for scheduler in schedulers:
            scheduler.settle()  # it looks at the time behind this
            scheduler.settle()

    def drop_load(self, scheduler: GrowthScheduler) -> None:
        """Let time pass in which nobody wants anything, and what the driver refuses is tried again."""
        scheduler.reap()
        for _ in range(10):
            self.pass_by(IDLE_SECONDS, scheduler)
        stats = scheduler.stats()
        assert stats.parked_bytes + stats.pooled_bytes <= stats.live_bytes // 5


def assert_all_given_back(scheduler: GrowthScheduler) -> None:
    """Once nothing refers to a tensor any more, trim leaves neither memory nor addresses."""
    scheduler.settle()
    scheduler.trim()
    if scheduler.stats().reserved_bytes:  # a traceback that the test caught is a cycle
        garbage.collect()
        scheduler.trim()
    scheduler.pool.check_integrity()
    stats = scheduler.stats()
    assert (stats.committed_bytes, stats.reserved_bytes, stats.live_bytes, stats.pooled_bytes) == (0, 0, 0, 0), stats
    driver = scheduler.pool.driver.inner
    if isinstance(driver, HostDriver):
        assert (driver.physical_bytes(), driver.offloaded_bytes()) == (0, 0)
        assert not (driver.pins and driver.pins._mappings), "memory is pinned"


def pages(scheduler: GrowthScheduler, num_rows: int, capacity: int = 100, **options: int) -> VTensor:
    """A tensor whose rows are exactly a page each, with ``num_rows`` of ones written."""
    vtensor = VTensor((PAGE,), capacity=capacity, dtype=torch.uint8, scheduler=scheduler, **options)
    vtensor.append(torch.ones(num_rows, PAGE, dtype=torch.uint8))
    return vtensor


def rows(num_rows: int, *shape: int, start: int = 0) -> torch.Tensor:
    """Rows [num_rows, *shape] that count up from ``start``, every element of a row the same."""
    counts = torch.arange(start, start + num_rows, dtype=torch.float32)
    return counts.reshape(-1, *[1] * len(shape)).expand(num_rows, *shape).contiguous()


def make(scheduler: GrowthScheduler, num_rows: int = 0, row: int = 300, **options: object) -> VTensor:
    vtensor = VTensor((row,), scheduler=scheduler, **({"capacity": 1000} | options))
    if num_rows:
        vtensor.append(rows(num_rows, row))
    return vtensor
