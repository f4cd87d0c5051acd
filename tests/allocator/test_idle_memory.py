"""Idle memory that nobody wants any more goes back by itself; what steady load comes back to stays."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from lives import Life, calls_of, refuse_each
from scripted_drivers import OFFLOAD_FOLDER, PAGE, FailingDriver, ManualDriver
from vtensors import Clock, MakeScheduler, pages

from torch_vtensor.allocator import growth
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor

SECONDS = 5.0


class PagesDriver(HostDriver):
    """Pages of one size: a figure that follows from how many there are."""

    def __init__(self) -> None:
        super().__init__(PAGE, OFFLOAD_FOLDER)
        self.page_sizes = (PAGE,)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scheduler(clock: Clock, make_scheduler: MakeScheduler) -> Iterator[GrowthScheduler]:
    made = make_scheduler(PagesDriver(), idle_seconds=SECONDS, clock=clock)
    made.run_soon(lambda: None)  # its thread's preparations are no part of what is counted
    made.settle()
    return made


def idle_pages(scheduler: GrowthScheduler) -> tuple[int, int]:
    stats = scheduler.stats()
    assert stats.committed_bytes == scheduler.pool.driver.inner.physical_bytes()
    return stats.parked_bytes // PAGE, stats.pooled_bytes // PAGE


@contextmanager
def stopped(scheduler: GrowthScheduler) -> Iterator[None]:
    """What is asked of the scheduler's thread inside is done in one go behind it."""
    begun, go_on = threading.Event(), threading.Event()
    scheduler.run_soon(lambda: begun.set() or go_on.wait(60))
    assert begun.wait(60)
    yield
    go_on.set()


def pool_pages(scheduler: GrowthScheduler, num_pages: int) -> None:
    scheduler.pool.drop(scheduler.pool.acquire([PAGE] * num_pages))


def test_with_nothing_live_all_goes_after_a_while_and_not_before(clock: Clock, scheduler: GrowthScheduler) -> None:
    pool_pages(scheduler, 7)
    for num_rows in (10, 20, 30):
        pages(scheduler, num_rows, adopt=False).close()
    pool_pages(scheduler, 7)
    assert idle_pages(scheduler) == (60, 7)
    clock.pass_by(SECONDS - 0.1, scheduler)
    assert idle_pages(scheduler) == (60, 7)
    clock.pass_by(0.2, scheduler)
    assert sum(idle_pages(scheduler)) <= 7, "pages that were pooled since it watches may take a second look"
    clock.pass_by(SECONDS, scheduler)
    assert idle_pages(scheduler) == (0, 0)
    assert scheduler.stats().reserved_bytes == 0
    with pages(scheduler, 20) as again:
        assert again.tensor().sum() == 20 * PAGE


def test_what_was_pooled_without_a_word_to_the_scheduler_goes_as_well(clock: Clock, scheduler: GrowthScheduler) -> None:
    pool_pages(scheduler, 10)
    for _ in range(2):
        clock.pass_by(SECONDS, scheduler)
    assert scheduler.pool.driver.inner.physical_bytes() == 0


def test_a_fifth_of_what_is_live_stays_of_that_which_was_used_last(clock: Clock, scheduler: GrowthScheduler) -> None:
    live = pages(scheduler, 100)
    pool_pages(scheduler, 5)
    for capacity in (31, 32, 33, 34):
        pages(scheduler, 9, capacity, adopt=False).close()
        clock.pass_by(0.1, scheduler)
    clock.pass_by(SECONDS, scheduler)
    stats = scheduler.stats()
    assert stats.committed_bytes <= 1.2 * stats.live_bytes
    assert idle_pages(scheduler) == (18, 2), "pooled pages first: they spare nobody the mapping"
    before = stats.num_driver_calls
    adopted = [pages(scheduler, 9, capacity, first_rows=9) for capacity in (34, 33)]  # with no fewer addresses
    assert scheduler.stats().num_driver_calls == before, "those parked last were kept"
    for vtensor in [*adopted, live]:
        vtensor.close()
    clock.pass_by(2 * SECONDS, scheduler)
    assert idle_pages(scheduler) == (0, 0)


