"""A prefix tree under random operations and refusals, against the tokens alone: rows, tenants, every byte counted."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted_drivers import PAGE, FailingDriver
from sequences import LANES, SALTS, check, close, expected_rows
from vtensors import Clock

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool, Tier
from torch_vtensor.allocator.prefix import Pin, PrefixTree
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError, OutOfPagesError

_CAPACITY = 120
_MOST_TENSORS = 4
_MOST_MAPPINGS = 250  # is reached at times
Tokens = tuple[int, ...]

# Long stretches in common, and partings anywhere.
_stretches = st.sampled_from([(1,) * 7, (2,) * 30, (3, 4), tuple(range(40)), (5,), ()])
_sequences = st.lists(_stretches, min_size=1, max_size=3).map(lambda parts: sum(parts, ())[:_CAPACITY])


@dataclass
class Modelled:
    """Tensors, a lane each, and what their slots were told to hold."""

    vtensors: list[VTensor]
    tokens: list[Tokens]
    paddings: list[int]
    salt: Hashable


class PrefixMachine(RuleBasedStateMachine):
    """The model: what was ever recorded, by tenant. Whatever the tree lends has to be the rows of those tokens."""

    @initialize(budget_pages=st.sampled_from([None, None, 150, 400]), max_pages=st.sampled_from([None, 60]))
    def make(self, budget_pages: int | None, max_pages: int | None) -> None:
        self.driver = FailingDriver()
        budget_bytes = None if budget_pages is None else budget_pages * PAGE
        self.clock = Clock()
        self.scheduler = GrowthScheduler(PagePool(self.driver, budget_bytes), 20 * PAGE, clock=self.clock)
        max_bytes = None if max_pages is None else max_pages * PAGE
        self.tree = PrefixTree(LANES, scheduler=self.scheduler, max_bytes=max_bytes, max_mappings=_MOST_MAPPINGS)
        self.tensors: list[Modelled] = []
        self.pins: list[tuple[Pin, Tokens, Hashable]] = []
        self.recorded: set[tuple[Tokens, Hashable]] = set()

    @contextmanager
    def may_be_refused(self) -> Iterator[None]:
        try:
            yield
        except DriverError:
            assert self.driver.refused, "nothing was refused"
            self.driver.refused.clear()
        except OutOfPagesError:
            stats = self.scheduler.stats()
            assert stats.budget_bytes is not None
        self.driver.fail_at = None

    def longest_recorded(self, tokens: Tokens, salt: Hashable) -> int:
        common = [_num_common(tokens, known) for known, of in self.recorded if of == salt]
        return max(common, default=0)

    @precondition(lambda self: len(self.tensors) < _MOST_TENSORS)
    @rule(
        tokens=st.lists(_sequences, min_size=1, max_size=3),
        salt=st.sampled_from(SALTS),
        paddings=st.sampled_from([(0, 0, 0), (0, 0, 0), (0, 3, 11), (6, 0, 0)]),
    )
    def generate(self, tokens: list[Tokens], salt: Hashable, paddings: Sequence[int]) -> None:
        paddings = list(paddings[: len(tokens)])
        length = min(min(padding + len(one) for one, padding in zip(tokens, paddings, strict=True)), _CAPACITY)
        if length <= max(paddings):
            return
        tokens = [one[: length - padding] for one, padding in zip(tokens, paddings, strict=True)]
        with self.may_be_refused():
            loan = self.tree.fork(tokens, capacity=_CAPACITY, paddings=paddings, salt=salt)
            if loan is None:
                return
            held = [one[: max(loan.num_rows - padding, 0)] for one, padding in zip(tokens, paddings, strict=True)]
            for one in held:
                assert self.longest_recorded(one, salt) == len(one), "lent what was never recorded"
            shown = [min(padding, loan.num_rows) for padding in paddings]
            self.tensors.append(Modelled(loan.vtensors, held, shown, salt))

    @precondition(lambda self: len(self.tensors) < _MOST_TENSORS)
    @rule(tokens=_sequences, num_slots=st.integers(1, 2), salt=st.sampled_from(SALTS))
    def compute(self, tokens: Tokens, num_slots: int, salt: Hashable) -> None:
        with self.may_be_refused():
            vtensors = [lane.make(num_slots, _CAPACITY, self.scheduler, salt) for lane in LANES]
            self.tensors.append(Modelled(vtensors, [()] * num_slots, [0] * num_slots, salt))
            self.extend_one(self.tensors[-1], tokens)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), more=_sequences)
    def extend(self, data: st.DataObject, more: Tokens) -> None:
        it = self.pick(data)
        with self.may_be_refused():
            self.extend_one(it, more)

    def extend_one(self, it: Modelled, more: Tokens) -> None:
        length = len(it.tokens[0]) + it.paddings[0]
        tokens = [(*one, *more)[: len(one) + _CAPACITY - length] for one in it.tokens]
        before = [vtensor.length for vtensor in it.vtensors]
        try:
            for lane, vtensor in zip(LANES, it.vtensors, strict=True):
                axis = len(lane.outer_shape)
                slots = [
                    expected_rows(lane, new, it.salt).narrow(axis, len(old), len(new) - len(old))
                    for old, new in zip(it.tokens, tokens, strict=True)
                ]
                vtensor.append(torch.stack(slots))
        except BaseException:
            for vtensor, rows in zip(it.vtensors, before, strict=True):
                vtensor.truncate(rows)
            raise
        it.tokens = tokens

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), part=st.integers(0, 4), more=_sequences)
    def rewrite(self, data: st.DataObject, part: int, more: Tokens) -> None:
        it = self.pick(data)
        length = max(max(it.paddings), it.vtensors[0].length * part // 4)
        for vtensor in it.vtensors:
            vtensor.truncate(length)
        it.tokens = [one[: length - padding] for one, padding in zip(it.tokens, it.paddings, strict=True)]
        with self.may_be_refused():
            self.extend_one(it, more)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), whole=st.booleans())
    def record(self, data: st.DataObject, whole: bool) -> None:
        it = self.pick(data)
        slot = data.draw(st.sampled_from(range(len(it.tokens))))
        tokens = it.tokens[slot] if whole else it.tokens[slot][: len(it.tokens[slot]) // 2]
        if it.paddings[slot] or not tokens:
            return
        num_known = self.tree.match(tokens, it.salt)
        assert self.tree.record(tokens, it.vtensors, slot, it.salt) == len(tokens) - num_known
        self.recorded.add((tokens, it.salt))
        assert self.tree.held_bytes <= self.tree.max_bytes or self.pins

    @precondition(lambda self: self.recorded)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        tokens, salt = data.draw(st.sampled_from(sorted(self.recorded, key=repr)))
        tokens = tokens[: self.tree.match(tokens, salt)]
        if tokens and len(self.pins) < 2:
            self.pins.append((self.tree.pin(tokens, salt), tokens, salt))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop()[0].release()

    @rule(num_pages=st.sampled_from([1, 10, 1000]))
    def evict(self, num_pages: int) -> None:
        self.tree.evict(num_pages * PAGE)

    @rule(calls_until=st.integers(0, 12))
    def refuse_soon(self, calls_until: int) -> None:
        self.driver.fail_at = len(self.driver.calls) + calls_until

    @rule()
    def load_drops(self) -> None:
        self.clock.drop_load(self.scheduler)
        self.driver.fail_at = None
        self.driver.refused.clear()

    @rule(what=st.sampled_from(["trim", "reclaim", "drop"]))
    def memory(self, what: str) -> None:
        self.driver.fail_at = None
        if what == "trim":
            self.scheduler.trim()
        elif what == "reclaim":
            self.scheduler.pool.reclaim(30 * PAGE)
        elif self.tensors:
            close(self.tensors.pop(0).vtensors)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), what=st.sampled_from(["offload", "offload when needed", "prefetch"]))
    def move(self, data: st.DataObject, what: str) -> None:
        for vtensor in self.pick(data).vtensors:
            with self.may_be_refused():
                if what == "prefetch":
                    vtensor.prefetch()
                else:
                    vtensor.offload(when_needed=what == "offload when needed")

    @rule()
    def sleep_and_wake(self) -> None:
        for step in (self.scheduler.sleep, self.scheduler.wake):
            with self.may_be_refused():
                step()
        self.scheduler.wake()  # if that was refused: there is room for what was there

    def pick(self, data: st.DataObject) -> Modelled:
        return self.tensors[data.draw(st.sampled_from(range(len(self.tensors))))]

    @invariant()
    def every_slot_holds_the_rows_of_its_tokens(self) -> None:
        for it in self.tensors:
            check(it.vtensors, it.tokens, it.salt, it.paddings)

    @invariant()
    def no_tenant_can_read_what_is_anothers(self) -> None:
        for salt, vtensor in [(it.salt, vtensor) for it in self.tensors for vtensor in it.vtensors]:
            range_ = vtensor._range
            if range_.committed_bytes:
                strips = vtensor.storage().as_strided(
                    (range_.num_strips, range_.committed_bytes), (range_.strip_bytes, 1)
                )
                foreign = (strips != 0) & ((strips - 1) // 80 != SALTS.index(salt))
                assert not foreign.any()

    @invariant()
    def what_is_pinned_is_there(self) -> None:
        for _, tokens, salt in self.pins:
            assert self.tree.explain(tokens, salt).num_cached == len(tokens)

    @invariant()
    def every_byte_is_counted_once(self) -> None:
        self.driver.fail_at, fail_at = None, self.driver.fail_at  # nothing of what follows is to be refused
        num_calls = len(self.driver.calls)
        self.scheduler.reap()
        self.scheduler.settle()
        self.scheduler.pool.check_integrity()
        self.tree.check_integrity()
        stats = self.scheduler.stats()
        parts = stats.live_bytes, stats.prefix_bytes, stats.parked_bytes, stats.pooled_bytes
        assert min(parts) >= 0
        assert sum(parts) == stats.committed_bytes == self.driver.physical_bytes()
        live = {page for it in self.tensors for vtensor in it.vtensors for page in vtensor._range.pages}
        assert stats.live_bytes == sum(page.nbytes for page in live if page.tier is Tier.DEVICE)
        assert stats.offloaded_bytes >= sum(page.nbytes for page in live if page.is_outside)
        if fail_at is not None:
            self.driver.fail_at = fail_at + len(self.driver.calls) - num_calls

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.driver.fail_at = None
        for it in self.tensors:
            close(it.vtensors)
        for pin, _, _ in self.pins:
            pin.release()
        self.tensors.clear()
        self.tree.evict()
        self.scheduler.settle()
        self.scheduler.trim()
        stats = self.scheduler.stats()
        assert (stats.committed_bytes, stats.reserved_bytes, stats.num_mappings) == (0, 0, 0)
        assert self.driver.physical_bytes() == 0


def _num_common(one: Tokens, other: Tokens) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


TestPrefixMachine = pytest.mark.slow(PrefixMachine.TestCase)
