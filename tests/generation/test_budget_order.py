"""What goes first when memory is short, end to end: each is spared for as long as something before it is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from paged_memory import PAGE_BYTES, Memory
from serving_models import WHY_SKIPPED, Served, alone, config_of, counted, model_to_serve, prompts, uncompiled

import torch_vtensor
from torch_vtensor import Session, VTensor
from torch_vtensor.allocator.pools import default_scheduler, set_default_budget

CPU = torch.device("cpu")
ANSWER = 60


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from uncompiled(monkeypatch)


@pytest.mark.skipif(WHY_SKIPPED is not None, reason=str(WHY_SKIPPED))
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_parked_then_prefixes_then_idle_then_preemption_and_only_then_an_error_for_the_newcomer(memory: Memory) -> None:
    model, scheduler = model_to_serve("llama"), default_scheduler(CPU)
    first, second, kept, newcomer = prompts(40, 45, 90, 900, seed=5)
    expected = [alone("llama", prompt, ANSWER) for prompt in (first, second)]
    parked = VTensor((PAGE_BYTES,), capacity=10, dtype=torch.uint8)
    parked.append(torch.ones(6, PAGE_BYTES, dtype=torch.uint8))
    with torch.no_grad():
        idle = Session(model)
        idle.generate(kept, max_new_tokens=4, do_sample=False)
        torch_vtensor.enable(prefix_cache=True)
        model.generate(torch.tensor([kept[::-1]]), max_new_tokens=1, do_sample=False)
        idle.offload(when_needed=True)
        served = Served(model, generation_config=config_of(max_new_tokens=ANSWER))
        parked.close()
        memory.settle()
        grows = VTensor((PAGE_BYTES,), capacity=1000, dtype=torch.uint8, adopt=False)
        row = torch.ones(1, PAGE_BYTES, dtype=torch.uint8)

        def left() -> tuple[bool, bool, bool]:
            """Whether there are parked ranges, prefixes that nobody uses, and the idle session's rows on the device."""
            stats = scheduler.stats()
            return stats.parked_bytes > 0, stats.prefix_bytes > 0, idle.memory().offloaded_bytes == 0

        assert left() == (True, True, True)
        set_default_budget(scheduler.stats().committed_bytes + PAGE_BYTES)
        seen = [left()]
        while all(left()) or any(left()):
            grows.append(row)
            seen += [left()] if left() != seen[-1] else []
        assert seen == [(True, True, True), (False, True, True), (False, False, True), (False, False, False)]

        # Two requests for whom there is room while their answers are short.
        held = scheduler.stats().committed_bytes - scheduler.stats().pooled_bytes
        set_default_budget(held + 24 * PAGE_BYTES)
        for request_id, prompt in (("first", first), ("second", second)):
            served.manager.add_request(prompt, request_id=request_id)
        while counted("gave way") == 0:
            served.round()
            assert not served.outputs, "somebody had ended before anybody had to give way"
        assert [request.state.request_id for request in served.engine.queues.active] == ["first"], (
            "the newest gives way"
        )
        served.manager.add_request(newcomer, request_id="newcomer")
        answers = served.run()
        assert "newcomer" in answers
        assert "pages" in answers["newcomer"].error
        assert [answers[name].generated_tokens for name in ("first", "second")] == expected
        served.close()
        grows.close()
        set_default_budget(None)
        assert idle.generate([5], max_new_tokens=2, do_sample=False)
        idle.close()