def test_of_a_large_range_that_goes_the_fifth_stays_pooled(clock: Clock, scheduler: GrowthScheduler) -> None:
    live = pages(scheduler, 50)
    pages(scheduler, 80).close()
    clock.pass_by(SECONDS, scheduler)
    assert idle_pages(scheduler) == (0, 10)
    clock.pass_by(5 * SECONDS, scheduler)
    assert idle_pages(scheduler) == (0, 10)
    live.close()


def test_steady_load_makes_no_driver_call(clock: Clock, scheduler: GrowthScheduler) -> None:
    def call() -> None:
        several = [pages(scheduler, 20, first_rows=20) for _ in range(3)]
        pool_pages(scheduler, 4)
        for vtensor in several:
            vtensor.close()
        scheduler.reap()

    for _ in range(2):
        call()
        clock.pass_by(1, scheduler)
    before, kept = scheduler.stats().num_driver_calls, idle_pages(scheduler)
    assert kept == (60, 4)
    for _ in range(20):
        call()
        clock.pass_by(1, scheduler)
    assert scheduler.stats().num_driver_calls == before
    assert idle_pages(scheduler) == kept


def test_when_load_drops_to_a_trickle_what_the_trickle_uses_stays(clock: Clock, scheduler: GrowthScheduler) -> None:
    several = [pages(scheduler, 20) for _ in range(8)]
    pool_pages(scheduler, 10)
    for vtensor in several:
        vtensor.close()
    for _ in range(15):
        pages(scheduler, 20, first_rows=20).close()
        pool_pages(scheduler, 3)
        clock.pass_by(1, scheduler)
    assert idle_pages(scheduler) == (20, 3)
    before = scheduler.stats().num_driver_calls
    pages(scheduler, 20, first_rows=20).close()
    pool_pages(scheduler, 3)
    assert scheduler.stats().num_driver_calls == before


def test_a_sequence_that_grows_keeps_no_more_than_it_takes(clock: Clock, scheduler: GrowthScheduler) -> None:
    """Load that dropped from several sequences to one which goes on never stands still."""
    growing, others = pages(scheduler, 10), [pages(scheduler, 20) for _ in range(4)]
    for vtensor in others:
        vtensor.close()
    for _ in range(12):
        growing.append(torch.ones(1, PAGE, dtype=torch.uint8))
        clock.pass_by(1, scheduler)
    stats = scheduler.stats()
    assert stats.committed_bytes <= 1.2 * stats.live_bytes
    assert growing.tensor().sum() == 22 * PAGE
    growing.close()


def test_nothing_wakes_while_there_is_nothing_to_do(clock: Clock, scheduler: GrowthScheduler) -> None:
    live = pages(scheduler, 50)
    pages(scheduler, 5).close()
    clock.pass_by(SECONDS, scheduler)
    assert idle_pages(scheduler) == (5, 0), "little enough to stay"
    clock.pass_by(2 * SECONDS, scheduler)
    asked = clock.num_asked
    for _ in range(2):
        scheduler.settle()
    assert clock.num_asked == asked, "it waits for a time"
    scheduler.trim()
    clock.pass_by(SECONDS, scheduler)
    asked = clock.num_asked
    scheduler.reap()
    for _ in range(2):
        scheduler.settle()
    assert clock.num_asked == asked, "there is nothing to look at"
    live.close()


def test_never_means_never(clock: Clock, make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(idle_seconds=None, clock=clock)
    pages(scheduler, 20).close()
    clock.pass_by(1e9, scheduler)
    assert scheduler.stats().parked_bytes == 20 * PAGE


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"idle_seconds is .*: give more than 0 seconds, or None"):
        GrowthScheduler(PagePool(HostDriver(PAGE)), idle_seconds=seconds)


