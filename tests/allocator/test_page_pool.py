"""PagePool: every byte counted, shared by count, within the budget, and given back."""

import mmap
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scripted_drivers import PAGE, FailingDriver
from strategies import budgets, page_requests

from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import Page, PagePool
from torch_vtensor.errors import DriverError, OutOfPagesError, VTensorError

SIZES = HostDriver(PAGE).page_sizes


class PagePoolMachine(RuleBasedStateMachine):
    """The model: how many references each page has. What is not referenced can always be had again."""

    @initialize(budget_bytes=budgets(PAGE))
    def make(self, budget_bytes: int | None) -> None:
        self.driver = HostDriver(PAGE)
        self.pool = PagePool(self.driver, budget_bytes)
        self.refs: Counter[Page] = Counter()

    @property
    def live_bytes(self) -> int:
        return sum(page.nbytes for page in self.refs)

    @rule(sizes=page_requests(SIZES))
    def acquire(self, sizes: list[int]) -> None:
        budget = self.pool.budget_bytes
        fits = budget is None or not sizes or self.live_bytes + sum(sizes) <= budget
        if not fits:
            with pytest.raises(OutOfPagesError) as caught:
                self.pool.acquire(sizes)
            assert (caught.value.asked_bytes, caught.value.budget_bytes) == (sum(sizes), budget)
            assert caught.value.committed_bytes == self.pool.ledger.committed_bytes
            return
        pages = self.pool.acquire(sizes)
        assert [page.nbytes for page in pages] == sizes
        assert not self.refs.keys() & set(pages)
        self.refs.update(pages)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.some_pages()), max_size=4)) if self.refs else []
        self.pool.share(chosen)
        self.refs.update(chosen)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.some_pages()), max_size=8)) if self.refs else []
        chosen = list((Counter(chosen) & self.refs).elements())
        self.pool.drop(chosen)
        self.refs -= Counter(chosen)

    @rule(keep_bytes=st.sampled_from([0, 1, PAGE, 10 * PAGE]))
    def trim(self, keep_bytes: int) -> None:
        committed, pooled = self.pool.ledger.committed_bytes, self.pool.ledger.free_bytes
        freed = self.pool.trim(keep_bytes)
        assert self.pool.ledger.free_bytes <= keep_bytes
        assert freed == committed - self.pool.ledger.committed_bytes == pooled - self.pool.ledger.free_bytes

    @rule(budget_bytes=budgets(PAGE))
    def set_budget(self, budget_bytes: int | None) -> None:
        self.pool.budget_bytes = budget_bytes

    @invariant()
    def every_byte_is_counted_once(self) -> None:
        self.pool.check_integrity()
        assert self.pool.live_pages() == self.refs.keys()
        assert {page: page.num_refs for page in self.refs} == self.refs
        assert self.pool.ledger.committed_bytes == self.live_bytes + self.pool.ledger.free_bytes
        assert self.driver.physical_bytes() == self.pool.ledger.committed_bytes

    @invariant()
    def no_two_pages_overlap(self) -> None:
        extents = sorted((page.handle, page.nbytes) for page in self.refs)
        for (handle, nbytes), (following, _) in pairwise(extents):
            assert handle + nbytes <= following

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.drop(self.refs.elements())
            self.pool.trim()
            assert (self.pool.ledger.committed_bytes, self.driver.physical_bytes()) == (0, 0)

    def some_pages(self) -> list[Page]:
        return sorted(self.refs, key=lambda page: page.handle)


TestPagePoolMachine = PagePoolMachine.TestCase


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, 4 * PAGE - 1, 16 * PAGE, 37 * PAGE + 5])
def test_a_plan_covers_what_is_asked_and_less_than_a_page_more(nbytes: int) -> None:
    plan = PagePool(HostDriver(PAGE)).page_plan(nbytes)
    assert 0 <= sum(plan) - nbytes < PAGE
    assert sorted(plan, reverse=True) == plan
    assert len(plan) <= nbytes // SIZES[-1] + 3 + 3 + 1  # large pages for the bulk


def test_a_dropped_page_is_had_again_without_a_driver_call() -> None:
    pool = PagePool(HostDriver(PAGE))
    pages = pool.acquire([PAGE, PAGE, SIZES[1]])
    handles = {page.handle for page in pages}
    pool.drop(pages)
    calls = pool.driver.stats()["create"].count
    again = pool.acquire([SIZES[1], PAGE, PAGE])
    assert {page.handle for page in again} == handles
    assert pool.driver.stats()["create"].count == calls
    assert "destroy" not in pool.driver.stats()


