"""Many threads on one scheduler: each tensor stays its thread's own, and what others do does not show."""

import gc
import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from scripted_drivers import PAGE, PausingDriver
from vtensors import MakeScheduler

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once; raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def live(scheduler: GrowthScheduler, seed: int, num_steps: int, may_run_out: bool = False) -> None:
    """One thread's sequences: appended to, forked, cut, kept in views, closed; always equal to their clones."""
    choose = random.Random(seed)
    sequences: list[tuple[VTensor, torch.Tensor]] = []
    views: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(num_steps):
        if not sequences or (len(sequences) < 4 and choose.random() < 0.2):
            vtensor = VTensor((2, 300), capacity=500, outer_shape=(2,), scheduler=scheduler, first_rows=5)
            sequences.append((vtensor, torch.empty(2, 0, 2, 300)))
        index = choose.randrange(len(sequences))
        vtensor, expected = sequences[index]
        action = choose.choice(["append"] * 4 + ["fork", "truncate", "view", "close", "drop_head"])
        try:
            if action == "append" and vtensor.length < 400:
                new = torch.full((2, choose.randrange(1, 20), 2, 300), float(seed * 1000 + step))
                vtensor.append(new)
                sequences[index] = (vtensor, torch.cat([expected, new], 1))
                vtensor.commit_ahead(vtensor.length + 8)
            elif action == "fork" and len(sequences) < 4:
                sequences.append((vtensor.fork(), expected))
        except OutOfPagesError:
            assert may_run_out
        if action == "truncate":
            length = choose.randint(vtensor.first_row, vtensor.length)
            vtensor.truncate(length)
            sequences[index] = (vtensor, expected[:, :length])
        elif action == "drop_head":
            vtensor.drop_head(vtensor.length // 2)
        elif action == "view":
            view = vtensor.tensor()
            views.append((view, view.clone()))
            del views[:-3]
        elif action == "close":
            sequences.pop(index)[0].close()
        for vtensor, expected in sequences:
            assert torch.equal(vtensor.tensor(), expected[:, vtensor.first_row :])
        for view, expected in views:
            assert torch.equal(view, expected)


@pytest.mark.parametrize("budget_pages", [None, 120], ids=["unlimited", "scarce"])
def test_threads_do_not_see_each_other(make_scheduler: MakeScheduler, budget_pages: int | None) -> None:
    scheduler = make_scheduler(budget_bytes=budget_pages and budget_pages * PAGE, idle_bytes=20 * PAGE)
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.002):
            scheduler.trim()
            scheduler.pool.check_integrity()
            stats = scheduler.stats()
            parts = stats.live_bytes + stats.parked_bytes + stats.pooled_bytes + stats.torch_bytes
            assert parts == stats.committed_bytes
            assert budget_pages is None or stats.committed_bytes <= budget_pages * PAGE

    def work() -> None:
        try:
            in_threads(*(lambda seed=seed: live(scheduler, seed, 150, budget_pages is not None) for seed in range(4)))
        finally:
            done.set()

    in_threads(disturb, work)


def test_garbage_may_be_collected_anywhere(make_scheduler: MakeScheduler) -> None:
    """Tensors and views that die in cycles are finalized inside any allocation, also under the pool's lock."""
    scheduler = make_scheduler(idle_bytes=0)
    threshold = gc.get_threshold()

    def litter(seed: int) -> None:
        for step in range(60):
            vtensor = VTensor((300,), capacity=200, scheduler=scheduler, first_rows=10)
            view = vtensor.append(torch.full((30, 300), float(seed)))
            cycle: list[object] = [vtensor, view, vtensor.fork()]
            cycle.append(cycle)
            if step % 3:
                vtensor.close()

    gc.set_threshold(20, 2, 2)
    try:
        in_threads(lambda: litter(1), lambda: litter(2), lambda: live(scheduler, 3, 60))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()


def test_committing_on_two_threads_commits_once(make_scheduler: MakeScheduler) -> None:
    driver = PausingDriver()
    scheduler = make_scheduler(driver)
    vtensor = VTensor((PAGE,), capacity=8, dtype=torch.uint8, scheduler=scheduler, outer_shape=(2,))
    neighbours = [VTensor((PAGE,), capacity=8, dtype=torch.uint8, scheduler=scheduler) for _ in range(4)]
    vtensor.commit_ahead(8)
    assert driver.entered.wait(60)
    waiting = threading.Thread(target=vtensor.commit, args=(8,))
    waiting.start()
    time.sleep(0.1)  # until it waits for the scheduler's thread
    driver.go_on.set()
    waiting.join()
    scheduler.settle()
    assert vtensor.committed_bytes == scheduler.stats().live_bytes == 2 * 8 * PAGE
    vtensor.append(torch.ones(2, 8, PAGE, dtype=torch.uint8))
    assert [neighbour.append(torch.zeros(8, PAGE, dtype=torch.uint8)).sum() for neighbour in neighbours] == [0] * 4
    assert vtensor.tensor().sum() == 2 * 8 * PAGE


def test_a_view_made_while_the_other_thread_commits_shows_all_rows(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = HostDriver(PAGE)
    scheduler = make_scheduler(driver)
    vtensor = VTensor((PAGE,), capacity=8, dtype=torch.uint8, scheduler=scheduler)
    made = driver.tensor

    def tensor(ptr: int, nbytes: int, owner: object) -> torch.Tensor:
        result = made(ptr, nbytes, owner)
        vtensor.commit_ahead(vtensor.committed + 1)
        scheduler.settle()
        return result

    monkeypatch.setattr(driver, "tensor", tensor)
    for value in range(8):
        new = torch.full((1, PAGE), value, dtype=torch.uint8)
        assert vtensor.append(new)[:, 0].tolist() == list(range(value + 1))


def test_the_last_view_may_die_on_any_thread(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    for _ in range(20):
        views = []
        with VTensor((300,), capacity=100, scheduler=scheduler) as vtensor:
            views.append(vtensor.append(torch.ones(50, 300)))
        in_threads(views.clear, scheduler.reap, lambda: scheduler.trim() and None)
    assert scheduler.stats().live_bytes == 0
