"""Tensors under two tags that sleep, rest and share pages and prefixes at random, while the driver refuses calls.

The prefix tree's machine has memory come back within one step. Here it stays away while others go on: what sleeps
refuses every use, what is awake holds its rows, and no page is lost or counted twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted_drivers import PAGE, FailingDriver
from vtensors import Clock

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool, Tier
from torch_vtensor.allocator.prefix import Lane, PrefixTree
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import AsleepError, DriverError, OutOfPagesError

_LANE = Lane((700,), (2,), torch.uint8)  # rows lie across the edges of pages
_CAPACITY = 150
_MOST_TENSORS = 6
_TAGS = ("kv_cache", "weights")
_BUDGETS = (None, 60, 120, 300)
_wishes = st.sampled_from([None, ["kv_cache"], ["weights"]])
_counts = st.sampled_from([1, 3, 12, 40])


@dataclass
class Modelled:
    vtensor: VTensor
    rows: torch.Tensor  # [1, 2, T, 700], none of them zero
    is_whole: bool = True  # False once rows were discarded: pages of them may hold zeros


class TiersMachine(RuleBasedStateMachine):
    """The model: clones of all rows, and which tensors are known to sleep."""

    make_driver: Callable[[], FailingDriver] = FailingDriver

    @initialize(budget=st.sampled_from(_BUDGETS), idle_pages=st.sampled_from([0, 20]))
    def make(self, budget: int | None, idle_pages: int) -> None:
        self.driver = self.make_driver()
        self.pool = PagePool(self.driver)
        self.clock = Clock()
        self.scheduler = GrowthScheduler(self.pool, idle_pages * PAGE, clock=self.clock)
        self.tree = PrefixTree((_LANE,), scheduler=self.scheduler, max_bytes=100 * PAGE)
        self.tensors: list[Modelled] = []
        self.recorded: dict[int, torch.Tensor] = {}  # by the token that a prefix repeats
        self.number = 0
        self.set_budget(budget)

    @contextmanager
    def may_be_refused(self) -> Iterator[None]:
        try:
            yield
        except AsleepError:
            assert any(it.vtensor.is_asleep for it in self.tensors)
        except DriverError:
            assert self.driver.refused, "nothing was refused"
        except OutOfPagesError:
            assert self.pool.budget_bytes is not None or self.driver.refused
        finally:
            self.driver.fail_at = None
            self.driver.refused.clear()

    def pick(self, data: st.DataObject) -> Modelled:
        return self.tensors[data.draw(st.sampled_from(range(len(self.tensors))))]

    def new_rows(self, num_rows: int) -> torch.Tensor:
        self.number += 1
        return (torch.arange(2 * num_rows * 700) * 7 % 251 + 1 + self.number % 5).to(torch.uint8).reshape(1, 2, -1, 700)

    # Tensors

    @precondition(lambda self: len(self.tensors) < _MOST_TENSORS)
    @rule(tag=st.sampled_from(_TAGS), num_rows=_counts)
    def begin(self, tag: str, num_rows: int) -> None:
        with self.may_be_refused():
            vtensor = VTensor(
                (700,), capacity=_CAPACITY, dtype=torch.uint8, outer_shape=(1, 2), scheduler=self.scheduler, tag=tag
            )
            self.tensors.append(Modelled(vtensor, torch.empty(1, 2, 0, 700, dtype=torch.uint8)))
            self.extend(self.tensors[-1], num_rows)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), num_rows=_counts, part=st.sampled_from([1, 1, 1, 0.5, 0]))
    def write(self, data: st.DataObject, num_rows: int, part: float) -> None:
        it = self.pick(data)
        length = int(it.vtensor.length * part)
        it.vtensor.truncate(length)
        it.rows = it.rows[:, :, :length]
        with self.may_be_refused():
            self.extend(it, num_rows)

    def extend(self, it: Modelled, num_rows: int) -> None:
        new = self.new_rows(min(num_rows, _CAPACITY - it.vtensor.length))
        it.vtensor.append(new)
        it.rows = torch.cat([it.rows, new], 2)

    @precondition(lambda self: 0 < len(self.tensors) < _MOST_TENSORS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        it = self.pick(data)
        with self.may_be_refused():
            self.tensors.append(Modelled(it.vtensor.fork(), it.rows, it.is_whole))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        it = self.pick(data)
        self.tensors.remove(it)
        it.vtensor.close()

    # Prefixes

    @precondition(lambda self: self.tensors and len(self.recorded) < 200)
    @rule(data=st.data())
    def record(self, data: st.DataObject) -> None:
        it = self.pick(data)
        if it.is_whole and it.vtensor.length and not it.vtensor.is_asleep:
            token = len(self.recorded)
            self.tree.record([token] * it.vtensor.length, [it.vtensor])
            self.recorded[token] = it.rows

    @precondition(lambda self: self.recorded and len(self.tensors) < _MOST_TENSORS)
    @rule(data=st.data())
    def borrow(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.recorded)))
        rows = self.recorded[token]
        with self.may_be_refused():
            loan = self.tree.fork([[token] * rows.shape[2]], capacity=_CAPACITY)
            if loan is not None:
                self.tensors.append(Modelled(loan.vtensors[0], rows[:, :, : loan.num_rows]))

    # Moving

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), what=st.sampled_from(["offload", "when needed", "prefetch"]))
    def move(self, data: st.DataObject, what: str) -> None:
        vtensor = self.pick(data).vtensor
        with self.may_be_refused():
            vtensor.prefetch() if what == "prefetch" else vtensor.offload(when_needed=what == "when needed")

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def offload_while_another_thread_holds_it(self, data: st.DataObject) -> None:
        it = self.pick(data)
        if it.vtensor.is_asleep:
            return
        with _another_thread_in(it.vtensor.in_place):
            before = it.vtensor.offloaded_bytes
            with self.may_be_refused():
                for other in self.tensors:
                    if other is not it and not other.vtensor.is_asleep:
                        other.vtensor.offload()
            assert it.vtensor.offloaded_bytes == before, "somebody was using it"

    @rule(tags=_wishes, discard=st.sampled_from([(), (), (), None, ["weights"]]))
    def sleep(self, tags: list[str] | None, discard: tuple[str, ...] | list[str] | None) -> None:
        for it in self.tensors:
            it.is_whole = it.is_whole and discard == ()
        if discard != ():
            self.recorded = {}
            self.tree.evict()
        with self.may_be_refused():
            self.scheduler.sleep(tags, discard)
            for it in self.tensors:
                if tags is None or it.vtensor.tag in tags:
                    assert it.vtensor.is_asleep == (it.vtensor.num_pages > 0)

    @rule(tags=_wishes)
    def wake(self, tags: list[str] | None) -> None:
        with self.may_be_refused():
            self.scheduler.wake(tags)
            assert not any(it.vtensor.is_asleep for it in self.tensors if tags is None or it.vtensor.tag in tags)

    @rule(calls_until=st.integers(0, 30), num_failures=st.sampled_from([1, 1, 2, 5]))
    def refuse_soon(self, calls_until: int, num_failures: int) -> None:
        self.driver.fail_at, self.driver._num_failures = len(self.driver.calls) + calls_until, num_failures
        self.driver._code = "ENOMEM" if calls_until % 2 else "EIO"

    @rule(budget=st.sampled_from(_BUDGETS))
    def set_budget(self, budget: int | None) -> None:
        self.pool.budget_bytes = None if budget is None else budget * PAGE

    @rule()
    def load_drops(self) -> None:
        with self.may_be_refused():
            self.clock.drop_load(self.scheduler)

    @rule(what=st.sampled_from(["trim", "evict"]))
    def give_back(self, what: str) -> None:
        with self.may_be_refused():
            self.scheduler.trim() if what == "trim" else self.tree.evict(20 * PAGE)

    # What has to hold

    @invariant()
    def what_is_awake_holds_its_rows_and_what_sleeps_refuses(self) -> None:
        for it in self.tensors:
            assert it.vtensor.length == it.rows.shape[2]
            if it.vtensor.is_asleep:
                with pytest.raises(AsleepError):
                    it.vtensor.tensor()
            elif it.is_whole:
                assert torch.equal(it.vtensor.tensor(), it.rows)
            else:
                held = it.vtensor.tensor()
                assert bool(((held == it.rows) | (held == 0)).all()), "discarded rows are zeros, and nothing else"

    @invariant()
    def every_byte_is_counted_once(self) -> None:
        self.driver.fail_at, fail_at = None, self.driver.fail_at  # nothing of what follows is to be refused
        num_calls = len(self.driver.calls)
        self.scheduler.reap()
        self.scheduler.settle()
        self.pool.check_integrity()
        self.tree.check_integrity()
        stats = self.scheduler.stats()
        parts = stats.live_bytes, stats.prefix_bytes, stats.parked_bytes, stats.pooled_bytes
        assert min(parts) >= 0
        assert sum(parts) == stats.committed_bytes == self.driver.physical_bytes()
        live = {page for it in self.tensors for page in it.vtensor._range.pages}
        live |= {page for it in self.tensors for _, page in it.vtensor._range._strays}  # whose undoing was refused
        assert stats.live_bytes == sum(page.nbytes for page in live if page.tier is Tier.DEVICE)
        for it in self.tensors:
            it.vtensor._range.check_integrity()
        if fail_at is not None:
            self.driver.fail_at = fail_at + len(self.driver.calls) - num_calls

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.driver.fail_at = None
        self.pool.budget_bytes = None
        self.scheduler.wake()
        self.what_is_awake_holds_its_rows_and_what_sleeps_refuses()
        assert not any(it.vtensor.is_asleep for it in self.tensors)
        for it in self.tensors:
            it.vtensor.close()
        self.tensors.clear()
        self.tree.evict()
        self.scheduler.settle()
        self.scheduler.trim()
        stats = self.scheduler.stats()
        assert (stats.committed_bytes, stats.reserved_bytes, stats.num_mappings, stats.offloaded_bytes) == (0, 0, 0, 0)
        assert (self.driver.physical_bytes(), self.driver.offloaded_bytes()) == (0, 0)


@contextmanager
def _another_thread_in(lock: Callable[[], threading.RLock]) -> Iterator[None]:
    """Somebody else holds the lock meanwhile."""
    has_it, lets_go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock():
            has_it.set()
            assert lets_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_it.wait(60)
    try:
        yield
    finally:
        lets_go.set()
        thread.join()


class PinningDriver(FailingDriver):
    """What sleeps on it cannot be mapped."""

    has_pins = True


class PinnedTiersMachine(TiersMachine):
    """As on a GPU."""

    make_driver = PinningDriver


TestTiersMachine = pytest.mark.slow(TiersMachine.TestCase)
TestPinnedTiersMachine = pytest.mark.slow(PinnedTiersMachine.TestCase)
