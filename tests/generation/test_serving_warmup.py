"""warmup(): what is compiled and captured before the first request, by whom, and that nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from serving_models import IN_ONE_LAYOUT, Served, alone, batching, config_of, counted, model_to_serve, prompts

import torch_vtensor
from torch_vtensor.generation import shared_reads
from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.serving.program import ServingProgram
from torch_vtensor.generation.serving.prompts import PromptShape

pytestmark = IN_ONE_LAYOUT
COMPILE_STEP = graphs.compile_step


class Event(NamedTuple):
    """A graph that was captured, or prompts that were run; by which thread."""

    what: str
    thread: int


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    seen: list[Event] = []

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(Event(what, threading.get_ident()))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(graphs, "capture", noted("capture", graphs.capture))
    monkeypatch.setattr(ServingProgram, "run_prompts", noted("prompts", ServingProgram.run_prompts))
    return seen


def answers(manager: Any, num_answers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < num_answers:
        output = manager.get_result(timeout=60)
        assert output is not None
        found |= {output.request_id: output} if output.is_finished() else {}
    return found


@pytest.mark.parametrize("reuses_prefixes", [False, True])
def test_nothing_is_captured_once_requests_come(
    reuses_prefixes: bool, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    model, (stem, *asked) = model_to_serve("llama"), prompts(150, 9, 30, 200, 70)
    asked += [stem + tail for tail in asked]
    with torch_vtensor.enabled(compile=True, prefix_cache=reuses_prefixes):
        manager = model.init_continuous_batching(config_of(), batching(max_requests_per_batch=6))
        manager.warmup()
        assert manager.warmed_up
        manager.start()
        for index, prompt in enumerate(asked):
            manager.add_request(prompt, request_id=str(index))
        outputs = answers(manager, len(asked))
        thread = manager._generation_thread.ident
        manager.stop()
    assert [outputs[str(index)].generated_tokens for index in range(8)] == [
        alone("llama", prompt, 8) for prompt in asked
    ]
    kinds = [event.what for event in events]
    assert set(kinds[: kinds.index("prompts")]) == {"capture"}
    assert "capture" not in kinds[kinds.index("prompts") :]
    assert {event.thread for event in events} == {thread}, "the manager's own"
    assert (counted("steps that read shared tokens once") > 0) == reuses_prefixes


def test_batches_of_all_sizes_are_compiled_once_whatever_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    monkeypatch.setattr(graphs, "compile_step", COMPILE_STEP)
    compiled: list[str] = []

    def compile_fx(graph_module: Any, inputs: Any) -> Any:
        compiled.append("of any batch" if any(isinstance(each, torch.SymInt) for each in inputs) else "of one")
        return graph_module

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, (stem, *asked) = model_to_serve("llama"), prompts(150, 9, 30, 20, 70, 40)
    asked += [stem + tail for tail in asked]
    with torch_vtensor.enabled(compile=True, prefix_cache=True):
        for batch in (asked[:2], asked, asked[4:]):
            outputs = model.generate_batch(batch, generation_config=config_of())
            found = [output.generated_tokens for output in outputs.values()]
            assert found == [alone("llama", prompt, 8) for prompt in batch]
    torch._dynamo.reset()
    assert counted("steps that read shared tokens once") > 0
    assert counted("uncompiled: the model's step cannot be compiled") == 0
    assert compiled.count("of any batch") == 3
    assert compiled.count("of one") == 3


def test_a_running_manager_warms_up_while_it_is_waited_for(events: list[Event]) -> None:
    model, (prompt, other) = model_to_serve("llama"), prompts(40, 200)
    with torch_vtensor.enabled(compile=True):
        manager = model.init_continuous_batching(config_of(max_new_tokens=150), batching(max_requests_per_batch=2))
        manager.start()
        manager.add_request(prompt, request_id="before", streaming=True)
        while not manager.get_result(timeout=60).generated_tokens:
            pass
        manager.warmup()
        num_captured = len([event for event in events if event.what == "capture"])
        manager.add_request(other, request_id="after", max_new_tokens=8)
        outputs = answers(manager, 2)
        manager.stop()
    assert len([event for event in events if event.what == "capture"]) == num_captured
    assert threading.get_ident() not in {event.thread for event in events}
    assert outputs["before"].generated_tokens == alone("llama", prompt, 150)
    assert outputs["after"].generated_tokens == alone("llama", other, 8)


def test_a_batch_warms_up_for_what_it_surely_needs(events: list[Event]) -> None:
    model = model_to_serve("llama")
    with torch_vtensor.enabled(compile=True):
        model.generate_batch(prompts(200, 201, 202), generation_config=config_of())
        kinds = [event.what for event in events]
        assert kinds[:3] == ["capture"] * 3, "what takes up so many tokens, a step of up to four and its choice"
        assert kinds[3] == "prompts"
        events.clear()
        model.generate_batch(prompts(200, 201, 202, seed=1), generation_config=config_of())
        assert "capture" not in [event.what for event in events]


def test_one_that_is_not_captured_has_nothing_to_warm_up(events: list[Event]) -> None:
    model = model_to_serve("llama")
    with torch_vtensor.enabled():
        manager = model.init_continuous_batching(config_of())
        manager.warmup()
        assert manager.warmed_up
        manager.start()
        manager.add_request(prompts(9)[0], request_id="one")
        assert answers(manager, 1)["one"].generated_tokens == alone("llama", prompts(9)[0], 8)
        manager.warmup()
        manager.stop()
        manager.warmup()  # does not wait for who has ended
    assert "capture" not in [event.what for event in events]


def test_a_shape_that_cannot_be_captured_does_not_end_the_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_to_serve("llama"), prompts(40, 200)
    capture = ServingProgram._capture_prompts

    def fail(self: Any, shape: PromptShape) -> None:
        if shape.num_places > 1 or shape.size == 64:
            raise ValueError("no code for this")
        capture(self, shape)

    monkeypatch.setattr(ServingProgram, "_capture_prompts", fail)
    with torch_vtensor.enabled(compile=True):
        served = Served(model, generation_config=config_of(), continuous_batching_config=batching())
        served.manager._warmups.put(threading.Event())
        ids = served.manager.add_requests(asked)
        outputs = served.run()
        served.close()
    assert counted("uncompiled: the model's step cannot be compiled") > 1
    for request_id, prompt in zip(ids, asked, strict=True):
        assert outputs[request_id].generated_tokens == alone("llama", prompt, 8)


@pytest.mark.parametrize("is_captured", [False, True])
def test_other_threads_random_numbers_are_their_own(is_captured: bool) -> None:
    """What a manager draws, and what it rehearses, changes nothing of torch's own generator."""
    model, asked = model_to_serve("llama"), prompts(20, 30)
    config = config_of(do_sample=True, top_k=0)
    drawn = []
    with torch_vtensor.enabled(compile=is_captured):
        for seed in (5, 5, 6):
            before = torch.get_rng_state()
            found = model.generate_batch(
                asked, generation_config=config, continuous_batching_config=batching(seed=seed)
            )
            assert torch.equal(torch.get_rng_state(), before)
            drawn.append([output.generated_tokens for output in found.values()])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_stopping_takes_no_longer_than_the_last_round() -> None:
    """It does not collect garbage, and an idle loop is told."""
    import gc

    model = model_to_serve("llama")
    collected: list[Any] = []
    with torch_vtensor.enabled():
        manager = model.init_continuous_batching(config_of())
        manager.start()
        manager.add_request(prompts(9)[0], request_id="one")
        answers(manager, 1)

        def note(phase: str, info: dict[str, int]) -> None:
            collected.append(info["generation"])

        gc.callbacks.append(note)
        try:
            manager.stop()
        finally:
            gc.callbacks.remove(note)
        assert not manager.is_running()
        assert 2 not in collected
