"""Captures of one thread, and fences of another: neither begins during the other. What needs memory back waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from scripted_drivers import PAGE, ManualDriver, ManualFence
from vtensors import MakeScheduler, pages

from torch_vtensor.allocator import captures, tiers
from torch_vtensor.allocator.captures import another_captures, between_captures, capturing
from torch_vtensor.allocator.pinned_memory import PinnedMemory
from torch_vtensor.allocator.prefix import Lane, PrefixTree
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError, VTensorError


class Capturing:
    """Another thread, inside `capturing` until ``end`` is set."""

    def __init__(self) -> None:
        self.end, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self._thread.start()
        assert self._begun.wait(10)

    def _capture(self) -> None:
        with capturing():
            self._begun.set()
            self.end.wait(10)

    def join(self) -> None:
        self.end.set()
        self._thread.join(10)


@pytest.fixture
def other() -> Iterator[Capturing]:
    made = Capturing()
    yield made
    made.join()


def test_whose_capture_it_is(other: Capturing) -> None:
    assert another_captures()
    other.join()
    assert not another_captures()
    with capturing():
        assert not another_captures(), "its own"


def test_a_fence_waits_for_a_capture_to_end(other: Capturing) -> None:
    made = threading.Event()

    def fence() -> None:
        with between_captures():
            made.set()

    thread = threading.Thread(target=fence, daemon=True)
    thread.start()
    assert not made.wait(0.1)
    other.join()
    assert made.wait(10)
    thread.join(10)


def test_a_capture_waits_for_a_fence() -> None:
    with between_captures():
        thread = threading.Thread(target=lambda: Capturing().join(), daemon=True)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert not another_captures()
    thread.join(10)
    assert not thread.is_alive()


class Ending:
    """Another thread's capture, which ends soon after somebody has asked for it for the first time."""

    def __init__(self, driver: ManualDriver) -> None:
        self.driver, self._asked = driver, threading.Event()
        self._thread = threading.Thread(target=self._end, daemon=True)
        driver.capturing, driver.capturer = True, self._thread
        driver.is_capturing = self._is_capturing
        self._thread.start()

    def _is_capturing(self) -> bool:
        self._asked.set()
        return self.driver.capturing

    def _end(self) -> None:
        assert self._asked.wait(10)
        time.sleep(0.05)
        self.driver.capturing = False

    def join(self) -> None:
        self._thread.join(10)


def test_growth_waits_for_another_threads_capture_and_takes_back_then(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver, budget_bytes=40 * PAGE)
    pages(scheduler, 30).close()
    scheduler.reap()  # parked: nobody else's
    scheduler.settle()
    source = pages(scheduler, 5, adopt=False)
    capture = Ending(driver)
    assert source.append(torch.ones(20, PAGE, dtype=torch.uint8)).unique().tolist() == [1]
    capture.join()
    source.close()
    scheduler.trim()


def test_a_copy_on_write_waits_as_well(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver, budget_bytes=40 * PAGE)
    source = pages(scheduler, 15, adopt=False)
    pages(scheduler, 20, adopt=False).close()
    scheduler.reap()
    scheduler.settle()
    capture = Ending(driver)
    fork = source.fork(share_rows=0)
    capture.join()
    assert torch.equal(fork.tensor(), source.tensor())


