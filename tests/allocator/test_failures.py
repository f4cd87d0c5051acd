"""Every driver call made to fail, at every position: nothing is lost, nothing leaks, and trying again works."""

import gc
from collections.abc import Callable

import pytest
import torch
from lives import ROW, Life, calls_of, refuse_each
from scripted_drivers import PAGE, FailingDriver
from vtensors import assert_all_given_back

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError


class OneLife(Life):
    """One life with every operation in it."""

    def __init__(self, driver: FailingDriver) -> None:
        super().__init__(driver)
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def steps(self) -> list[Callable[[], object]]:
        return [
            lambda: self.make("a"),
            lambda: self.append("a", 3),
            lambda: self.append("a", 60),  # pages of several sizes, two strips
            lambda: self.fork("a", "b"),
            lambda: self.fork("a", "c", [1, 1, 0]),
            lambda: self.keep_view("b"),
            lambda: self.append("b", 5),
            lambda: self.truncate_and_append("a", 40, 2),  # shared: moves
            lambda: self.truncate_and_append("b", 50, 30),  # seen: moves
            lambda: self.close("c"),
            lambda: self.drop_head("b", 20),
            lambda: self.append("b", 10),
            lambda: self.drop_head("b", self.tensors["b"].length),
            lambda: self.append("b", 1),
            lambda: self.commit_ahead("a"),
            lambda: self.make("d"),
            lambda: self.append("d", 30),
            lambda: self.views.clear(),
            lambda: self.close("d"),
            lambda: self.scheduler.trim(),
            lambda: self.make("e"),
            lambda: self.append("e", 20),
            lambda: self.write_under_a_view("e", 10),
            lambda: self.views.clear(),
        ]

    def truncate_and_append(self, name: str, length: int, num_rows: int) -> None:
        self.tensors[name].truncate(length)
        self.expected[name] = self.expected[name][:, :length]
        self.append(name, num_rows)

    def fork(self, name: str, other: str, select: list[int] | None = None) -> None:
        self.tensors[other] = self.tensors[name].fork(select)
        self.expected[other] = self.expected[name] if select is None else self.expected[name][select]

    def keep_view(self, name: str) -> None:
        view = self.tensors[name].tensor()
        self.views.append((view, view.clone()))

    def drop_head(self, name: str, first_row: int) -> None:
        self.tensors[name].drop_head(first_row)

    def commit_ahead(self, name: str) -> None:
        self.tensors[name].commit_ahead(100)
        self.scheduler.settle()
        self.tensors[name].commit(100)

    def write_under_a_view(self, name: str, length: int) -> None:
        """Overwrite rows that a view shows: the tensor moves."""
        self.keep_view(name)
        self.truncate_and_append(name, length, 5)

    def check(self, *, is_done: bool) -> None:
        super().check(is_done=is_done)
        for view, expected in self.views:
            assert torch.equal(view, expected)


def test_the_life_makes_every_call() -> None:
    assert set(calls_of(OneLife)) == {"reserve", "create", "map", "set_access", "unmap", "destroy", "release"}


@pytest.mark.parametrize("num_failures", [1, 4], ids=lambda n: f"{n}-in-a-row")
def test_every_call_may_fail(num_failures: int) -> None:
    """More than one in a row also refuses the undoing of what the first one stopped."""
    refuse_each(OneLife, num_failures)


def test_a_full_device_shows_only_where_memory_is_really_short() -> None:
    """Creating is refused for want of memory: parked and pooled memory is given back and the call made again."""
    for number, name in enumerate(calls_of(OneLife)):
        if name == "create":
            life = OneLife(FailingDriver(number, code="ENOMEM"))
            life.run()
            life.end()
            assert life.driver.refused == ["create"]


