"""The ledger: budget, charges and pooled pages, against a plain-Python model."""

import threading
from collections import defaultdict

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torch_vtensor.allocator import ledger as ledger_module
from torch_vtensor.allocator import native
from torch_vtensor.allocator.ledger import Ledger, LedgerCounts, Take
from torch_vtensor.errors import ClosedError

SIZES = st.sampled_from([4096, 65536, 3 * 65536])


class LedgerMachine(RuleBasedStateMachine):
    """Takes, creates, pools, pops and destroys pages in any order; the model keeps plain lists of handles."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.budget: int | None = None
        self.out: list[tuple[int, int]] = []
        self.free: dict[int, list[int]] = defaultdict(list)
        self.unwanted: dict[int, int] = defaultdict(int)  # pages, by size
        self.next_handle = 1

    def committed(self) -> int:
        return self.used() + self.free_bytes()

    def used(self) -> int:
        return sum(nbytes for _, nbytes in self.out)

    def free_bytes(self) -> int:
        return sum(nbytes * len(handles) for nbytes, handles in self.free.items())

    @rule(nbytes=SIZES, creation_fails=st.booleans())
    def take(self, nbytes: int, creation_fails: bool) -> None:
        counted = self.used() if self.free[nbytes] else self.committed()
        taken = self.ledger.take(nbytes)
        if self.budget is not None and counted + nbytes > self.budget:
            assert taken is Take.OVER_BUDGET
        elif self.free[nbytes]:
            assert taken == self.unpool(nbytes), "the page pooled last is reused first"
            self.out.append((taken, nbytes))
        else:
            assert taken is Take.CHARGED
            if creation_fails:
                self.ledger.uncharge(nbytes)
            else:
                self.out.append((2**63 + self.next_handle, nbytes))
                self.next_handle += 1

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        handle, nbytes = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.ledger.put(handle, nbytes)
        self.free[nbytes].append(handle)

    @rule(destroying_fails=st.booleans())
    def pop(self, destroying_fails: bool) -> None:
        popped = self.ledger.pop_free()
        pooled = [nbytes for nbytes, handles in self.free.items() if handles]
        if not pooled:
            assert popped is None
            return
        nbytes = max(pooled)
        assert popped == (self.unpool(nbytes), nbytes)
        self.destroy(popped, destroying_fails)

    @rule(destroying_fails=st.booleans())
    def pop_unwanted(self, destroying_fails: bool) -> None:
        popped = self.ledger.pop_unwanted()
        unwanted = [nbytes for nbytes, num_pages in self.unwanted.items() if num_pages]
        if not unwanted:
            assert popped is None
            return
        nbytes = max(unwanted)
        self.unwanted[nbytes] -= 1
        assert popped == (self.unpool(nbytes), nbytes)
        self.destroy(popped, destroying_fails)

    def unpool(self, nbytes: int) -> int:
        handle = self.free[nbytes].pop()
        self.unwanted[nbytes] = min(self.unwanted[nbytes], len(self.free[nbytes]))
        return handle

    def destroy(self, popped: tuple[int, int], fails: bool) -> None:
        handle, nbytes = popped
        assert self.ledger.committed_bytes == self.committed() + nbytes, "charged until it is destroyed"
        if fails:
            self.ledger.put(handle, nbytes)
            self.free[nbytes].append(handle)
        else:
            self.ledger.uncharge(nbytes)

    @rule()
    def watch(self) -> None:
        self.ledger.watch()
        self.unwanted.update({nbytes: len(handles) for nbytes, handles in self.free.items()})

    @rule(nbytes=SIZES, num_pages=st.integers(0, 3))
    def give_up(self, nbytes: int, num_pages: int) -> None:
        self.ledger.give_up(nbytes, num_pages)
        self.unwanted[nbytes] = min(self.unwanted[nbytes] + num_pages, len(self.free[nbytes]))

    @rule(budget=st.none() | st.integers(0, 2**20))
    def set_budget(self, budget: int | None) -> None:
        self.ledger.budget_bytes = self.budget = budget

    @invariant()
    def counts_agree(self) -> None:
        num_free = sum(map(len, self.free.values()))
        assert self.ledger.counts() == LedgerCounts(
            committed_bytes=self.committed(),
            free_bytes=self.free_bytes(),
            torch_bytes=0,
            budget_bytes=self.budget,
            num_free_pages=num_free,
            num_pages=num_free + len(self.out),
            unwanted_bytes=sum(nbytes * num_pages for nbytes, num_pages in self.unwanted.items()),
        )
        assert (self.ledger.committed_bytes, self.ledger.free_bytes) == (self.committed(), self.free_bytes())
        assert (self.ledger.budget_bytes, self.ledger.torch_bytes) == (self.budget, 0)

    def teardown(self) -> None:
        self.ledger.close()


TestLedgerMachine = LedgerMachine.TestCase


def test_budget_of_nothing_gives_nothing() -> None:
    ledger = Ledger(0)
    assert ledger.take(1) is Take.OVER_BUDGET
    assert ledger.committed_bytes == 0


def test_lowered_budget_lets_pooled_pages_be_reused_within_it() -> None:
    ledger = Ledger()
    for _ in range(5):
        assert ledger.take(10) is Take.CHARGED
    for handle in range(4):
        ledger.put(handle, 10)
    ledger.budget_bytes = 20
    assert ledger.take(10) == 3, "two pages in use are within the budget of two"
    assert ledger.take(10) is Take.OVER_BUDGET
    assert (ledger.committed_bytes, ledger.free_bytes) == (50, 30)


def test_many_pages_and_sizes_come_back_largest_first() -> None:
    ledger = Ledger()
    sizes = [64 * (1 + index % 7) for index in range(1000)]
    for handle, nbytes in enumerate(sizes):
        assert ledger.take(nbytes) is Take.CHARGED
        ledger.put(handle, nbytes)
        assert ledger.take(nbytes) == handle
    for handle, nbytes in enumerate(sizes):
        ledger.put(handle, nbytes)
    popped = [ledger.pop_free() for _ in sizes]
    assert [nbytes for _, nbytes in popped] == sorted(sizes, reverse=True)
    assert sorted(handle for handle, _ in popped) == list(range(1000))
    assert ledger.pop_free() is None


@pytest.mark.parametrize("return_page", [lambda ledger: ledger.put(7, 4096), lambda ledger: ledger.uncharge(4096)])
def test_page_that_is_not_out_cannot_come_back(return_page) -> None:
    ledger = Ledger()
    with pytest.raises(AssertionError, match="4096 bytes"):
        return_page(ledger)
    assert ledger.take(4096) is Take.CHARGED
    ledger.put(6, 4096)
    with pytest.raises(AssertionError, match="4096 bytes"):
        return_page(ledger)
    assert ledger.counts() == LedgerCounts(4096, 4096, 0, None, 1, 1, 0)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"budget_bytes is -1; .* None for no limit"):
        Ledger(-1)
    ledger = Ledger(100)
    with pytest.raises(ValueError, match="budget_bytes is 9223372036854775808"):
        ledger.budget_bytes = 2**63
    with pytest.raises(ValueError, match="nbytes is 0"):
        ledger.take(0)
    assert ledger.counts() == LedgerCounts(0, 0, 0, 100, 0, 0, 0)


def test_closed_ledger_is_refused() -> None:
    ledger = Ledger()
    ledger.close()
    ledger.close()
    for use in (
        lambda: ledger.take(1),
        lambda: ledger.put(1, 1),
        ledger.pop_free,
        ledger.pop_unwanted,
        ledger.watch,
        lambda: ledger.give_up(1, 1),
        ledger.counts,
        lambda: ledger.address,
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_threads_lose_no_page() -> None:
    ledger = Ledger(20 * 64)
    created = iter(range(10**6))
    in_use: set[int] = set()
    refusals = []

    def work() -> None:
        for _ in range(2000):
            taken = ledger.take(64)
            if taken is Take.OVER_BUDGET:
                refusals.append(taken)
                continue
            handle = next(created) if taken is Take.CHARGED else taken
            assert handle not in in_use
            in_use.add(handle)
            in_use.remove(handle)
            ledger.put(handle, 64)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = ledger.counts()
    assert counts.num_pages == counts.num_free_pages == next(created) <= 8
    assert not refusals
    assert len({ledger.pop_free() for _ in range(counts.num_pages)}) == counts.num_pages


def test_library_from_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_ABI_VERSION", 999)
    with pytest.raises(
        ImportError, match=r"has interface version \d+, this torch_vtensor needs 999.*pip install -e"
    ) as e:
        ledger_module.load_library.__wrapped__()
    assert str(native.library_path()) in str(e.value)
