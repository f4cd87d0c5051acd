"""Session: whatever is said, branched, taken back, saved or refused, it says what the model says to all its tokens."""

from __future__ import annotations

import copy
import functools
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import garbage
import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paged_memory import Memory
from test_identity_gpu import MODELS
from tiny_models import (
    ENCODER_DECODER,
    FAMILIES,
    LONG_WINDOW,
    OWN_CACHE,
    SHORT_WINDOW,
    STATEFUL,
    model_of,
    sizes,
)

import torch_vtensor
from torch_vtensor import Session
from torch_vtensor.allocator import pools
from torch_vtensor.errors import ClosedError
from torch_vtensor.generation import layers, prefix_cache, session_file, turns
from torch_vtensor.generation.decode import graphs, loop, program, prompt_parts

GREEDY = {"do_sample": False, "eos_token_id": None}
LIKE_LLAMA = ("llama", "gpt2", "mixtral", "deepseek_v3")  # GQA, MHA, experts, MLA
SLIDING = ("gemma3", "mistral-short-window", "gpt_oss")


def ids(num_tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.lru_cache(4096)
def plain(family: str, tokens: tuple[int, ...], num_new: int) -> list[int]:
    """What the model answers to all of these tokens at once, over transformers' own cache."""
    ids = torch.tensor([tokens])  # some may be the padding token
    output = model_of(family).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, **GREEDY)
    return output[0, len(tokens) :].tolist()


@pytest.fixture
def num_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """How many tokens each call of a model took, from now on; without a hook."""

    def watch(model: Any) -> list[int]:
        counts: list[int] = []
        stock = model.forward

        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            counts.append(kwargs["input_ids"].shape[1])
            return stock(*args, **kwargs)

        monkeypatch.setattr(model, "forward", forward)
        return counts

    return watch


@pytest.mark.parametrize("family", [*LIKE_LLAMA, *SLIDING])
def test_turns_branches_and_what_is_taken_back_say_what_the_model_says(family: str, tmp_path: Path) -> None:
    with Session(model_of(family)) as session:
        first = session.generate(ids(70), max_new_tokens=8, **GREEDY)
        assert first == plain(family, tuple(ids(70)), 8)
        branches = session.fork(2)
        for seed, branch in enumerate(branches):
            said = (*session.tokens, *ids(20 + seed, seed))
            assert branch.generate(ids(20 + seed, seed), max_new_tokens=5, **GREEDY) == plain(family, said, 5)
        assert session.tokens == ids(70) + first
        branches[0].save(tmp_path / "branch")
        tokens = branches[0].tokens
        with Session.load(tmp_path / "branch", model_of(family)) as loaded:
            assert loaded.tokens == tokens
            assert loaded.generate(max_new_tokens=3, **GREEDY) == plain(family, tuple(tokens), 3)
        for num_kept in (93, 74, 40):
            branches[0].truncate(num_kept)
            said = (*branches[0].tokens, *ids(9, num_kept))
            assert said[:num_kept] == tuple(tokens[:num_kept])
            assert branches[0].generate(ids(9, num_kept), max_new_tokens=4, **GREEDY) == plain(family, said, 4)
        for branch in branches:
            branch.close()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_only_new_tokens_are_run(family: str, num_run: Callable[[Any], list[int]]) -> None:
    model = model_of(family)
    counts = num_run(model)
    with Session(model) as session:
        session.generate(ids(70), max_new_tokens=3, **GREEDY)
        assert counts == [70, 1, 1]
        session.generate(ids(10), max_new_tokens=2, **GREEDY)
        assert counts[3:] == [11, 1]  # the last answer's last token is not in the cache
        session.truncate(73)  # to answer the second turn again
        session.generate(ids(12), max_new_tokens=1, **GREEDY)
        assert counts[5:] == [13 if family == "gemma3" else 12]  # windows go back to the beginning of the turn
        (branch,) = session.fork()
        assert branch.num_cached == session.num_cached == session.length - 1
        branch.truncate(20)
        assert branch.num_cached == (0 if family == "gemma3" else 20)  # a window has dropped it
        branch.close()


def test_branches_share_pages_and_close_gives_them_back(memory: Memory) -> None:
    session = Session(model_of("llama"))
    session.generate(ids(400), max_new_tokens=1, **GREEDY)
    alone = memory.live_bytes
    branches = session.fork(4)
    for branch in branches:
        branch.generate(ids(2), max_new_tokens=1, **GREEDY)
    assert all(branch.memory().shared_bytes > 0.6 * branch.memory().committed_bytes for branch in branches)
    assert memory.live_bytes < 2.2 * alone
    session.close(), session.close()
    for branch in branches:
        branch.close()
    garbage.collect()
    assert memory.live_bytes == 0
    assert repr(session) == "Session(closed)"
    for use in (session.fork, session.generate, lambda: session.tokens, lambda: session.truncate(0)):
        with pytest.raises(ClosedError, match="this session is closed"):
            use()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_logits_and_other_outputs_are_those_of_the_model() -> None:
    model = model_of("llama")
    with Session(model) as session:
        session.generate(ids(50), max_new_tokens=4, **GREEDY)
        output = session.generate(
            torch.tensor([ids(7)]), max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        assert output.sequences[0].tolist() == session.tokens
        with torch.no_grad():
            expected = model(output.sequences).logits[0, -4:-1]
        torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-4, rtol=1e-4)


