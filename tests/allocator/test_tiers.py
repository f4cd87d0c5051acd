"""Tensors whose pages leave the device and come back: the same rows, at the same addresses, and memory really goes."""

import itertools
import re
import threading
from pathlib import Path

import pytest
import torch
from scripted_drivers import OFFLOAD_FOLDER, PAGE, FailingDriver, ManualDriver, ManualFence
from sequences import LANES, append, check, close, record
from sequences import make as make_sequences
from vtensors import MakeScheduler, make, pages, rows

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.prefix import PrefixTree
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import AsleepError, DriverError, OffloadLimitError, OutOfPagesError, VTensorError


def takes(scheduler: GrowthScheduler, device_bytes: int, offloaded_bytes: int) -> bool:
    """Whether the system counts so much: a file of offloaded pages may need a little for itself."""
    driver = scheduler.pool.driver.inner
    assert isinstance(driver, HostDriver)
    file_bytes = driver.offloaded_bytes()
    return driver.physical_bytes() == device_bytes and offloaded_bytes <= file_bytes <= offloaded_bytes + 8 * PAGE


def test_sleep_gives_back_memory_and_wake_restores_rows_views_and_addresses(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor = VTensor((2, 300), capacity=500, outer_shape=(3,), scheduler=scheduler)
    expected = torch.rand(3, 200, 2, 300)
    view = vtensor.append(expected)
    address, committed_bytes = vtensor.data_ptr, vtensor.committed_bytes
    assert scheduler.sleep() >= committed_bytes
    assert takes(scheduler, 0, committed_bytes)
    stats = scheduler.stats()
    assert (stats.committed_bytes, stats.live_bytes, stats.offloaded_bytes) == (0, 0, committed_bytes)
    assert vtensor.is_asleep
    assert scheduler.wake() == committed_bytes
    assert not vtensor.is_asleep
    assert vtensor.data_ptr == address == view.data_ptr()
    assert torch.equal(view, expected)
    assert torch.equal(vtensor.append(expected), torch.cat([expected, expected], 1))
    assert scheduler.stats().offloaded_bytes == 0


def test_resident_memory_of_the_process_drops(make_scheduler: MakeScheduler) -> None:
    def resident_bytes() -> int:
        found = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    scheduler, before = make_scheduler(), resident_bytes()
    vtensor = pages(scheduler, 1000, 1000)
    assert resident_bytes() - before >= 1000 * PAGE
    scheduler.sleep()
    assert resident_bytes() - before < 100 * PAGE
    scheduler.wake()
    assert vtensor.tensor().unique().tolist() == [1]


def test_a_sleeping_tensor_refuses_use_and_can_be_closed(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor, view = make(scheduler, 50), None
    view = vtensor.tensor()
    scheduler.sleep()
    for use in (
        vtensor.tensor,
        vtensor.storage,
        vtensor.fork,
        vtensor.offload,
        vtensor.prefetch,
        vtensor.use,
        lambda: vtensor.append(rows(1, 300)),
        lambda: vtensor.commit(900),
        lambda: vtensor.lend(0, 1),
    ):
        with pytest.raises(AsleepError, match=r"tag 'kv_cache'.*torch_vtensor\.wake\(\)"):
            use()
    vtensor.commit_ahead(900)
    scheduler.settle()
    assert vtensor.committed < 900
    assert "VTensor([50, 300]" in repr(vtensor)
    del view
    vtensor.close()
    scheduler.trim()
    assert takes(scheduler, 0, 0)
    assert scheduler.wake() == 0


def test_tags_sleep_and_wake_apart(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    cache, weights = make(scheduler, 60), make(scheduler, 40, tag="weights")
    fork = weights.fork()
    scheduler.sleep(["weights"])
    assert (cache.is_asleep, weights.is_asleep, fork.is_asleep) == (False, True, True)
    assert torch.equal(cache.append(rows(1, 300, start=60)), rows(61, 300))
    assert scheduler.sleep(["weights"]) == 0
    scheduler.sleep()
    assert cache.is_asleep
    scheduler.wake(["kv_cache"])
    assert (cache.is_asleep, weights.is_asleep, fork.is_asleep) == (False, True, True)
    assert torch.equal(cache.tensor(), rows(61, 300))
    scheduler.wake(["weights"])
    assert torch.equal(weights.tensor(), fork.tensor())
    assert torch.equal(weights.tensor(), rows(40, 300))


def test_shared_pages_are_offloaded_once_and_stay_shared(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    source = pages(scheduler, 20)
    forks = [source.fork() for _ in range(5)]
    scheduler.sleep()
    assert takes(scheduler, 0, 20 * PAGE)
    assert scheduler.wake() == 20 * PAGE
    assert all(fork.shared_bytes == 20 * PAGE for fork in forks)
    source.append(torch.full((1, PAGE), 2, dtype=torch.uint8))
    assert all(fork.tensor().unique().tolist() == [1] for fork in forks)


def test_what_an_awake_tensor_shares_stays(make_scheduler: MakeScheduler) -> None:
    """Tags of tensors that map the same pages: memory goes when the last of them sleeps, and comes with the first."""
    scheduler = make_scheduler()
    one = pages(scheduler, 20)
    other = one.fork()
    other._range.tag = "other"
    assert scheduler.sleep(["other"]) == 0
    assert (one.is_asleep, other.is_asleep) == (False, True)
    assert one.tensor().unique().tolist() == [1]
    assert scheduler.sleep(["kv_cache"]) >= 20 * PAGE
    assert scheduler.wake(["other"]) == 20 * PAGE
    assert (one.is_asleep, other.is_asleep) == (True, False)
    assert other.tensor().unique().tolist() == [1]
    assert scheduler.wake() == 0
    assert one.tensor().unique().tolist() == [1]


def test_discarded_rows_come_back_as_zeros(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    cache, weights = make(scheduler, 60), make(scheduler, 40, tag="weights")
    address = cache.data_ptr
    committed_bytes = weights.committed_bytes
    scheduler.sleep(discard=["kv_cache"])
    assert takes(scheduler, 0, committed_bytes)
    assert cache.committed_bytes == 0
    blocker = pages(scheduler, 30, adopt=False)  # pages that hold something are taken for the rows that come back
    blocker.close()
    scheduler.reap()
    scheduler.wake()
    assert cache.data_ptr == address
    assert not cache.tensor().any()
    assert torch.equal(weights.tensor(), rows(40, 300))
    assert torch.equal(cache.append(rows(1, 300, start=7))[60:], rows(1, 300, start=7))


def test_a_discarded_cache_leaves_prefixes_their_rows(make_scheduler: MakeScheduler) -> None:
    """Those that nobody maps go; those that a cache maps as well are kept for others, and for it."""
    scheduler = make_scheduler()
    tree = PrefixTree(LANES, scheduler=scheduler)
    tokens = list(range(60))
    record(tree, tokens)
    user = make_sequences(scheduler, [[100, *tokens]])
    tree.record([100, *tokens], user)
    loan = tree.fork([[100, *tokens]], capacity=200)
    assert loan is not None
    scheduler.sleep(discard=None)
    assert (tree.match(tokens), tree.match([100, *tokens])) == (0, 61)
    scheduler.wake()
    again = tree.fork([[100, *tokens]], capacity=200)
    assert again is not None
    check(user, [[100, *tokens]], None)
    check(again.vtensors, [[100, *tokens]], None)
    close([*user, *loan.vtensors, *again.vtensors])
    tree.evict()


@pytest.fixture(params=[False, True], ids=["mappable", "pinned"])
def sleeping_driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FailingDriver:
    """What sleeps on it can be mapped, or not."""
    monkeypatch.setattr(FailingDriver, "has_pins", request.param)
    return FailingDriver()


def test_a_prefix_sleeps_and_can_be_lent_meanwhile(
    make_scheduler: MakeScheduler, sleeping_driver: FailingDriver
) -> None:
    scheduler = make_scheduler(sleeping_driver)
    tree = PrefixTree(LANES, scheduler=scheduler)
    tokens = list(range(60))
    record(tree, tokens)
    alive = make_sequences(scheduler, [tokens])
    scheduler.sleep()
    assert scheduler.stats().committed_bytes == 0
    tree.check_integrity()
    while_asleep = tree.fork([tokens[:30]], capacity=200)  # from outside the device, to where there is room
    assert while_asleep is not None
    check(while_asleep.vtensors, [tokens[:30]], None)
    assert all(vtensor.offloaded_bytes == 0 for vtensor in while_asleep.vtensors)
    scheduler.wake()
    assert scheduler.stats().offloaded_bytes == 0
    loan = tree.fork([tokens], capacity=200)
    assert loan is not None
    check(loan.vtensors, [tokens], None)
    close([*alive, *loan.vtensors, *while_asleep.vtensors])
    tree.evict()


def test_a_sleeping_tensor_can_be_forgotten_after_its_front_was(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor = pages(scheduler, 30)
    view = vtensor.tensor()
    scheduler.sleep()
    vtensor.drop_head(20)
    scheduler.wake()
    assert vtensor.first_row == 20
    assert vtensor.tensor().unique().tolist() == view.unique().tolist() == [1]
    scheduler.sleep()
    del view
    vtensor.close()


def test_wake_without_room_changes_nothing(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=40 * PAGE)
    vtensor = pages(scheduler, 30)
    scheduler.sleep()
    blocker = pages(scheduler, 30)
    with pytest.raises(OutOfPagesError) as caught:
        scheduler.wake()
    assert caught.value.asked_bytes == 30 * PAGE
    assert vtensor.is_asleep
    assert blocker.tensor().unique().tolist() == [1]
    blocker.close()
    scheduler.wake()
    assert vtensor.tensor().unique().tolist() == [1]


def test_nothing_moves_while_a_graph_is_captured(make_scheduler: MakeScheduler) -> None:
    driver = ManualDriver()
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    driver.capturing = True
    for move in (scheduler.sleep, scheduler.wake, vtensor.offload, vtensor.prefetch):
        with pytest.raises(VTensorError, match="while a graph is being captured"):
            move()
    driver.capturing = False
    assert vtensor.offloaded_bytes == 0


@pytest.mark.parametrize("way", ["sleep", "offload"])
def test_the_device_is_done_with_the_pages_before_they_are_copied_and_unmapped(
    make_scheduler: MakeScheduler, way: str
) -> None:
    happened: list[str] = []

    class Fence(ManualFence):
        def wait(self) -> None:
            super().wait()
            happened.append("wait")

    class Driver(ManualDriver):
        def fence(self) -> ManualFence:
            self.fences.append(Fence(self))
            return self.fences[-1]

        copied = fence

        def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
            super().copy(target_ptr, source_ptr, nbytes)
            happened.append("copy")

        def unmap(self, ptr: int, nbytes: int) -> None:
            super().unmap(ptr, nbytes)
            if ptr in addresses:
                happened.append("unmap")

    scheduler = make_scheduler(Driver())
    vtensor = pages(scheduler, 10)
    addresses = range(vtensor.data_ptr, vtensor.data_ptr + vtensor.reserved_bytes)
    leave, come_back = (scheduler.sleep, scheduler.wake) if way == "sleep" else (vtensor.offload, vtensor.prefetch)
    leave()
    assert [what for what, _ in itertools.groupby(happened)][:4] == ["wait", "copy", "wait", "unmap"]
    happened.clear()
    come_back()
    unmap = ["unmap"] if way == "offload" else []  # what slept is not mapped
    assert [what for what, _ in itertools.groupby(happened)] == ["wait", *unmap, "copy", "wait"]
    assert vtensor.tensor().unique().tolist() == [1]


def test_a_row_is_not_lost_that_another_thread_writes_during_a_move(make_scheduler: MakeScheduler) -> None:
    class Pausing(HostDriver):
        """Stops when all is copied."""

        left_bytes = -1

        def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
            super().copy(target_ptr, source_ptr, nbytes)
            self.left_bytes -= nbytes
            if self.left_bytes == 0:
                copied.set()
                assert go_on.wait(60)

    copied, go_on, driver = threading.Event(), threading.Event(), Pausing(PAGE, OFFLOAD_FOLDER)
    scheduler = make_scheduler(driver)
    vtensor = pages(scheduler, 10)
    vtensor.commit(12)
    driver.left_bytes = vtensor.committed_bytes
    mover = threading.Thread(target=vtensor.offload)
    mover.start()
    assert copied.wait(60)
    writer = threading.Thread(target=vtensor.append, args=[torch.full((1, PAGE), 2, dtype=torch.uint8)])
    writer.start()
    writer.join(0.1)
    go_on.set()
    mover.join()
    writer.join()
    assert vtensor.tensor()[10].unique().tolist() == [2]
    assert (vtensor.is_idle, vtensor.offloaded_bytes) == (False, 0)


def test_a_page_that_somebody_else_uses_outside_the_device_stays_there(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=60 * PAGE)
    source = pages(scheduler, 20)
    fork = source.fork()
    source.offload()
    fork.offload()
    blocker = pages(scheduler, 50, adopt=False)
    fork.use()  # where its rows are: there is no room
    blocker.close()
    scheduler.trim()
    unmapped: list[int] = []
    unmap = scheduler.pool.driver.inner.unmap
    scheduler.pool.driver.inner.unmap = lambda ptr, nbytes: (unmapped.append(ptr), unmap(ptr, nbytes))[1]
    assert source.prefetch() == 0
    assert not any(fork.data_ptr <= ptr < fork.data_ptr + fork.reserved_bytes for ptr in unmapped)
    del scheduler.pool.driver.inner.unmap
    assert fork.offloaded_bytes == source.offloaded_bytes == 20 * PAGE
    fork.offload()
    assert source.prefetch() == 20 * PAGE
    assert fork.offloaded_bytes == 0
    assert torch.equal(fork.tensor(), source.tensor())


def test_waking_leaves_what_is_used_outside_the_device(
    make_scheduler: MakeScheduler, sleeping_driver: FailingDriver
) -> None:
    scheduler = make_scheduler(sleeping_driver)
    tree = PrefixTree(LANES, scheduler=scheduler)
    tokens = list(range(60))
    record(tree, tokens)
    alive = tree.fork([tokens], capacity=200)
    assert alive is not None
    scheduler.sleep()
    scheduler.pool.budget_bytes = 60 * PAGE
    blocker = pages(scheduler, 50, adopt=False)
    loan = tree.fork([tokens[:59]], capacity=200, at_least=1)
    blocker.close()
    scheduler.trim()
    assert loan is not None
    scheduler.pool.budget_bytes = None
    away = [vtensor.offloaded_bytes for vtensor in loan.vtensors]
    assert any(away)
    scheduler.wake()
    assert [vtensor.offloaded_bytes for vtensor in loan.vtensors] == away
    check(alive.vtensors, [tokens], None)
    check(loan.vtensors, [tokens[:59]], None)
    close([*alive.vtensors, *loan.vtensors])
    tree.evict()


def test_what_found_no_room_comes_when_it_has_grown_and_there_is_some(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=60 * PAGE)
    vtensor = pages(scheduler, 20)
    vtensor.offload()
    blocker = pages(scheduler, 50, adopt=False)
    row = torch.ones(1, PAGE, dtype=torch.uint8)
    vtensor.append(row)
    assert vtensor.offloaded_bytes >= 20 * PAGE
    blocker.close()
    scheduler.trim()
    num_rows = 0
    while vtensor.offloaded_bytes and num_rows < 40:
        vtensor.append(row)
        num_rows += 1
    assert 0 < num_rows < 30
    assert vtensor.tensor().unique().tolist() == [1]
    assert not scheduler.pool.is_tiered


def test_prefixes_outside_the_device_are_no_use_to_it(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    tree = PrefixTree(LANES, scheduler=scheduler)
    tokens = list(range(60))
    record(tree, tokens)
    scheduler.sleep()
    scheduler.pool.budget_bytes = 60 * PAGE
    pages(scheduler, 50, adopt=False)
    with pytest.raises(OutOfPagesError):
        pages(scheduler, 70, adopt=False)
    assert tree.match(tokens) == 60
    scheduler.trim()
    assert tree.match(tokens) == 0


def test_uses_look_only_as_long_as_something_is_not_on_the_device(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    one, other = pages(scheduler, 10), pages(scheduler, 10)
    is_tiered = []
    for step in (
        one.use,
        scheduler.sleep,
        scheduler.wake,
        lambda: one.offload(when_needed=True),
        other.use,
        one.use,
        one.offload,
        other.offload,
        one.prefetch,
        other.close,
        scheduler.trim,
    ):
        step()
        is_tiered.append(scheduler.pool.is_tiered)
    assert is_tiered == [False, True, False, True, True, False, True, True, True, True, False]


def test_offloaded_rows_are_read_where_they_are(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor = make(scheduler, 70)
    view, committed_bytes = vtensor.tensor(), vtensor.committed_bytes
    assert vtensor.offload() == committed_bytes
    assert (vtensor.is_idle, vtensor.is_asleep, vtensor.offloaded_bytes) == (True, False, committed_bytes)
    scheduler.trim()
    assert takes(scheduler, 0, committed_bytes)
    assert scheduler.stats().offloaded_bytes == committed_bytes
    assert torch.equal(view, rows(70, 300))
    assert vtensor.tensor().data_ptr() == view.data_ptr()
    view[3] = 9  # a view may be written as well
    assert vtensor.offload() == 0
    assert vtensor.prefetch() == committed_bytes
    assert (vtensor.is_idle, vtensor.offloaded_bytes) == (False, 0)
    assert (view[2].unique().tolist(), view[3].unique().tolist()) == ([2], [9])


def test_an_append_or_a_fork_brings_the_rows_back(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor = make(scheduler, 70)
    address = vtensor.data_ptr
    vtensor.offload()
    assert torch.equal(vtensor.append(rows(30, 300, start=70)), rows(100, 300))
    assert (vtensor.is_idle, vtensor.offloaded_bytes, vtensor.data_ptr) == (False, 0, address)
    vtensor.offload()
    fork = vtensor.fork()
    assert (vtensor.offloaded_bytes, fork.offloaded_bytes) == (0, 0)
    assert torch.equal(fork.tensor(), rows(100, 300))


def test_an_append_without_room_for_the_rows_goes_on_outside_the_device(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=40 * PAGE)
    vtensor = pages(scheduler, 30)
    vtensor.offload()
    blocker = pages(scheduler, 30)
    vtensor.append(torch.full((2, PAGE), 2, dtype=torch.uint8))
    assert vtensor.offloaded_bytes >= 30 * PAGE
    assert (vtensor.tensor()[:30].unique().tolist(), vtensor.tensor()[30:].unique().tolist()) == ([1], [2])
    blocker.close()
    vtensor.prefetch()
    assert vtensor.offloaded_bytes == 0
    assert (vtensor.tensor()[:30].unique().tolist(), vtensor.tensor()[30:].unique().tolist()) == ([1], [2])


def test_offloading_leaves_what_others_use(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    source = pages(scheduler, 20)
    fork = source.fork()
    fork.append(torch.ones(4, PAGE, dtype=torch.uint8))
    own_bytes = fork.committed_bytes - fork.shared_bytes
    assert fork.offload() == own_bytes
    assert source.offload() == 20 * PAGE  # now that both are idle
    assert fork.offloaded_bytes == fork.committed_bytes
    source.prefetch()
    assert (source.offloaded_bytes, fork.offloaded_bytes) == (0, own_bytes)


def test_pressure_offloads_what_is_idle_the_longest(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=100 * PAGE)
    tree = PrefixTree(LANES, scheduler=scheduler)
    parked = pages(scheduler, 10)
    first, second, busy = (pages(scheduler, 20, adopt=False) for _ in range(3))
    record(tree, list(range(20)))
    parked.close()
    second.offload(when_needed=True)
    first.offload(when_needed=True)
    assert (first.offloaded_bytes, second.offloaded_bytes) == (0, 0)
    prefix_bytes = scheduler.stats().prefix_bytes
    assert prefix_bytes > 0
    new = pages(scheduler, 40, adopt=False)  # parked ranges and prefixes go before
    assert scheduler.stats().prefix_bytes == 0
    assert (first.offloaded_bytes, second.offloaded_bytes) == (0, 0)
    newer = pages(scheduler, 10, adopt=False)
    assert (first.offloaded_bytes, second.offloaded_bytes) == (0, 20 * PAGE)
    newest = pages(scheduler, 20, adopt=False)
    assert (first.offloaded_bytes, second.offloaded_bytes) == (20 * PAGE, 20 * PAGE)
    with pytest.raises(OutOfPagesError):
        pages(scheduler, 20, adopt=False)
    assert busy.offloaded_bytes == 0
    for vtensor in (first, second, busy, new, newer, newest):
        assert vtensor.tensor().unique().tolist() == [1]


def test_a_used_tensor_is_not_offloaded_any_more(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=40 * PAGE)
    vtensor = pages(scheduler, 20)
    vtensor.offload(when_needed=True)
    vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
    with pytest.raises(OutOfPagesError):
        pages(scheduler, 30, adopt=False)
    assert vtensor.offloaded_bytes == 0


def test_memory_ahead_of_need_offloads_nothing(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=40 * PAGE)
    idle, growing = pages(scheduler, 30), pages(scheduler, 5)
    idle.offload(when_needed=True)
    growing.commit_ahead(20)
    scheduler.settle()
    assert (idle.offloaded_bytes, growing.committed < 20) == (0, True)
    growing.commit(20)
    assert idle.offloaded_bytes == 30 * PAGE


def test_the_limit_of_what_may_be_offloaded_holds() -> None:
    driver = HostDriver(PAGE)
    scheduler = GrowthScheduler(PagePool(driver, 60 * PAGE, offload_bytes=25 * PAGE))
    first, second = pages(scheduler, 20), pages(scheduler, 20, adopt=False)
    with pytest.raises(OffloadLimitError, match=r"limit is 0\.10 MiB.*TORCH_VTENSOR_OFFLOAD_BYTES"):
        scheduler.sleep()
    assert not first.is_asleep
    first.offload(when_needed=True)
    second.offload(when_needed=True)
    pages(scheduler, 40, adopt=False).close()
    assert (first.offloaded_bytes, second.offloaded_bytes) == (20 * PAGE, 0)
    with pytest.raises(OutOfPagesError):  # what is idle may not go
        pages(scheduler, 60, adopt=False)
    assert first.tensor().unique().tolist() == second.tensor().unique().tolist() == [1]


def test_what_is_outside_is_asked_once_for_all_that_is_to_go_there(make_scheduler: MakeScheduler) -> None:
    class Asked(HostDriver):
        def check_offload(self, nbytes: int) -> None:
            asked_bytes.append(nbytes)

    asked_bytes: list[int] = []
    scheduler = make_scheduler(Asked(PAGE, OFFLOAD_FOLDER))
    vtensor = pages(scheduler, 30)
    scheduler.sleep()
    scheduler.wake()
    scheduler.sleep()  # to where there is memory
    scheduler.wake()
    assert asked_bytes == [vtensor.committed_bytes]


def test_an_idle_tensor_sleeps_and_wakes_to_where_it_was(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    idle, busy = make(scheduler, 50), make(scheduler, 50)
    idle.offload()
    scheduler.sleep()
    assert (idle.is_asleep, busy.is_asleep) == (True, True)
    scheduler.wake()
    assert (idle.offloaded_bytes, busy.offloaded_bytes) == (idle.committed_bytes, 0)
    assert torch.equal(idle.tensor(), busy.tensor())


def test_what_was_offloaded_needs_no_room_to_wake(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=40 * PAGE)
    away = pages(scheduler, 30)
    away.offload()
    busy = pages(scheduler, 30)
    with pytest.raises(OutOfPagesError):
        away.prefetch()  # and with it the tensor is not idle any more
    scheduler.sleep()
    scheduler.wake()
    assert (away.offloaded_bytes, busy.offloaded_bytes) == (30 * PAGE, 0)
    assert away.tensor().unique().tolist() == busy.tensor().unique().tolist() == [1]


def test_tenants_stay_apart_when_pages_change_places(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    alice = pages(scheduler, 20, salt="alice")
    scheduler.sleep()
    scheduler.wake()
    alice.close()
    scheduler._reclaim(float("inf"))  # her pages are pooled
    bob = VTensor((PAGE,), capacity=30, dtype=torch.uint8, scheduler=scheduler, salt="bob", adopt=False)
    bob.commit(20)
    bob.length = 20
    assert not bob.tensor().any()


def test_a_prefix_tree_may_end_while_its_pages_are_copied(make_scheduler: MakeScheduler) -> None:
    class Forgetting(HostDriver):
        """Garbage is collected in the middle of a move."""

        def create_offloaded(self, nbytes: int) -> int:
            trees.clear()
            return super().create_offloaded(nbytes)

    driver = Forgetting(PAGE, OFFLOAD_FOLDER)
    scheduler = make_scheduler(driver)
    trees = [PrefixTree(LANES, scheduler=scheduler)]
    record(trees[0], list(range(60)))
    user = make_sequences(scheduler, [list(range(60, 120))])
    trees[0].record(list(range(60, 120)), user)
    scheduler.sleep()
    scheduler.pool.check_integrity()
    scheduler.wake()
    check(user, [list(range(60, 120))], None)
    close(user)


def test_many_cycles_leave_nothing_behind(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor = make(scheduler, 100)
    fork = vtensor.fork()
    reserved_bytes = scheduler.stats().reserved_bytes
    for _ in range(100):
        scheduler.sleep()
        scheduler.wake()
    scheduler.settle()
    scheduler.reap()
    assert scheduler.stats().reserved_bytes == reserved_bytes
    assert len(scheduler.pool.ranges) == 2
    assert torch.equal(vtensor.tensor(), rows(100, 300))
    assert torch.equal(fork.tensor(), rows(100, 300))
    scheduler.pool.check_integrity()


def test_no_folder_to_offload_to_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    scheduler = GrowthScheduler(PagePool(HostDriver(PAGE, str(tmp_path / "missing"))))
    vtensor = pages(scheduler, 3)
    with pytest.raises(DriverError, match=r"ENOENT.*TORCH_VTENSOR_OFFLOAD_FOLDER"):
        vtensor.offload()
    assert vtensor.tensor().unique().tolist() == [1]


def test_sequences_go_on_after_sleeping(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    sequences = [[1, 2, 3] * 10, [4, 5, 6] * 10]
    vtensors = make_sequences(scheduler, sequences)
    for step in range(5):
        scheduler.sleep()
        scheduler.wake()
        sequences = [[*tokens, step] for tokens in sequences]
        append(vtensors, sequences, len(sequences[0]) - 1, None)
        check(vtensors, sequences, None)
    close(vtensors)
