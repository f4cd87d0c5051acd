"""Continuous batching by CUDA graphs: every request is answered as alone, while memory grows under the graphs."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from paged_memory import Memory
from serving_models import WHY_SKIPPED, Served, config_of, model_to_serve, prompts

import torch_vtensor
from torch_vtensor.allocator.cuda_driver import CudaDriver
from torch_vtensor.generation import shared_reads
from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.serving import support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_SKIPPED is not None, reason=str(WHY_SKIPPED)),
    pytest.mark.parametrize("memory", ["token-major"], indirect=True),
]
LENGTHS = (5, 130, 40, 1, 77, 60, 300)
PAGE_BYTES = 2 * 2**20


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products as float32, so that tokens can be told apart; counters of this test alone."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    support.counters.clear()
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def wide() -> Any:
    """A Llama with 32 KiB of keys and values a token: a page holds 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, initializer_range=0.1, pad_token_id=0,
        eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().cuda()


def alone(model: Any, prompt: list[int], num_new: int) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    options = config_of(max_new_tokens=num_new)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)[
        0, len(prompt) :
    ].tolist()


def check_all_ours() -> None:
    serving = torch_vtensor.stats().serving
    assert not [name for name in serving if name.startswith(("stock", "uncompiled", "failed"))], serving


@pytest.mark.parametrize("is_captured", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss", "mixtral"])
def test_every_request_is_answered_as_alone(family: str, is_captured: bool) -> None:
    model, asked = copy.deepcopy(model_to_serve(family)).cuda(), prompts(*LENGTHS)
    expected = [alone(model, prompt, 24) for prompt in asked]
    with torch_vtensor.enabled(compile=is_captured):
        for _ in range(2):
            found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=24))
            assert [output.generated_tokens for output in found.values()] == expected
    check_all_ours()


def test_requests_join_leave_and_are_cancelled(memory: Memory) -> None:
    model = wide()
    asked = prompts(*range(20, 260, 20))
    lengths = [10 + 37 * index % 150 for index in range(len(asked))]
    expected = [alone(model, prompt, length) for prompt, length in zip(asked, lengths, strict=True)]
    with torch_vtensor.enabled(compile=True, prefix_cache=True):
        served = Served(model, generation_config=config_of())
        for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
            served.manager.add_request(prompt, request_id=str(index), max_new_tokens=length, streaming=index % 2 == 0)
            served.manager.add_request(prompt[:-1], request_id=f"cancelled {index}", max_new_tokens=500)
            for _ in range(5):
                served.round()
            served.manager.cancel_request(f"cancelled {index}")
        outputs = served.run()
        served.close()
    found = [outputs[str(index)].generated_tokens for index in range(len(asked))]
    assert found == expected
    check_all_ours()
    assert torch_vtensor.stats().serving["cancelled"] == len(asked)


def test_the_newest_gives_way_and_is_resumed() -> None:
    model = wide()
    asked = prompts(300, 280, 260, 240)
    expected = [alone(model, prompt, 250) for prompt in asked]
    with torch_vtensor.enabled(compile=True, budget_bytes=24 * PAGE_BYTES):
        found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=250))
    assert [output.generated_tokens for output in found.values()] == expected
    assert torch_vtensor.stats().serving["gave way"] > 0
    check_all_ours()


