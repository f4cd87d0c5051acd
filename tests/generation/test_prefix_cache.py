"""enable(prefix_cache=True): calls begin with what earlier calls left, and say the same as they would have alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import garbage
import pytest
import torch
import transformers
from paged_memory import Memory
from tiny_models import (
    ENCODER_DECODER,
    FAMILIES,
    LONG_WINDOW,
    OWN_CACHE,
    SLIDING,
    STATEFUL,
    VISION,
    Inputs,
    assistant_of,
    model_of,
    prompt,
    sizes,
)

import torch_vtensor
from torch_vtensor.allocator import prefix
from torch_vtensor.generation import layers, prefix_cache
from torch_vtensor.generation.decode import graphs, loop, program, prompt_parts

NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    prefix_cache.counters.clear()
    yield
    torch_vtensor.disable()
    prefix_cache.counters.clear()


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    defaults = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    return model.generate(**defaults | inputs | options)


def tokens_of(output: Any) -> torch.Tensor:
    return getattr(output, "sequences", output)


def said(tokens: torch.Tensor) -> Inputs:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def reused() -> int:
    return torch_vtensor.stats().prefixes.get("tokens reused", 0)


def reasons(what: str = "not reused") -> dict[str, int]:
    counted = torch_vtensor.stats().prefixes
    return {name.removeprefix(f"{what}: "): n for name, n in counted.items() if name.startswith(f"{what}: ")}


def check_turns(model: Any, first: Inputs, second: Inputs, at_least: int, **options: Any) -> None:
    """Two calls, warm, say what they say cold, and the second one reuses so many tokens."""
    cold = [generate(model, inputs, **options) for inputs in (first, second)]
    with torch_vtensor.enabled(prefix_cache=True):
        warm = [generate(model, inputs, **options) for inputs in (first, second)]
        assert reused() >= at_least, dict(prefix_cache.counters)
    assert [each.tolist() for each in warm] == [each.tolist() for each in cold]


def next_turn(model: Any, first: Inputs, **options: Any) -> Inputs:
    """What was said so far, and the user's next tokens."""
    answered = generate(model, first, **options)
    more = torch.randint(3, 90, (len(answered), 9), generator=torch.Generator().manual_seed(5))
    return said(torch.cat([answered, more], 1))


PLAIN = [
    family for family in FAMILIES if family not in (*SLIDING, *STATEFUL, *ENCODER_DECODER, *VISION, *OWN_CACHE, "lfm2")
]


@pytest.mark.parametrize("family", PLAIN)
def test_a_next_turn_runs_only_its_new_tokens(family: str) -> None:
    model = model_of(family)
    first = prompt(1)
    check_turns(model, first, next_turn(model, first), at_least=130 + NEW_TOKENS - 1)
    assert not reasons()
    assert "reused" in {entry.prefix for entry in torch_vtensor.explain(model)}


@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_is_reused_as_long_as_it_has_dropped_nothing(family: str) -> None:
    model = model_of(family)
    first = prompt(1, 30)
    if prefix_cache.why_never(model) is not None:  # gemma3n's layers that share keys, in some versions
        check_turns(model, first, next_turn(model, first), at_least=0)
        return
    check_turns(model, first, next_turn(model, first), at_least=30)
    long = prompt(1, LONG_WINDOW + 20)
    cold = generate(model, long)
    with torch_vtensor.enabled(prefix_cache=True):
        generate(model, first)
        assert torch.equal(generate(model, long), cold)
    assert reasons("not recorded").keys() == {"a sliding window has dropped its first tokens"}
    assert torch_vtensor.stats().prefixes["limited: a sliding window keeps no more"] == 1
    assert any("shorter than the window of" in entry.prefix for entry in torch_vtensor.explain(model))


