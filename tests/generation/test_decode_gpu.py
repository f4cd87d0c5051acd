"""Compiled decoding by CUDA graphs: the stock loop's tokens, over memory that grows under the captured graph."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from typing import Any

import pytest
import torch
import transformers
from paged_memory import Memory
from tiny_models import FAMILIES, prompt
from transformers import DynamicCache

import torch_vtensor
from torch_vtensor.allocator.cuda_driver import CudaDriver
from torch_vtensor.generation import shared_reads
from torch_vtensor.generation.decode import graphs, program

# Pages are 2 MiB on CUDA whatever the fixture's setting says; the decoding is the same in both of its layouts.
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("memory", ["token-major"], indirect=True)]

TAKEN = ("llama", "mistral-short-window", "gemma3", "gpt_oss", "mixtral", "gpt2", "deepseek_v3")


def wide(**changes: Any) -> Any:
    """A Llama with 32 KiB of keys and values a token: a page holds 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, initializer_range=0.1, pad_token_id=0,
        eos_token_id=None, bos_token_id=1, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().cuda()


def on_gpu(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family].make().eval().cuda()
    model.generation_config.pad_token_id = 0
    return model


def generate(model: Any, batch: int = 1, tokens: int = 130, *, new_tokens: int = 40, **options: Any) -> Any:
    inputs = {name: tensor.cuda() for name, tensor in prompt(batch, tokens).items()}
    torch.manual_seed(1)
    return model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **options})


def compiled(model: Any, *args: Any, **options: Any) -> Any:
    with torch_vtensor.enabled(compile=True):
        return generate(model, *args, **options)


def reasons(memory: Memory) -> set[str]:
    return {reason for reason in memory.appends if reason.startswith("stock loop")}


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products as float32, so that tokens can be told apart."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", TAKEN)
def test_the_same_tokens_in_float32(family: str, batch: int, memory: Memory, caplog: pytest.LogCaptureFixture) -> None:
    model = on_gpu(family)
    theirs = generate(model, batch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(compiled(model, batch), theirs)
    if family == "deepseek_v3":  # newer versions of transformers keep less of a token than they attend to
        assert reasons(memory) <= {"stock loop: the model's step cannot be compiled"}
    else:
        assert reasons(memory) == set(), caplog.text


def test_sampling_is_the_stock_loops_for_the_same_seed(memory: Memory) -> None:
    model = on_gpu("llama")
    for options in (
        {"top_k": 0},
        {"temperature": 0.7, "top_p": 0.9},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"typical_p": 0.8, "epsilon_cutoff": 0.01, "suppress_tokens": list(range(20, 90))},
        {"min_new_tokens": 9, "eos_token_id": [5, 17, 33, 60], "remove_invalid_values": True},
    ):
        for batch in (1, 3):
            theirs = generate(model, batch, do_sample=True, **options)
            for _ in range(2):
                assert torch.equal(compiled(model, batch, do_sample=True, **options), theirs), options
    assert reasons(memory) == set()


@pytest.mark.parametrize("step_of_end", [0, 1, 9])
def test_ends(step_of_end: int, memory: Memory) -> None:
    model = on_gpu("llama")
    free = generate(model, 3)
    ends = [int(row[130 + step_of_end]) for row in free]
    theirs = generate(model, 3, eos_token_id=ends)
    cache = DynamicCache(config=model.config)
    ours = compiled(model, 3, eos_token_id=ends, past_key_values=cache)
    assert torch.equal(ours, theirs)
    assert cache.get_seq_length() == ours.shape[1] - 1, "what ran ahead is no part of it"
    assert reasons(memory) == set()


def test_bfloat16_logits(memory: Memory) -> None:
    """The captured step's logits are as near to the float32 model's as the stock step's, or four times (two bits)."""
    model = wide().bfloat16()
    exact_model = copy.deepcopy(model).float()
    out = compiled(model, tokens=300, return_dict_in_generate=True)
    assert reasons(memory) == set()
    (captured,) = [each for several in program.traced_model(model)._programs.values() for each in several]
    ids = out.sequences[:, :-1]  # whose last token the last step was for
    with torch.no_grad():
        exact = exact_model(ids).logits[:, -1]
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        stock = model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()
    assert captured.logits is not None
    stock_error = (stock - exact).abs().max()
    assert stock_error > 0
    assert (captured.logits - exact).abs().max() <= 4 * stock_error


