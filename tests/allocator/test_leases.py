"""Threads that move a tensor's memory while others are in the middle of using it: they wait, and no row is lost."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from scripted_drivers import OFFLOAD_FOLDER, PAGE
from vtensors import MakeScheduler, pages

from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.tiers import Rounds, call
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import AsleepError, OutOfPagesError, VTensorError

_SHORT_S = 0.3  # in which a move that does not wait has long begun


class StoppingDriver(HostDriver):
    """Stops one thread where its pages are copied and still mapped, and any write to them would be lost."""

    def __init__(self) -> None:
        super().__init__(PAGE, OFFLOAD_FOLDER)
        self.stops: threading.Thread | None = None
        self.is_there, self.go_on = threading.Event(), threading.Event()

    def unmap(self, ptr: int, nbytes: int) -> None:
        if threading.current_thread() is self.stops:
            self.is_there.set()
            assert self.go_on.wait(60)
        super().unmap(ptr, nbytes)

    @contextmanager
    def moving(self, move: Callable[[], object]) -> Iterator[None]:
        """``move`` in another thread, which in the block has got as far as it can; then it goes on to its end."""
        self.stops = threading.Thread(target=move)
        self.stops.start()
        self.is_there.wait(_SHORT_S)
        yield
        self.go_on.set()
        self.stops.join()
        self.stops = None


def moves(vtensor: VTensor) -> dict[str, Callable[[], object]]:
    return {
        "offload": vtensor.offload,
        "sleep": lambda: (vtensor.scheduler.sleep(), vtensor.scheduler.wake()),
        "prefetch": vtensor.prefetch,
    }


@pytest.mark.parametrize("way", ["offload", "sleep"])
def test_a_row_is_not_lost_whose_write_has_begun_before_the_move(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    driver = StoppingDriver()
    vtensor = pages(make_scheduler(driver), 10)
    vtensor.commit(12)
    is_prepared, writes = threading.Event(), threading.Event()
    prepare = VTensor.prepare_write

    def stop_after(self: VTensor, start: int, stop: int) -> None:
        prepare(self, start, stop)
        is_prepared.set()
        assert writes.wait(60)

    monkeypatch.setattr(VTensor, "prepare_write", stop_after)
    writer = threading.Thread(target=vtensor.append, args=[torch.full((1, PAGE), 2, dtype=torch.uint8)])
    writer.start()
    assert is_prepared.wait(60)
    with driver.moving(moves(vtensor)[way]):
        writes.set()
        writer.join()
    assert vtensor.tensor()[10].unique().tolist() == [2]
    assert vtensor.tensor()[:10].unique().tolist() == [1]


@pytest.mark.parametrize("way", ["offload", "sleep", "prefetch"])
def test_who_holds_a_tensor_in_place_reads_its_rows_and_writes_into_them(
    make_scheduler: MakeScheduler, way: str
) -> None:
    driver = StoppingDriver()
    vtensor = pages(make_scheduler(driver), 10)
    if way == "prefetch":
        vtensor.offload()
    with vtensor.in_place(), driver.moving(moves(vtensor)[way]):
        assert not driver.is_there.is_set()
        driver.go_on.set()  # it waits for this thread alone
        view = vtensor.tensor()
        assert view.unique().tolist() == [1]
        view[3] = 7
        vtensor.in_place().release()
        assert driver.stops is not None
        driver.stops.join()
        vtensor.in_place().acquire()
    assert vtensor.tensor()[3].unique().tolist() == [7]


def test_pressure_takes_what_is_idle_and_in_nobodys_hands(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=50 * PAGE)
    held, source = pages(scheduler, 20), pages(scheduler, 20, adopt=False)
    fork = source.fork()
    for vtensor in (held, source, fork):
        vtensor.offload(when_needed=True)
    caught: list[BaseException] = []

    def grow(num_rows: int) -> None:
        try:
            pages(scheduler, num_rows, adopt=False).close()
        except OutOfPagesError as error:
            caught.append(error)

    with held.in_place(), fork.in_place():  # and with it what the fork shares with its source
        thread = threading.Thread(target=grow, args=[30])
        thread.start()
        thread.join()
    assert len(caught) == 1
    assert (held.offloaded_bytes, source.offloaded_bytes) == (0, 0)
    grow(50)
    assert len(caught) == 1
    assert (held.offloaded_bytes, source.offloaded_bytes) == (20 * PAGE, 20 * PAGE)
    caught.clear()


def test_an_append_that_waited_for_sleep_is_refused(make_scheduler: MakeScheduler) -> None:
    driver = StoppingDriver()
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    caught: list[BaseException] = []

    def append() -> None:
        try:
            vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
        except AsleepError as error:
            caught.append(error)

    with driver.moving(scheduler.sleep):
        assert driver.is_there.is_set()
        writer = threading.Thread(target=append)
        writer.start()
    writer.join()
    assert len(caught) == 1
    caught.clear()
    scheduler.wake()
    assert vtensor.tensor().unique().tolist() == [1]


def test_a_tensor_that_had_to_move_to_other_addresses_is_held_there(make_scheduler: MakeScheduler) -> None:
    vtensor = pages(make_scheduler(), 10)
    view = vtensor.tensor()
    vtensor.truncate(5)
    vtensor.append(torch.full((1, PAGE), 2, dtype=torch.uint8))
    assert vtensor.data_ptr != view.data_ptr()
    with vtensor.in_place():
        offload = threading.Thread(target=vtensor.offload)
        offload.start()
        offload.join(0.1)
        assert vtensor.offloaded_bytes == 0
    offload.join()
    assert vtensor.offloaded_bytes > 0  # what the view shows as well stays


def test_two_that_want_all_memory_at_rest_at_once_do_not_wait_for_each_other(make_scheduler: MakeScheduler) -> None:
    """One of them in the middle of work of its own, which the other waits for."""
    scheduler = make_scheduler()
    vtensor = pages(scheduler, 10)
    first, second = Rounds(), Rounds()
    scheduler.pool.rounds += [first, second]
    with second.lock:
        sleeper = threading.Thread(target=scheduler.sleep)
        sleeper.start()
        sleeper.join(_SHORT_S)
        assert sleeper.is_alive()
        assert not vtensor.is_asleep
        scheduler.sleep()
        scheduler.wake()
    sleeper.join()
    scheduler.wake()
    assert vtensor.tensor().unique().tolist() == [1]


def test_calls_that_follow_each_other_let_memory_rest_in_between(make_scheduler: MakeScheduler) -> None:
    """Also where one begins before the other ends, on and on; those that begin meanwhile wait."""
    scheduler, stop = make_scheduler(), threading.Event()
    pages(scheduler, 3)

    def work() -> None:
        while not stop.is_set():
            with call(), call():
                stop.wait(0.02)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    sleeper = threading.Thread(target=scheduler.sleep, daemon=True)
    sleeper.start()
    sleeper.join(10)
    stop.set()
    assert not sleeper.is_alive()
    for thread in threads:
        thread.join(10)
    scheduler.wake()


def test_a_call_is_waited_for_by_memory_that_is_made_in_it(make_scheduler: MakeScheduler) -> None:
    with call():
        scheduler = make_scheduler()
        vtensor = pages(scheduler, 3)
        sleeper = threading.Thread(target=scheduler.sleep)
        sleeper.start()
        sleeper.join(_SHORT_S)
        assert not vtensor.is_asleep
    sleeper.join()
    assert vtensor.is_asleep
    scheduler.wake()


def test_of_two_calls_that_move_memory_one_is_refused(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    pages(scheduler, 3)
    both, refused = threading.Barrier(2), []

    def work() -> None:
        try:
            with call():
                both.wait(10)
                scheduler.sleep()
                scheduler.wake()
        except VTensorError as error:
            refused.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(refused) == 1
    assert "sleep or wake after the call" in str(refused[0])
