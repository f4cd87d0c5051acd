"""Continuous batching where something is short, asleep or switched off: nobody is answered wrongly, nothing crashes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_memory import Memory
from serving_models import IN_ONE_LAYOUT, Served, alone, batching, config_of, counted, model_to_serve, prompts
from transformers import GenerationConfig

import torch_vtensor
from torch_vtensor import VTensorCache
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.errors import DriverError
from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.serving import admission, known, manager
from torch_vtensor.generation.serving.engine import Engine
from torch_vtensor.generation.serving.program import Prompt, ServingProgram
from torch_vtensor.generation.serving.rows import SequenceRows
from torch_vtensor.generation.serving.step_graphs import StepGraphs

pytestmark = IN_ONE_LAYOUT


def failing(method: Callable[..., Any], fails: Callable[[int], bool], error: Exception) -> Callable[..., Any]:
    """``method``, but for calls whose number ``fails``."""
    calls: list[None] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if fails(len(calls)):
            raise error
        return method(*args, **kwargs)

    return call


# Settings


def test_without_an_end_token_answers_go_on_as_with_transformers_own(caplog: pytest.LogCaptureFixture) -> None:
    model, (prompt,) = copy.deepcopy(model_to_serve("llama")), prompts(20)
    model.config.eos_token_id = model.generation_config.eos_token_id = alone("llama", prompt, 12)[4]

    def answer(**options: Any) -> tuple[list[int], Any]:
        config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
        (output,) = model.generate_batch([prompt], generation_config=config, **options).values()
        return output.generated_tokens, config.eos_token_id

    stock = answer(continuous_batching_config=batching(num_blocks=16, max_batch_tokens=64))
    with torch_vtensor.enabled():
        assert answer() == stock == (alone("llama", prompt, 12), -1)
    assert counted("finished") == 1


def test_settings_are_kept_or_counted() -> None:
    model, asked = model_to_serve("llama"), prompts(60)
    with torch_vtensor.enabled(prefix_cache=True, compile=True):
        options = batching(use_cuda_graph=False, allow_block_sharing=False, max_requests_per_batch=10_000)
        for _ in range(2):
            model.generate_batch(asked, generation_config=config_of(), continuous_batching_config=options)
        assert torch_vtensor.stats().prefixes.get("tokens reused", 0) == 0
        served = Served(model, generation_config=config_of(), continuous_batching_config=options)
        assert not served.engine.program.is_captured
        served.close()
        assert counted("limited: max_requests_per_batch is more than 256") == 3
        with pytest.raises(ValueError, match="safety_margin is 2"):
            model.init_continuous_batching(config_of(), batching(safety_margin=2))
    with torch_vtensor.enabled():
        model.init_continuous_batching(config_of(), batching(use_cuda_graph=True))
    assert counted("not honoured: use_cuda_graph, without enable(compile=True)") == 1


def test_a_safety_margin_holds_requests_back_beside_others() -> None:
    model, asked = model_to_serve("llama"), prompts(40, 40)
    with torch_vtensor.enabled(budget_bytes=256 * 1024):
        options = batching(safety_margin=0.8)
        served = Served(model, generation_config=config_of(), continuous_batching_config=options)
        served.manager.add_requests(asked)
        served.round()
        assert len(served.engine.queues.active) == 1
        outputs = served.run()
        served.close()
    assert counted("held back: safety margin") > 0
    assert [output.error for output in outputs.values()] == [None, None]


def test_lengths_beyond_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "capacity_of", lambda *args: 64)
    model, (short, long) = model_to_serve("llama"), prompts(20, 64)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of())
        served.manager.add_request(short, request_id="endless", max_new_tokens=10**7)
        served.manager.add_request(long, request_id="long")
        outputs = served.run()
        served.close()
    assert outputs["endless"].generated_tokens == alone("llama", short, 44)
    assert outputs["endless"].error is None
    assert "64 tokens" in outputs["long"].error
    assert counted("limited: max_new_tokens is more than there are addresses for") == 1


# Order


def test_a_queue_does_not_hold_running_sequences_up() -> None:
    model, (short, long) = model_to_serve("llama"), prompts(20, 400)
    options = batching(max_batch_tokens=16, max_requests_per_batch=2)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=60), continuous_batching_config=options)
        served.manager.add_request(short, request_id="first")
        for _ in range(4):
            served.round()
        served.manager.add_request(long, request_id="long", max_new_tokens=2)
        for _ in range(4):
            served.manager.add_request(short, max_new_tokens=2)
        steps = counted("steps")
        for _ in range(12):
            served.round()
        assert counted("steps") == steps + 12
        served.close()


def test_steps_are_run_even_if_many_wait_for_their_first_token() -> None:
    model, (short, *long) = model_to_serve("llama"), prompts(20, 300, 300, 300)
    with torch_vtensor.enabled():
        options = batching(max_batch_tokens=16)
        served = Served(model, generation_config=config_of(max_new_tokens=60), continuous_batching_config=options)
        served.manager.add_request(short, request_id="first")
        for _ in range(4):
            served.round()
        served.manager.add_requests(long, max_new_tokens=2)
        steps = counted("steps")
        for _ in range(12):
            served.round()
        assert counted("steps") - steps == 3
        served.close()


# Sleep


@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("is_captured", [False, True])
def test_rounds_stop_while_memory_sleeps(discard: bool, is_captured: bool) -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30)
    torch_vtensor.enable(compile=is_captured, prefix_cache=True)
    serving = model.init_continuous_batching(generation_config=config_of(max_new_tokens=150))
    serving.start()
    for index, prompt in enumerate(asked):
        serving.add_request(prompt, request_id=str(index), streaming=True)
    while len(serving.get_result(timeout=60).generated_tokens) < 3:
        pass
    for _ in range(3):
        torch_vtensor.sleep(discard=discard)
        serving.add_request(asked[0], request_id="late", max_new_tokens=4)
        steps = counted("steps")
        threading.Event().wait(0.05)
        assert counted("steps") == steps
        torch_vtensor.wake()
        threading.Event().wait(0.02)
    outputs: dict[str, Any] = {}
    while len(outputs) < 3:
        output = serving.get_result(timeout=60)
        outputs |= {output.request_id: output} if output.is_finished() else {}
    serving.stop()
    for request_id, prompt, length in (("0", asked[0], 150), ("1", asked[1], 150), ("late", asked[0], 4)):
        assert outputs[request_id].error is None
        assert outputs[request_id].generated_tokens == alone("llama", prompt, length), request_id


def test_requests_may_be_cancelled_and_managers_stopped_while_memory_sleeps(memory: Memory) -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=50))
        served.manager.add_requests(asked)
        for _ in range(3):
            served.round()
        torch_vtensor.sleep()
        served.manager.cancel_request("req_0")
        served.round()
        assert len(served.engine.queues.active) == 1
        served.close()
        torch_vtensor.wake()


# Memory


@pytest.mark.parametrize("where", ["run_prompts", "first_tokens", "run_step"])
def test_a_step_without_memory_is_run_again_with_fewer(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30, 40)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
    method = failing(getattr(ServingProgram, where), lambda number: number in (2, 3), error)
    monkeypatch.setattr(ServingProgram, where, method)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=20))
        ids = served.manager.add_requests(asked)
        outputs = served.run()
        served.close()
    assert counted("out of memory") == 2
    for request_id, prompt in zip(ids, asked, strict=True):
        assert outputs[request_id].error is None
        assert outputs[request_id].generated_tokens == alone("llama", prompt, 20)


def test_only_what_finds_no_memory_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (fine, huge, also_fine) = model_to_serve("llama"), prompts(20, 90, 30)
    run_prompts = ServingProgram.run_prompts

    def run(self: Any, several: list[Prompt], *args: Any) -> None:
        if any(len(prompt.tokens) > 80 for prompt in several):
            raise torch.OutOfMemoryError("CUDA out of memory")
        run_prompts(self, several, *args)

    monkeypatch.setattr(ServingProgram, "run_prompts", run)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of())
        for request_id, prompt in (("fine", fine), ("huge", huge), ("also", also_fine)):
            served.manager.add_request(prompt, request_id=request_id)
        outputs = served.run()
        served.close()
    assert "out of memory" in outputs["huge"].error
    assert outputs["fine"].generated_tokens == alone("llama", fine, 8)
    assert outputs["also"].generated_tokens == alone("llama", also_fine, 8)


def test_a_request_alone_waits_for_memory_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (held, prompt) = model_to_serve("llama"), prompts(80, 60)
    with torch_vtensor.enabled(budget_bytes=96 * 1024):
        served = Served(model, generation_config=config_of())
        cache = VTensorCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([held]), past_key_values=cache)
        served.manager.add_request(prompt, request_id="waits")
        for _ in range(3):
            served.round()
        assert served.outputs == []
        assert served.engine.has_pending_requests()
        del cache
        outputs = served.run()
        assert outputs["waits"].generated_tokens == alone("llama", prompt, 8)
        cache = VTensorCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([held]), past_key_values=cache)
        monkeypatch.setattr(admission, "_MOST_WAIT_S", 0.0)
        served.manager.add_request(prompt, request_id="in vain")
        assert "out of pages" in served.run()["in vain"].error
        del cache
        served.close()


@pytest.mark.parametrize("num_calls_before", [0, 3])  # when the request begins, or when it goes on
def test_a_request_alone_waits_for_a_device_that_has_no_memory(
    num_calls_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a budget too: another process may hold it."""
    model, (prompt,) = model_to_serve("llama"), prompts(60)
    map_pages, refused = HostDriver.map, []

    def map_or_refuse(*args: Any) -> Any:
        num_left[0] -= 1
        if num_left[0] in (-1, -2):
            refused.append(num_left[0])
            raise DriverError("map", "ENOMEM", torch.device("cpu"), 4096)
        return map_pages(*args)

    with torch_vtensor.enabled(budget_bytes=96 * 1024):
        served = Served(model, generation_config=config_of(max_new_tokens=40))
        num_left = [num_calls_before]
        monkeypatch.setattr(HostDriver, "map", map_or_refuse)
        served.manager.add_request(prompt, request_id="waits")
        outputs = served.run()
        served.close()
    assert len(refused) == 2
    assert outputs["waits"].generated_tokens == alone("llama", prompt, 40)