def test_a_prefix_is_run_once_for_all_sessions(num_run: Callable[[Any], list[int]], memory: Memory) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    counts = num_run(model)
    system, other = ids(200), ids(30, 1)
    with Session(model) as session, session.prefix(system) as prefix:
        assert (prefix.num_tokens, counts, session.length) == (200, [200], 0)
        held = memory.live_bytes
        sessions = [Session(model) for _ in range(3)]
        for index, each in enumerate([session, *sessions]):
            question = ids(10 + index, index)
            answer = each.generate(system + question, max_new_tokens=2, **GREEDY)
            assert counts[-2:] == [10 + index, 1]
            expected = model.generate(torch.tensor([system + question]), max_new_tokens=2, **GREEDY)
            assert each.tokens == expected[0].tolist() == system + question + answer
        assert all(each.memory().shared_bytes > 0 for each in sessions)
        with session.prefix(system + other), torch_vtensor.prefix_salt("another tenant"):
            assert counts[-1] == 30
            Session(model).generate(system, max_new_tokens=1, **GREEDY)
            assert counts[-1] == 200
        torch_vtensor.trim()
        Session(model).generate(system + other, max_new_tokens=1, **GREEDY)
        assert counts[-1] == 30, "a prefix that is pinned stays"
        assert held < memory.live_bytes
    prefix.release()
    assert not prefix_cache.trees_of(model)
    for each in sessions:
        each.close()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_system_prompt_is_run_once_for_all_chats(num_run: Callable[[Any], list[int]]) -> None:
    model, told = model_of("llama"), tokenizer(CHAT)
    system = {"role": "system", "content": "you are kind, and know what a page is. " * 3}
    counts = num_run(model)
    with Session(model, told) as session, session.prefix([system]):
        num_system = counts.pop()
        assert num_system == len(told.apply_chat_template([system], return_dict=False))
        for _ in range(2):
            with Session(model, told) as chat:
                chat.messages = [system]
                chat.chat("hello", max_new_tokens=1, **GREEDY)
                assert counts[-1] == chat.length - 1 - num_system


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_prefix_of_a_model_that_changed_is_not_found() -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    with Session(model) as session, session.prefix(ids(100)):
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        session.generate([*ids(100), 5], max_new_tokens=4, **GREEDY)
        assert session.tokens == model.generate(torch.tensor([[*ids(100), 5]]), max_new_tokens=4, **GREEDY)[0].tolist()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_prefixes_outlive_enable_and_are_shared_with_generate(num_run: Callable[[Any], list[int]]) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().eval()
    counts = num_run(model)
    with Session(model) as session, session.prefix(ids(100)):
        with torch_vtensor.enabled(prefix_cache=True):
            answered = model.generate(torch.tensor([ids(100) + ids(5)]), max_new_tokens=2, **GREEDY)[0].tolist()
            assert counts[1:] == [5, 1]
            session.generate([*answered, 7], max_new_tokens=1, **GREEDY)
            assert counts[3:] == [2]
        Session(model).generate([*answered, 7], max_new_tokens=1, **GREEDY)
        assert counts[4:] == [8], "what generate() left ends with the block, what is pinned does not"


