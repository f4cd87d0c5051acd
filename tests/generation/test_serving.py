"""Continuous batching over growing memory: every request is answered as it would be alone, whoever runs beside it."""

from __future__ import annotations

import asyncio
import copy
import threading
import weakref
from typing import Any

import garbage
import pytest
import torch
from paged_memory import Memory
from serving_models import BATCHES, Served, alone, batching, config_of, counted, model_to_serve, prompts
from tiny_models import FAMILIES, SHORT_WINDOW
from transformers import GenerationMixin

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.serving import steps as steps_module
from torch_vtensor.generation.serving.engine import Engine
from torch_vtensor.generation.serving.manager import BatchingManager
from torch_vtensor.generation.serving.program import ServingProgram
from torch_vtensor.generation.serving.queues import Queues

pytestmark = BATCHES
one_layout = pytest.mark.parametrize("memory", ["token-major"], indirect=True)
COMPILE_STEP = graphs.compile_step
LENGTHS = (5, 130, 40, 1, 77, 60)


def reasons() -> dict[str, int]:
    serving = torch_vtensor.stats().serving
    return {name.removeprefix("stock: "): n for name, n in serving.items() if name.startswith("stock: ")}


def answers(outputs: dict[str, Any]) -> list[list[int]]:
    assert all(output.error is None for output in outputs.values()), outputs
    return [output.generated_tokens for output in outputs.values()]


# Answers


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(
    ("family", "memory"),
    [
        ("llama", "strips"),
        ("llama", "token-major"),
        ("qwen3", "token-major"),
        ("gemma3", "strips"),
        ("gemma3", "token-major"),
        ("gpt_oss", "token-major"),
        ("mistral-short-window", "token-major"),
        ("mixtral", "token-major"),
        ("gpt2", "token-major"),
    ],
    indirect=["memory"],
)
def test_every_request_is_answered_as_alone(family: str, is_captured: bool) -> None:
    model, asked = model_to_serve(family), prompts(*LENGTHS)
    expected = [alone(family, prompt, 12) for prompt in asked]
    with torch_vtensor.enabled(compile=is_captured):
        found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=12))
    assert answers(found) == expected
    assert reasons() == {}
    assert counted("uncompiled: the model's step cannot be compiled") == 0
    assert counted("finished") == len(asked)


@one_layout
@pytest.mark.parametrize("is_captured", [False, True])
def test_requests_join_and_leave_a_running_batch(is_captured: bool) -> None:
    """Each of its own length, some begun while others are under way; one cancelled."""
    model, asked = model_to_serve("llama"), prompts(*range(3, 60, 5))
    lengths = [2 + 7 * index % 23 for index in range(len(asked))]
    with torch_vtensor.enabled(compile=is_captured):
        served = Served(model, generation_config=config_of())
        for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
            served.manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
            served.round()
        served.manager.add_request(prompts(50, seed=9)[0], request_id="cancelled", max_new_tokens=500)
        for _ in range(3):
            served.round()
        served.manager.cancel_request("cancelled")
        outputs = served.run()
        served.close()
    assert "cancelled" not in outputs
    assert counted("cancelled") == 1
    for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
        assert outputs[str(index)].generated_tokens == alone("llama", prompt, length), index


@one_layout
@pytest.mark.parametrize("is_captured", [False, True])
def test_long_prompts_are_taken_up_in_parts_beside_running_sequences(
    is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "_PROMPT_TOKENS_BESIDE", 48)
    model, (short, long) = model_to_serve("gemma3"), prompts(9, 400)
    with torch_vtensor.enabled(compile=is_captured):
        served = Served(model, generation_config=config_of())
        served.manager.add_request(short, request_id="short", max_new_tokens=30)
        served.round()
        served.manager.add_request(long, request_id="long", max_new_tokens=6)
        for _ in range(6):
            served.round()
        (first,) = [request for request in served.engine.queues.active if request.state.request_id == "short"]
        assert first.num_known >= 6, "it was not held up"
        assert counted("tokens generated") == first.num_known, "the other has said nothing yet"
        outputs = served.run()
        served.close()
    assert outputs["short"].generated_tokens == alone("gemma3", short, 30)
    assert outputs["long"].generated_tokens == alone("gemma3", long, 6)


