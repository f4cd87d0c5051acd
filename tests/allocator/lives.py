"""Lives of tensors in which every driver call is refused once: nothing is lost, nothing leaks, trying again works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scripted_drivers import FailingDriver
from vtensors import assert_all_given_back

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError

ROW = 700  # bytes: rows lie across the edges of pages
_MOST_TRIES = 20


class Life:
    """Named tensors of two strips, what they hold, and steps that can each be tried until they work."""

    def __init__(self, driver: FailingDriver, idle_bytes: int = 0, **options: Any) -> None:
        self.driver = driver
        self.scheduler = GrowthScheduler(PagePool(driver), idle_bytes, **{"idle_seconds": None, **options})
        self.tensors: dict[str, VTensor] = {}
        self.expected: dict[str, torch.Tensor] = {}

    def steps(self) -> Sequence[Callable[[], object]]:
        raise NotImplementedError

    def make(self, name: str, **options: object) -> None:
        self.tensors[name] = VTensor(
            (ROW,), capacity=400, dtype=torch.uint8, outer_shape=(2,), scheduler=self.scheduler, **options
        )
        self.expected[name] = torch.empty(2, 0, ROW, dtype=torch.uint8)

    def append(self, name: str, num_rows: int) -> None:
        rows = (torch.arange(2 * num_rows * ROW) * 7 + num_rows).to(torch.uint8).reshape(2, num_rows, ROW)
        self.tensors[name].append(rows)
        self.expected[name] = torch.cat([self.expected[name], rows], 1)

    def close(self, name: str) -> None:
        if name in self.tensors:
            self.tensors.pop(name).close()

    def check(self, *, is_done: bool) -> None:
        """After each try, which worked or was refused."""
        self.scheduler.reap()
        self.scheduler.settle()  # and with it the order of calls is the same in every run
        self.scheduler.pool.check_integrity()
        for name, vtensor in self.tensors.items():
            assert vtensor.length == self.expected[name].shape[1]
            vtensor._range.check_integrity()
            if not vtensor.is_asleep:
                assert torch.equal(vtensor.tensor(), self.expected[name][:, vtensor.first_row :]), name
        stats = self.scheduler.stats()
        assert stats.committed_bytes == stats.live_bytes + stats.parked_bytes + stats.pooled_bytes
        assert stats.committed_bytes == self.driver.physical_bytes()

    def run(self) -> int:
        """All steps, each until it works; returns how often one was refused."""
        num_refused = 0
        for step in self.steps():
            for _ in range(_MOST_TRIES):
                try:
                    step()
                except DriverError:
                    num_refused += 1
                    self.check(is_done=False)
                else:
                    break
            else:
                raise AssertionError("a step went on failing after the driver had recovered")
            self.check(is_done=True)
        return num_refused

    def end(self) -> None:
        """Everything is let go of."""
        self.tensors.clear()
        for _ in range(_MOST_TRIES):
            try:
                assert_all_given_back(self.scheduler)
            except DriverError:
                continue
            return
        raise AssertionError("the end went on failing after the driver had recovered")


def calls_of(make: Callable[[FailingDriver], Life]) -> list[str]:
    """The calls of a life in which nothing is refused."""
    life = make(FailingDriver())
    life.driver.calls.clear()
    assert life.run() == 0
    life.end()
    return life.driver.calls


def refuse_each(make: Callable[[FailingDriver], Life], num_failures: int = 1, step: int = 1) -> None:
    """As many lives as there are calls, or every ``step``-th: in each that call is refused, and the next ones."""
    calls = calls_of(make)
    for number, name in list(enumerate(calls))[::step]:
        driver = FailingDriver(None, num_failures)
        life = make(driver)
        driver.calls.clear()
        driver.fail_at = number
        try:
            life.run()
            life.end()
        except BaseException as error:
            error.add_note(f"after call {number} of {len(calls)} ({name}) was refused; refused: {driver.refused}")
            raise
        assert driver.refused[0] == name
        assert len(driver.refused) == min(num_failures, len(driver.calls) - number)
