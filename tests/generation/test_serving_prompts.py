"""Prompts in one forward: which, in what shape, and that each is answered as alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from serving_models import IN_ONE_LAYOUT, Served, alone, batching, config_of, counted, model_to_serve, prompts

import torch_vtensor
from torch_vtensor.generation.decode.prompt import FREE_ROWS
from torch_vtensor.generation.serving import steps as steps_module
from torch_vtensor.generation.serving.program import ServingProgram
from torch_vtensor.generation.serving.prompts import PromptShape, place_size, shapes_up_to, together

pytestmark = IN_ONE_LAYOUT


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, PromptShape]]:
    """How many prompts each forward took up, and in which shape."""
    run_prompts, seen = ServingProgram.run_prompts, []

    def run(self: Any, several: Any, shape: PromptShape) -> None:
        seen.append((len(several), shape))
        run_prompts(self, several, shape)

    monkeypatch.setattr(ServingProgram, "run_prompts", run)
    return seen


def test_prompts_go_together_where_that_costs_less() -> None:
    for num_prompts, size, budget in itertools.product((1, 2, 3, 5, 16, 40, 90), (32, 128), (16, 300, 2048, 4096)):
        found = together(num_prompts, size, budget)
        if found is None:
            assert num_prompts == 1 or 2 * size > budget or budget < FREE_ROWS
            continue
        num_taken, shape = found
        assert shape.size == size
        assert 2 <= num_taken <= min(num_prompts, shape.num_places)
        assert shape.num_rows <= budget
        assert shape in shapes_up_to(1, num_prompts)
        assert max(shape.num_rows, FREE_ROWS) < num_taken * FREE_ROWS, "less than one by one"
    assert [place_size(num_tokens) for num_tokens in (1, 32, 33, 128, 129)] == [32, 32, 128, 128, None]


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "mixtral", "gpt2", "mistral-short-window"])
def test_short_prompts_go_together(family: str, is_captured: bool, forwards: list[Any]) -> None:
    model, asked = model_to_serve(family), prompts(9, 30, 200, 1, 25, 100, 31, 128, 70)
    with torch_vtensor.enabled(compile=is_captured):
        found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=12))
    assert [output.generated_tokens for output in found.values()] == [alone(family, prompt, 12) for prompt in asked]
    assert sum(num_prompts for num_prompts, _ in forwards) == len(asked)
    assert len(forwards) < len(asked)
    assert counted("uncompiled: the model's step cannot be compiled") == 0


def test_long_prompts_go_alone_in_their_order(forwards: list[Any]) -> None:
    model, asked = model_to_serve("llama"), prompts(150, 200, 129)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of())
        for prompt in asked:
            served.manager.add_request(prompt)
        served.run()
        served.close()
    assert forwards == [(1, PromptShape(1, len(prompt))) for prompt in asked]


def test_a_round_takes_up_no_more_than_it_is_given(forwards: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "_PROMPT_TOKENS", 512)
    model, asked = model_to_serve("llama"), prompts(*[20] * 40)
    with torch_vtensor.enabled():
        served = Served(model, generation_config=config_of())
        ids = served.manager.add_requests(asked)
        served.round()
        assert sum(shape.num_rows for _, shape in forwards) <= 512
        outputs = served.run()
        served.close()
    for request_id, prompt in zip(ids, asked, strict=True):
        assert outputs[request_id].generated_tokens == alone("llama", prompt, 8)


def test_no_step_is_launched_for_some_while_answers_come_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "_PROMPT_TOKENS", 150)  # one of them a round
    model, asked = model_to_serve("llama"), prompts(*[150] * 8)
    with torch_vtensor.enabled():
        found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=12))
        assert counted("steps") == 11
        with model.continuous_batching_context_manager(generation_config=config_of(max_new_tokens=12)) as manager:
            ids = manager.add_requests(asked)
            while ids:
                ids.remove(manager.get_result(timeout=60).request_id)
        assert counted("steps") > 2 * 11, "who asked first had its next token before the last one its first"
    assert [output.generated_tokens for output in found.values()] == [alone("llama", prompt, 12) for prompt in asked]


@pytest.mark.parametrize("is_captured", [False, True])
def test_numbers_of_each_requests_own_go_with_its_prompt(is_captured: bool, forwards: list[Any]) -> None:
    model, asked = model_to_serve("llama"), prompts(20, 30, 25)
    with torch_vtensor.enabled(compile=is_captured):
        config = config_of(do_sample=True, top_k=90)
        served = Served(
            model, generation_config=config, continuous_batching_config=batching(per_request_processors=True)
        )
        for index, (prompt, top_k) in enumerate(zip(asked, (90, 1, 1), strict=True)):
            served.manager.add_request(prompt, request_id=str(index), top_k=top_k, max_new_tokens=1 + index)
        outputs = served.run()
        served.close()
    assert forwards[0][0] == 3
    assert [len(outputs[str(index)].generated_tokens) for index in range(3)] == [1, 2, 3]
    for index in (1, 2):
        assert outputs[str(index)].generated_tokens == alone("llama", asked[index], 1 + index)