@pytest.mark.parametrize("family", [*STATEFUL, *ENCODER_DECODER, *VISION, "lfm2"])
def test_what_cannot_be_reused_is_left_alone_with_the_reason(family: str, memory: Memory) -> None:
    if memory.layout == "strips" and family not in ("llava", "t5"):
        pytest.skip("the reason does not depend on the layout")
    model, inputs = model_of(family), FAMILIES[family].inputs(1)
    options = {"eos_token_id": None, "do_sample": False, "max_new_tokens": 3}
    cold = model.generate(**inputs, **options)
    with torch_vtensor.enabled(prefix_cache=True):
        assert [torch.equal(model.generate(**inputs, **options), cold) for _ in range(2)] == [True, True]
    assert reused() == 0
    assert sum(reasons().values()) == 2
    expected = {
        "llava": "the model takes more than tokens (",
        "t5": "an encoder-decoder",
        "qwen3_next": "layers that keep something else than keys and values",
    }
    assert next(iter(reasons())).startswith(expected.get(family, "")), reasons()
    assert all(entry.prefix.startswith("not reused: ") for entry in torch_vtensor.explain(model)) or family in VISION


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=["sampling", "several", "beams", "beam sampling", "scores"],
)
def test_every_mode_says_the_same(options: dict[str, Any]) -> None:
    model = model_of("llama")
    first, second = prompt(1), said(torch.cat([prompt(1)["input_ids"], torch.tensor([[7, 8, 9, 10]])], 1))
    cold = [tokens_of(generate(model, inputs, **options)) for inputs in (first, second)]
    with torch_vtensor.enabled(prefix_cache=True):
        warm = [tokens_of(generate(model, inputs, **options)) for inputs in (first, second)]
    assert [each.tolist() for each in warm] == [each.tolist() for each in cold]
    slots = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert reused() == slots * 130


def padded(rows: list[torch.Tensor]) -> Inputs:
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_batch_reuses_as_much_as_all_of_its_rows_can() -> None:
    model, system = model_of("llama"), prompt(1)["input_ids"][0]
    tails = [torch.arange(10, 30), torch.arange(40, 45), torch.arange(60, 72)]
    first = said(system[None])
    second = padded([torch.cat([system, tail]) for tail in tails])
    paddings = (second["attention_mask"] == 0).sum(1).tolist()
    check_turns(model, first, second, at_least=367)
    assert reused() == sum(130 - padding for padding in paddings) == 367  # rows with padding get copies behind it
    check_turns(model, first, padded([torch.cat([system, tails[0]]), torch.arange(5, 40)]), at_least=0)
    assert reasons("not recorded")["padding in front"] > 0


def test_rows_that_ended_early_are_kept_to_their_end() -> None:
    model = model_of("llama")
    both = prompt(2)
    ends = int(generate(model, both)[0, 131])  # the first row's second answer
    check_turns(model, both, said(prompt(2)["input_ids"][:1]), at_least=129, eos_token_id=ends, pad_token_id=0)


@pytest.mark.parametrize("attention", [None, "fast"])
def test_compiled_decoding_begins_with_the_prefix(attention: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "compile_step", lambda forward: forward)
    monkeypatch.setattr(prompt_parts, "compile_parts", lambda twin: None)
    monkeypatch.setattr(program, "_traced", weakref.WeakKeyDictionary())
    monkeypatch.setattr(loop, "_refused", weakref.WeakSet())
    monkeypatch.setattr(loop, "_prompts_refused", weakref.WeakSet())
    model, first = model_of("llama"), prompt(2)
    second = next_turn(model, first)
    with torch_vtensor.enabled(compile=True, attention=attention):
        cold = [generate(model, inputs, max_new_tokens=8) for inputs in (first, second)]
    layers.counters.clear()
    with torch_vtensor.enabled(compile=True, attention=attention, prefix_cache=True):
        warm = [generate(model, inputs, max_new_tokens=8) for inputs in (first, second)]
        assert reused() >= 2 * 136
        assert not [name for name in torch_vtensor.stats().appends if name.startswith("stock")]
    assert [each.tolist() for each in warm] == [each.tolist() for each in cold]