def tokenizer(template: str) -> Any:
    """A token a character, with a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    characters = {char: index for index, char in enumerate("#<>? abcdefghijklmnopqrstuvwxyz.,:")}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", chat_template=template)


CHAT = (
    "{% for m in messages %}<{{ m.role }}:{{ m.content }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant:{% endif %}"
)
FORGETS = CHAT.replace("m.content", "(m.content if m.role == 'user' else '.')")


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("template", [CHAT, FORGETS], ids=["as said", "rewritten"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chat_runs_what_the_template_has_not_written_before(
    family: str, template: str, num_run: Callable[[Any], list[int]]
) -> None:
    model, told = model_of(family), tokenizer(template)
    session = Session(model, told)
    answers = []
    for content in ("hello there", "who are you, and why?", "ah."):
        answers.append(session.chat(content, max_new_tokens=12, **GREEDY))
        asked = told.apply_chat_template(session.messages[:-1], add_generation_prompt=True, return_dict=False)
        assert answers[-1] == told.decode(plain(family, tuple(asked), 12), skip_special_tokens=True)
    assert [message["content"] for message in session.messages[1::2]] == answers
    counts = num_run(model)
    del session.messages[-2:]  # say something else
    session.chat("oh.", max_new_tokens=2, **GREEDY)
    asked = told.apply_chat_template(session.messages[:-1], add_generation_prompt=True, return_dict=False)
    assert session.messages[-1]["content"] == told.decode(plain(family, tuple(asked), 2), skip_special_tokens=True)
    if template is CHAT and family == "llama":  # a window goes back to where a turn began, or is run again
        assert counts[0] <= 40 < len(asked)
    del session.messages[-1]
    with pytest.raises(ValueError, match="nothing to answer"):
        Session(model, told).chat()
    assert session.chat(max_new_tokens=2, **GREEDY) == session.messages[-1]["content"]
    assert session.generate("and", max_new_tokens=1, **GREEDY) == [session.tokens[-1]]
    session.close()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_decoding_continues_a_session(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "compile_step", lambda forward: forward)
    monkeypatch.setattr(prompt_parts, "compile_parts", lambda twin: None)
    monkeypatch.setattr(program, "_traced", weakref.WeakKeyDictionary())
    monkeypatch.setattr(loop, "_refused", weakref.WeakSet())
    monkeypatch.setattr(loop, "_prompts_refused", weakref.WeakSet())
    layers.counters.clear()
    with torch_vtensor.enabled(compile=True), Session(model_of(family)) as session:
        tokens: tuple[int, ...] = ()
        for seed in range(3):
            tokens += tuple(ids(20, seed))
            tokens += tuple(session.generate(ids(20, seed), max_new_tokens=6, **GREEDY))
        (branch,) = session.fork()
        branch.truncate(60)
        assert branch.generate(max_new_tokens=6, **GREEDY) == plain(family, tokens[:60], 6)
        branch.close()
        assert not [reason for reason in torch_vtensor.stats().appends if reason.startswith("stock loop")]
    expected: tuple[int, ...] = ()
    for seed in range(3):
        expected += tuple(ids(20, seed))
        expected += tuple(plain(family, expected, 6))
    assert tokens == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_turn_that_fails_leaves_the_session_as_it_was(family: str) -> None:
    session = Session(model_of(family), tokenizer(CHAT))
    session.generate(ids(70), max_new_tokens=4, **GREEDY)
    before, kept = session.tokens, session.num_cached
    (pool,) = (scheduler.pool for scheduler in pools.all_schedulers().values())
    torch_vtensor.trim()
    pool.budget_bytes = pool.ledger.committed_bytes + 8 * 4096
    with pytest.raises(torch_vtensor.OutOfPagesError):
        session.generate(ids(30), max_new_tokens=300, **GREEDY)
    with Session(model_of(family), tokenizer(CHAT)) as chat, pytest.raises(torch_vtensor.OutOfPagesError):
        chat.chat("hello", max_new_tokens=600, **GREEDY)
    assert chat.messages == []
    pool.budget_bytes = None
    assert session.tokens == before
    # A window that has moved on goes back to where the turn began, if there are pages for it.
    assert session.num_cached == kept if family == "llama" else session.num_cached in (kept, 0)

    class Stop(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 100:
                raise KeyboardInterrupt
            return scores

    with pytest.raises(KeyboardInterrupt):
        session.generate(ids(20), max_new_tokens=300, logits_processor=[Stop()], **GREEDY)
    assert session.tokens == before
    assert session.generate(ids(30), max_new_tokens=5, **GREEDY) == plain(family, (*before, *ids(30)), 5)
    pool.budget_bytes = pool.ledger.committed_bytes
    with pytest.raises(torch_vtensor.OutOfPagesError):
        session.fork(50)
    pool.budget_bytes = None
    session.close()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_what_a_session_cannot_do_is_refused_with_the_reason() -> None:
    for family in (*ENCODER_DECODER, *STATEFUL, "lfm2"):
        with pytest.raises(ValueError, match="no session over") as caught:
            Session(model_of(family))
        assert family not in ENCODER_DECODER or "an encoder-decoder" in str(caught.value)
        assert family in (*ENCODER_DECODER, *OWN_CACHE) or "something else than keys and values" in str(caught.value)
    with pytest.raises(TypeError, match="not a Linear"):
        Session(torch.nn.Linear(1, 1))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = transformers.LlamaConfig(**sizes(rope_parameters=rope, rope_scaling=rope))
    with pytest.raises(ValueError, match="rotary frequencies that depend on the length"):
        Session(transformers.LlamaForCausalLM(dynamic).eval())
    session = Session(model_of("llama"))
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "nothing to go on from"),
        ([96], {}, "token 96 is none of the model's, which go from 0 to 95"),
        ([-1], {}, "token -1"),
        ([[1, 2], [3, 4]], {}, r"a turn is tokens \[T\]"),
        (torch.rand(3), {}, r"a turn is tokens"),
        ("text", {}, "needs a tokenizer"),
        ([1], {"num_beams": 2}, "num_beams is 2; a session is one sequence"),
        ([1], {"num_return_sequences": 3, "do_sample": True}, r"fork\(3\) makes several"),
        ([1], {"prompt_lookup_num_tokens": 3}, "assisted generation, by prompt_lookup_num_tokens, runs again"),
        ([1], {"past_key_values": None, "attention_mask": None}, "attention_mask, past_key_values"),
    ]
    for turn, options, message in refused:
        with pytest.raises(ValueError, match=message):
            session.generate(turn, **options)
    for act, message in (
        (lambda: session.chat("x"), "messages need a tokenizer"),
        (lambda: session.fork(0), "at least 1"),
        (lambda: session.truncate(1), "the session has 0"),
        (lambda: session.prefix([]), "a prefix of 0 tokens: give at least one"),
        (lambda: Session(model_of("gemma3")).prefix(ids(48)), "a sliding window keeps no more than 47"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    hook = model_of("llama").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be kept for others: hooks run in forward"):
        session.prefix(ids(40))
    hook.remove()
    assert session.length == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_saved_rows_are_restored_bit_for_bit(family: str, tmp_path: Path) -> None:
    path = tmp_path / "session"
    session = Session(model_of(family))
    session.generate(ids(LONG_WINDOW + 20), max_new_tokens=4, **GREEDY)
    session.messages = [{"role": "user", "content": "ü"}]
    session.save(path)
    loaded = Session.load(path, model_of(family))
    assert (loaded.tokens, loaded.messages, loaded.num_cached) == (session.tokens, session.messages, session.num_cached)
    for ours, theirs in zip(loaded._open().layers, session._open().layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert layers.state_of(ours) is not None
    if family != "llama":
        assert path.stat().st_size < 2 * (SHORT_WINDOW + LONG_WINDOW + 20) * 3 * 2 * 16 * 4 * 2 + 8192
    session.close(), loaded.close()


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "session", model_of("llama")
    session = Session(model)
    session.generate(ids(80), max_new_tokens=2, **GREEDY)
    session.save(path)
    written = path.read_bytes()

    def refused(message: str, other: Any = model, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            Session.load(path, other)

    refused("class LlamaForCausalLM .the model: GPT2LMHeadModel", model_of("gpt2"))
    refused("dtype torch.float32 .the model: torch.bfloat16", transformers.LlamaForCausalLM(model.config).bfloat16())
    refused("the same sizes and other weights .* differ, lm_head.weight", transformers.LlamaForCausalLM(model.config))
    monkeypatch.setattr(session_file, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        session.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["session"]
    assert path.read_bytes() == written
    path.write_bytes(written[: len(written) // 2])
    refused("is no session's file, or is cut short")
    path.write_bytes(b"")
    refused("is no session's file")
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    refused("of format None")
    path.unlink()
    refused("does not exist", error=FileNotFoundError)
    path.mkdir()
    refused("is a folder")
    path.rmdir()
    path.write_bytes(written)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for changed in (
        {"seen": ""},
        {"seen": '{"77": 3}'},
        {"chat": "[]"},
        *({name: None} for name in ("model", "weights", "seen", "chat")),
    ):
        told = {name: text for name, text in (metadata | changed).items() if text is not None}
        save_file(tensors, path, told)
        refused("was changed or damaged")
    save_file(
        {"tokens": tensors["tokens"][:5], **{name: tensors[name] for name in tensors if name != "tokens"}},
        path,
        metadata,
    )
    refused("its tensors are of other sizes")
    save_file(tensors | {"tokens": torch.full_like(tensors["tokens"], 96)}, path, metadata)
    refused("token 96 is none of the model's")
    path.write_bytes(written)
    live_bytes = memory.live_bytes
    pool = next(iter(pools.all_schedulers().values())).pool
    torch_vtensor.trim()
    pool.budget_bytes = pool.ledger.committed_bytes
    refused("out of pages", error=torch_vtensor.OutOfPagesError)
    pool.budget_bytes = None
    garbage.collect()
    assert memory.live_bytes == live_bytes
    session.close()


def small(family: str = "llama") -> Any:
    """A model of the test's own, to change."""
    torch.manual_seed(0)
    return FAMILIES[family].make().eval()