def test_a_failed_fork_leaves_nothing_even_while_its_error_is_kept() -> None:
    driver = FailingDriver()
    scheduler = GrowthScheduler(PagePool(driver), idle_bytes=0)
    source = VTensor((ROW,), capacity=100, dtype=torch.uint8, scheduler=scheduler)
    source.append(torch.ones(60, ROW, dtype=torch.uint8))
    live_bytes = scheduler.stats().live_bytes
    calls_before = len(driver.calls)
    source.fork().close()
    num_calls = len(driver.calls[calls_before:])
    errors = []
    for ahead in range(num_calls):
        scheduler.settle()
        scheduler.trim()
        driver.fail_at = len(driver.calls) + ahead
        try:
            source.fork().close()
        except DriverError as error:
            errors.append(error)
        stats = scheduler.stats()
        assert (stats.live_bytes, stats.shared_bytes) == (live_bytes, 0)
    assert {error.call for error in errors} == {"reserve", "map", "set_access", "create"}
    scheduler.settle()
    source.truncate(10)  # and nothing is taken to be shared any more
    address = source.data_ptr
    source.append(torch.zeros(10, ROW, dtype=torch.uint8))
    assert source.data_ptr == address
    source.close()
    errors.clear()
    assert_all_given_back(scheduler)


def test_sharing_that_fails_leaves_both_ranges_as_they_were() -> None:
    driver = FailingDriver()
    pool = PagePool(driver)
    source, sharer = AddressRange(pool, 1, 8 * PAGE), AddressRange(pool, 1, 8 * PAGE)
    source.commit(PAGE)
    head = source.detach_head(PAGE)
    assert head is not None
    source.commit(3 * PAGE)
    for ahead in range(3):
        driver.fail_at = len(driver.calls) + ahead
        with pytest.raises(DriverError):
            sharer.commit_shared(source, [0], 3 * PAGE)
        assert (sharer.head_bytes, sharer.committed_bytes, source.exclusive_from()) == (0, 0, 0)
    assert sharer.commit_shared(source, [0], 3 * PAGE) == 3 * PAGE
    for range_ in (sharer, head, source):
        range_.empty()
        range_.release()
    assert pool.trim() == 3 * PAGE
    assert driver.physical_bytes() == 0


def test_a_grown_range_that_lost_its_front_keeps_its_place_when_mapping_fails() -> None:
    driver = FailingDriver()
    scheduler = GrowthScheduler(PagePool(driver), idle_bytes=0)
    vtensor = VTensor((PAGE,), capacity=8, dtype=torch.uint8, scheduler=scheduler)
    view = vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
    vtensor.drop_head(1)  # every page: what is mapped next lies right behind them
    driver.fail_at = len(driver.calls) + 1
    with pytest.raises(DriverError):
        vtensor.append(torch.full((1, PAGE), 2, dtype=torch.uint8))
    assert driver.refused == ["map"]
    vtensor.append(torch.full((1, PAGE), 2, dtype=torch.uint8))
    assert (view.unique().tolist(), vtensor.tensor().unique().tolist()) == ([1], [2])
    del view
    vtensor.close()
    assert_all_given_back(scheduler)


def test_trim_goes_on_after_a_refused_destroy() -> None:
    driver = FailingDriver()
    pool = PagePool(driver)
    pool.drop(pool.acquire([PAGE] * 3))
    driver.fail_at = len(driver.calls) + 1
    with pytest.raises(DriverError):
        pool.trim()
    assert pool.ledger.free_bytes == 2 * PAGE == driver.physical_bytes()
    pool.check_integrity()
    assert pool.trim() == 2 * PAGE
    assert driver.physical_bytes() == 0


def test_a_shortage_that_passes_keeps_nothing_alive() -> None:
    """No error of it is left in a cycle, with the frames it came through and what they held, for gc to find."""
    driver = FailingDriver(code="ENOMEM", num_failures=2)
    scheduler = GrowthScheduler(PagePool(driver), idle_bytes=0)
    vtensor = VTensor((PAGE,), capacity=100, dtype=torch.uint8, scheduler=scheduler)
    gc.collect()
    gc.disable()
    try:
        vtensor.append(torch.ones(4, PAGE, dtype=torch.uint8))
        view = vtensor.tensor()
        vtensor.truncate(0)
        driver.fail_at = len(driver.calls) + 1  # the rows move to other pages, and the first two are refused
        vtensor.append(torch.ones(3, PAGE, dtype=torch.uint8))
        assert driver.refused == ["create", "create"]
        del view
        vtensor.close()
        scheduler.settle()
        scheduler.trim()
        assert scheduler.stats().reserved_bytes == 0
    finally:
        gc.enable()
    assert_all_given_back(scheduler)
