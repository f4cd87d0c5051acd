"""GrowthScheduler: memory is there before it is needed, goes back behind the device, and never earlier."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripted_drivers import PAGE
from vtensors import MakeScheduler, pages

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError


def calls_of(scheduler: GrowthScheduler, thread: int | None = None) -> int:
    if thread is None:
        return scheduler.stats().num_driver_calls
    return scheduler.pool.driver.num_calls_by_thread[thread]


def test_the_next_sequence_starts_in_the_last_ones_memory(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    pages(scheduler, 20).close()
    stats = scheduler.stats()
    assert (stats.parked_bytes, stats.live_bytes) == (20 * PAGE, 0)
    before = calls_of(scheduler)
    with pages(scheduler, 20, first_rows=20) as second:
        assert calls_of(scheduler) == before
        assert second.tensor().sum() == 20 * PAGE
        stats = scheduler.stats()
        assert (stats.parked_bytes, stats.live_bytes) == (0, 20 * PAGE)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"first_rows": 5}, "it would tie up much more memory than is needed"),
        ({"first_rows": 20, "adopt": False}, "the caller does not want it"),
        ({"first_rows": 20, "capacity": 200}, "its addresses do not suffice"),
        ({"first_rows": 20, "outer_shape": (2,)}, "its strips are others"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_range_is_not_adopted_where(make_scheduler: MakeScheduler, options: dict, why: str) -> None:
    scheduler = make_scheduler()
    pages(scheduler, 20).close()
    with VTensor((PAGE,), dtype=torch.uint8, scheduler=scheduler, **({"capacity": 100} | options)) as other:
        assert other.committed == 0
        assert scheduler.stats().parked_bytes == 20 * PAGE


def test_appending_after_committing_ahead_calls_the_driver_on_the_other_thread_only(
    make_scheduler: MakeScheduler,
) -> None:
    scheduler, this_thread = make_scheduler(), threading.get_ident()
    vtensor = pages(scheduler, 1)
    before = calls_of(scheduler, this_thread)
    for _ in range(60):
        vtensor.commit_ahead(vtensor.length + 1)
        scheduler.settle()
        vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
    assert calls_of(scheduler, this_thread) == before
    assert vtensor.tensor().sum() == 61 * PAGE


def test_committing_ahead_without_memory_is_silent_and_committing_is_not(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=2 * PAGE)
    vtensor = pages(scheduler, 2)
    vtensor.commit_ahead(3)
    scheduler.settle()
    assert vtensor.committed == 2
    with pytest.raises(OutOfPagesError):
        vtensor.commit(3)
    assert vtensor.tensor().sum() == 2 * PAGE


def test_committing_ahead_after_the_front_went_back_grows_what_is_left(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor = pages(scheduler, 4)
    view, blocker = vtensor.tensor(), threading.Event()
    scheduler.run_soon(blocker.wait)
    vtensor.commit_ahead(20)  # noted before the front goes, done after it
    vtensor.append(torch.full((4, PAGE), 2, dtype=torch.uint8))
    vtensor.drop_head(4)
    blocker.set()
    scheduler.settle()
    assert vtensor.committed >= 20
    assert vtensor.tensor().unique().tolist() == [2]
    assert view.unique().tolist() == [1]


def test_parked_memory_is_given_to_whom_the_budget_would_refuse(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=10 * PAGE)
    pages(scheduler, 4).close()
    pages(scheduler, 4, outer_shape=()).close()
    other = pages(scheduler, 9, capacity=1000)  # more addresses than the parked ranges have
    assert scheduler.stats().parked_bytes == 0
    with pytest.raises(OutOfPagesError):
        other.append(torch.ones(2, PAGE, dtype=torch.uint8))
    assert other.tensor().sum() == 9 * PAGE


def test_idle_memory_above_the_watermark_goes_back_by_itself(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(idle_bytes=20 * PAGE)
    sequences, blocker = [pages(scheduler, 6) for _ in range(6)], threading.Event()
    for vtensor in sequences[:3]:
        vtensor.close()
    scheduler.settle()
    assert scheduler.stats().parked_bytes == 18 * PAGE  # below the high mark: kept for the next
    scheduler.run_soon(blocker.wait)
    for vtensor in sequences[3:]:
        vtensor.close()
    assert scheduler.stats().parked_bytes == 36 * PAGE
    blocker.set()
    scheduler.settle()
    stats = scheduler.stats()
    assert 0 < stats.parked_bytes + stats.pooled_bytes <= 10 * PAGE  # down to the low mark, half of it
    assert scheduler.pool.driver.inner.physical_bytes() == stats.committed_bytes


def test_pooled_memory_goes_back_before_ranges_that_can_be_adopted(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(idle_bytes=20 * PAGE)
    scheduler.pool.drop(scheduler.pool.acquire([PAGE] * 16))
    with pages(scheduler, 8, adopt=False):
        scheduler.pool.drop(scheduler.pool.acquire([PAGE] * 16))
    scheduler.settle()
    stats = scheduler.stats()
    assert (stats.parked_bytes, stats.pooled_bytes) == (8 * PAGE, 2 * PAGE)


def test_a_sliding_window_keeps_no_more_than_its_window(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(idle_bytes=0)
    vtensor = VTensor((PAGE,), capacity=2000, dtype=torch.uint8, scheduler=scheduler)
    for step in range(300):
        vtensor.append(torch.full((1, PAGE), step % 251, dtype=torch.uint8))
        vtensor.drop_head(step - 10)
        scheduler.settle()
        # The window, a large page that it has not left entirely, and what grew ahead.
        assert scheduler.pool.driver.inner.physical_bytes() <= 50 * PAGE
    assert vtensor.tensor()[-11:, 0].tolist() == [step % 251 for step in range(289, 300)]
    assert not vtensor.num_storages() > 1


def test_the_thread_outlives_a_job_that_fails(make_scheduler: MakeScheduler, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make_scheduler()
    with caplog.at_level(logging.ERROR):
        scheduler.run_soon(lambda: 1 // 0)
        scheduler.settle()
    assert "ZeroDivisionError" in caplog.text
    vtensor = pages(scheduler, 1)
    vtensor.commit_ahead(10)
    scheduler.settle()
    assert vtensor.committed >= 10


def test_a_forgotten_scheduler_takes_its_thread_and_its_memory_along() -> None:
    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("torch_vtensor")

    def live_and_forget() -> tuple[Callable[[], object], threading.Thread]:
        scheduler = GrowthScheduler(PagePool(HostDriver(PAGE)), idle_seconds=1000)
        vtensor = pages(scheduler, 50)
        vtensor.commit_ahead(60)
        vtensor.close()
        scheduler.settle()
        (thread,) = [t for t in threading.enumerate() if t not in before]
        return weakref.ref(scheduler.pool.driver.inner), thread

    gc.collect()
    before, mapped_before = threading.enumerate(), num_mappings()
    driver, thread = live_and_forget()
    assert num_mappings() > mapped_before
    deadline = time.monotonic() + 30
    while (driver() is not None or thread.is_alive()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not thread.is_alive()
    assert driver() is None
    assert num_mappings() == mapped_before