@one_layout
def test_streaming_ends_and_limits() -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30, 40)
    expected = [alone("llama", prompt, 12) for prompt in asked]
    end = expected[1][5]
    stop = expected[1].index(end) + 1
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=12))
        served.manager.add_request(asked[0], request_id="a", streaming=True, record_timestamps=True)
        served.manager.add_request(asked[1], request_id="b", eos_token_id=end)
        served.manager.add_request(asked[2], request_id="c", max_new_tokens=1)
        outputs = served.run()
        served.close()
    streamed = [output.generated_tokens for output in served.outputs if output.request_id == "a"]
    assert streamed == [expected[0][:length] for length in range(1, 13)]
    assert len(outputs["a"].timestamps) == 12
    assert [output.request_id for output in served.outputs].count("b") == 1
    assert outputs["b"].generated_tokens == expected[1][:stop]
    assert outputs["c"].generated_tokens == expected[2][:1]
    assert all(output.is_finished() for output in outputs.values())


@one_layout
def test_several_answers_to_one_prompt() -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(do_sample=True, top_k=1, num_return_sequences=3))
        ids = served.manager.add_requests(asked)
        outputs = served.run()
        served.close()
    assert len(outputs) == 6
    for request_id, prompt in zip(ids, asked, strict=True):
        for name in (request_id, f"{request_id}__child#0", f"{request_id}__child#1"):
            assert outputs[name].generated_tokens == alone("llama", prompt, 8)


@one_layout
def test_answers_come_to_an_event_loop() -> None:
    """As `transformers serve` asks for them."""
    model, (prompt,) = model_to_serve("llama"), prompts(20)

    async def ask() -> list[list[int]]:
        found: list[list[int]] = []
        done = asyncio.Event()

        def note(output: Any) -> None:
            found.append(output.generated_tokens)
            if output.is_finished():
                done.set()

        manager = model.init_continuous_batching(generation_config=config_of())
        manager.start()
        try:
            manager.register_result_handler("mine", note)
            manager.add_request(prompt, request_id="mine", streaming=True)
            await asyncio.wait_for(done.wait(), 60)
        finally:
            manager.stop()
        return found

    with torch_vtensor.enabled():
        found = asyncio.run(ask())
    assert found[-1] == alone("llama", prompt, 8)
    assert len(found) == 8


# Choosing tokens


@one_layout
def test_sampling() -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30)
    with torch_vtensor.enabled(compile=True):
        one_choice = config_of(do_sample=True, top_k=1, temperature=0.7)
        assert answers(model.generate_batch(asked, generation_config=one_choice)) == [
            alone("llama", prompt, 8) for prompt in asked
        ]
        torch.manual_seed(3)
        drawn = answers(model.generate_batch(asked, generation_config=config_of(do_sample=True, top_k=0)))
        torch.manual_seed(3)
        again = answers(model.generate_batch(asked, generation_config=config_of(do_sample=True, top_k=0)))
    assert drawn == again
    assert drawn != [alone("llama", prompt, 8) for prompt in asked]
    assert reasons() == {}


@one_layout
@pytest.mark.parametrize("is_captured", [False, True])
def test_numbers_of_each_requests_own(is_captured: bool) -> None:
    from transformers import ContinuousBatchingConfig

    model, asked = model_to_serve("llama"), prompts(20, 30, 40)
    batching = ContinuousBatchingConfig(per_request_processors=True)
    with torch_vtensor.enabled(compile=is_captured):
        config = config_of(do_sample=True, top_k=90)
        served = Served(model, generation_config=config, continuous_batching_config=batching)
        torch.manual_seed(1)
        for index, (prompt, top_k) in enumerate(zip(asked, (1, 90, 1), strict=True)):
            served.manager.add_request(prompt, request_id=str(index), top_k=top_k)
        served.manager.add_request(asked[0], request_id="wrong", top_k="many")
        outputs = served.run()
        served.close()
    alike = [outputs[str(index)].generated_tokens == alone("llama", asked[index], 8) for index in range(3)]
    assert alike == [True, False, True]
    assert "top_k" in outputs["wrong"].error


