"""Every driver call made to fail, at every position: nothing is lost, nothing leaks, and trying again works."""

from collections.abc import Callable

import pytest
import torch
from scripted_drivers import PAGE, FailingDriver
from vtensors import assert_all_given_back

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError

ROW = 700  # bytes: rows lie across the edges of pages


class Scenario:
    """One life with every operation in it: each step can be tried until it works, and then has happened once."""

    def __init__(self, driver: FailingDriver) -> None:
        self.driver = driver
        self.scheduler = GrowthScheduler(PagePool(driver), idle_bytes=0)
        self.tensors: dict[str, VTensor] = {}
        self.expected: dict[str, torch.Tensor] = {}
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def steps(self) -> list[Callable[[], None]]:
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
            lambda: self.scheduler.trim() and None,
            lambda: self.make("e"),
            lambda: self.append("e", 20),
            lambda: self.write_under_a_view("e", 10),
            lambda: self.views.clear(),
        ]

    def make(self, name: str) -> None:
        self.tensors[name] = VTensor(
            (ROW,), capacity=400, dtype=torch.uint8, outer_shape=(2,), scheduler=self.scheduler
        )
        self.expected[name] = torch.empty(2, 0, ROW, dtype=torch.uint8)

    def append(self, name: str, num_rows: int) -> None:
        rows = (torch.arange(2 * num_rows * ROW) * 7 + num_rows).to(torch.uint8).reshape(2, num_rows, ROW)
        self.tensors[name].append(rows)
        self.expected[name] = torch.cat([self.expected[name], rows], 1)

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

    def close(self, name: str) -> None:
        if name in self.tensors:
            self.tensors.pop(name).close()

    def check(self) -> None:
        self.scheduler.reap()
        self.scheduler.settle()  # and with it the order of calls is the same in every run
        self.scheduler.pool.check_integrity()
        for name, vtensor in self.tensors.items():
            assert vtensor.length == self.expected[name].shape[1]
            assert torch.equal(vtensor.tensor(), self.expected[name][:, vtensor.first_row :]), name
            vtensor._range.check_integrity()
        for view, expected in self.views:
            assert torch.equal(view, expected)
        stats = self.scheduler.stats()
        assert stats.committed_bytes == stats.live_bytes + stats.parked_bytes + stats.pooled_bytes
        assert stats.committed_bytes == self.driver.physical_bytes()

    def run(self) -> int:
        """All steps, each until it works; returns how often one failed."""
        num_failed = 0
        for step in self.steps():
            for _ in range(len(self.driver.refused) + 10):
                try:
                    step()
                except DriverError:
                    num_failed += 1
                    self.check()
                else:
                    break
            else:
                raise AssertionError("a step went on failing after the driver had recovered")
            self.check()
        return num_failed

    def end(self) -> None:
        self.tensors.clear()
        while True:
            try:
                assert_all_given_back(self.scheduler)
            except DriverError:
                continue
            return


def all_calls() -> list[str]:
    scenario = Scenario(FailingDriver())
    assert scenario.run() == 0
    scenario.end()
    return scenario.driver.calls


def test_the_scenario_makes_every_call() -> None:
    assert set(all_calls()) == {"reserve", "create", "map", "set_access", "unmap", "destroy", "release"}


@pytest.mark.parametrize("num_failures", [1, 4], ids=lambda n: f"{n}-in-a-row")
def test_every_call_may_fail(num_failures: int) -> None:
    """More than one in a row also refuses the undoing of what the first one stopped."""
    calls = all_calls()
    for number, name in enumerate(calls):
        driver = FailingDriver(number, num_failures)
        scenario = Scenario(driver)
        try:
            scenario.run()
            scenario.end()
        except BaseException as error:
            error.add_note(f"after call {number} of {len(calls)} ({name}) was refused; refused: {driver.refused}")
            raise
        assert driver.refused[0] == name
        assert len(driver.refused) == num_failures


def test_a_full_device_shows_only_where_memory_is_really_short() -> None:
    """Creating is refused for want of memory: parked and pooled memory is given back and the call made again."""
    for number, name in enumerate(all_calls()):
        if name == "create":
            scenario = Scenario(FailingDriver(number, code="ENOMEM"))
            scenario.run()
            scenario.end()
            assert scenario.driver.refused == ["create"]


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
