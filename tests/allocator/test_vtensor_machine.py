"""VTensors under random operations, against torch clones: contents, views, addresses, and every byte counted."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted_drivers import OFFLOAD_FOLDER, PAGE
from strategies import TensorSpec, budgets, row_counts, tensor_specs
from vtensors import Clock

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool, Tier
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import CapacityError, OutOfPagesError

_MOST_TENSORS = 6


@dataclass
class Modelled:
    """A VTensor, all rows that were written to it, and where its memory was last seen."""

    vtensor: VTensor
    spec: TensorSpec
    rows: torch.Tensor
    first_row: int = 0  # as asked of drop_head: the tensor may keep earlier rows, down to a page's edge
    most_rows: int = 0  # written at this address: only writing below may move the tensor

    @property
    def axis(self) -> int:
        return len(self.spec.outer_shape)

    def expected(self, first_row: int) -> torch.Tensor:
        return self.rows.narrow(self.axis, first_row, self.rows.shape[self.axis] - first_row)


class VTensorMachine(RuleBasedStateMachine):
    """The model: a clone of the rows. Sharing, pages and addresses must not show in it."""

    @initialize(budget_bytes=budgets(PAGE), idle_pages=st.sampled_from([0, 10, 10_000]))
    def make_scheduler(self, budget_bytes: int | None, idle_pages: int) -> None:
        self.driver = HostDriver(PAGE, OFFLOAD_FOLDER)
        self.clock = Clock()
        self.scheduler = GrowthScheduler(PagePool(self.driver, budget_bytes), idle_pages * PAGE, clock=self.clock)
        self.tensors: list[Modelled] = []
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.seed = 0

    def pick(self, data: st.DataObject) -> Modelled:
        return self.tensors[data.draw(st.sampled_from(range(len(self.tensors))))]

    def memory_really_was_short(self, error: OutOfPagesError) -> None:
        stats = self.scheduler.stats()
        assert stats.budget_bytes is not None
        assert stats.live_bytes + error.asked_bytes > stats.budget_bytes

    @precondition(lambda self: len(self.tensors) < _MOST_TENSORS)
    @rule(data=st.data(), spec=tensor_specs())
    def make(self, data: st.DataObject, spec: TensorSpec) -> None:
        first_rows = data.draw(row_counts(spec.capacity))
        vtensor = VTensor(
            spec.row_shape,
            capacity=spec.capacity,
            dtype=spec.dtype,
            outer_shape=spec.outer_shape,
            first_rows=first_rows,
            scheduler=self.scheduler,
        )
        self.tensors.append(Modelled(vtensor, spec, spec.rows(0, 0)))
        self.append_to(self.tensors[-1], first_rows)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        it = self.pick(data)
        self.append_to(it, data.draw(row_counts(it.vtensor.capacity - it.vtensor.length + 1)))

    def append_to(self, it: Modelled, num_rows: int) -> None:
        self.seed += 1
        room = it.vtensor.capacity - it.vtensor.length
        new = it.spec.rows(num_rows, self.seed)
        address, start = it.vtensor.data_ptr, it.vtensor.length
        try:
            result = it.vtensor.append(new)
        except CapacityError:
            assert new.shape[it.axis] > room
        except OutOfPagesError as error:
            self.memory_really_was_short(error)
        else:
            assert new.shape[it.axis] <= room
            it.rows = torch.cat([it.rows, new], it.axis)
            assert torch.equal(result, it.expected(it.vtensor.first_row))
        if it.vtensor.data_ptr == address:
            it.most_rows = max(it.most_rows, it.vtensor.length)
        else:
            assert start < it.most_rows, "the address moved though no written row was written again"
            it.most_rows = it.vtensor.length

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), write_again=st.booleans())
    def truncate(self, data: st.DataObject, write_again: bool) -> None:
        self.truncate_one(self.pick(data), data, write_again)

    def truncate_one(self, it: Modelled, data: st.DataObject, write_again: bool) -> None:
        length = it.vtensor.first_row + data.draw(row_counts(it.vtensor.length - it.vtensor.first_row))
        it.vtensor.truncate(length)
        it.rows = it.rows.narrow(it.axis, 0, length)
        it.first_row = min(it.first_row, length)
        if write_again:
            self.append_to(it, data.draw(row_counts(it.vtensor.capacity - length)))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def drop_head(self, data: st.DataObject) -> None:
        it = self.pick(data)
        first_row = data.draw(row_counts(it.vtensor.length))
        it.vtensor.drop_head(first_row)
        it.first_row = max(it.first_row, first_row)

    @precondition(lambda self: 0 < len(self.tensors) < _MOST_TENSORS)
    @rule(data=st.data(), write_again=st.sampled_from(["source", "fork", "none"]))
    def fork(self, data: st.DataObject, write_again: str) -> None:
        it = self.pick(data)
        select = None
        if it.spec.outer_shape and data.draw(st.booleans()):
            select = data.draw(st.lists(st.sampled_from(range(it.spec.outer_shape[0])), min_size=1, max_size=4))
        share_rows = data.draw(st.none() | row_counts(it.vtensor.length))
        capacity = data.draw(st.sampled_from([None, max(it.vtensor.length, 1), 2 * it.spec.capacity]))
        try:
            forked = it.vtensor.fork(select, capacity=capacity, share_rows=share_rows)
        except OutOfPagesError as error:
            self.memory_really_was_short(error)
            return
        rows = it.rows.clone() if select is None else it.rows[select]
        outer_shape = tuple(rows.shape[: it.axis])
        spec = TensorSpec(it.spec.row_shape, outer_shape, it.spec.dtype, forked.capacity)
        assert forked.capacity == (capacity or it.vtensor.capacity)
        self.tensors.append(Modelled(forked, spec, rows, it.first_row, forked.length))
        if write_again != "none":
            self.truncate_one(it if write_again == "source" else self.tensors[-1], data, True)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), what=st.sampled_from(["whole", "whole", "part", "drop"]))
    def view(self, data: st.DataObject, what: str) -> None:
        if what == "drop":
            del self.views[: data.draw(st.sampled_from([1, 2, 100]))]
            return
        view = self.pick(data).vtensor.tensor()
        if what == "part" and view.numel():
            view = view.flatten()[1::2] if view.is_contiguous() else view[..., :1]
        self.views.append((view, view.clone()))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), explicit=st.booleans())
    def close(self, data: st.DataObject, explicit: bool) -> None:
        it = self.tensors.pop(data.draw(st.sampled_from(range(len(self.tensors)))))
        if explicit:
            it.vtensor.close()

    @rule(data=st.data(), what=st.sampled_from(["trim", "budget", "commit", "commit ahead"]))
    def memory(self, data: st.DataObject, what: str) -> None:
        if what == "trim":
            self.scheduler.settle()
            self.scheduler.trim()
            stats = self.scheduler.stats()
            assert (stats.parked_bytes, stats.pooled_bytes) == (0, 0)
            assert self.driver.physical_bytes() == stats.live_bytes
        elif what == "budget":
            self.scheduler.pool.budget_bytes = data.draw(budgets(PAGE))
        elif self.tensors:
            self.commit(self.pick(data), data, what)

    @rule()
    def load_drops(self) -> None:
        self.clock.drop_load(self.scheduler)

    def commit(self, it: Modelled, data: st.DataObject, what: str) -> None:
        vtensor, address = it.vtensor, it.vtensor.data_ptr
        try:
            rows = data.draw(row_counts(vtensor.capacity))
            if what == "commit":
                vtensor.commit(rows)
                assert vtensor.committed >= rows
            else:
                vtensor.commit_ahead(rows)
        except OutOfPagesError as error:
            self.memory_really_was_short(error)
        assert vtensor.data_ptr == address

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), when_needed=st.booleans())
    def offload(self, data: st.DataObject, when_needed: bool) -> None:
        vtensor = self.pick(data).vtensor
        address = vtensor.data_ptr
        vtensor.offload(when_needed=when_needed)
        assert vtensor.is_idle
        assert vtensor.data_ptr == address

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        vtensor = self.pick(data).vtensor
        try:
            vtensor.prefetch()
        except OutOfPagesError as error:
            self.memory_really_was_short(error)
        else:
            others = [it for it in self.scheduler.pool.ranges.values() if it is not vtensor._range and not it.is_idle]
            used = {page for range_ in others for page in range_.pages}
            assert all(page in used for page in vtensor._range.pages if page.is_outside), "nobody else uses it there"

    @precondition(lambda self: self.tensors)
    @rule()
    def sleep_and_wake(self) -> None:
        self.scheduler.sleep()
        assert self.scheduler.stats().committed_bytes == 0
        assert self.driver.physical_bytes() == 0
        assert all(it.vtensor.is_asleep == (it.vtensor.num_pages > 0) for it in self.tensors)
        budget_bytes = self.scheduler.pool.budget_bytes
        try:
            self.scheduler.wake()
        except OutOfPagesError as error:  # the budget was lowered since
            self.memory_really_was_short(error)
            self.scheduler.pool.budget_bytes = None
            self.scheduler.wake()
            self.scheduler.pool.budget_bytes = budget_bytes

    @invariant()
    def every_tensor_holds_its_rows(self) -> None:
        for it in self.tensors:
            assert it.vtensor.length == it.rows.shape[it.axis]
            first_row = it.vtensor.first_row
            assert first_row <= it.first_row
            assert first_row <= it.vtensor.length <= it.vtensor.committed
            assert torch.equal(it.vtensor.tensor(), it.expected(first_row))

    @invariant()
    def no_view_ever_changes(self) -> None:
        for view, expected in self.views:
            assert torch.equal(view, expected)

    @invariant()
    def every_byte_is_counted_once(self) -> None:
        self.scheduler.reap()
        self.scheduler.settle()
        self.scheduler.pool.check_integrity()
        stats = self.scheduler.stats()
        parts = (stats.live_bytes, stats.parked_bytes, stats.pooled_bytes, stats.torch_bytes)
        assert min(parts) >= 0
        assert sum(parts) == stats.committed_bytes == self.driver.physical_bytes()
        uses = Counter(page for it in self.tensors for page in it.vtensor._range.pages)
        live_bytes = sum(page.nbytes for page in uses if page.tier is Tier.DEVICE)
        shared_bytes = sum(page.nbytes for page, num_uses in uses.items() if num_uses > 1 and page.tier is Tier.DEVICE)
        offloaded_bytes = sum(page.nbytes for page in uses if page.is_outside)
        assert stats.offloaded_bytes >= offloaded_bytes
        assert self.views or stats.offloaded_bytes == offloaded_bytes
        # Views of closed tensors, and of addresses left behind, hold more.
        assert stats.live_bytes >= live_bytes
        assert stats.shared_bytes >= shared_bytes
        assert self.views or (stats.live_bytes, stats.shared_bytes) == (live_bytes, shared_bytes)
        for it in self.tensors:
            it.vtensor._range.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.tensors.clear()
        self.views.clear()
        self.scheduler.settle()
        self.scheduler.trim()
        stats = self.scheduler.stats()
        assert (stats.committed_bytes, stats.reserved_bytes, self.driver.physical_bytes()) == (0, 0, 0)


TestVTensorMachine = pytest.mark.slow(VTensorMachine.TestCase)