@pytest.mark.slow
@one_layout
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_by_inductor(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for single sequences and once for all other batches."""
    monkeypatch.setattr(graphs, "compile_step", COMPILE_STEP)
    model, asked = copy.deepcopy(model_to_serve(family)), prompts(*LENGTHS)
    with torch_vtensor.enabled(compile=True):
        for num_asked in (1, 2, 6):
            found = model.generate_batch(asked[:num_asked], generation_config=config_of())
            assert answers(found) == [alone(family, prompt, 8) for prompt in asked[:num_asked]]
    assert counted("uncompiled: the model's step cannot be compiled") == 0
    torch._dynamo.reset()


# Memory


@one_layout
@pytest.mark.parametrize("reuses_prefixes", [False, True])
def test_the_newest_gives_way_and_is_resumed(reuses_prefixes: bool, memory: Memory) -> None:
    model, asked = model_to_serve("llama"), prompts(60, 50, 40, 30)
    with torch_vtensor.enabled(budget_bytes=96 * 1024, prefix_cache=reuses_prefixes):
        served = Served(model, generation_config=config_of(max_new_tokens=50))
        served.manager.add_requests(asked)
        outputs = served.run()
        served.close()
    assert counted("gave way") > 0
    assert [outputs[f"req_{index}"].error for index in range(4)] == [None] * 4
    for index, prompt in enumerate(asked):
        assert outputs[f"req_{index}"].generated_tokens == alone("llama", prompt, 50), index


@one_layout
def test_what_could_never_fit_fails_alone() -> None:
    model, asked = model_to_serve("llama"), prompts(40, 300, 30, 20)
    with torch_vtensor.enabled(budget_bytes=96 * 1024):
        served = Served(model, generation_config=config_of())
        for index, (prompt, length) in enumerate(zip(asked, (8, 8, 500, 8), strict=True)):
            served.manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
        outputs = served.run()
        served.close()
    for index in (0, 3):
        assert outputs[str(index)].generated_tokens == alone("llama", asked[index], 8)
    assert "out of pages" in outputs["1"].error
    assert "out of pages" in outputs["2"].error
    answered = outputs["2"].generated_tokens
    assert len(answered) > 20
    assert answered == alone("llama", asked[2], len(answered)), "what it has said is there"
    assert counted("failed: OutOfPagesError") == 2


def test_windows_give_their_pages_back(memory: Memory) -> None:
    model, (prompt,) = model_to_serve("mistral-short-window"), prompts(6 * SHORT_WINDOW)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=40))
        served.manager.add_request(prompt, request_id="one")
        for _ in range(20):
            served.round()
        token_bytes = 3 * 2 * 2 * 16 * 4
        assert memory.live_bytes < (2 * SHORT_WINDOW + 6 * 64) * token_bytes
        outputs = served.run()
        served.close()
    assert outputs["one"].generated_tokens == alone("mistral-short-window", prompt, 40)


@one_layout
@pytest.mark.parametrize("is_captured", [False, True])
def test_without_requests_a_manager_keeps_what_is_its_own_and_no_more(
    memory: Memory, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_VTENSOR_IDLE_SECONDS", "0.01")
    model, asked = model_to_serve("llama"), prompts(60, 50)
    with torch_vtensor.enabled(compile=is_captured):
        served = Served(model, generation_config=config_of(max_new_tokens=20))
        own_bytes = memory.live_bytes
        for turn in range(3):
            for index, prompt in enumerate(asked):
                served.manager.add_request(prompt, request_id=f"{turn}.{index}")
            outputs = served.run()
            assert memory.live_bytes == own_bytes
            memory.wait_for_idle_memory()
            found = [outputs[f"{turn}.{index}"].generated_tokens for index in range(2)]
            assert found == [alone("llama", prompt, 20) for prompt in asked]
        served.close()


@one_layout
def test_cancelled_requests_leave_their_memory_at_once(memory: Memory) -> None:
    model = model_to_serve("llama")
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of(max_new_tokens=100))
        before = memory.live_bytes
        served.manager.add_requests(prompts(60, 50))
        for _ in range(4):
            served.round()
        assert memory.live_bytes > before
        for index in range(2):
            served.manager.cancel_request(f"req_{index}")
        served.manager.cancel_request("nobody")
        served.round()
        assert memory.live_bytes == before
        assert not served.engine.has_pending_requests()
        assert served.outputs == []
        served.close()


@one_layout
def test_prefixes_are_shared_with_generate_and_among_requests() -> None:
    model, (shared,) = model_to_serve("llama"), prompts(100)
    ids = torch.tensor([shared])
    asked = [shared + tail for tail in prompts(7, 12, seed=2)]
    with torch_vtensor.enabled(prefix_cache=True):
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config_of())
        found = answers(model.generate_batch(asked, generation_config=config_of()))
        assert torch_vtensor.stats().prefixes["tokens reused"] >= 200
        again = answers(model.generate_batch(asked, generation_config=config_of()))
        assert torch_vtensor.stats().prefixes["tokens reused"] >= 200 + 106 + 111
    assert found == again == [alone("llama", prompt, 8) for prompt in asked]


@one_layout
def test_nothing_is_kept_of_requests_that_end_after_disable(memory: Memory) -> None:
    model, asked = model_to_serve("llama"), prompts(60, 50)
    torch_vtensor.enable(prefix_cache=True)
    served = Served(model, generation_config=config_of())
    served.manager.add_requests(asked)
    served.round()
    torch_vtensor.disable()
    outputs = served.run()
    served.close()
    assert [outputs[f"req_{index}"].generated_tokens for index in range(2)] == [
        alone("llama", prompt, 8) for prompt in asked
    ]
    assert not prefix_cache.trees_of(model)


@one_layout
def test_tenants_are_kept_apart() -> None:
    model, asked = model_to_serve("llama"), prompts(100)
    with torch_vtensor.enabled(prefix_cache=True):
        for salt, expected in (("alice", 0), ("bob", 0), ("alice", 99)):
            with torch_vtensor.prefix_salt(salt):
                model.generate_batch(asked, generation_config=config_of())
            assert torch_vtensor.stats().prefixes["tokens reused"] == expected


# The seam


@one_layout
def test_managers_are_ours_while_enabled_and_exactly_stock_after() -> None:
    model = copy.deepcopy(model_to_serve("llama"))
    stock = GenerationMixin.init_continuous_batching
    with torch_vtensor.enabled():
        manager = model.init_continuous_batching(generation_config=config_of())
        assert isinstance(manager, BatchingManager)
        assert model.config._attn_implementation == "sdpa"
        found = model.generate_batch(prompts(9), generation_config=config_of(), persistent_manager=True)
        assert len(found) == 1
        assert isinstance(model._cached_continuous_batching_manager, BatchingManager)
        again = model.generate_batch(prompts(9), generation_config=config_of(), persistent_manager=True)
        assert answers(again) == answers(found)
        assert reasons() == {}
    assert GenerationMixin.init_continuous_batching is stock
    assert "init_continuous_batching" not in vars(GenerationMixin)
    assert not hasattr(model, "_cached_continuous_batching_manager")
    assert type(model.init_continuous_batching(generation_config=config_of())) is not BatchingManager


@one_layout
def test_what_is_left_to_transformers_is_counted_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import continuous_api

    model = copy.deepcopy(model_to_serve("llama"))

    def manager_of(options: dict[str, Any], batching: dict[str, Any]) -> Any:
        given = ContinuousBatchingConfig(**batching)
        return model.init_continuous_batching(config_of(**options), given)

    with torch_vtensor.enabled():
        for options, batching, reason in (
            ({}, {"num_blocks": 16}, "num_blocks"),
            ({}, {"return_logprobs": True}, "return_logprobs"),
            ({}, {"scheduler_type": "mine"}, "mine"),
            ({"repetition_penalty": 1.3}, {"drop_unsupported_processors": False}, "looks at tokens"),
        ):
            assert not isinstance(manager_of(options, batching), BatchingManager)
            assert sum(reason in each for each in reasons()) == 1, reasons()
        assert type(FAMILIES["llava"].make().init_continuous_batching(config_of())) is not BatchingManager
        assert reasons()["a model of more than text"] == 1
        assert {entry.batching for entry in torch_vtensor.explain(model)} == {"ours"}
        llava = torch_vtensor.explain(FAMILIES["llava"].make())
        assert {entry.batching for entry in llava} == {"stock: a model of more than text"}
        monkeypatch.delattr(continuous_api.BackgroundThreadStatus, "update_with_tp_status")
        assert {entry.batching for entry in torch_vtensor.explain(model)} == {
            "stock: this version of transformers batches by another interface"
        }


@one_layout
def test_a_step_that_fails_ends_the_manager_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_to_serve("llama")

    def fail(*args: Any) -> None:
        raise RuntimeError("broken")

    with torch_vtensor.enabled():
        manager = model.init_continuous_batching(generation_config=config_of())
        monkeypatch.setattr(ServingProgram, "run_step", fail)
        manager.start()
        ids = manager.add_requests(prompts(9, 8))
        errors = {}
        while len(errors) < len(ids):
            output = manager.get_result(timeout=10)
            errors[output.request_id] = output.error
        assert set(errors.values()) == {"broken"}
        manager._generation_thread.join(timeout=60)
        assert not manager.is_running()
        assert manager.background_thread_status.fatal_error is not None
        manager.stop()


@one_layout
def test_a_model_that_cannot_be_compiled_is_served_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_to_serve("llama"), prompts(*LENGTHS)

    def broken(forward: Any, **options: Any) -> Any:
        def fail(*args: Any) -> None:
            raise ValueError("no code for this")

        return fail

    monkeypatch.setattr(graphs, "compile_step", broken)
    with torch_vtensor.enabled(compile=True):
        found = model.generate_batch(asked, generation_config=config_of())
    assert answers(found) == [alone("llama", prompt, 8) for prompt in asked]
    assert counted("uncompiled: the model's step cannot be compiled") == 1


@one_layout
def test_captured_steps_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Any] = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda run, *args: (captured.append(run), capture(run, *args))[1])
    model = copy.deepcopy(model_to_serve("llama"))
    with torch_vtensor.enabled(compile=True):
        model.generate_batch(prompts(20, 21, 22), generation_config=config_of())
        num_captured = len(captured)
        assert num_captured == 3, "a size of prompts, a step and a choice for up to four"
        model.generate_batch(prompts(20, 21, 22, 23, seed=5), generation_config=config_of(max_new_tokens=20))
        assert len(captured) == num_captured
        reference = weakref.ref(model)
        del model
        captured.clear()
    garbage.collect()
    assert reference() is None


@one_layout
def test_a_request_that_nobody_can_answer_fails_alone() -> None:
    model = model_to_serve("llama")
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of())
        served.manager.add_request([], request_id="empty")
        served.manager.add_request(prompts(9)[0], request_id="fine")
        outputs = served.run()
        served.close()
    assert "no tokens" in outputs["empty"].error
    assert outputs["fine"].generated_tokens == alone("llama", prompts(9)[0], 8)


@one_layout
@pytest.mark.parametrize("seed", [None, 5])
def test_random_numbers_go_on_with_other_weights(seed: int | None) -> None:
    """Weights that are the same in another place change no token, and take no number of the process's own."""
    if not hasattr(BatchingManager, "pause"):
        pytest.skip("this version of transformers has no pause")
    config, said = config_of(do_sample=True, top_k=0, max_new_tokens=120), []
    for is_replaced in (False, True):
        model = copy.deepcopy(model_to_serve("llama"))
        torch.manual_seed(3)
        with torch_vtensor.enabled():
            manager = model.init_continuous_batching(
                generation_config=config, continuous_batching_config=batching(seed=seed)
            )
            manager.start()
            manager.add_request(prompts(30)[0], streaming=True)
            while not (output := manager.get_result(timeout=60)).generated_tokens:
                pass
            with manager.pause():
                state = torch.get_rng_state()
                if is_replaced:
                    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            while not (output := manager.get_result(timeout=60)).is_finished():
                pass
            assert torch.equal(torch.get_rng_state(), state)
            manager.stop()
        said.append(output.generated_tokens)
    assert len(said[0]) == 120
    assert said[0] == said[1]


@one_layout
def test_a_hand_over_that_fails_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt,) = copy.deepcopy(model_to_serve("llama")), prompts(30)
    closed: list[Engine] = []
    close = Engine.close

    def noted(engine: Engine) -> None:
        closed.append(engine)
        close(engine)

    def refuse(*args: Any) -> None:
        raise RuntimeError("no hand-over today")

    monkeypatch.setattr(Engine, "close", noted)
    monkeypatch.setattr(Queues, "hand_over", refuse)
    with torch_vtensor.enabled():
        manager = model.init_continuous_batching(generation_config=config_of(max_new_tokens=150))
        if not hasattr(manager, "pause"):
            pytest.skip("this version of transformers has no pause")
        manager.start()
        manager.add_request(prompt, request_id="one", streaming=True)
        while not manager.get_result(timeout=60).generated_tokens:
            pass
        with manager.pause():
            model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
        output = manager.get_result(timeout=60)
        while output.error is None and not output.is_finished():
            output = manager.get_result(timeout=60)
        manager.stop()
    assert "no hand-over today" in output.error
    assert len(closed) == len(set(closed)) == 2
    assert default_scheduler(torch.device("cpu")).pool.rounds == []


