"""Caches that sleep or are offloaded between two turns: the same tokens as if nothing had happened."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_memory import Memory
from tiny_models import FAMILIES, model_of, prompt
from transformers import DynamicCache

import torch_vtensor
from torch_vtensor import Session, VTensorCache
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.errors import AsleepError, OutOfPagesError
from torch_vtensor.generation.decode import loop
from torch_vtensor.generation.layer_column import LayerColumn

CPU = torch.device("cpu")


def turn(model: Any, inputs: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=8, suppress_tokens=[2], past_key_values=cache)


def next_inputs(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.cat([tokens, tokens[:, 10:15]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stock", "compiled"])
def test_turns_with_sleep_and_offload_between_them(memory: Memory, compiled: bool) -> None:
    model, inputs = model_of("llama"), prompt(2)
    expected, stock = inputs, DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(4):
            expected = next_inputs(turn(model, expected, stock))
        cache = DynamicCache(config=model.config)
        with torch_vtensor.enabled(compile=compiled):
            for between in (torch_vtensor.sleep, lambda: torch_vtensor.offload(cache), lambda: None, lambda: None):
                inputs = next_inputs(turn(model, inputs, cache))
                committed_bytes = torch_vtensor.memory(cache).committed_bytes
                assert committed_bytes > 0
                between()
                away_bytes = torch_vtensor.memory(cache).offloaded_bytes
                assert away_bytes in (0, committed_bytes)
                assert torch_vtensor.stats().devices[CPU].offloaded_bytes == away_bytes
                torch_vtensor.wake()
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch_vtensor.memory(cache).offloaded_bytes == 0


def test_a_sleeping_cache_takes_no_tokens(memory: Memory) -> None:
    model, cache = model_of("llama"), VTensorCache(config=model_of("llama").config)
    with torch.no_grad():
        tokens = turn(model, prompt(1), cache)
        length = cache.get_seq_length()
        torch_vtensor.sleep()
        with pytest.raises(AsleepError, match="wake"):
            turn(model, next_inputs(tokens), cache)
        torch_vtensor.wake()
        assert cache.get_seq_length() == length
        turn(model, next_inputs(tokens), cache)


def test_an_offloaded_cache_forks_and_returns_by_prefetch(memory: Memory) -> None:
    model, cache = model_of("llama"), VTensorCache(config=model_of("llama").config)
    with torch.no_grad():
        tokens = turn(model, prompt(1), cache)
        stock = copy.deepcopy(cache)
        del stock
        memory.settle()  # nothing grows ahead while it leaves
        away_bytes = cache.offload()
        assert away_bytes == cache.memory().offloaded_bytes == cache.memory().committed_bytes > 0
        before = [layer.keys.clone() for layer in cache.layers]
        assert cache.prefetch() == away_bytes
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
        cache.offload()
        fork = cache.fork()
        one, other = (turn(model, next_inputs(tokens), it) for it in (cache, fork))
        assert torch.equal(one, other)


def test_idle_caches_make_room_for_a_new_one(memory: Memory) -> None:
    model = model_of("llama")
    first, second = (VTensorCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        answers = [turn(model, prompt(2), cache) for cache in (first, second)]
        used_bytes = first.memory().committed_bytes
        with torch_vtensor.enabled(budget_bytes=2 * used_bytes + used_bytes // 2):
            with pytest.raises(OutOfPagesError):
                turn(model, prompt(2), VTensorCache(config=model.config))
            assert second.offload(when_needed=True) == 0
            third = VTensorCache(config=model.config)
            answers.append(turn(model, prompt(2), third))
            assert (first.memory().offloaded_bytes, second.memory().offloaded_bytes > 0) == (0, True)
            assert third.memory().offloaded_bytes == 0
            third.offload(when_needed=True)
            again = [turn(model, next_inputs(answers[0]), cache) for cache in (first, second, third)]
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2])


def test_sessions_make_room_for_each_other(memory: Memory) -> None:
    model, (first, second) = model_of("llama"), prompt(2)["input_ids"].tolist()
    with Session(model) as stays, Session(model) as moves:
        for turn in (first, second):
            expected = stays.generate(turn, max_new_tokens=6, do_sample=False, suppress_tokens=[2])
        moves.generate(first, max_new_tokens=6, do_sample=False, suppress_tokens=[2])
        fork = moves.fork()[0]
        assert moves.offload() < moves.memory().committed_bytes, "pages that the fork uses stay"
        assert fork.offload() > 0
        assert moves.memory().offloaded_bytes == moves.memory().committed_bytes
        assert moves.prefetch() > 0
        assert moves.memory().offloaded_bytes == 0
        moves.offload(when_needed=True)
        found = moves.generate(second, max_new_tokens=6, do_sample=False, suppress_tokens=[2])
        assert found == expected
        assert fork.generate(second, max_new_tokens=6, do_sample=False, suppress_tokens=[2]) == expected
        fork.close()


@pytest.mark.parametrize("family", ["mistral-short-window", "t5", "deepseek_v3"])
@pytest.mark.parametrize("way", ["sleep", "offload"])
def test_caches_of_other_kinds_come_back_as_they_were(memory: Memory, family: str, way: str) -> None:
    model, inputs = model_of(family), FAMILIES[family].inputs(1)
    with torch.no_grad(), torch_vtensor.enabled():
        found = model.generate(**inputs, max_new_tokens=12, suppress_tokens=[2], return_dict_in_generate=True)
        cache = found.past_key_values
        layers = getattr(cache, "self_attention_cache", cache).layers
        before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        if way == "sleep":
            torch_vtensor.sleep()
            torch_vtensor.wake()
        else:
            torch_vtensor.offload(cache)
            torch_vtensor.prefetch(cache)
        for layer, (keys, values) in zip(layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


class Interrupting:
    """A streamer that has another thread do something in the middle of an answer, which must not end before it."""

    def __init__(self, does: Callable[[], object]) -> None:
        self.thread = threading.Thread(target=does)
        self.num_put = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.num_put += 1
        if self.num_put == 4:
            self.thread.start()
            self.thread.join(0.3)
            assert self.thread.is_alive()

    def end(self) -> None:
        assert self.thread.is_alive()


@pytest.mark.parametrize("way", ["cache", "session", pytest.param("compiled", marks=pytest.mark.slow)])
def test_an_offload_waits_for_the_answer_that_the_cache_is_used_for(memory: Memory, way: str) -> None:
    model, inputs = model_of("llama"), prompt(1)
    cache: Any = DynamicCache(config=model.config)
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [2]}
    expected = model.generate(**inputs, **settings)[0].tolist()
    if way == "session":
        with Session(model) as session:
            streamer = Interrupting(session.offload)
            session.generate(inputs["input_ids"][0], **settings, streamer=streamer)
            streamer.thread.join()
            assert session.memory().offloaded_bytes == session.memory().committed_bytes > 0
            assert session.tokens == expected
        return
    with torch_vtensor.enabled(compile=way == "compiled"), torch.no_grad():
        streamer = Interrupting(lambda: torch_vtensor.offload(cache))
        found = model.generate(**inputs, **settings, past_key_values=cache, streamer=streamer)
        streamer.thread.join()
        away = torch_vtensor.memory(cache)
        assert away.offloaded_bytes == away.committed_bytes > 0
        assert found[0].tolist() == expected


@pytest.mark.parametrize("way", ["generate", "session"])
def test_sleep_waits_for_the_answer(memory: Memory, way: str) -> None:
    model, inputs = model_of("llama"), prompt(1)
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [2]}
    expected = model.generate(**inputs, **settings)[0].tolist()
    default_scheduler(CPU)
    with torch_vtensor.enabled(), Session(model) as session:
        streamer = Interrupting(torch_vtensor.sleep)
        if way == "session":
            session.generate(inputs["input_ids"][0], **settings, streamer=streamer)
            found = session.tokens
        else:
            found = model.generate(**inputs, **settings, streamer=streamer)[0].tolist()
        streamer.thread.join()
        assert found == expected
        assert torch_vtensor.stats().devices[CPU].committed_bytes == 0
        assert not default_scheduler(CPU).pool.rounds
        torch_vtensor.wake()


@pytest.mark.parametrize("num_new", [3, 700])  # of which the first fit the memory that there is
def test_a_write_of_a_layer_that_has_begun_is_not_lost_to_an_offload(
    num_new: int, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, offloads = VTensorCache(config=model_of("llama").config), []
    rows, new = torch.rand(1, 2, 600, 64), torch.rand(1, 2, num_new, 64)
    with torch.no_grad():
        cache.update(rows, rows, 0)
        note_written = LayerColumn._note_written

        def after_an_attempt(self: LayerColumn, *args: Any, **kwargs: Any) -> int:
            offloads.append(threading.Thread(target=cache.offload))
            offloads[0].start()
            offloads[0].join(0.3)
            assert cache.memory().offloaded_bytes == 0
            return note_written(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(LayerColumn, "_note_written", after_an_attempt)
            keys, _ = cache.update(new, new, 0)
    offloads[0].join()
    assert cache.memory().offloaded_bytes > 0
    assert torch.equal(keys, torch.cat([rows, new], 2))


def test_a_call_while_memory_sleeps_is_not_the_models_last_one_to_be_compiled(memory: Memory) -> None:
    model, cache = model_of("llama"), VTensorCache(config=model_of("llama").config)
    with torch.no_grad(), torch_vtensor.enabled():
        tokens = turn(model, prompt(1), cache)
    with torch.no_grad(), torch_vtensor.enabled(compile=True):
        torch_vtensor.sleep()
        with pytest.raises(AsleepError, match="wake"):
            turn(model, next_inputs(tokens), cache)
        torch_vtensor.wake()
    assert model not in loop._refused
