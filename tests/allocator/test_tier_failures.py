"""Every driver call of sleep, wake, offload and prefetch made to fail: each tensor is as it was, or awake."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from lives import Life, calls_of, refuse_each
from scripted_drivers import PAGE, FailingDriver
from vtensors import assert_all_given_back

from torch_vtensor.allocator import page_copy
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError, OffloadLimitError, OutOfPagesError


@pytest.fixture(autouse=True, params=["mapped_for_a_copy", "always_mapped", "pinned"])
def _several_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """And memory outside that is mapped as the CPU's is, or as a GPU's, where what sleeps may be pinned instead."""
    monkeypatch.setattr(page_copy, "_CHUNK_BYTES", 5 * PAGE)
    monkeypatch.setattr(FailingDriver, "keeps_offloaded_mapped", request.param != "mapped_for_a_copy")
    monkeypatch.setattr(FailingDriver, "has_pins", request.param == "pinned")


class MovingLife(Life):
    """Tensors that share pages, one of them without its front, under another tag, or closed while it sleeps."""

    def __init__(self, driver: FailingDriver, num_failures: int = 1) -> None:
        super().__init__(driver)
        self.num_failures = num_failures
        self.was_asleep: set[str] = set()
        for name, tag in (("a", "kv_cache"), ("w", "weights"), ("z", "kv_cache")):
            self.make(name, tag=tag, adopt=False)
            self.append(name, 8)
        self.make("g", adopt=False)
        for _ in range(4):  # in small pages, which become large ones on the way
            self.append("g", 6)
        self.tensors["b"], self.expected["b"] = self.tensors["a"].fork([1, 0]), self.expected["a"][[1, 0]]
        self.append("b", 5)
        self.tensors["c"], self.expected["c"] = self.tensors["b"].fork(), self.expected["b"]
        self.tensors["c"].drop_head(6)
        self.view = self.tensors["a"].tensor()
        self.scheduler.settle()
        self.scheduler.trim()

    def steps(self) -> list[Callable[[], object]]:
        return [
            lambda: self.scheduler.sleep(),
            lambda: self.scheduler.wake(),
            lambda: self.scheduler.sleep(["weights"]),
            lambda: self.scheduler.sleep(["kv_cache"]),
            lambda: self.scheduler.wake(["kv_cache"]),
            lambda: self.scheduler.wake(["weights"]),
            lambda: self.append("g", 30),
            lambda: self.tensors["g"].offload(),
            lambda: self.tensors["a"].offload(),
            lambda: self.tensors["b"].offload(),
            lambda: self.tensors["c"].offload(),
            lambda: self.scheduler.sleep(),
            lambda: self.scheduler.wake(),
            lambda: self.tensors["c"].prefetch(),
            lambda: self.append("b", 3),
            lambda: self.scheduler.sleep(),
            lambda: self.close("z"),
            lambda: self.scheduler.wake(),
        ]

    def check(self, *, is_done: bool) -> None:
        super().check(is_done=is_done)
        if not self.tensors["a"].is_asleep:
            assert torch.equal(self.view, self.expected["a"])
        asleep = {name for name, vtensor in self.tensors.items() if vtensor.is_asleep}
        if is_done:
            self.was_asleep = asleep
            return
        fallen = asleep - self.was_asleep
        assert not fallen or self.num_failures > 1, f"{fallen} was put to sleep by what was refused"
        if fallen:  # where the undoing was refused as well
            with suppress(DriverError):
                self.scheduler.wake()
            self.check(is_done=False)

    def end(self) -> None:
        del self.view
        super().end()
        assert not self.scheduler.pool.offloads._places, "addresses are left"


def test_the_life_makes_every_call() -> None:
    names = {"reserve", "create", "create_offloaded", "copy", "map", "set_access", "unmap", "destroy", "release"}
    assert set(calls_of(MovingLife)) == names | ({"register", "unregister"} if FailingDriver.has_pins else set())


@pytest.mark.parametrize(
    ("num_failures", "step"),
    [(1, 17), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
    ids=["every-17th", "every", "4-in-a-row"],
)
def test_every_call_may_fail(num_failures: int, step: int) -> None:
    refuse_each(lambda driver: MovingLife(driver, num_failures), num_failures, step)


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
