"""Requests at random, of several tenants, cancelled, short of memory, on a driver that fails: all answered as alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from paged_memory import PAGE_BYTES, Memory
from serving_models import (
    READ_APART,
    WHY_SKIPPED,
    Served,
    alone,
    config_of,
    counted,
    model_to_serve,
    prompts,
    watch_shared_reads,
)
from tiny_models import SHORT_WINDOW

import torch_vtensor
from torch_vtensor.allocator import pools
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.errors import DriverError
from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.decode import graphs, program, prompt_parts
from torch_vtensor.generation.serving import support

MOST_NEW = 40
STEM = prompts(90, seed=7)[0]
PROMPTS = [STEM[:20], STEM, [*STEM, *prompts(9, seed=8)[0]], *prompts(1, 33, SHORT_WINDOW + 50, seed=9)]
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4  # of the tiny models, in all layers
SMALL_BUDGETS = (14 * PAGE_BYTES, 34 * PAGE_BYTES, 100 * PAGE_BYTES)  # a tree keeps a quarter: of the last, a stem
TENANTS = (None, "alice", "bob")


class Faults:
    """Failures of calls that take memory, when they are asked for."""

    calls = ("reserve", "create", "map", "set_access")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_fired = 0
        self._num_calls_before: int | None = None
        self._code = ""
        for name in self.calls:
            monkeypatch.setattr(HostDriver, name, self._failing(name, getattr(HostDriver, name)))

    def ask_for(self, num_calls_before: int, code: str) -> None:
        """The call after so many fails."""
        self._num_calls_before, self._code = num_calls_before, code

    def forget(self) -> None:
        self._num_calls_before = None

    def _failing(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(driver: Any, *args: Any) -> Any:
            if self._num_calls_before is not None:
                self._num_calls_before -= 1
                if self._num_calls_before < 0:
                    self._num_calls_before = None
                    self.num_fired += 1
                    raise DriverError(name, self._code, torch.device("cpu"), PAGE_BYTES, "injected")
            return method(driver, *args)

        return call


class Requests(RuleBasedStateMachine):
    """The model: what transformers' own loop answers to each prompt alone."""

    family: ClassVar[str]
    is_captured: ClassVar[bool]
    faults: ClassVar[Faults]

    @initialize(reuses_prefixes=st.booleans(), budget_bytes=st.sampled_from([None, *SMALL_BUDGETS]))
    def start(self, reuses_prefixes: bool, budget_bytes: int | None) -> None:
        torch_vtensor.enable(compile=self.is_captured, prefix_cache=reuses_prefixes)
        self.served = Served(model_to_serve(self.family), generation_config=config_of())
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.cancelled: set[str] = set()
        self.num_checked = 0
        self.faults.num_fired = 0
        self.limit(budget_bytes)

    @rule(budget_bytes=st.sampled_from([None, *SMALL_BUDGETS]))
    def limit(self, budget_bytes: int | None) -> None:
        """What is in use already may be more: it stays."""
        pools.set_default_budget(budget_bytes)
        self.budget = budget_bytes

    @rule(
        several=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(1, MOST_NEW)), min_size=1, max_size=4),
        streaming=st.booleans(),
        tenant=st.sampled_from(TENANTS),
    )
    def ask(self, several: list[tuple[list[int], int]], streaming: bool, tenant: str | None) -> None:
        for prompt, num_new in several:
            request_id = str(len(self.asked))
            self.asked[request_id] = prompt, num_new
            with torch_vtensor.prefix_salt(tenant):
                self.served.manager.add_request(
                    prompt, request_id=request_id, max_new_tokens=num_new, streaming=streaming
                )

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.asked:
            request_id = data.draw(st.sampled_from(sorted(self.asked)))
            self.cancelled.add(request_id)
            self.served.manager.cancel_request(request_id)

    @rule(num_calls_before=st.integers(0, 12), code=st.sampled_from(["EIO", "ENOMEM"]))
    def break_driver(self, num_calls_before: int, code: str) -> None:
        self.faults.ask_for(num_calls_before, code)

    @rule()
    def sleep_and_wake(self) -> None:
        self.faults.forget()
        torch_vtensor.sleep()
        self.served.round()
        pools.set_default_budget(None)  # there may be more than a budget that was set later allows
        torch_vtensor.wake()
        pools.set_default_budget(self.budget)

    @rule(num_rounds=st.integers(1, 16))
    def run_rounds(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self.served.round()

    @invariant()
    def what_is_said_is_right(self) -> None:
        for output in self.served.outputs[self.num_checked :]:
            prompt, num_new = self.asked[output.request_id]
            answered = output.generated_tokens
            assert answered == alone(self.family, prompt, MOST_NEW)[: len(answered)]
            if output.error is not None and "EIO" in output.error:
                assert self.faults.num_fired > 0
            elif output.error is not None:  # memory that is short, also by a failure, is waited for
                needed_bytes = (len(prompt) + len(answered) + 1) * TOKEN_BYTES
                assert self.budget is not None, "there was memory for it"
                assert needed_bytes + 8 * PAGE_BYTES > self.budget, output.error  # pages are not full, one is spare
            elif output.is_finished():
                assert len(answered) == num_new
        self.num_checked = len(self.served.outputs)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        engine, seats = self.served.engine.queues, self.served.engine.program.seats
        assert seats.num_taken == len(engine.seated)
        lengths = [request.rows.num_rows for request in engine.seated if request.rows is not None]
        if len(lengths) == len(engine.seated):
            assert seats.lengths.tolist() == lengths + [0] * (seats.num_seats - len(lengths))
        assert all(request.rows is not None for request in engine.active)
        assert all(request.rows is None for request in engine.waiting)
        for scheduler in pools.all_schedulers().values():
            scheduler.settle()
            scheduler.pool.check_integrity()
            for range_ in scheduler.pool.ranges.values():
                assert {page.salt for page in range_.pages} <= {range_.salt}, "a tenant can read another's memory"
                assert not any(page.is_dirty for page in range_.pages)
        for request in engine.active:
            if request.rows is not None:
                salts = {vtensor.salt for store in request.rows.stores for vtensor in store.vtensors}
                assert salts == {request.salt}
        assert counted(READ_APART) == 0, "rows that are read once are not the same"

    def teardown(self) -> None:
        if not hasattr(self, "served"):
            return
        self.faults.forget()
        outputs = self.served.run()
        self.what_is_said_is_right()
        ended = {request_id for request_id, output in outputs.items() if output.is_finished()}
        assert ended | self.cancelled == set(self.asked)
        self.served.close()
        pools.set_default_budget(None)
        torch_vtensor.disable()


@pytest.mark.skipif(WHY_SKIPPED is not None, reason=str(WHY_SKIPPED))
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize(("family", "is_captured"), [("llama", True), ("gemma3", False)])
def test_requests_at_random(family: str, is_captured: bool, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "compile_step", lambda forward, **options: forward)
    monkeypatch.setattr(prompt_parts, "compile_parts", lambda twin: None)
    monkeypatch.setattr(program, "_traced", weakref.WeakKeyDictionary())

    watch_shared_reads(monkeypatch)
    for prompt in PROMPTS:
        alone(family, prompt, MOST_NEW)  # while nothing is enabled

    class Machine(Requests):
        pass

    Machine.family, Machine.is_captured, Machine.faults = family, is_captured, Faults(monkeypatch)
    settings = hypothesis.settings(
        max_examples=12,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a step computes while it is drawn
    )
    with torch.no_grad():
        run_state_machine_as_test(Machine, settings=settings)
    support.counters.clear()
    prefix_cache.counters.clear()