def test_mappings_limit_how_many_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_to_serve("llama"), prompts(*[10] * 8)
    monkeypatch.setitem(admission.MOST_MAPPINGS, "cpu", 20)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of())
        ids = served.manager.add_requests(asked)
        served.round()
        assert 1 <= len(served.engine.queues.active) < 8
        outputs = served.run()
        served.close()
    assert counted("held back: mappings") > 0
    for request_id, prompt in zip(ids, asked, strict=True):
        assert outputs[request_id].generated_tokens == alone("llama", prompt, 8)


def test_mappings_that_run_out_are_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30)
    error = DriverError("mmap", "ENOMEM", torch.device("cpu"), 4096)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=100))
        commit = failing(SequenceRows.commit, lambda number: number in (2, 4), error)
        monkeypatch.setattr(SequenceRows, "commit", commit)
        ids = served.manager.add_requests(asked)
        outputs = served.run()
        served.close()
    for request_id, prompt in zip(ids, asked, strict=True):
        assert outputs[request_id].error is None
        assert outputs[request_id].generated_tokens == alone("llama", prompt, 100)


# Compiled steps


@pytest.mark.parametrize("is_short", [False, True])
def test_a_capture_that_fails_gives_up_one_size(is_short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only for a while if memory was short."""
    from torch_vtensor.generation.serving import program as programs

    monkeypatch.setattr(programs, "_STEPS_UNTIL_RETRIED", 3)
    model, asked = copy.deepcopy(model_to_serve("llama")), prompts(20, 30, 40)
    error: Exception = torch.OutOfMemoryError("CUDA out of memory") if is_short else ValueError("cannot")
    capture = failing(StepGraphs._capture, lambda number: number == 1, error)
    monkeypatch.setattr(StepGraphs, "_capture", capture)
    with torch_vtensor.enabled(compile=True):
        for several in (asked[:1], asked, asked[:1]):
            served = Served(model, generation_config=config_of())
            ids = served.manager.add_requests(several)
            outputs = served.run()
            for request_id, prompt in zip(ids, several, strict=True):
                assert outputs[request_id].generated_tokens == alone("llama", prompt, 8)
            captured = served.engine.program.steps.sizes
            served.close()
    assert captured == ({1, 4} if is_short else {4})
    assert counted("uncompiled: the model's step cannot be compiled") == (0 if is_short else 1)
    assert counted("uncompiled for now: out of memory") == (1 if is_short else 0)


def test_experts_that_ask_the_host_are_run_as_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels for many tokens may not be captured in every precision."""
    several: list[Any] = []

    def compile_step(forward: Any, of_any_batch: bool = False) -> Any:
        several.extend([forward] if of_any_batch else [])
        if len(several) == 1:
            return failing(forward, lambda number: True, RuntimeError("copies to the host"))
        return forward

    monkeypatch.setattr(graphs, "compile_step", compile_step)
    model, asked = copy.deepcopy(model_to_serve("mixtral")), prompts(20, 30, 40)
    with torch_vtensor.enabled(compile=True):
        served = Served(model, generation_config=config_of())
        ids = served.manager.add_requests(asked)
        outputs = served.run()
        served.close()
    assert [outputs[each].generated_tokens for each in ids] == [alone("mixtral", prompt, 8) for prompt in asked]
    assert len(several) == 2
    assert counted("uncompiled: the model's step cannot be compiled") == 0


# Prefixes


def test_requests_that_come_together_share_what_the_first_computes() -> None:
    model, (shared,) = model_to_serve("llama"), prompts(150)
    asked = [shared + tail for tail in prompts(7, 12, 9, 30, seed=2)]
    with torch_vtensor.enabled(prefix_cache=True):
        found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=30))
        assert torch_vtensor.stats().prefixes["tokens reused"] == 3 * 150
    assert [output.generated_tokens for output in found.values()] == [alone("llama", prompt, 30) for prompt in asked]
    assert counted("tokens of prompts") == 150 + 7 + 12 + 9 + 30