def cold(model: Any, tokens: list[int], num_new: int) -> list[int]:
    tokens_1T = torch.tensor([tokens])
    return model.generate(tokens_1T, max_new_tokens=num_new, num_beams=1, **GREEDY)[0, len(tokens) :].tolist()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_model_whose_generation_config_uses_no_cache_has_one_in_a_session() -> None:
    model = small()
    model.generation_config.use_cache = False
    with Session(model) as session:
        said: list[int] = []
        for seed in range(2):
            said += ids(40, seed)
            said += session.generate(ids(40, seed), max_new_tokens=5, **GREEDY)
            assert said[-5:] == cold(model, said[:-5], 5)
            assert session.num_cached == len(said) - 1
        given = transformers.GenerationConfig(max_new_tokens=5, do_sample=False)
        said += ids(3)
        said += session.generate(ids(3), generation_config=given)
        assert said[-5:] == cold(model, said[:-5], 5)
        given.use_cache = False
        with pytest.raises(ValueError, match="says use_cache=False; a session is a cache"):
            session.generate(ids(3), generation_config=given)


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_settings_of_the_models_own_are_refused_as_those_of_a_call() -> None:
    given = transformers.GenerationConfig(max_new_tokens=5, do_sample=False)
    refused = {
        "num_beams": (2, "num_beams is 2; a session is one sequence"),
        "prompt_lookup_num_tokens": (3, "assisted generation, by prompt_lookup_num_tokens"),
        "cache_implementation": ("static", "cache_implementation is 'static'"),
    }
    for name, (value, message) in refused.items():
        model = small()
        with Session(model) as session:
            setattr(model.generation_config, name, value)
            for options in ({"generation_config": given}, {"max_new_tokens": 2}):
                with pytest.raises(ValueError, match=message):
                    session.generate(ids(40), **options)
            assert session.length == 0