def test_out_of_pages_is_torchs_out_of_memory_and_says_what_to_do() -> None:
    pool = PagePool(HostDriver(1024 * 1024), 5 * 1024 * 1024)
    kept = pool.acquire([1024 * 1024] * 2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pool.acquire([4 * 1024 * 1024])
    error = caught.value
    assert isinstance(error, OutOfPagesError)
    assert isinstance(error, VTensorError)
    mib = 2**20
    assert (error.asked_bytes, error.committed_bytes, error.budget_bytes) == (4 * mib, 2 * mib, 5 * mib)
    assert not error.is_device_full
    for part in ("cpu", "4.00 MiB", "2.00 MiB", "5.00 MiB", "trim()", "sleep()", "TORCH_VTENSOR_BUDGET_BYTES"):
        assert part in str(error)
    pool.budget_bytes = 6 * mib
    assert len(pool.acquire([4 * mib])) == 1
    assert pool.live_pages() > set(kept)


def test_reclaimers_are_asked_before_giving_up_and_not_before_it_is_needed() -> None:
    pool = PagePool(HostDriver(PAGE), 4 * PAGE)
    parked, asked = pool.acquire([PAGE] * 3), []

    def reclaim(nbytes: int) -> None:
        asked.append(nbytes)
        pool.drop(parked)
        parked.clear()

    pool.reclaimers.append(reclaim)
    pool.acquire([PAGE])
    assert asked == []
    created = pool.driver.stats()["create"].count
    pool.acquire([PAGE, PAGE])
    assert asked == [2 * PAGE]
    assert pool.driver.stats()["create"].count == created  # the reclaimed pages themselves, not destroyed and made anew
    with pytest.raises(OutOfPagesError):
        pool.acquire([PAGE] * 2)


def test_a_device_that_is_full_is_asked_again_after_reclaiming() -> None:
    pool = PagePool(FailingDriver(fail_at=1, code="ENOMEM"))
    pool.drop(pool.acquire([SIZES[1]]))
    (page,) = pool.acquire([PAGE])
    assert pool.live_pages() == {page}
    assert pool.driver.inner.calls == ["create", "create", "destroy", "create"]
    pool.check_integrity()


@pytest.mark.parametrize("budget_bytes", [None, 2**30])
def test_a_device_that_stays_full_is_named_as_the_limit(budget_bytes: int | None) -> None:
    pool = PagePool(FailingDriver(fail_at=1, num_failures=99, code="ENOMEM"), budget_bytes)
    pool.acquire([PAGE])
    with pytest.raises(OutOfPagesError, match="the device has no more") as caught:
        pool.acquire([PAGE, PAGE])
    error = caught.value
    assert (error.asked_bytes, error.committed_bytes, error.budget_bytes) == (2 * PAGE, PAGE, budget_bytes)
    assert error.is_device_full
    assert ("of a budget of 1,024.00 MiB" in str(error)) == (budget_bytes is not None)
    assert "raise the budget" not in str(error), "which cannot help"
    assert "trim()" in str(error)
    assert isinstance(error.__cause__, DriverError)
    pool.check_integrity()


def test_a_lowered_budget_takes_back_what_is_pooled_first() -> None:
    pool = PagePool(HostDriver(PAGE), 40 * PAGE)
    kept = pool.acquire([PAGE] * 10)
    pool.drop(pool.acquire([PAGE] * 30))
    pool.budget_bytes = 11 * PAGE
    pool.acquire([PAGE])
    with pytest.raises(OutOfPagesError):
        pool.acquire([PAGE])
    pool.budget_bytes = 5 * PAGE
    assert set(kept) <= pool.live_pages()
    pool.check_integrity()


def test_after_lowering_the_budget_pages_of_other_sizes_make_room() -> None:
    pool = PagePool(HostDriver(PAGE), 40 * PAGE)
    pool.acquire([SIZES[1]])
    pool.drop(pool.acquire([SIZES[1]] * 8))
    pool.budget_bytes = 5 * PAGE  # 31 pages must go before the next one fits
    pool.acquire([PAGE])
    assert pool.driver.inner.physical_bytes() == 5 * PAGE


@pytest.mark.parametrize("page_bytes", [0, -1, mmap.PAGESIZE - 1, mmap.PAGESIZE + 1, 3 * mmap.PAGESIZE])
def test_a_page_that_the_system_cannot_map_is_refused(page_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"page_bytes is {page_bytes}: it must be a power of two"):
        HostDriver(page_bytes)