@pytest.mark.parametrize("is_captured", [True, False])
def test_steps_read_once_what_requests_share(is_captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents with questions, beside one who shares nothing; they come, and leave one after the other."""
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    model, (first, second, other) = wide(), prompts(700, 400, 90)
    asked = [first + tail for tail in prompts(7, 12, 9, seed=2)] + [second + tail for tail in prompts(5, 60, seed=3)]
    asked.append(other)
    lengths = [120, 20, 90, 60, 100, 120]
    expected = [alone(model, prompt, length) for prompt, length in zip(asked, lengths, strict=True)]
    with torch_vtensor.enabled(compile=is_captured, prefix_cache=True):
        served = Served(model, generation_config=config_of())
        for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
            served.manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
        outputs = served.run()
        served.close()
    assert [outputs[str(index)].generated_tokens for index in range(len(asked))] == expected
    check_all_ours()
    assert torch_vtensor.stats().serving["steps that read shared tokens once"] > 50
    assert not [name for name in torch_vtensor.stats().serving if name.startswith("read apart")]


def test_other_threads_draw_while_a_graph_is_captured() -> None:
    """Capturing takes possession of a generator, which must not be the one that they draw from."""
    device = torch.device("cuda", torch.cuda.current_device())
    own, noise = torch.Generator(device), torch.zeros(1000, device=device)
    drawn: list[torch.Tensor | Exception] = []

    def draw() -> None:
        try:
            drawn.append(torch.rand(1000, device=device))
        except Exception as error:
            drawn.append(error)

    def rehearse() -> None:
        noise.exponential_(1, generator=own)

    def run() -> None:
        rehearse()
        other = threading.Thread(target=draw)
        other.start()
        other.join()

    torch.cuda.manual_seed(7)
    own.manual_seed(3)
    graph = graphs.Captures(device, own)(run, rehearse)
    found = []
    for seed in (3, 3, 4):
        own.manual_seed(seed)
        for _ in range(2):
            graph()
            found.append(noise.clone())
    torch.cuda.manual_seed(7)
    (theirs,) = drawn
    assert isinstance(theirs, torch.Tensor), theirs
    assert torch.equal(theirs, torch.rand(1000, device=device)), "nothing else was drawn from it"
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[4])


def test_a_manager_warms_up_and_samples() -> None:
    model, asked = wide(), prompts(40, 50, 300)
    config = config_of(do_sample=True, top_k=0, max_new_tokens=60)
    answers = []
    with torch_vtensor.enabled(compile=True):
        for _ in range(2):
            options = transformers.ContinuousBatchingConfig(max_requests_per_batch=4, seed=3)
            manager = model.init_continuous_batching(config, options)
            manager.warmup()
            manager.start()
            ids = manager.add_requests(asked)
            outputs: dict[str, Any] = {}
            while len(outputs) < len(ids):
                output = manager.get_result(timeout=120)
                assert output is not None
                assert output.error is None
                outputs[output.request_id] = output
            manager.stop()
            answers.append([outputs[each].generated_tokens for each in ids])
    check_all_ours()
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == len(ids)


def test_no_driver_calls_and_no_waits_on_the_serving_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is decoded for the second time: what memory it needs is mapped ahead, in the background."""
    model, asked, mine = wide(), prompts(100, 90, 80, 70), []
    config = config_of(max_new_tokens=400)
    watched: set[int] = set()
    for name in ("create", "map", "unmap", "set_access", "destroy", "reserve", "release"):
        call = getattr(CudaDriver, name)

        def noted(self: Any, *args: Any, _name: str = name, _call: Any = call, **kwargs: Any) -> Any:
            if threading.get_ident() in watched:
                mine.append(_name)
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(CudaDriver, name, noted)
    with torch_vtensor.enabled(compile=True):
        model.generate_batch(asked, generation_config=config)
        manager = model.init_continuous_batching(generation_config=config)
        manager.start()
        manager.add_requests(asked, streaming=True)
        num_heard = 0
        while num_heard < 4 * 395:
            output = manager.get_result(timeout=60)
            assert output is not None
            num_heard += 1
            if num_heard == 4 * 10:
                watched.add(manager._generation_thread.ident)
        watched.clear()
        manager.stop()
    assert mine == []
    check_all_ours()


def test_memory_comes_back() -> None:
    model = wide()
    with torch_vtensor.enabled(compile=True):
        model.generate_batch(prompts(100, 200, 300), generation_config=config_of(max_new_tokens=100))
    gc.collect()
    began = time.monotonic()
    while time.monotonic() - began < 10:
        torch_vtensor.trim()
        if sum(pool.committed_bytes for pool in torch_vtensor.stats().devices.values()) == 0:
            return
    raise AssertionError(str(torch_vtensor.stats()))