def test_memory_grows_under_one_graph_and_another_cache_uses_it(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[Any] = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda run, *args: (captures.append(run), capture(run, *args))[1])
    model = wide()
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    theirs = [generate(model, 2, tokens, new_tokens=500) for tokens in (100, 160)]
    with torch_vtensor.enabled(compile=True):
        for tokens, cache, their in zip((100, 160), caches, theirs, strict=True):  # both alive: at different addresses
            assert torch.equal(generate(model, 2, tokens, new_tokens=500, past_key_values=cache), their)
            assert reasons(memory) == set()
            assert torch_vtensor.memory(cache).committed_bytes >= 2 * (tokens + 499) * 32 * 1024 > 10 * 2**21
    assert len(captures) == 4, "the step and the choice once, and two sizes of prompts"
    assert reasons(memory) == set()


def test_a_conversation_goes_on_in_either_loop(memory: Memory) -> None:
    model, answers = wide(), []
    for run in (generate, compiled):
        cache = DynamicCache(config=model.config)
        ids = run(model, 1, 100, new_tokens=30, past_key_values=cache)
        for turn in range(2):
            ids = torch.cat([ids, torch.full((1, 5), 7 + turn, device="cuda")], 1)
            with torch_vtensor.enabled(compile=run is compiled and turn == 1):
                ids = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    max_new_tokens=20,
                    do_sample=False,
                )
        answers.append(ids)
    assert torch.equal(*answers)
    assert reasons(memory) == set()


def test_forks_read_what_they_share_once(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    model, ids = wide(), prompt(1, 2000)["input_ids"].cuda()
    ids = torch.cat([ids.repeat(6, 1), torch.arange(6, device="cuda")[:, None] + 3], dim=1)
    answers = []
    for shares in (False, True):
        with torch_vtensor.enabled(compile=True), torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[: 1 if shares else None, :-1], past_key_values=cache)
            if shares:
                cache.batch_repeat_interleave(6)
            answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=80, do_sample=False))
            del cache
    assert torch.equal(*answers)
    assert not reasons(memory)
    assert [shares for _, _, shares in program.traced_model(model)._programs] == [(False,), (True,)]


def test_threads_on_streams_of_their_own(memory: Memory) -> None:
    model = on_gpu("llama")
    theirs = [generate(model, 2, 60 + 40 * index) for index in range(2)]
    found: list[list[torch.Tensor]] = [[], []]
    compiled(model, 2, 60)  # capturing waits for the whole device

    def work(index: int) -> None:
        inputs = {name: tensor.cuda() for name, tensor in prompt(2, 60 + 40 * index).items()}
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(8):
                out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
                found[index].append(out.cpu())

    with torch_vtensor.enabled(compile=True):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(2):
        assert len(found[index]) == 8
        assert all(torch.equal(sequences, theirs[index].cpu()) for sequences in found[index])
    assert reasons(memory) == set()


def test_memory_comes_back(memory: Memory) -> None:
    model = wide()
    compiled(model, 2, 100, new_tokens=300)
    gc.collect()
    torch_vtensor.trim()
    assert sum(pool.committed_bytes for pool in torch_vtensor.stats().devices.values()) == 0
    assert torch.equal(compiled(model, 2, 100, new_tokens=50), generate(model, 2, 100, new_tokens=50))


def test_no_driver_calls_on_the_decoding_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second call: what memory it needs beyond the first's is mapped ahead, in the background."""
    model, mine, here = wide(), [], threading.get_ident()

    compiled(model, 1, 100, new_tokens=400)
    is_decoding = threading.Event()

    class Streamer:
        """Tells when decoding is under way."""

        def __init__(self) -> None:
            self.num_tokens = 0

        def put(self, tokens: torch.Tensor) -> None:
            self.num_tokens += 1
            if self.num_tokens == 10:
                is_decoding.set()

        def end(self) -> None:
            is_decoding.clear()

    for name in ("create", "map", "unmap", "set_access", "destroy", "reserve", "release"):
        call = getattr(CudaDriver, name)

        def noted(self: Any, *args: Any, _name: str = name, _call: Any = call, **kwargs: Any) -> Any:
            if is_decoding.is_set() and threading.get_ident() == here:
                mine.append(_name)
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(CudaDriver, name, noted)
    compiled(model, 1, 100, new_tokens=400, streamer=Streamer())
    assert mine == []