def test_a_call_with_a_cache_of_its_own_is_left_alone() -> None:
    model = model_of("llama")
    with torch_vtensor.enabled(prefix_cache=True):
        generate(model, prompt(1))
        own = transformers.DynamicCache(config=model.config)
        generate(model, prompt(1), past_key_values=own)
        assert own.get_seq_length() == 130 + NEW_TOKENS - 1
        assert reused() == 0
        assert reasons() == {"the call brings a cache of its own": 1}


def test_a_cache_that_is_returned_goes_on_and_leaves_the_prefix_as_it_was() -> None:
    model = model_of("llama")
    cold = generate(model, prompt(1))
    with torch_vtensor.enabled(prefix_cache=True):
        for _ in range(2):
            output = generate(model, prompt(1), return_dict_in_generate=True)
            assert torch.equal(output.sequences, cold)
            cache = output.past_key_values if "past_key_values" in output else output.cache
            cache.crop(-95)
            with torch.no_grad():
                model(torch.full((1, 60), 5), past_key_values=cache)  # written over what was recorded
        assert torch.equal(generate(model, prompt(1)), cold)
        assert reused() == 2 * 129


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def replaced(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def adapted(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.active_adapters, layer.scaling = ["other"], {"other": 1.0}  # as PEFT's layers have them
    stock = layer.forward
    layer.forward = lambda x: stock(x) * 1.5


@pytest.mark.parametrize("change", [changed_in_place, replaced, adapted])
def test_a_model_that_changed_begins_anew(change: Any) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    with torch_vtensor.enabled(prefix_cache=True):
        generate(model, prompt(1))
        change(model)
        warm = generate(model, prompt(1))
        assert reused() == 0
        assert torch_vtensor.stats().prefixes["dropped: the model has changed"] == 1
        generate(model, prompt(1))
        assert reused() == 129
    assert torch.equal(warm, generate(model, prompt(1)))


def test_hooks_see_all_of_the_prompt(memory: Memory) -> None:
    """Nor is what they change taken for what the model computes, whatever address a hook has."""
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    layer = model.model.layers[0].self_attn.k_proj
    plain = generate(model, prompt(1))
    with torch_vtensor.enabled(prefix_cache=True):
        for factor in (1.5, 0.5):
            hook = layer.register_forward_hook(lambda module, args, output, factor=factor: output * factor)
            generate(model, prompt(1))
            hook.remove()
        assert reused() == 0
        assert torch_vtensor.stats().prefixes["not reused: hooks run in forward"] == 2
        for _ in range(2):
            assert torch.equal(generate(model, prompt(1)), plain)
        assert reused() == 129


def test_rows_that_are_no_tokens_are_not_recorded(memory: Memory) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation  # as prompt tuning overrides it
    with torch_vtensor.enabled(prefix_cache=True):
        for _ in range(2):
            generate(model, prompt(1))
        assert reused() == 0
        assert torch_vtensor.stats().prefixes["not reused: something is put in front of the tokens"] == 2


def test_what_is_kept_ends_with_the_model_and_with_disable(memory: Memory) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    torch_vtensor.enable(prefix_cache=True)
    generate(model, prompt(1)), generate(model_of("llama"), prompt(1))
    held = torch_vtensor.stats().prefixes["bytes held"]
    del model
    garbage.collect()
    memory.settle()
    assert torch_vtensor.stats().prefixes["bytes held"] == held // 2
    assert [pool.prefix_bytes for pool in torch_vtensor.stats().devices.values()] == [held // 2]
    torch_vtensor.disable()
    memory.settle()
    assert [pool.prefix_bytes for pool in torch_vtensor.stats().devices.values()] == [0]
    assert not prefix_cache.trees_of(model_of("llama"))


def test_prefixes_give_way_to_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_KEPT_FRACTION", 1)
    model, long = model_of("llama"), said(prompt(1, 400)["input_ids"].flip(1))
    with torch_vtensor.enabled():
        output = generate(model, long, return_dict_in_generate=True)
        (pool,) = torch_vtensor.stats().devices.values()
        cold, needed_bytes = output.sequences, pool.live_bytes
        del output
    with torch_vtensor.enabled(prefix_cache=True, budget_bytes=needed_bytes + 4096):
        generate(model, prompt(1))
        assert torch_vtensor.stats().prefixes["tokens recorded"] == 135
        warm = generate(model, long)
        assert torch_vtensor.stats().prefixes["tokens evicted"] >= 135
    assert torch.equal(warm, cold)


def test_tenants_are_kept_apart() -> None:
    model = model_of("llama")
    with torch_vtensor.enabled(prefix_cache=True):
        for salt, expected in (("alice", 0), ("bob", 0), ("alice", 129), (None, 129), (None, 258)):
            with torch_vtensor.prefix_salt(salt):
                generate(model, prompt(1))
            assert reused() == expected
        generate(model, prompt(1))
        assert reused() == 258 + 129


def test_rotary_frequencies_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**sizes(rope_parameters=rope, rope_scaling=rope))
    model = transformers.LlamaForCausalLM(config).eval()
    with torch_vtensor.enabled(prefix_cache=True):
        generate(model, prompt(1)), generate(model, prompt(1))
    assert reasons() == {"rotary frequencies that depend on the length": 2}
    assert torch_vtensor.explain(model)[0].prefix == "not reused: rotary frequencies that depend on the length"


def test_other_calls_are_counted_and_say_the_same() -> None:
    model, first = model_of("llama"), prompt(1)
    embeds = model.get_input_embeddings()(first["input_ids"]).detach()
    holes = first["attention_mask"].clone()
    holes[:, 50] = 0
    calls: list[dict[str, Any]] = [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 32},
        {"attention_mask": holes},
        {"position_ids": torch.arange(130)[None] + 3},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ]
    with torch_vtensor.enabled(prefix_cache=True):
        generate(model, first)
        for options in calls:
            generate(
                model,
                first | options if "attention_mask" in options else first,
                **({} if "attention_mask" in options else options),
            )
        model.generate(inputs_embeds=embeds, attention_mask=first["attention_mask"], max_new_tokens=2)
        assert reused() == 0
        assert sum(reasons().values()) == len(calls) + 1, reasons()
        assisted = generate(model, first, assistant_model=assistant_of("llama"))
        assert torch.equal(assisted, generate(model, first))


def test_short_prompts_are_not_worth_it() -> None:
    model = model_of("llama")
    with torch_vtensor.enabled(prefix_cache=True):
        for _ in range(2):
            generate(model, prompt(1, 6), max_new_tokens=4)
        assert reused() == 0
        assert reasons("not recorded") == {"fewer tokens than are worth it": 2}


def test_what_would_not_fill_half_a_page_stays_in_ordinary_memory(memory: Memory) -> None:
    model = model_of("llama")
    with torch_vtensor.enabled(prefix_cache=True):
        output = generate(model, prompt(1, 20), return_dict_in_generate=True)
        found = torch_vtensor.memory(output.past_key_values)
        if memory.layout == "strips":  # of 64 tokens a head
            assert found.committed_bytes == 0 < found.ordinary_bytes
            assert reasons("not recorded") == {"fewer tokens than are worth it": 1}
        else:  # of 5 tokens of every layer
            assert torch_vtensor.stats().prefixes["tokens recorded"] == 25


def test_blocks_and_the_switch_keep_prefixes_as_long_as_one_wants_them() -> None:
    model = model_of("llama")
    with torch_vtensor.enabled(prefix_cache=True):
        with torch_vtensor.enabled(prefix_cache=True):
            generate(model, prompt(1))
        generate(model, prompt(1))
        assert reused() == 129
        with torch_vtensor.enabled():
            generate(model, prompt(1))
    with torch_vtensor.enabled():
        generate(model, prompt(1))
    assert not prefix_cache.trees_of(model)
