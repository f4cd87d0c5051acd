"""Compiled decoding says the same as transformers' own loop, or leaves the call to it, counted with the reason.

Nothing is compiled here but in the tests marked slow: the traced step runs as it is, over rows at addresses.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import garbage
import pytest
import torch
import transformers
from paged_memory import PAGE_BYTES, Memory
from tiny_models import FAMILIES, VERSION, Inputs, assistant_of, model_of, prompt, sizes
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, StoppingCriteria
from transformers.generation import EosTokenCriteria

import torch_vtensor
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation import shared_reads
from torch_vtensor.generation.decode import graphs, loop, program, prompt_parts
from torch_vtensor.generation.decode import step as step_module
from torch_vtensor.generation.decode.sampling import Sampling


@pytest.fixture(autouse=True)
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it is, except in slow tests; and programs of this test alone."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(graphs, "compile_step", lambda forward: forward)
        monkeypatch.setattr(prompt_parts, "compile_parts", lambda twin: None)
    monkeypatch.setattr(program, "_traced", weakref.WeakKeyDictionary())
    monkeypatch.setattr(loop, "_refused", weakref.WeakSet())
    monkeypatch.setattr(loop, "_prompts_refused", weakref.WeakSet())
    monkeypatch.setattr(loop, "_sharing_refused", weakref.WeakSet())


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was captured, in order."""
    captured: list[Any] = []
    capture = graphs.capture

    def noted(run: Any, *args: Any) -> Any:
        captured.append(run)
        return capture(run, *args)

    monkeypatch.setattr(graphs, "capture", noted)
    return captured


def generate(model: Any, inputs: Inputs | None = None, *, new_tokens: int = 24, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    inputs = prompt(1) if inputs is None else inputs
    return model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **options})


def compiled(model: Any, *args: Any, **options: Any) -> Any:
    with torch_vtensor.enabled(compile=True):
        return generate(model, *args, **options)


def programs_of(model: Any) -> list[program.DecodeProgram]:
    """All programs that were made of the model."""
    return [each for several in program.traced_model(model)._programs.values() for each in several]


def reasons(memory: Memory) -> dict[str, int]:
    """Why calls were left to the stock loop, and how many."""
    return {
        reason.removeprefix("stock loop: "): count
        for reason, count in memory.appends.items()
        if reason.startswith("stock loop: ")
    }


def check_reasons(memory: Memory, expected: dict[str, int]) -> None:
    """What the stock loop is left depends on how a version writes a model; that little is left is checked on one."""
    if VERSION == (5, 17):
        assert reasons(memory) == expected
    else:
        assert sum(reasons(memory).values()) <= 1


def decoder(kind: str, **changes: Any) -> Any:
    """A tiny model of a kind that is not among the families."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes(**changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    return model


def endings(sequences: torch.Tensor, prompt_tokens: int) -> list[int]:
    """One token of each sequence that it says for the first time after ever more steps: to end it there."""
    return [int(row[prompt_tokens + 3 * index]) for index, row in enumerate(sequences)]


# Families

NOT_TAKEN = {
    "gemma3n": "the model's step cannot be compiled",  # layers attend to what others keep
    "deepseek_v3": "the model's step cannot be compiled",  # keeps less than it attends to
    "qwen3_next": "the model's attention is not exchangeable",
    "falcon_h1": "the model's attention is not exchangeable",
    "t5": "an encoder-decoder",
    "bart": "an encoder-decoder",
    "whisper": "an encoder-decoder",
    "mamba": "no cache",
    "lfm2": "layers that keep something else than keys and values",
    "llava": "the model takes more than tokens (pixel_values)",
    "qwen2_vl": "the model takes more than tokens (image_grid_thw, mm_token_type_ids, pixel_values)",
}


@pytest.mark.parametrize(("batch", "memory"), [(1, "strips"), (3, "token-major")], indirect=["memory"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, batch: int, memory: Memory) -> None:
    inputs = FAMILIES[family].inputs(batch)
    options = {"new_tokens": 30 if family == "mistral-long-window" else 12}
    theirs = generate(model_of(family), inputs, **options)
    ours = compiled(model_of(family), inputs, **options)
    assert torch.equal(ours, theirs)
    check_reasons(memory, {NOT_TAKEN[family]: 1} if family in NOT_TAKEN else {})
    if not reasons(memory):
        # Windows shorter than the prompt; experts.
        takes_prompt = family not in ("mistral-short-window", "gemma3", "gpt_oss", "mixtral")
        assert memory.appends.get("zero-copy", 0) == (0 if takes_prompt else 3), "layers appended the prompt at most"


OTHERS: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 40, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "Cohere": {},
    "Phi3": {"sliding_window": 40},
    "Granite": {"attention_multiplier": 0.3},
    "Olmo2": {},
}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders(kind: str, memory: Memory) -> None:
    model = decoder(kind, **OTHERS[kind])
    assert torch.equal(compiled(model, prompt(2)), generate(model, prompt(2)))
    assert reasons(memory) == {}


def test_a_window_is_the_models_whatever_the_cache_keeps(memory: Memory) -> None:
    """A DynamicCache made without the model's configuration keeps all tokens; attention still sees a window."""
    model = model_of("mistral-short-window")
    theirs = generate(model, past_key_values=DynamicCache())
    assert torch.equal(compiled(model, past_key_values=DynamicCache()), theirs)
    assert reasons(memory) == {}


