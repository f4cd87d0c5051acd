"""GrowthScheduler behind a device whose work ends, and whose stream is captured, when the test says so."""

import pytest
import torch
from scripted_drivers import PAGE, ManualDriver
from vtensors import MakeScheduler, pages

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.errors import OutOfPagesError


@pytest.fixture
def driver() -> ManualDriver:
    return ManualDriver()


@pytest.fixture
def scheduler(driver: ManualDriver, make_scheduler: MakeScheduler) -> GrowthScheduler:
    return make_scheduler(driver, idle_bytes=0)


def test_nothing_is_unmapped_before_its_last_reader(driver: ManualDriver, scheduler: GrowthScheduler) -> None:
    vtensor = pages(scheduler, 4)
    address = vtensor.data_ptr
    vtensor.close()
    scheduler.settle()
    on_device = driver.tensor(address, 4 * PAGE, None)  # as a kernel that still runs would read it
    assert on_device.sum() == 4 * PAGE
    assert scheduler.stats().parked_bytes == 4 * PAGE
    driver.finish_work()
    scheduler.pool.budget_bytes = 0
    with pytest.raises(OutOfPagesError):
        pages(scheduler, 1, capacity=1000)
    assert driver.physical_bytes() == 0
    assert scheduler.num_device_waits == 0
    scheduler.pool.budget_bytes = None


def test_adoption_orders_the_next_work_after_the_last(driver: ManualDriver, make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(driver)
    pages(scheduler, 4).close()
    scheduler.stats()
    (fence,) = driver.fences
    pages(scheduler, 4, first_rows=4).close()
    assert (fence.num_ordered, fence.num_waits, scheduler.num_device_waits) == (1, 0, 0)
    driver.finish_work()


def test_only_trim_and_want_of_memory_wait(driver: ManualDriver, scheduler: GrowthScheduler) -> None:
    with pages(scheduler, 2) as first:
        first.append(torch.ones(1, PAGE, dtype=torch.uint8))
        with first.fork() as second:
            second.truncate(1)
            second.append(torch.zeros(2, PAGE, dtype=torch.uint8))
            first.drop_head(3)
            assert (first.first_row, second.tensor().sum()) == (3, PAGE)
    scheduler.settle()
    stats, committed_bytes = scheduler.stats(), (3 + 2) * PAGE
    assert (stats.committed_bytes, stats.live_bytes, stats.shared_bytes) == (committed_bytes, 0, 0)
    assert sum(fence.num_waits for fence in driver.fences) == scheduler.num_device_waits == 0
    assert scheduler.trim() == committed_bytes
    assert sum(fence.num_waits for fence in driver.fences) == scheduler.num_device_waits > 0


def test_want_of_memory_waits_for_no_more_than_it_needs(driver: ManualDriver, scheduler: GrowthScheduler) -> None:
    for _ in range(3):
        pages(scheduler, 2).close()
    scheduler.settle()
    scheduler.pool.drop(scheduler.pool.acquire([4 * PAGE]))
    scheduler.pool.budget_bytes = 10 * PAGE
    kept = [pages(scheduler, 4, adopt=False)]  # there is a page pooled for it
    assert scheduler.num_device_waits == 0
    kept.append(pages(scheduler, 2, adopt=False))
    kept.append(pages(scheduler, 1, adopt=False))
    assert [fence.num_waits for fence in driver.fences] == [1, 1, 0]
    driver.finish_work()


def test_death_during_a_capture_is_noticed_after_it(driver: ManualDriver, scheduler: GrowthScheduler) -> None:
    vtensor, other = pages(scheduler, 4), pages(scheduler, 1)
    pages(scheduler, 3).close()  # parked behind a fence
    scheduler.settle()
    driver.capturing = True
    vtensor.close()
    other.drop_head(1)
    with pages(scheduler, 2, first_rows=4):
        scheduler.pool.budget_bytes = 0
        with pytest.raises(OutOfPagesError):  # and not by way of asking a fence
            other.append(torch.ones(20, PAGE, dtype=torch.uint8))
        scheduler.pool.budget_bytes = None
        scheduler.trim()
    scheduler.settle()
    assert len(driver.fences) == 1
    driver.capturing = False
    scheduler.reap()
    assert len(driver.fences) == 2
    driver.finish_work()
    driver.end_graphs()


@pytest.mark.parametrize("close_first", [True, False])
def test_a_graph_keeps_the_memory_that_it_reads(
    driver: ManualDriver, scheduler: GrowthScheduler, close_first: bool
) -> None:
    vtensor = pages(scheduler, 4)
    vtensor.tensor()  # made before the capture, and used again in it
    driver.capturing = True
    address = vtensor.tensor().data_ptr()
    driver.capturing = False
    if close_first:
        vtensor.close()
        scheduler.trim()
    assert driver.tensor(address, 4 * PAGE, None).sum() == 4 * PAGE
    driver.end_graphs()
    vtensor.close()
    assert scheduler.trim() == 4 * PAGE


def test_addresses_stay_until_the_front_that_went_first_is_unmapped(
    driver: ManualDriver, scheduler: GrowthScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    vtensor = pages(scheduler, 1)
    vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
    vtensor.drop_head(1)
    vtensor.close()
    front, rest = driver.fences
    rest.has_passed = True
    scheduler.run_soon(scheduler._collect)
    scheduler.settle()
    assert scheduler.stats().reserved_bytes == 100 * PAGE
    front.has_passed = True
    scheduler.run_soon(scheduler._collect)
    scheduler.settle()
    assert scheduler.stats().reserved_bytes == 0
    assert not caplog.records


def test_one_that_dies_while_a_fence_is_made_gets_a_fence_of_its_own(
    driver: ManualDriver, scheduler: GrowthScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = pages(scheduler, 2), [pages(scheduler, 3)]
    made = driver.fence

    def fence() -> object:
        fence = made()
        late.clear()  # its last kernel started after the fence
        return fence

    monkeypatch.setattr(driver, "fence", fence)
    early.close()
    scheduler.settle()
    driver.fences[0].has_passed = True
    scheduler.pool.budget_bytes = 0
    scheduler.reap()
    assert len(driver.fences) == 2
    scheduler.settle()
    assert scheduler.stats().parked_bytes == 3 * PAGE
    scheduler.pool.budget_bytes = None
    driver.finish_work()