@one_layout
@pytest.mark.parametrize("change", ["nothing", "in place", "replaced"])
def test_others_may_use_the_model_in_a_pause(change: str) -> None:
    """And change its weights: requests under way go on with the new ones, and nothing old is taken for new."""
    model, (prompt,) = copy.deepcopy(model_to_serve("llama")), prompts(30)
    with torch_vtensor.enabled(compile=True, prefix_cache=True):
        manager = model.init_continuous_batching(generation_config=config_of(max_new_tokens=150))
        if not hasattr(manager, "pause"):
            pytest.skip("this version of transformers has no pause")
        manager.start()
        manager.add_request(prompt, request_id="before", streaming=True)
        while not (output := manager.get_result(timeout=60)).generated_tokens:
            pass
        with manager.pause():
            steps = counted("steps")
            threading.Event().wait(0.05)
            assert counted("steps") == steps
            if change == "in place":
                with torch.no_grad():
                    model.lm_head.weight.neg_()
            elif change == "replaced":
                model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
        manager.add_request(prompt, request_id="after", max_new_tokens=20)
        outputs = {}
        while len(outputs) < 2:
            output = manager.get_result(timeout=60)
            outputs |= {output.request_id: output} if output.is_finished() else {}
        manager.stop()
        found = answers(model.generate_batch([prompt], generation_config=config_of(max_new_tokens=20)))
    assert len(outputs["before"].generated_tokens) == 150
    ids = torch.tensor([prompt])
    now = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config_of(max_new_tokens=20))
    assert outputs["after"].generated_tokens == now[0, 30:].tolist() == found[0]
    if change == "nothing":
        assert outputs["before"].generated_tokens == alone("llama", prompt, 150)
    else:
        assert outputs["before"].generated_tokens[:1] == alone("llama", prompt, 1)
        assert outputs["after"].generated_tokens != alone("llama", prompt, 20)
        assert torch_vtensor.stats().prefixes.get("not recorded: the model has changed", 0) <= 1