def test_a_prompt_shorter_than_the_window_that_the_answer_leaves(memory: Memory) -> None:
    inputs = prompt(2, 40)
    theirs = generate(model_of("mistral-short-window"), inputs)
    assert torch.equal(compiled(model_of("mistral-short-window"), inputs), theirs)
    assert reasons(memory) == {}


# Choosing tokens

SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "defaults": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.7},
    "epsilon": {"epsilon_cutoff": 0.02},
    "repetition": {"repetition_penalty": 1.8},
    "suppress": {"suppress_tokens": list(range(20, 90))},
    "normalized": {"renormalize_logits": True, "remove_invalid_values": True},
    "min-length": {"min_length": 140},
    "min-new": {"min_new_tokens": 9},
    "all": {
        "temperature": 1.4, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 1e-3,
        "repetition_penalty": 1.2, "suppress_tokens": [5, 6], "min_new_tokens": 9, "renormalize_logits": True,
        "remove_invalid_values": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_says_the_same_for_the_same_seed(name: str, memory: Memory) -> None:
    model, options = model_of("llama"), {"do_sample": True, "eos_token_id": [2, 17, 40, 77], **SAMPLING[name]}
    for batch in (1, 3):
        theirs = generate(model, prompt(batch), **options)
        after = torch.rand(1)
        ours = compiled(model, prompt(batch), **options)
        assert torch.equal(ours, theirs)
        assert torch.equal(torch.rand(1), after), "no more random numbers were drawn"
    assert reasons(memory) == {}


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
@pytest.mark.parametrize("name", ["repetition", "suppress", "min-length", "min-new"])
def test_greedy_with_processors(name: str, memory: Memory) -> None:
    model = model_of("llama")
    ends = endings(generate(model, prompt(3)), 130)
    options = {"eos_token_id": ends, **SAMPLING[name]}
    theirs = generate(model, prompt(3), **options)
    assert torch.equal(compiled(model, prompt(3), **options), theirs)
    assert reasons(memory) == {}


@pytest.mark.parametrize("size", [1, 7, 509, 512, 50257])
def test_the_highest_score_is_found_in_two_steps(size: int) -> None:
    """As argmax finds it: the first of equals, and of scores of which none counts."""
    choice = Sampling([], False, None, None)
    scores = torch.randint(0, 4, (5, size)).float()
    scores[3] = float("-inf")
    scores[4, size // 2] = float("nan")
    first = [int((row == row.max()).nonzero()[0]) for row in scores[:4]]
    assert choice.draw(scores).tolist() == [*first, size // 2]


@pytest.mark.parametrize(("batch", "memory"), [(1, "strips"), (3, "token-major")], indirect=["memory"])
@pytest.mark.parametrize("step_of_end", [0, 1, 7])
def test_ends(batch: int, step_of_end: int, memory: Memory) -> None:
    """Sequences that end early, late, and all at once."""
    model = model_of("llama")
    free = generate(model, prompt(batch), eos_token_id=None)
    for ends in ([int(free[0, 130 + step_of_end])], [int(row[130 + step_of_end]) for row in free]):
        theirs = generate(model, prompt(batch), eos_token_id=ends, pad_token_id=0)
        ours = compiled(model, prompt(batch), eos_token_id=ends, pad_token_id=0)
        assert torch.equal(ours, theirs)
    assert ours.shape[1] <= 130 + step_of_end + 1
    assert reasons(memory) == {}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_two_criteria_for_the_end(memory: Memory) -> None:
    model = model_of("llama")
    free = generate(model, prompt(2), eos_token_id=None)
    mine = EosTokenCriteria(int(free[0, 134]))

    def run(run_generate: Any) -> Any:
        return run_generate(model, prompt(2), eos_token_id=int(free[1, 133]), stopping_criteria=[mine])

    assert torch.equal(run(compiled), run(generate))
    assert reasons(memory) == {}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_no_time(memory: Memory) -> None:
    theirs = generate(model_of("llama"), max_time=0.0)
    assert torch.equal(compiled(model_of("llama"), max_time=0.0), theirs)
    assert theirs.shape[1] == 131
    assert compiled(model_of("llama"), max_time=600.0).shape[1] == 130 + 24
    assert reasons(memory) == {}


# Inputs and outputs


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_left_padding(family: str, memory: Memory) -> None:
    inputs = prompt(3)
    for row, padding in ((0, 2), (2, 100)):  # the latter ends within the window
        inputs["input_ids"][row, :padding] = 0
        inputs["attention_mask"][row, :padding] = 0
    assert torch.equal(compiled(model_of(family), inputs), generate(model_of(family), inputs))
    check_reasons(memory, {})


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_mask_with_holes_is_left_to_the_stock_loop(memory: Memory) -> None:
    inputs = prompt(2)
    inputs["attention_mask"][1, 50:60] = 0
    assert torch.equal(compiled(model_of("llama"), inputs), generate(model_of("llama"), inputs))
    assert reasons(memory) == {"an attention mask with holes": 1}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_positions_of_ones_own(memory: Memory) -> None:
    inputs = prompt(2)
    inputs["position_ids"] = torch.arange(130).expand(2, -1) * 2
    theirs = generate(model_of("llama"), inputs)
    assert not torch.equal(theirs, generate(model_of("llama"), prompt(2)))
    assert torch.equal(compiled(model_of("llama"), inputs), theirs)
    check_reasons(memory, {})


class Streamer:
    """Notes the calls that it gets."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.calls.append((tokens.tolist(), tokens.device.type))

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("step_of_end", [0, 1, 7, None])
def test_streaming_makes_the_same_calls(step_of_end: int | None) -> None:
    model = model_of("llama")
    free = generate(model, eos_token_id=None)
    ends = None if step_of_end is None else int(free[0, 130 + step_of_end])
    theirs, ours = Streamer(), Streamer()
    generate(model, streamer=theirs, eos_token_id=ends)
    compiled(model, streamer=ours, eos_token_id=ends)
    assert ours.calls == theirs.calls
    assert ours.calls[-1] == "end"


def assert_same_cache(ours: Any, theirs: Any) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for our, their in zip(ours.layers, theirs.layers, strict=True):
        assert our.get_seq_length() == their.get_seq_length()
        assert getattr(our, "cumulative_length", None) == getattr(their, "cumulative_length", None)
        # Products of one row and of many sum up in another order.
        torch.testing.assert_close(our.keys, their.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(our.values, their.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral-short-window", "gemma3", "gpt_oss"])
def test_the_cache_is_what_the_stock_loop_leaves(family: str, memory: Memory) -> None:
    """And both loops go on from it: three turns, of which the stock loop takes the second."""
    model, outputs, inputs = model_of(family), [], prompt(2)
    for run in (generate, compiled):
        out: Any = run(model, inputs, return_dict_in_generate=True)
        assert type(out).__name__ == "GenerateDecoderOnlyOutput"
        turns = [copy.deepcopy(out)]
        for turn in (1, 2):
            ids = torch.cat([out.sequences, torch.full((2, 5), 30 + turn)], 1)
            with torch_vtensor.enabled(compile=run is compiled and turn == 2):
                torch.manual_seed(turn)
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=out.past_key_values,
                    max_new_tokens=9,
                    do_sample=False,
                    return_dict_in_generate=True,
                )
            turns.append(copy.deepcopy(out))
        outputs.append(turns)
    for their, our in zip(*outputs, strict=True):
        assert torch.equal(our.sequences, their.sequences)
        assert_same_cache(our.past_key_values, their.past_key_values)
    assert reasons(memory) == {}


def test_an_explicit_cache_and_its_forks(memory: Memory) -> None:
    model = model_of("llama")

    def run(run_generate: Any, make: Any, fork: Any) -> list[torch.Tensor]:
        cache = make(config=model.config)
        first = run_generate(model, prompt(2), past_key_values=cache)
        answers = [first]
        forks = [cache, fork(cache), fork(cache)]
        for index, each in enumerate(forks):
            question = torch.full((2, 4), 40 + index)
            inputs = {"input_ids": torch.cat([first, question], 1)}
            answers.append(run_generate(model, inputs, past_key_values=each))
        return answers

    theirs = run(generate, DynamicCache, copy.deepcopy)
    ours = run(compiled, torch_vtensor.VTensorCache, lambda cache: cache.fork())
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
    assert reasons(memory) == {}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_what_forks_share_is_told_to_the_operator(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    model, inputs = model_of("llama"), prompt(2, 130)
    answers = []
    for compiles in (False, True):
        with torch_vtensor.enabled(compile=compiles), torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(**inputs, past_key_values=cache)
            cache.batch_repeat_interleave(3)
            ids = torch.cat([inputs["input_ids"].repeat_interleave(3, 0), torch.arange(6)[:, None] + 3], dim=1)
            answers.append(generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                                    past_key_values=cache))  # fmt: skip
    assert torch.equal(*answers)
    assert not reasons(memory)
    (made,) = programs_of(model)
    (shared,) = {id(group.shared): group.shared for group in made.step.groups}.values()
    assert shared is not None
    assert shared.groups.tolist() == [[0, 1, 2, *[-1] * 3], [3, 4, 5, *[-1] * 3], [-1] * 6]
    assert 0 < shared.num_shared[0] <= 130
    assert len(set(shared.num_shared.tolist())) == 1


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_step_that_cannot_read_once_what_is_shared(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads it for each; steps of other calls are not concerned."""
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    attend, num_tries = step_module.cached_attention, 0

    def refuse(*args: Any, groups: Any = None, num_shared: Any = None, **options: Any) -> Any:
        nonlocal num_tries
        if groups is not None:
            num_tries += 1
            raise ValueError("no such kernel")
        return attend(*args, **options)

    monkeypatch.setattr(step_module, "cached_attention", refuse)
    model, ids = model_of("llama"), prompt(1, 130)["input_ids"].repeat(2, 1)
    inputs = {"input_ids": torch.cat([ids, torch.tensor([[3], [4]])], dim=1), "attention_mask": torch.ones(2, 131)}
    answers = []
    for compiles in (False, True, True):
        with torch_vtensor.enabled(compile=compiles), torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:1], past_key_values=cache)
            cache.batch_repeat_interleave(2)
            answers.append(generate(model, inputs, past_key_values=cache))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert not reasons(memory)
    assert num_tries == 1


def test_tokens_that_were_cut_off_are_no_part_of_what_follows(memory: Memory) -> None:
    model = model_of("llama")

    def run(run_generate: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        run_generate(model, past_key_values=cache)
        before = cache.layers[0].keys
        kept = before.clone()
        cache.crop(100 - cache.get_seq_length())
        ids = prompt(1)["input_ids"][:, :110]
        sequences: torch.Tensor = run_generate(model, {"input_ids": ids}, past_key_values=cache)
        assert torch.equal(before, kept), "an older view shows what it showed"
        return sequences

    assert torch.equal(run(compiled), run(generate))


# Calls for the stock loop


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


STOCK: dict[str, tuple[dict[str, Any], str]] = {
    "own processor": ({"logits_processor": [Nothing()]}, "a logits processor of its own (Nothing)"),
    "n-grams": ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor needs the host"),
    "entropy": ({"do_sample": True, "eta_cutoff": 0.01}, "EtaLogitsWarper needs the host"),
    "criterion": ({"stopping_criteria": [Never()]}, "a stopping criterion that needs the host"),
    "scores": (
        {"return_dict_in_generate": True, "output_scores": True},
        "scores, logits, attentions or hidden states are asked for",
    ),
    "no cache": ({"use_cache": False}, "no cache"),
    "one token": ({"new_tokens": 1}, "a single new token"),
}


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
@pytest.mark.parametrize("name", STOCK)
def test_what_the_stock_loop_takes(name: str, memory: Memory) -> None:
    options, reason = STOCK[name]
    theirs = generate(model_of("llama"), **options)
    ours = compiled(model_of("llama"), **options)
    if isinstance(ours, torch.Tensor):
        ours, theirs = {"sequences": ours}, {"sequences": theirs}
    assert torch.equal(ours["sequences"], theirs["sequences"])
    assert len(ours.get("scores", ())) == len(theirs.get("scores", ()))
    assert reasons(memory) == {reason: 1}


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
def test_other_ways_to_generate_never_come_here(memory: Memory) -> None:
    model = model_of("llama")
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(compiled(model, **options), generate(model, **options))
    assert reasons(memory) == {}
    options = {"assistant_model": assistant_of("llama")}
    assert torch.equal(compiled(model, **options), generate(model, **options))
    assert set(reasons(memory)) <= {"steps are synchronised with another process or model", "a single new token"} | {
        "scores, logits, attentions or hidden states are asked for"
    }


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_training_mode_hooks_and_autocast(memory: Memory) -> None:
    model = copy.deepcopy(model_of("llama"))
    theirs = generate(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert torch.equal(compiled(model), theirs)
    handle.remove()
    assert torch.equal(compiled(model.train()), theirs)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model)
        assert torch.equal(compiled(model), expected)
    assert reasons(memory) == {
        "the model has forward hooks": 1,
        "the model is in training mode (call model.eval())": 1,
        "autocast": 1,
    }
    assert torch.equal(compiled(model), theirs)
    assert sum(reasons(memory).values()) == 3, "none of these is for good"


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_attention_in_chunks_is_no_window(memory: Memory) -> None:
    model = decoder("Llama")
    model.config.layer_types = ["chunked_attention"] * 3
    model.config.attention_chunk_size = 64
    compiled(model, past_key_values=DynamicCache())
    assert reasons(memory) == {"attention that is neither full nor to a sliding window": 1}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_what_has_changed_since_an_earlier_call_is_seen(memory: Memory) -> None:
    """What calls look at again and again is remembered, not believed."""
    model = decoder("Llama", layer_types=["full_attention"] * 3)
    compiled(model)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    assert torch.equal(compiled(model), generate(model))
    assert reasons(memory) == {}
    model.model.layers[1].mlp.add_module("more", torch.nn.Dropout(0.0))
    compiled(model)
    assert reasons(memory) == {"the model is in training mode (call model.eval())": 1}
    model.model.layers[1].mlp.more.eval().register_forward_pre_hook(lambda *_: None)
    compiled(model)
    assert reasons(memory)["the model has forward hooks"] == 1
    del model.model.layers[1].mlp.more
    compiled(model)
    assert sum(reasons(memory).values()) == 2
    model.config.layer_types[2] = "chunked_attention"
    compiled(model, past_key_values=DynamicCache())
    assert reasons(memory)["attention that is neither full nor to a sliding window"] == 1


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("where", ["while tracing", "in the middle of a layer"])
@pytest.mark.parametrize("step_of_end", [0, 3])
def test_a_step_that_cannot_be_compiled(
    where: str, step_of_end: int, memory: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(model_of("llama"))
    num_tries = 0

    def broken(forward: Any) -> Any:
        def fail(*args: Any) -> Any:
            nonlocal num_tries
            num_tries += 1
            if where == "in the middle of a layer":
                forward(*args)
            raise ValueError("no such thing")

        return fail

    free = generate(model, prompt(3), eos_token_id=None)
    options: dict[str, Any] = {
        "eos_token_id": int(free[1, 130 + step_of_end]), "pad_token_id": 0, "do_sample": True, "temperature": 0.01
    }  # fmt: skip
    theirs, their_streamer = generate(model, prompt(3), **options), Streamer()
    generate(model, prompt(1), streamer=their_streamer)
    monkeypatch.setattr(graphs, "compile_step", broken)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(model, prompt(3), **options), theirs)
        assert torch.equal(compiled(model, prompt(3), **options), theirs)
        our_streamer = Streamer()
        compiled(model, prompt(1), streamer=our_streamer)
    assert our_streamer.calls == their_streamer.calls
    (warning,) = [record for record in caplog.records if "cannot be compiled" in record.message]
    assert "ValueError: no such thing" in warning.message
    assert reasons(memory) == {"the model's step cannot be compiled": 3}
    assert num_tries == 1


def test_a_prompt_that_cannot_be_captured(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for transformers from then on; what comes after it is compiled all the same."""
    model = copy.deepcopy(model_of("llama"))
    theirs = generate(model, prompt(2))
    num_tries = 0

    def fail(*_: Any) -> Any:
        nonlocal num_tries
        num_tries += 1
        raise ValueError("no such thing")

    monkeypatch.setattr(program.DecodeProgram, "_capture_prompt", fail)
    for _ in range(2):
        assert torch.equal(compiled(model, prompt(2)), theirs)
    assert num_tries == 1
    assert reasons(memory) == {}
    assert memory.appends["prompt by transformers: prompts are for transformers"] == 1


@pytest.mark.skipif(VERSION == (5, 0), reason="transformers 5.0 cannot: a prompt in chunks")
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_prompt_in_chunks_and_a_step_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    theirs = generate(model, prompt(2), prefill_chunk_size=50)
    assert torch.equal(compiled(model, prompt(2), prefill_chunk_size=50), theirs)
    monkeypatch.setattr(graphs, "compile_step", None)
    monkeypatch.setattr(program, "_traced", weakref.WeakKeyDictionary())
    assert torch.equal(compiled(model, prompt(2), prefill_chunk_size=50), theirs)


# Memory


def test_a_budget_that_ends_in_the_middle(memory: Memory) -> None:
    """The text so far is in the error; the cache keeps it, and goes on when there is memory again."""
    model = model_of("llama")
    theirs = generate(model, new_tokens=200)
    cache = torch_vtensor.VTensorCache(config=model.config)
    num_pages = 48 if memory.layout == "strips" else 28
    with (
        torch_vtensor.enabled(compile=True, budget_bytes=num_pages * PAGE_BYTES),
        pytest.raises(OutOfPagesError) as failure,
    ):
        generate(model, new_tokens=200, past_key_values=cache)
    error: Any = failure.value
    num_new = error.sequences.shape[1] - 130
    assert 1 < num_new < 200
    assert torch.equal(error.sequences, theirs[:, : 130 + num_new])
    assert cache.get_seq_length() == 130 + num_new - 1
    assert f"{num_new} new tokens" in "".join(error.__notes__)
    more = compiled(model, {"input_ids": error.sequences}, past_key_values=cache, new_tokens=200 - num_new)
    assert torch.equal(more, theirs)
    assert reasons(memory) == {}
    del error, failure


@pytest.mark.parametrize("num_tokens", [4, 6])
def test_a_budget_too_small_to_begin_with(memory: Memory, num_tokens: int) -> None:
    """A page holds one layer's keys in strips, and all of five tokens token by token: four and the first new one."""
    inputs = prompt(1, num_tokens)
    with (
        torch_vtensor.enabled(compile=True, budget_bytes=PAGE_BYTES),
        pytest.raises(OutOfPagesError) as failure,
    ):
        generate(model_of("llama"), inputs)
    error: Any = failure.value
    num_new = 2 if memory.layout == "token-major" and num_tokens == 4 else 0
    assert torch.equal(
        error.sequences, generate(model_of("llama"), inputs, new_tokens=max(num_new, 1))[:, : num_tokens + num_new]
    )
    del error, failure


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_no_memory_is_taken_for_tokens_that_cannot_come(memory: Memory) -> None:
    """Mapping ahead ends where the call does: a few new tokens take no pages for many."""
    model = model_of("llama")
    with torch_vtensor.enabled(compile=True):
        output = generate(model, prompt(1, 300), new_tokens=5, return_dict_in_generate=True)
        memory.settle()
        found = torch_vtensor.memory(output.past_key_values)
    assert 0 < found.committed_bytes - found.written_bytes < 2 * PAGE_BYTES


def test_growing_over_many_pages(memory: Memory) -> None:
    model = model_of("llama")
    theirs = generate(model, prompt(2, 20), new_tokens=250)
    before = memory.num_mapped
    assert torch.equal(compiled(model, prompt(2, 20), new_tokens=250), theirs)
    assert memory.num_mapped - before > 10
    assert reasons(memory) == {}


# Programs


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_programs_are_used_again(captures: list[Any]) -> None:
    model = copy.deepcopy(model_of("llama"))
    options = {"do_sample": True, "suppress_tokens": [4, 5], "min_new_tokens": 3, "eos_token_id": 2}
    for _ in range(3):
        compiled(model, prompt(2), **options)
    assert len(captures) == 3, "the step, the prompt and the choice, once"
    compiled(model, prompt(2), **options | {"suppress_tokens": [4, 6]})
    assert len(captures) == 4, "another choice"
    compiled(model, prompt(2), **options)
    assert len(captures) == 4
    compiled(model, prompt(3), **options)
    assert len(captures) == 7, "another batch"
    for temperature in range(1, 20):
        compiled(model, prompt(2), new_tokens=2, do_sample=True, temperature=temperature / 10)
    programs = programs_of(model)
    assert max(len(each._choices) for each in programs) <= 16


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_two_choices_that_look_alike() -> None:
    """A seed gives what it gives, whatever was captured before."""
    model = copy.deepcopy(model_of("llama"))
    for options in ({"temperature": 0.5}, {"temperature": 0.9}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.3}) * 2:
        theirs = generate(model, prompt(2), do_sample=True, **options)
        assert torch.equal(compiled(model, prompt(2), do_sample=True, **options), theirs)


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_another_answer_length_finds_room(captures: list[Any]) -> None:
    model = copy.deepcopy(model_of("llama"))
    for new_tokens in (5, 260, 7):
        options = {"repetition_penalty": 1.3, "new_tokens": new_tokens}
        assert torch.equal(compiled(model, prompt(2, 20), **options), generate(model, prompt(2, 20), **options))
    assert len(captures) <= 5


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_weights_that_were_replaced(captures: list[Any]) -> None:
    model = copy.deepcopy(model_of("llama"))
    compiled(model)
    with torch.no_grad():
        model.lm_head.weight.neg_()  # in place
    assert torch.equal(compiled(model), generate(model))
    num_captures = len(captures)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())
    assert torch.equal(compiled(model), generate(model))
    assert len(captures) > num_captures
    num_captures, attention = len(captures), model.model.layers[0].self_attn
    k_proj, v_proj = attention.k_proj, attention.v_proj
    attention.k_proj, attention.v_proj = v_proj, k_proj
    assert torch.equal(compiled(model), generate(model))
    assert len(captures) > num_captures
    num_captures = len(captures)
    del attention.k_proj, attention.v_proj
    attention.v_proj, attention.k_proj = v_proj, k_proj  # the same two, by each other's names
    attention.v_proj, attention.k_proj = k_proj, v_proj
    assert torch.equal(compiled(model), generate(model))
    assert len(captures) > num_captures
    num_captures = len(captures)
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()
    assert torch.equal(compiled(model), generate(model))
    assert len(captures) > num_captures
    num_captures = len(captures)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    assert torch.equal(compiled(model), generate(model))
    assert len(captures) > num_captures


@pytest.fixture
def collecting_elsewhere() -> Iterator[Callable[[], None]]:
    """Waits until another thread collects garbage, whose finalizers let this one run, as calls of a driver do."""

    class Finalized:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            is_finalizing.set()
            has_ended.wait(0.05)

    def collect() -> None:
        while not has_ended.wait(0.01):
            Finalized()
            gc.collect()

    def wait() -> None:
        is_finalizing.clear()
        assert is_finalizing.wait(60)

    has_ended, is_finalizing = threading.Event(), threading.Event()
    thread = threading.Thread(target=collect)
    thread.start()
    yield wait
    has_ended.set()
    thread.join()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_nothing_keeps_a_model_alive(collecting_elsewhere: Callable[[], None]) -> None:
    model = copy.deepcopy(model_of("llama"))
    compiled(model)
    programs = programs_of(model)
    held = [weakref.ref(model), *map(weakref.ref, programs)]
    assert len(held) == 2
    collecting_elsewhere()
    del model, programs
    garbage.collect()
    assert [reference() for reference in held] == [None, None]


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_the_model_stays_as_it_was() -> None:
    model = model_of("gemma3")
    before = model.config.to_dict(), model.config._attn_implementation
    compiled(model)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_threads_with_one_model(memory: Memory) -> None:
    """Each has a program of its own while it needs one."""
    model = copy.deepcopy(model_of("llama"))
    theirs = [generate(model, prompt(2, 40 + 20 * index), new_tokens=30) for index in range(2)]
    found: list[list[torch.Tensor]] = [[], []]
    both = threading.Barrier(2)

    def work(index: int) -> None:
        for _ in range(3):
            both.wait()
            found[index].append(model.generate(**prompt(2, 40 + 20 * index), max_new_tokens=30, do_sample=False))

    with torch_vtensor.enabled(compile=True):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(2):
        assert len(found[index]) == 3
        assert all(torch.equal(sequences, theirs[index]) for sequences in found[index])
    assert model.config._attn_implementation == model_of("llama").config._attn_implementation
    assert reasons(memory) == {}


def test_a_call_under_way_keeps_its_program_to_itself(captures: list[Any]) -> None:
    """A streamer that generates with the same model."""
    model = copy.deepcopy(model_of("llama"))
    theirs, inner = generate(model), generate(model, prompt(1, 50), new_tokens=4)
    answers: list[torch.Tensor] = []

    class Asking(Streamer):
        def put(self, tokens: torch.Tensor) -> None:
            answers.append(model.generate(**prompt(1, 50), max_new_tokens=4, do_sample=False))

    assert torch.equal(compiled(model, streamer=Asking()), theirs)
    assert len(answers) > 20
    assert all(torch.equal(answer, inner) for answer in answers)


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_streamer_that_fails(memory: Memory) -> None:
    model = copy.deepcopy(model_of("llama"))
    cache = DynamicCache(config=model.config)

    class Failing(Streamer):
        def put(self, tokens: torch.Tensor) -> None:
            super().put(tokens)
            if len(self.calls) == 6:
                raise KeyboardInterrupt

    with torch_vtensor.enabled(compile=True):
        with pytest.raises(KeyboardInterrupt):
            generate(model, streamer=Failing(), past_key_values=cache)
        assert cache.get_seq_length() == 134, "what was streamed, but for the last token"
    assert torch.equal(compiled(model), generate(model))
    programs = programs_of(model)
    assert len(programs) == 1


# Switching it on and off


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_switching() -> None:
    stock, model = GenerationMixin._sample, copy.deepcopy(model_of("llama"))
    traced = program._traced

    def is_taken() -> bool:
        traced.clear()
        generate(model, new_tokens=3)
        return len(traced) > 0

    with torch_vtensor.enabled():
        assert not is_taken()
        with torch_vtensor.enabled(compile=True):
            assert is_taken()
            with torch_vtensor.enabled():
                assert is_taken()
        assert not is_taken()
    assert GenerationMixin._sample is stock
    torch_vtensor.enable(compile=True)
    assert is_taken()
    torch_vtensor.enable()
    assert not is_taken()
    torch_vtensor.enable(compile=True)
    torch_vtensor.disable()
    assert GenerationMixin._sample is stock
    assert not is_taken()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_inference_mode_and_default_devices(memory: Memory) -> None:
    model = copy.deepcopy(model_of("llama"))
    theirs = generate(model)
    with torch.inference_mode():
        assert torch.equal(compiled(model), theirs)
    assert torch.equal(compiled(model), theirs)
    with torch.device("cpu"):
        assert torch.equal(compiled(model), theirs)
    assert reasons(memory) == {}


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_addresses_are_made_on_the_host() -> None:
    class Noted(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.tensor:
                assert (kwargs or {}).get("device") is not None, "goes to the default device"
            return function(*args, **(kwargs or {}))

    with Noted():
        program._on(torch.device("cpu"), [1, 2], torch.int64)


# Really compiled


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_compiled_by_inductor(family: str, memory: Memory, captures: list[Any]) -> None:
    model = copy.deepcopy(model_of(family))
    for batch in (1, 2):
        theirs = generate(model, prompt(batch))
        for _ in range(2):
            assert torch.equal(compiled(model, prompt(batch)), theirs)
    # Of each batch size a step and a choice, and a prompt if it fits into the windows and goes through no experts.
    assert len(captures) == (6 if family == "llama" else 4)
    assert reasons(memory) == {}


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_compiled_model_is_let_go(memory: Memory) -> None:
    model = copy.deepcopy(model_of("llama"))
    compiled(model)
    reference = weakref.ref(model)
    del model
    garbage.collect()
    assert reference() is None


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()