def test_a_manager_that_is_made_while_prefixes_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_to_serve("llama"), prompts(60, 50)
    make = Engine.__init__

    def disable_meanwhile(self: Any, *args: Any) -> None:
        make(self, *args)
        torch_vtensor.disable()

    monkeypatch.setattr(Engine, "__init__", disable_meanwhile)
    torch_vtensor.enable(prefix_cache=True)
    served = Served(model, generation_config=config_of())
    served.manager.add_requests(asked)
    served.run()
    served.close()
    assert not prefix_cache.trees_of(model)


def test_nothing_is_left_once_prefixes_are_switched_off() -> None:
    """Not even by who is just about to."""
    reuse = known.Reuse()
    reuse.switch(True)
    with reuse.lock:
        switching = threading.Thread(target=reuse.switch, args=(False,))
        switching.start()
        switching.join(timeout=0.05)
        assert reuse.is_on, "switching waits for what is being left"
    switching.join()
    assert not reuse.is_on


def test_what_was_lent_in_another_layout_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt,) = model_to_serve("llama"), prompts(60)
    with torch_vtensor.enabled(prefix_cache=True):
        first = model.generate_batch([prompt], generation_config=config_of())
        served = Served(model, generation_config=config_of())
        served.engine.known._stores = ()
        served.manager.add_request(prompt, request_id="again")
        outputs = served.run()
        served.close()
        assert torch_vtensor.stats().prefixes["tokens reused"] == 0
    assert [outputs["again"].generated_tokens] == [output.generated_tokens for output in first.values()]