class Silent:
    """A streamer."""

    def put(self, tokens: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_settings_that_change_between_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted last is remembered, for turns that ask for the very same."""
    checked: list[Any] = []
    stock = turns.effective_settings
    monkeypatch.setattr(turns, "effective_settings", lambda *given: checked.append(given) or stock(*given))
    model, other_model = small(), small()
    config = model.generation_config
    config.suppress_tokens = [1]
    with Session(model) as session, Session(other_model) as other:

        def is_checked(session: Session = session, **options: Any) -> bool:
            checked.clear()
            said = session.tokens
            answer = session.generate(ids(2), max_new_tokens=2, **GREEDY, **options)
            assert answer == cold(session.model, [*said, *ids(2)], 2)
            assert session.num_cached == session.length - 1
            return bool(checked)

        assert is_checked()
        assert not is_checked()
        assert is_checked(other)
        assert is_checked(streamer=Silent())
        assert not is_checked(streamer=Silent())
        assert is_checked(logits_processor=transformers.LogitsProcessorList())
        assert is_checked(repetition_penalty=1.0)
        assert is_checked(repetition_penalty=1)
        for name, value in (("num_beams", 2), ("max_new_tokns", 3)):
            with pytest.raises(ValueError, match=name):
                session.generate(ids(2), max_new_tokens=2, **GREEDY, **{name: value})
        assert is_checked()
        assert not is_checked()
        for name, value, message in (("num_beams", 2, "num_beams is 2"), ("prompt_lookup_num_tokens", 3, "assisted")):
            before = getattr(config, name)
            setattr(config, name, value)
            with pytest.raises(ValueError, match=message):
                session.generate(ids(2), max_new_tokens=2, **GREEDY)
            setattr(config, name, before)
        assert not is_checked()
        config.suppress_tokens[0] = 2  # in place
        assert is_checked()
        assert not is_checked()
        config.use_cache = False
        assert is_checked()
        assert not is_checked()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_cache_of_several_sequences_is_not_gone_on_from() -> None:
    def double(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        output = model(input_ids.expand(2, -1), past_key_values=options.get("past_key_values", options.get("cache")))
        return torch.cat([input_ids, output.logits[:1, -1:].argmax(-1)], 1)

    with Session(model_of("llama")) as session:
        answer = session.generate(ids(40), custom_generate=double, max_new_tokens=1)
        assert session.num_cached == 0
        assert session.generate(ids(5), max_new_tokens=4, **GREEDY) == plain("llama", (*ids(40), *answer, *ids(5)), 4)


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_what_says_more_than_tokens_is_refused() -> None:
    with Session(model_of("gpt2"), tokenizer(CHAT)) as session:
        with pytest.raises(ValueError, match=r"more than tokens .token_type_ids., and a session knows again"):
            session.generate(ids(40), token_type_ids=torch.full((1, 40), 7), max_new_tokens=2)
        refused: list[tuple[Any, str]] = [
            ([1.7, 2.2], r"a turn is tokens \[T\].*float32"),
            (torch.tensor([True, False]), r"a turn is tokens.*bool"),
            ([True, 5], "True or False among them"),
            (5, "not 5"),
            ([[1, 2], [3]], "a list or tensor of token ids"),
            ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "without padding"),
            ({"attention_mask": [1, 1]}, "has input_ids"),
            ({"input_ids": [1, 2], "pixel_values": torch.ones(1)}, "more than tokens .pixel_values."),
        ]
        for turn, message in refused:
            with pytest.raises(ValueError, match=message):
                session.generate(turn, max_new_tokens=2)
        assert session.length == 0
        encoding = session.tokenizer("hello", return_tensors="pt", return_token_type_ids=False)
        assert type(encoding) is transformers.BatchEncoding
        session.generate(encoding, max_new_tokens=1, **GREEDY)
        assert session.tokens[:5] == encoding["input_ids"][0].tolist()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_call_that_is_refused_costs_nothing(num_run: Callable[[Any], list[int]]) -> None:
    model = model_of("llama")
    with Session(model, tokenizer(CHAT)) as session:
        session.chat("hello there, who are you", max_new_tokens=4, **GREEDY)
        kept = session.num_cached
        session.messages = [{"role": "user", "content": "something else"}]
        for options, message in (({"max_new_tokns": 3}, "max_new_tokns"), ({"num_beams": 2}, "num_beams is 2")):
            with pytest.raises(ValueError, match=message):
                session.chat(**options)
            assert session.num_cached == kept


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_truncate_takes_messages_back_and_chat_loses_nothing_of_generate(tmp_path: Path) -> None:
    model, told = model_of("llama"), tokenizer(CHAT)
    letters = GREEDY | {"suppress_tokens": [*range(5), *range(31, 96)]}  # what the tokenizer can write
    with Session(model, told) as session:
        system = {"role": "system", "content": "be kind."}
        session.messages = [system]
        session.truncate(0)
        assert session.messages == [system], "it was not said yet"
        answers = [session.chat(content, max_new_tokens=4, **letters) for content in ("hello", "and you")]
        said, first_end = list(session.messages), session.length
        begun, asked = (len(told.apply_chat_template(said[:n], return_dict=False)) for n in (2, 4))
        session.save(tmp_path / "session")
        loaded = Session.load(tmp_path / "session", model, told)
        for each, num_kept, num_messages in (
            (session, first_end, 5), (session, first_end - 1, 4), (session, asked, 4), (session, asked - 1, 3),
            (loaded, asked + 3, 4), (loaded, begun, 2), (loaded, 3, 0),
        ):  # fmt: skip
            each.truncate(num_kept)
            assert each.messages == said[:num_messages]
        assert session.chat("and you", max_new_tokens=4, **letters) == answers[1]
        (branch,) = session.fork()
        branch.messages[0]["content"] = "be rude."
        assert session.messages[0]["content"] == "be kind.", "a branch has messages of its own"
        num_chatted = session.length
        more = session.generate(max_new_tokens=3, **letters)
        with pytest.raises(ValueError, match=rf"generate.. has said 3 tokens .*truncate.{num_chatted}. takes them"):
            session.chat("so", max_new_tokens=2, **letters)
        assert (session.length, len(session.messages)) == (num_chatted + 3, 5)
        session.messages[-1]["content"] += told.decode(more)
        session.chat("so", max_new_tokens=2, **letters)
        loaded.close(), branch.close()


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_prefix_is_what_the_model_computes_whatever_it_generates_by(num_run: Callable[[Any], list[int]]) -> None:
    model = small()
    counts = num_run(model)
    model.generation_config.num_beams, model.generation_config.stop_strings = 2, ["x"]
    model.generation_config.use_cache = False
    with Session(model) as session, session.prefix(ids(60)):
        assert counts == [60]
        model.generation_config = transformers.GenerationConfig()
        assert session.generate([*ids(60), 5], max_new_tokens=4, **GREEDY) == cold(model, [*ids(60), 5], 4)
        assert counts[1] == 1
        counts.clear()
        model.train()
        with pytest.raises(ValueError, match="cannot be kept for others: the model is in training mode"):
            session.prefix(ids(70))
        assert counts == []


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_short_prefix_is_lent_too(num_run: Callable[[Any], list[int]]) -> None:
    model = model_of("llama")
    counts = num_run(model)
    with Session(model) as session:
        with session.prefix(ids(5)):
            Session(model).generate([*ids(5), 7], max_new_tokens=1, **GREEDY)
            Session(model).generate([*ids(4), 1, 7], max_new_tokens=1, **GREEDY)
            session.generate(ids(9), max_new_tokens=3, **GREEDY)
            assert (counts[:3], counts[3]) == ([5, 1, 6], 4)
        assert session.tokens[9:] == plain("llama", tuple(ids(9)), 3)


def held_by_prefixes() -> int:
    return sum(pool.prefix_bytes for pool in torch_vtensor.stats().devices.values())


def under_autocast(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Session(model).generate(ids(20, 1), max_new_tokens=1, **GREEDY)


def under_eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")
    Session(model).generate(ids(20, 1), max_new_tokens=1, **GREEDY)
    model.set_attn_implementation("sdpa")


def with_a_prefix_of_its_own(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.active_adapters, layer.scaling = ["other"], {"other": 1.0}  # as PEFT's layers have them
    with Session(model).prefix(ids(100)), Session(model) as session:
        session.generate(ids(101), max_new_tokens=1, **GREEDY)
        assert session.memory().shared_bytes > 0
    layer.active_adapters = []
    del layer.scaling


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("act", [under_autocast, under_eager_attention, with_a_prefix_of_its_own])
def test_a_prefix_outlasts_calls_in_another_state(
    act: Callable[[Any], None], memory: Memory, num_run: Callable[[Any], list[int]]
) -> None:
    model = small()
    with Session(model).prefix(ids(100)), torch_vtensor.enabled(prefix_cache=True):
        act(model)
        counts = num_run(model)
        with Session(model) as session:
            session.generate(ids(101), max_new_tokens=1, **GREEDY)
        assert counts == [1]
    assert not prefix_cache.trees_of(model)
    memory.settle()
    assert held_by_prefixes() == 0


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_prefix_of_weights_that_are_gone_is_gone_when_released(memory: Memory) -> None:
    model = small()
    prefix = Session(model).prefix(ids(300))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    Session(model).generate(ids(20), max_new_tokens=1, **GREEDY)
    prefix.release()
    memory.settle()
    assert held_by_prefixes() == 0, "though the handle is still there"


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_prefix_that_is_being_kept_is_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    stock = prefix_cache._tree_for
    threads: list[threading.Thread] = []

    def tree_for(*args: Any) -> Any:
        tree = stock(*args)
        threads.append(threading.Thread(target=prefix_cache.clear))  # as another session's release
        threads[-1].start()
        threads[-1].join(0.2)
        return tree

    monkeypatch.setattr(prefix_cache, "_tree_for", tree_for)
    with Session(model).prefix(ids(100)):
        threads[0].join()
        with Session(model) as session:
            session.generate(ids(101), max_new_tokens=1, **GREEDY)
            assert session.memory().shared_bytes > 0


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_file_is_of_these_weights_to_the_bit_and_of_these_settings(tmp_path: Path) -> None:
    model = small()
    with Session(model) as session:
        session.generate(ids(30), max_new_tokens=2, **GREEDY)
        session.save(tmp_path / "session")

    def refused(message: str, other: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Session.load(tmp_path / "session", other)

    config = copy.deepcopy(model.config)
    config.rms_norm_eps, config.pad_token_id, config.use_cache = 1e-3, 5, False
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    refused(r"of another model: rms_norm_eps 1e-0\d .the model: 0.001.\. Load", other)
    config.rms_norm_eps = model.config.rms_norm_eps
    Session.load(tmp_path / "session", other).close()
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[[3, 4]] = weight[[4, 3]]
        refused("other weights .1 of .* differ, model.layers.1.mlp.up_proj.weight", model)
        weight[[3, 4]] = weight[[4, 3]]
        Session.load(tmp_path / "session", model).close()
    layer = model.model.layers[0].self_attn.k_proj
    layer.active_adapters, layer.scaling = ["other"], {"other": 1.0}
    refused("adapters .. .the model: .*other", model)


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_file_is_on_disk_with_the_mode_of_the_one_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    stock = os.fsync
    monkeypatch.setattr(session_file.os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), stock(file)))
    path, link = tmp_path / "session", tmp_path / "link"
    with Session(model_of("llama")) as session:
        session.generate(ids(9), max_new_tokens=2, **GREEDY)
        (tmp_path / "new").touch()
        session.save(path)
        assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
        assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
        path.chmod(0o640)
        link.symlink_to("session")
        session.generate(ids(9), max_new_tokens=2, **GREEDY)
        session.save(link)
        assert (link.is_symlink(), path.stat().st_mode & 0o777) == (True, 0o640)
        with Session.load(path, model_of("llama")) as loaded:
            assert loaded.tokens == session.tokens
        assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "new", "session"]


class SessionMachine(RuleBasedStateMachine):
    """The model: of every session, its tokens. What it says next is what a plain run on all of them says."""

    memory: ClassVar[Memory]
    family: ClassVar[str]

    @initialize()
    def start(self) -> None:
        self.sessions = [(Session(model_of(self.family)), [])]
        self.prefixes: list[Any] = []
        self.folder = tempfile.TemporaryDirectory()

    def pick(self, data: st.DataObject) -> tuple[Session, list[int]]:
        return data.draw(st.sampled_from(self.sessions), label="session")

    @rule(data=st.data(), num_tokens=st.sampled_from([0, 1, 3, 20, 50]), seed=st.integers(0, 2))
    def generate(self, data: st.DataObject, num_tokens: int, seed: int) -> None:
        session, tokens = self.pick(data)
        turn = ids(num_tokens, seed)
        if not tokens + turn or len(tokens) > 400:
            return
        output = session.generate(turn, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **GREEDY)
        tokens += turn
        answer = plain(self.family, tuple(tokens), 3)
        tokens += answer
        assert output.sequences[0].tolist() == tokens
        with torch.no_grad():
            expected = model_of(self.family)(torch.tensor([tokens])).logits[0, -4:-1]
        torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-3, rtol=1e-3)

    @rule(data=st.data(), spare_pages=st.integers(0, 12))
    def run_out_of_pages(self, data: st.DataObject, spare_pages: int) -> None:
        session, tokens = self.pick(data)
        torch_vtensor.trim()
        (pool,) = [each.pool for each in pools.all_schedulers().values()] or [None]
        if pool is None or not tokens:
            return
        pool.budget_bytes = pool.ledger.committed_bytes + spare_pages * 4096 or 4096
        try:
            session.generate(ids(200), max_new_tokens=2, **GREEDY)
        except torch_vtensor.OutOfPagesError:
            assert session.tokens == tokens
        else:
            session.truncate(len(tokens))
        finally:
            pool.budget_bytes = None

    @precondition(lambda self: len(self.sessions) < 4)
    @rule()
    def begin(self) -> None:
        self.sessions.append((Session(model_of(self.family)), []))

    @precondition(lambda self: len(self.prefixes) < 2)
    @rule(data=st.data(), num_tokens=st.sampled_from([20, 40]), seed=st.integers(0, 2))
    def keep_a_prefix(self, data: st.DataObject, num_tokens: int, seed: int) -> None:
        session, _ = self.pick(data)
        self.prefixes.append(session.prefix(ids(50, seed)[:num_tokens]))

    @precondition(lambda self: self.prefixes)
    @rule()
    def let_a_prefix_go(self) -> None:
        self.prefixes.pop(0).release()

    @precondition(lambda self: len(self.sessions) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        session, tokens = self.pick(data)
        self.sessions += [(forked, list(tokens)) for forked in session.fork(2)]

    @rule(data=st.data(), part=st.sampled_from([0.0, 0.3, 0.9, 1.0]), by=st.integers(0, 3))
    def truncate(self, data: st.DataObject, part: float, by: int) -> None:
        session, tokens = self.pick(data)
        num_kept = max(int(len(tokens) * part) - by, 0)
        session.truncate(num_kept)
        del tokens[num_kept:]

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        session, tokens = self.pick(data)
        path = Path(self.folder.name) / "session"
        session.save(path)
        self.sessions.remove((session, tokens))
        session.close()
        self.sessions.append((Session.load(path, model_of(self.family)), tokens))

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session, tokens = self.pick(data)
        self.sessions.remove((session, tokens))
        session.close()

    @invariant()
    def every_session_has_its_tokens(self) -> None:
        for session, tokens in self.sessions:
            assert session.tokens == tokens
            assert session.num_cached <= len(tokens)

    def teardown(self) -> None:
        for session, _ in self.sessions:
            session.close()
        for prefix in self.prefixes:
            prefix.release()
        self.sessions.clear()
        self.folder.cleanup()
        if sys.exc_info()[0] is None:  # otherwise its traceback holds caches
            self.memory.check_nothing_left()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sessions_of_any_life_say_what_the_model_says(family: str, memory: Memory) -> None:
    machine = type("Machine", (SessionMachine,), {"memory": memory, "family": family})
    run_state_machine_as_test(machine, settings=hypothesis.settings(max_examples=6, stateful_step_count=12))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_a_session_on_a_gpu_says_what_the_model_says(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval().cuda().double()
    with Session(model) as session, torch.no_grad():
        said: list[int] = []
        for seed in range(3):
            said += ids(300, seed)
            said += session.generate(ids(300, seed), max_new_tokens=20, **GREEDY)
        assert session.tokens == said
        (branch,) = session.fork()
        branch.truncate(700)
        said = branch.tokens + branch.generate(max_new_tokens=30, **GREEDY)
        branch.save(tmp_path / "branch")
        loaded = Session.load(tmp_path / "branch", model)
        said += loaded.generate(max_new_tokens=30, **GREEDY)
        expected = model(torch.tensor([said], device="cuda")).logits[0, 699:-1].argmax(-1).tolist()
        assert said[700:] == expected
        assert loaded.memory().ordinary_bytes == 0 < loaded.memory().committed_bytes
        loaded.close(), branch.close()