def test_what_moves_waits_for_another_threads_capture(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    for move in (scheduler.sleep, scheduler.wake, vtensor.offload, vtensor.prefetch):
        capture = Ending(driver)
        move()
        capture.join()
    assert vtensor.tensor().unique().tolist() == [1]


def test_what_moves_waits_for_a_capture_that_began_after_it(make_scheduler: MakeScheduler) -> None:
    """While it waited for the pool's lock, or for who used the tensor."""
    driver = ManualDriver()
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    refused: list[VTensorError] = []

    def tried(move: Callable[[], object]) -> None:
        try:
            move()
        except VTensorError as error:
            refused.append(error)

    for move in (scheduler.sleep, scheduler.wake, vtensor.offload, vtensor.prefetch):
        with scheduler.pool.lock:
            thread = threading.Thread(target=tried, args=(move,), daemon=True)
            thread.start()
            time.sleep(0.05)
            capture = Ending(driver)
        thread.join(20)
        capture.join()
        assert not thread.is_alive()
    assert refused == []
    assert vtensor.tensor().unique().tolist() == [1]


def test_trim_waits_and_gives_back_all_of_it(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver)
    pages(scheduler, 30).close()
    scheduler.settle()
    capture = Ending(driver)
    assert scheduler.trim() == 30 * PAGE
    capture.join()


def test_a_tensor_that_borrows_waits_as_well(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver, budget_bytes=40 * PAGE)
    pages(scheduler, 30).close()
    scheduler.settle()
    source = pages(scheduler, 5, adopt=False)
    own = VTensor((PAGE,), capacity=100, dtype=torch.uint8, scheduler=scheduler, adopt=False)
    capture = Ending(driver)
    own.borrow(source.lend(0, 5), [False], 25)
    capture.join()
    assert own.length == 25
    assert own.tensor()[:5].unique().tolist() == [1]


def test_nothing_waits_with_the_pools_lock(other: Capturing, make_scheduler: MakeScheduler) -> None:
    """For a capture that began after it had asked: who captures may need the lock."""
    driver = ManualDriver()
    driver.fences_break_captures = True
    scheduler = make_scheduler(driver)
    pages(scheduler, 10).close()
    assert driver.fences == [], "and makes no fence, which would break the capture"
    other.join()
    scheduler.reap()
    assert len(driver.fences) == 1


class Begun(ManualDriver):
    """Fences break captures, and whoever looks finds none: one begins right after."""

    def __init__(self) -> None:
        super().__init__()
        self.fences_break_captures = True

    def refuse_fences(self) -> None:
        def fence() -> ManualFence:
            raise AssertionError("it would wait for the capture, with the pool's lock")

        self.fence = fence


def test_a_prefix_is_not_recorded_during_a_capture_that_began_just_now(
    other: Capturing, make_scheduler: MakeScheduler
) -> None:
    driver = Begun()
    scheduler = make_scheduler(driver)
    vtensor = VTensor((PAGE,), capacity=100, dtype=torch.uint8, outer_shape=(1,), scheduler=scheduler)
    vtensor.append(torch.ones(1, 10, PAGE, dtype=torch.uint8))
    tree = PrefixTree([Lane.of(vtensor)], scheduler=scheduler)
    driver.refuse_fences()
    assert tree.record(range(10), [vtensor]) == 0
    with pytest.raises(ValueError, match="0 of them are cached"):
        tree.keep(range(10), [vtensor])
    other.join()
    del driver.fence
    assert tree.record(range(10), [vtensor]) == 10
    assert tree.evict() == 0, "the tensor has them"


def test_rows_are_used_where_they_are_during_a_capture_that_began_just_now(make_scheduler: MakeScheduler) -> None:
    driver = Begun()
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    vtensor.offload()
    capture = Capturing()
    driver.refuse_fences()
    vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
    assert vtensor.offloaded_bytes == 10 * PAGE
    with pytest.raises(VTensorError, match="cannot change places while another thread's graph is still"):
        scheduler.prefetch(vtensor._hold)
    capture.join()
    del driver.fence
    assert vtensor.prefetch() == 10 * PAGE
    assert vtensor.tensor().unique().tolist() == [1]


def test_what_is_idle_stays_during_a_capture_that_began_just_now(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Begun()
    scheduler = make_scheduler(driver, budget_bytes=20 * PAGE)
    vtensor, other = pages(scheduler, 10), pages(scheduler, 5)
    vtensor.offload(when_needed=True)
    capture = Capturing()
    driver.refuse_fences()
    with pytest.raises(OutOfPagesError):
        other.append(torch.ones(10, PAGE, dtype=torch.uint8))
    assert vtensor.offloaded_bytes == 0
    capture.join()
    del driver.fence
    other.append(torch.ones(10, PAGE, dtype=torch.uint8))
    assert vtensor.offloaded_bytes == 10 * PAGE


def test_what_cannot_be_mapped_sleeps_on_during_a_capture_that_began_just_now(make_scheduler: MakeScheduler) -> None:
    driver = Begun()
    driver.pins = PinnedMemory(driver.device, lambda ptr, nbytes: None, lambda ptr, nbytes: None)
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    held = list(vtensor.lend(0, 10).pages())
    scheduler.pool.hold(held)  # as a prefix tree does
    scheduler.sleep()
    capture = Capturing()
    driver.refuse_fences()
    with pytest.raises(VTensorError, match="cannot change places while another thread's graph is still"):
        tiers.make_mappable(scheduler, held)
    capture.join()
    del driver.fence
    tiers.make_mappable(scheduler, held)
    assert all(page.is_mappable for page in held)
    scheduler.wake()
    scheduler.pool.let_go(held)
    assert vtensor.tensor().unique().tolist() == [1]


def test_no_capture_begins_while_something_moves(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    driver.fences_break_captures = True
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    seen: list[bool] = []
    threads: list[threading.Thread] = []
    make_fence = driver.fence

    def fence() -> ManualFence:
        threads.append(threading.Thread(target=lambda: Capturing().join(), daemon=True))
        threads[-1].start()
        threads[-1].join(0.1)
        seen.append(threads[-1].is_alive())
        return make_fence()

    driver.fence = fence
    vtensor.offload()
    assert seen[0], "it waits"
    vtensor.prefetch()
    del driver.fence
    for thread in threads:  # whose captures would be in others' way
        thread.join(10)


def test_who_bars_captures_bars_nobody_else() -> None:
    """Moving memory on one device takes seconds, in which another one goes on; a capture begins after both."""
    driver = ManualDriver()
    driver.fences_break_captures = True
    barred, end, begun = threading.Event(), threading.Event(), threading.Event()

    def bar() -> None:
        with ExitStack() as held:
            assert captures.bar_captures(driver, held)
            barred.set()
            end.wait(10)

    def capture() -> None:
        with capturing():
            begun.set()

    with ExitStack() as held:
        assert captures.bar_captures(driver, held)
        with capturing(), capturing():
            assert not another_captures(), "who bars others may capture itself"
        threads = [threading.Thread(target=target, daemon=True) for target in (bar, capture)]
        threads[0].start()
        assert barred.wait(10)
        threads[1].start()
        assert not begun.wait(0.05)
    assert not begun.wait(0.05), "the other one bars still"
    end.set()
    assert begun.wait(10)
    for thread in threads:
        thread.join(10)


def test_a_capture_that_does_not_end_is_named(make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "_MOST_SECONDS", 0.01)
    driver = ManualDriver()
    scheduler = make_scheduler(driver, budget_bytes=40 * PAGE)
    pages(scheduler, 30).close()
    scheduler.reap()
    scheduler.settle()
    vtensor = pages(scheduler, 5, adopt=False)
    for capturer in (threading.Thread(), None):
        driver.capturing, driver.capturer = True, capturer
        with pytest.raises(OutOfPagesError, match="While a graph is being captured, nothing is taken back"):
            vtensor.append(torch.ones(20, PAGE, dtype=torch.uint8))
        with pytest.raises(VTensorError, match="another thread.s graph is still" if capturer else "while a graph is"):
            vtensor.offload()
        driver.capturing = False
    assert vtensor.tensor().unique().tolist() == [1]
