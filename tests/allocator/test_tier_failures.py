"""Every driver call of sleep, wake, offload and prefetch made to fail: each tensor is as it was, or awake."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from scripted_drivers import PAGE, FailingDriver
from vtensors import assert_all_given_back

from torch_vtensor.allocator import page_copy
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError, OffloadLimitError, OutOfPagesError

ROW = 700
_MOST_TRIES = 20


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_copy, "_CHUNK_BYTES", 5 * PAGE)


class Scenario:
    """Tensors that share pages, one of them without its front, under another tag, or closed while it sleeps."""

    def __init__(self, driver: FailingDriver, num_failures: int = 1) -> None:
        self.driver = driver
        self.num_failures = num_failures
        self.scheduler = GrowthScheduler(PagePool(driver), idle_bytes=0)
        self.sleeps = False
        self.tensors = {name: self.make(tag) for name, tag in (("a", "kv_cache"), ("w", "weights"), ("z", "kv_cache"))}
        self.tensors["b"] = self.tensors["a"].fork([1, 0])
        self.tensors["b"].append(self.rows(5))
        self.tensors["c"] = self.tensors["b"].fork()
        self.tensors["c"].drop_head(6)
        self.expected = {name: vtensor.tensor().clone() for name, vtensor in self.tensors.items()}
        self.view = self.tensors["a"].tensor()
        self.scheduler.settle()
        self.scheduler.trim()
        driver.calls.clear()

    def rows(self, num_rows: int) -> torch.Tensor:
        return (torch.arange(2 * num_rows * ROW) * 7 + num_rows).to(torch.uint8).reshape(2, num_rows, ROW)

    def make(self, tag: str) -> VTensor:
        vtensor = VTensor(
            (ROW,), capacity=400, dtype=torch.uint8, outer_shape=(2,), scheduler=self.scheduler, tag=tag, adopt=False
        )
        vtensor.append(self.rows(8))
        return vtensor

    def steps(self) -> list[Callable[[], object]]:
        return [
            lambda: self.scheduler.sleep(),
            lambda: self.scheduler.wake(),
            lambda: self.scheduler.sleep(["weights"]),
            lambda: self.scheduler.sleep(["kv_cache"]),
            lambda: self.scheduler.wake(["kv_cache"]),
            lambda: self.scheduler.wake(["weights"]),
            lambda: self.tensors["a"].offload(),
            lambda: self.tensors["b"].offload(),
            lambda: self.tensors["c"].offload(),
            lambda: self.scheduler.sleep(),
            lambda: self.scheduler.wake(),
            lambda: self.tensors["c"].prefetch(),
            lambda: self.append("b"),
            lambda: self.scheduler.sleep(),
            lambda: self.close("z"),
            lambda: self.scheduler.wake(),
        ]

    def append(self, name: str) -> None:
        rows = self.rows(3)
        self.tensors[name].append(rows)
        self.expected[name] = torch.cat([self.expected[name], rows], 1)

    def close(self, name: str) -> None:
        if name in self.tensors:
            self.tensors.pop(name).close()

    def check(self, was_asleep: set[str], is_done: bool) -> None:
        self.scheduler.reap()
        self.scheduler.settle()
        self.scheduler.pool.check_integrity()
        for name, vtensor in self.tensors.items():
            vtensor._range.check_integrity()
            if not vtensor.is_asleep:
                assert torch.equal(vtensor.tensor(), self.expected[name]), name
                if name == "a":
                    assert torch.equal(self.view, self.expected["a"])
            elif not is_done:
                assert name in was_asleep or self.num_failures > 1, f"{name} was put to sleep by what failed"
        stats = self.scheduler.stats()
        assert stats.committed_bytes == stats.live_bytes + stats.parked_bytes + stats.pooled_bytes
        assert stats.committed_bytes == self.driver.physical_bytes()

    def asleep(self) -> set[str]:
        return {name for name, vtensor in self.tensors.items() if vtensor.is_asleep}

    def run(self) -> None:
        for step in self.steps():
            before = self.asleep()
            for _ in range(_MOST_TRIES):
                try:
                    step()
                except DriverError:
                    self.check(before, is_done=False)
                    while self.asleep() - before:  # only where the undoing was refused as well
                        with suppress(DriverError):
                            self.scheduler.wake()
                        self.check(before, is_done=False)
                else:
                    break
            else:
                raise AssertionError("a step went on failing after the driver had recovered")
            self.check(before, is_done=True)
        assert not self.asleep()

    def end(self) -> None:
        self.tensors.clear()
        del self.view
        for _ in range(_MOST_TRIES):
            try:
                assert_all_given_back(self.scheduler)
            except DriverError:
                continue
            return


def all_calls() -> list[str]:
    scenario = Scenario(FailingDriver())
    scenario.run()
    scenario.end()
    return scenario.driver.calls


def test_the_scenario_makes_every_call() -> None:
    names = {"reserve", "create", "create_offloaded", "copy", "map", "set_access", "unmap", "destroy", "release"}
    assert set(all_calls()) == names


@pytest.mark.parametrize(
    ("num_failures", "step"),
    [(1, 11), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
    ids=["every-11th", "every", "4-in-a-row"],
)
def test_every_call_may_fail(num_failures: int, step: int) -> None:
    calls = all_calls()
    for number, name in list(enumerate(calls))[::step]:
        driver = FailingDriver(None, num_failures)
        scenario = Scenario(driver, num_failures)
        driver.fail_at = number
        try:
            scenario.run()
            scenario.end()
        except BaseException as error:
            error.add_note(f"after call {number} of {len(calls)} ({name}) was refused; refused: {driver.refused}")
            raise
        assert driver.refused[0] == name


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_pressure_that_cannot_offload_is_out_of_pages_or_the_drivers_error(code: str) -> None:
    driver = FailingDriver(code=code)
    scheduler = GrowthScheduler(PagePool(driver, 30 * PAGE), idle_bytes=0)
    idle, busy = (VTensor((PAGE,), capacity=100, dtype=torch.uint8, scheduler=scheduler, adopt=False) for _ in range(2))
    idle.append(torch.ones(20, PAGE, dtype=torch.uint8))
    idle.offload(when_needed=True)
    driver.fail_at = len(driver.calls)
    with pytest.raises(OutOfPagesError if code == "ENOSPC" else DriverError):
        busy.append(torch.ones(20, PAGE, dtype=torch.uint8))
    assert driver.refused == ["create"] or driver.refused == ["create_offloaded"]
    driver.fail_at = None
    busy.append(torch.ones(20, PAGE, dtype=torch.uint8))
    assert idle.offloaded_bytes == 20 * PAGE
    assert idle.tensor().unique().tolist() == busy.tensor().unique().tolist() == [1]
    idle.close()
    busy.close()
    assert_all_given_back(scheduler)


def test_too_much_for_the_limit_leaves_all_tensors_awake() -> None:
    scheduler = GrowthScheduler(PagePool(FailingDriver(), offload_bytes=10 * PAGE), idle_bytes=0)
    vtensor = VTensor((PAGE,), capacity=100, dtype=torch.uint8, scheduler=scheduler)
    vtensor.append(torch.ones(20, PAGE, dtype=torch.uint8))
    with pytest.raises(OffloadLimitError):
        scheduler.sleep()
    assert vtensor.tensor().unique().tolist() == [1]
    vtensor.close()
    assert_all_given_back(scheduler)