def test_of_much_some_at_a_time_and_others_are_let_in_between(
    clock: Clock, scheduler: GrowthScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_MOST_BYTES_AT_ONCE", 4 * PAGE)
    pages(scheduler, 20).close()
    scheduler.reap()
    seen: list[int] = []
    with stopped(scheduler):
        scheduler.run_soon(lambda: seen.append(sum(idle_pages(scheduler))))
        clock.now += SECONDS
    for _ in range(10):
        scheduler.settle()
    assert seen == [16]
    assert idle_pages(scheduler) == (0, 0)


def test_what_comes_in_between_keeps_its_memory(
    clock: Clock, scheduler: GrowthScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_MOST_BYTES_AT_ONCE", 4 * PAGE)
    for _ in range(2):
        pages(scheduler, 20, adopt=False).close()
    scheduler.reap()
    made: list[VTensor] = []
    with stopped(scheduler):
        scheduler.run_soon(lambda: made.append(pages(scheduler, 20, first_rows=20)))
        clock.now += SECONDS
    for _ in range(10):
        scheduler.settle()
    assert idle_pages(scheduler) == (0, 4), "a fifth of what is live then"
    assert made[0].tensor().sum() == 20 * PAGE
    made.pop().close()


def test_each_pool_by_itself(clock: Clock, make_scheduler: MakeScheduler) -> None:
    busy, quiet = (make_scheduler(idle_seconds=SECONDS, clock=clock) for _ in range(2))
    for scheduler in (busy, quiet):
        pages(scheduler, 20).close()
    for _ in range(6):
        pages(busy, 20, first_rows=20).close()
        clock.pass_by(1, busy, quiet)
    assert (busy.stats().committed_bytes, quiet.stats().committed_bytes) == (20 * PAGE, 0)


# Behind the device


def test_nothing_goes_under_a_running_kernel(clock: Clock, make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver, idle_seconds=SECONDS, clock=clock)
    parked, shared = pages(scheduler, 10), pages(scheduler, 10)
    address = parked.data_ptr
    shared.fork().close()  # what had two tensors is not for adoption
    for vtensor in (parked, shared):
        vtensor.close()
    for _ in range(3):
        clock.pass_by(SECONDS, scheduler)
    assert driver.tensor(address, 10 * PAGE, None).sum() == 10 * PAGE
    assert driver.physical_bytes() >= 20 * PAGE
    again = pages(scheduler, 10, first_rows=10)
    assert again.data_ptr == address, "it was there for the next sequence meanwhile"
    again.close()
    driver.finish_work()
    clock.pass_by(SECONDS, scheduler)
    clock.pass_by(SECONDS, scheduler)
    assert driver.physical_bytes() == 0
    assert (scheduler.num_device_waits, sum(fence.num_waits for fence in driver.fences)) == (0, 0)


def test_nothing_goes_during_a_capture(
    clock: Clock, make_scheduler: MakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver, idle_seconds=SECONDS, clock=clock)
    vtensor = pages(scheduler, 10)
    pages(scheduler, 20).close()
    scheduler.reap()
    driver.finish_work()
    driver.capturing = True
    vtensor.tensor()
    clock.pass_by(2 * SECONDS, scheduler)
    assert driver.physical_bytes() == 30 * PAGE
    assert not caplog.records, "a fence was asked, which breaks it"
    driver.capturing = False
    vtensor.close()
    clock.pass_by(2 * SECONDS, scheduler)
    assert driver.physical_bytes() == 10 * PAGE, "which the graph may read"
    driver.end_graphs()
    scheduler.reap()
    driver.finish_work()
    clock.pass_by(SECONDS, scheduler)
    clock.pass_by(SECONDS, scheduler)
    assert driver.physical_bytes() == 0


def test_what_sleeps_or_is_offloaded_comes_back_after_its_memory_went(clock: Clock, scheduler: GrowthScheduler) -> None:
    vtensor = pages(scheduler, 20)
    vtensor.offload()
    assert idle_pages(scheduler) == (0, 20)
    clock.pass_by(SECONDS, scheduler)
    clock.pass_by(SECONDS, scheduler)
    assert idle_pages(scheduler) == (0, 0)
    vtensor.prefetch()
    pages(scheduler, 10).close()
    scheduler.sleep()
    clock.pass_by(SECONDS, scheduler)
    pages(scheduler, 10).close()
    clock.pass_by(SECONDS, scheduler)
    assert idle_pages(scheduler) == (0, 0)
    scheduler.wake()
    assert vtensor.tensor().sum() == 20 * PAGE
    vtensor.close()


# When the driver refuses


class IdleLife(Life):
    """One life in which load drops again and again."""

    def __init__(self, driver: FailingDriver) -> None:
        self.clock = Clock()
        super().__init__(driver, idle_bytes=1000 * PAGE, idle_seconds=SECONDS, clock=self.clock)

    def steps(self) -> list[Callable[[], object]]:
        return [
            lambda: self.make("a"),
            lambda: self.append("a", 60),
            lambda: self.make("b"),
            lambda: self.append("b", 30),
            lambda: self.append("b", 5),
            lambda: self.close("b"),
            lambda: self.wait(),
            lambda: self.make("c"),
            lambda: self.append("c", 20),
            lambda: self.tensors["a"].drop_head(20),
            lambda: self.close("a"),
            lambda: self.wait(),
            lambda: self.close("c"),
            lambda: self.wait(),
        ]

    def wait(self) -> None:
        self.scheduler.reap()
        for _ in range(6):  # what is refused is tried again, and then nothing is for a while
            self.clock.pass_by(SECONDS, self.scheduler)
        stats = self.scheduler.stats()
        assert stats.committed_bytes <= 1.2 * stats.live_bytes


def test_the_life_gives_back() -> None:
    assert {"unmap", "destroy", "release"} < set(calls_of(IdleLife))


@pytest.mark.parametrize("num_failures", [1, 3], ids=lambda n: f"{n}-in-a-row")
def test_every_call_of_giving_back_may_fail(num_failures: int) -> None:
    refuse_each(IdleLife, num_failures)


def test_what_is_refused_is_tried_again(clock: Clock, make_scheduler: MakeScheduler) -> None:
    driver = FailingDriver(kind="destroy")
    scheduler = make_scheduler(driver, idle_seconds=SECONDS, clock=clock)
    pages(scheduler, 20).close()
    driver.fail_at = 0
    clock.pass_by(SECONDS, scheduler)
    assert driver.refused == ["destroy"]
    assert driver.physical_bytes() == 20 * PAGE
    scheduler.pool.check_integrity()
    clock.pass_by(SECONDS, scheduler)
    assert driver.physical_bytes() == 0


# By the real clock


def test_a_process_gives_back_by_itself_and_its_child_leaves_that_to_it(run_python: Callable[..., str]) -> None:
    """With a thread that waits for a time, at fork() and at the end of the process."""
    script = """
import os, sys, threading, time, warnings
import torch
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.vtensor import VTensor
warnings.simplefilter("ignore", DeprecationWarning)
torch.set_num_threads(1)
scheduler = default_scheduler(torch.device("cpu"))

def call():
    VTensor((1000,), capacity=1000, first_rows=100).append(torch.ones(100, 1000))
    scheduler.reap()

def in_child():
    pid = os.fork()
    if pid == 0:
        scheduler.reap()
        scheduler.pool.drop([])
        assert threading.active_count() == 1
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

call()
assert scheduler.stats().parked_bytes > 0
in_child()
wait_for(lambda: scheduler.pool.driver.inner.physical_bytes() == 0)
live = VTensor((1000,), capacity=1000, first_rows=900)
live.append(torch.ones(900, 1000))
call()
wait_for(lambda: not scheduler._is_watching_idle)  # what is idle is little enough
assert scheduler.stats().parked_bytes > 0
wait_for(lambda: not scheduler._is_watching_idle)
in_child()
call()
print("done")
"""
    assert run_python(script, environ={"TORCH_VTENSOR_IDLE_SECONDS": "0.2"}) == "done\n"
