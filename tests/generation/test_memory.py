"""What caches cost: beams, forks and windows share or give back; figures are exact; all of it returns in the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import garbage
import pytest
import torch
import transformers
from paged_memory import PAGE_BYTES, Memory
from tiny_models import FAMILIES, model_of, sizes
from transformers import DynamicCache

import torch_vtensor
from torch_vtensor import VTensorCache
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.pools import default_pool, default_scheduler
from torch_vtensor.allocator.row_copy import CAPTURED, NOT_COPIED, row_copier
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation.layer_states import layers_on, states
from torch_vtensor.generation.modules import devices_of_layers

CPU = torch.device("cpu")
LAYERS, HEADS, DIM = 3, 2, 16
TOKEN_BYTES = LAYERS * HEADS * 2 * DIM * 4  # of one sequence of the caches that `grown` makes


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def grow(cache: Any, num_new: int, batch: int = 1) -> None:
    tokens = torch.randn(batch, HEADS, num_new, DIM)
    for layer in range(LAYERS):
        cache.update(tokens, tokens, layer)


def grown(num_tokens: int, batch: int = 1) -> VTensorCache:
    cache = VTensorCache(config=model_of("llama").config)
    grow(cache, num_tokens, batch)
    return cache


def num_strips(memory: Memory, batch: int = 1) -> int:
    """How many parts of a cache of `grown` are rounded up to pages of their own."""
    return batch if memory.layout == "token-major" else batch * LAYERS * HEADS * 2


def generate(model: Any, inputs: Any, new_tokens: int, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=new_tokens, suppress_tokens=[2], return_dict_in_generate=True, **options
    )


# Exact figures


def test_memory_says_what_was_written(memory: Memory) -> None:
    cache = grown(1000, batch=3)
    for num_new in (1, 1, 57, 300):
        grow(cache, num_new, batch=3)
        memory.settle()
        found, written_bytes = cache.memory(), 3 * cache.get_seq_length() * TOKEN_BYTES
        assert found.written_bytes == written_bytes
        strips = num_strips(memory, 3)
        rounded_bytes = strips * -(-written_bytes // strips // PAGE_BYTES) * PAGE_BYTES
        assert rounded_bytes <= found.committed_bytes <= rounded_bytes * (1 + growth_fraction()) + strips * PAGE_BYTES
        assert found.committed_bytes % PAGE_BYTES == 0
        assert found.committed_bytes == torch_vtensor.stats().devices[CPU].live_bytes == memory.live_bytes
        assert (found.shared_bytes, found.ordinary_bytes) == (0, 0)
        assert found.reserved_bytes >= found.committed_bytes


def growth_fraction() -> float:
    return default_pool(CPU).driver.growth_fraction


def test_the_first_commit_is_what_was_written_to_a_page(memory: Memory) -> None:
    for num_tokens in (600, 1024, 1025):
        cache, strips = grown(num_tokens), num_strips(memory)
        memory.settle()
        rounded_bytes = strips * -(-num_tokens * TOKEN_BYTES // strips // PAGE_BYTES) * PAGE_BYTES
        # Where a page is full, the next one is there already.
        assert cache.memory().committed_bytes in (rounded_bytes, rounded_bytes + strips * PAGE_BYTES)
        del cache
        torch_vtensor.trim()


def test_committed_stays_close_to_live_while_decoding(memory: Memory) -> None:
    cache, strips = grown(600, batch=2), num_strips(memory, 2)
    for _ in range(400):
        grow(cache, 1, batch=2)
        memory.settle()
        found = cache.memory()
        ahead_bytes = int(found.written_bytes * growth_fraction()) + 2 * PAGE_BYTES * strips
        assert found.committed_bytes <= found.written_bytes + ahead_bytes
        assert torch_vtensor.stats().devices[CPU].committed_bytes <= found.written_bytes + ahead_bytes


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_layers_on_other_devices_have_no_room_beside_those_here(memory: Memory) -> None:
    elsewhere = torch.device("cpu", 1)  # as if: all tokens are on the one CPU that there is
    with layers_on({0: CPU, 1: CPU, 2: elsewhere}):
        cache = grown(300)
    widths = [state.group.num_layers for layer in cache.layers if (state := states.get(layer)) is not None]
    assert widths == [2, 2, 1]
    whole = 300 * TOKEN_BYTES
    assert whole <= cache.memory().committed_bytes < whole + 2 * PAGE_BYTES + whole // 4


def test_a_spread_models_layers_are_looked_up_on_their_devices() -> None:
    model = model_of("llama")
    assert devices_of_layers(model) == {}
    for spread, expected in (
        ({"": 0}, {}),
        ({"model.layers.0": "cpu", "lm_head": "disk"}, dict.fromkeys(range(3), CPU)),
    ):
        model.hf_device_map = spread
        try:
            assert devices_of_layers(model) == expected
        finally:
            del model.hf_device_map


def test_small_caches_take_no_page(memory: Memory) -> None:
    cache = grown(2)
    for _ in range(3):
        grow(cache, 1)
    found = cache.memory()
    assert memory.num_mapped == 0
    assert (found.committed_bytes, found.reserved_bytes) == (0, 0)
    assert found.written_bytes == 5 * TOKEN_BYTES <= found.ordinary_bytes <= 2 * found.written_bytes
    with torch_vtensor.enabled():
        out = model_of("llama").generate(torch.tensor([[5, 6]]), max_new_tokens=3, return_dict_in_generate=True)
    assert torch_vtensor.memory(out.past_key_values).ordinary_bytes > 0
    assert memory.num_mapped == 0


def test_memory_knows_stock_caches_and_the_parts_of_an_encoder_decoder(memory: Memory) -> None:
    stock = DynamicCache()
    grow(stock, 500)
    found = torch_vtensor.memory(stock)
    assert found == (500 * TOKEN_BYTES, 0, 0, 0, 500 * TOKEN_BYTES, 0)
    with torch_vtensor.enabled():
        out = generate(model_of("t5"), FAMILIES["t5"].inputs(2), 20)
        cache, found = out.past_key_values, torch_vtensor.memory(out.past_key_values)
        parts = [torch_vtensor.memory(part) for part in (cache.self_attention_cache, cache.cross_attention_cache)]
        live_bytes = memory.live_bytes
    assert found.written_bytes == sum(part.written_bytes for part in parts)
    assert found.committed_bytes == sum(part.committed_bytes for part in parts) == live_bytes
    assert parts[1].committed_bytes > 0


# Sharing


def test_sixty_four_forks_of_a_prefix(memory: Memory) -> None:
    prefix = grown(2053)  # ends within a page
    memory.settle()
    prefix_bytes = prefix.memory().committed_bytes
    forks = [prefix.fork() for _ in range(64)]
    assert memory.live_bytes <= prefix_bytes + 64 * num_strips(memory) * PAGE_BYTES, "at most the last page was copied"
    for fork in forks:
        grow(fork, 1000)
    memory.settle()
    pool = torch_vtensor.stats().devices[CPU]
    assert pool.live_bytes <= 1.1 * (prefix_bytes + 64 * 1000 * TOKEN_BYTES)
    assert pool.shared_bytes >= 0.95 * prefix_bytes
    for fork in forks[::9]:
        assert fork.memory().shared_bytes >= 0.95 * prefix_bytes
        assert torch.equal(fork.layers[1].keys[:, :, :2053], prefix.layers[1].keys)
    del fork
    forks.clear()
    assert memory.live_bytes == prefix_bytes
    assert prefix.memory().shared_bytes == torch_vtensor.stats().devices[CPU].shared_bytes == 0


def test_forks_that_do_not_fit_the_budget_leave_no_trace(memory: Memory) -> None:
    cache = grown(1000)
    memory.settle()
    before_bytes, keys = memory.live_bytes, cache.layers[0].keys.clone()
    pool = default_pool(CPU)
    pool.budget_bytes = 3 * before_bytes
    forks: list[VTensorCache] = []

    def fork_on() -> None:
        for _ in range(100):
            forks.append(cache.fork())
            grow(forks[-1], 700)

    with pytest.raises(OutOfPagesError) as caught:
        fork_on()
    assert len(forks) > 2
    assert caught.value.committed_bytes <= 3 * before_bytes
    for fork in forks:  # also the one that was refused more
        assert torch.equal(fork.layers[0].keys[:, :, :1000], keys)
    del caught, fork
    forks.clear()
    assert memory.live_bytes == before_bytes
    assert cache.memory().shared_bytes == 0
    pool.budget_bytes = None
    grow(cache, 700)
    assert torch.equal(cache.layers[0].keys[:, :, :1000], keys)


def bytes_of(model: Any, inputs: Any, new_tokens: int, **options: Any) -> int:
    """What the cache that generate() returns has physically."""
    with torch_vtensor.enabled():
        out = generate(model, inputs, new_tokens, **options)
        return torch_vtensor.memory(out.past_key_values).committed_bytes


@pytest.fixture(scope="module")
def long_model() -> Any:
    """A Llama whose prompts are long against a page."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes(max_position_embeddings=4096, num_hidden_layers=2))
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}])
def test_beams_share_their_prompt(long_model: Any, options: dict[str, int], memory: Memory) -> None:
    ids = torch.randint(3, 90, (1, 1500), generator=torch.Generator().manual_seed(0))
    one_bytes = bytes_of(long_model, {"input_ids": ids}, 40)
    four_bytes = bytes_of(long_model, {"input_ids": ids.expand(4, -1)}, 40)
    assert four_bytes > 3.5 * one_bytes
    assert bytes_of(long_model, {"input_ids": ids}, 40, **options) < 1.6 * one_bytes


# Windows


@pytest.mark.parametrize("family", ["mistral-short-window", "mistral-long-window"])
def test_a_window_stays_bounded_far_beyond_it(family: str, memory: Memory) -> None:
    model, window = model_of(family), model_of(family).config.sliding_window
    ids = FAMILIES[family].inputs(1)["input_ids"]
    cache = VTensorCache(config=model.config)
    token_bytes = 3 * 2 * 2 * 16 * 4
    strips = 1 if memory.layout == "token-major" else 3 * 2 * 2
    most_bytes = 0
    for start in range(0, 6 * window, 10):
        model(ids[:, start % 120 : start % 120 + 10], past_key_values=cache)
        found = cache.memory()
        memory.settle()
        most_bytes = max(most_bytes, found.committed_bytes, torch_vtensor.stats().devices[CPU].live_bytes)
        assert found.written_bytes <= window * token_bytes
    # The window, what one step adds, what is committed ahead, and a page at either end of each strip.
    bound_bytes = (window + 20) * token_bytes * (1 + growth_fraction()) + 3 * strips * PAGE_BYTES
    assert most_bytes <= bound_bytes
    assert cache.get_seq_length() * token_bytes > 2 * bound_bytes or family == "mistral-short-window"
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, _far_beyond(model, ids, window))


def _far_beyond(model: Any, ids: torch.Tensor, window: int) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    for start in range(0, 6 * window, 10):
        model(ids[:, start % 120 : start % 120 + 10], past_key_values=cache)
    return model(ids[:, :1], past_key_values=cache).logits


# Given back, and used again


def test_trim_gives_everything_back(memory: Memory) -> None:
    pool = default_pool(CPU)
    with torch_vtensor.enabled():
        out = generate(model_of("gemma3"), FAMILIES["gemma3"].inputs(2), 100, num_beams=2)
    kept_bytes = torch_vtensor.memory(out.past_key_values).committed_bytes
    torch_vtensor.trim()
    assert pool.ledger.committed_bytes == kept_bytes == pool.driver.inner.physical_bytes()
    del out
    garbage.collect()
    assert pool.ledger.committed_bytes == kept_bytes, "kept for the next conversation until it is asked for"
    assert torch_vtensor.trim("cpu") == kept_bytes
    assert pool.ledger.committed_bytes == pool.driver.inner.physical_bytes() == 0
    assert torch_vtensor.trim() == 0


def test_trim_of_one_device_is_of_that_device(memory: Memory) -> None:
    def ended() -> int:
        vtensor = torch_vtensor.VTensor((PAGE_BYTES,), capacity=4, dtype=torch.uint8)
        vtensor.append(torch.ones(3, PAGE_BYTES, dtype=torch.uint8))
        vtensor.close()
        return default_pool(CPU).ledger.committed_bytes

    for device in ("cpu", "cpu:0", torch.device("cpu", 0)):
        assert ended() == torch_vtensor.trim(device) > 0
    kept_bytes = ended()
    assert torch_vtensor.trim("cuda") == 0
    with pytest.raises(ValueError, match="device is 'mps', which has no memory driver: give one of 'cpu' and 'cuda'"):
        torch_vtensor.trim("mps")
    assert torch_vtensor.trim() == kept_bytes


def test_the_next_conversation_adopts_the_memory_of_the_last(memory: Memory) -> None:
    model, inputs = model_of("llama"), FAMILIES["llama"].inputs(2)
    with torch_vtensor.enabled():
        generate(model, inputs, 60)
        first, reserved = memory.num_mapped, num_calls("reserve")
        assert first > 0
        for _ in range(3):
            generate(model, inputs, 60)
        assert memory.num_mapped - first <= 0.05 * first
        assert num_calls("reserve") == reserved
        assert num_calls("unmap") == num_calls("release") == 0


def test_between_calls_idle_memory_goes_back_and_the_next_one_is_answered_alike(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_VTENSOR_IDLE_SECONDS", "0.01")
    model, inputs = model_of("llama"), FAMILIES["llama"].inputs(2)
    expected = generate(model, inputs, 60).sequences
    kept = grown(300)
    with torch_vtensor.enabled():
        for _ in range(3):
            assert torch.equal(generate(model, inputs, 60).sequences, expected)
            memory.wait_for_idle_memory()
            pool = torch_vtensor.stats().devices[CPU]
            assert pool.committed_bytes <= 1.2 * kept.memory().committed_bytes
    assert num_calls("destroy") > 0


def num_calls(name: str) -> int:
    calls = torch_vtensor.stats().devices[CPU].driver_calls
    return calls[name].count if name in calls else 0


def test_steady_decoding_makes_no_driver_call_on_its_thread(memory: Memory) -> None:
    cache = grown(1000, batch=2)
    driver, this_thread = default_pool(CPU).driver, threading.get_ident()
    steps_with_calls = 0
    for step in range(600):
        before = driver.num_calls_by_thread[this_thread]
        grow(cache, 1, batch=2)
        calls = driver.num_calls_by_thread[this_thread] - before
        steps_with_calls += bool(calls)
        if step % 2:
            default_scheduler(CPU).settle()  # as the device's work would let it
    assert sum(driver.num_calls_by_thread.values()) > driver.num_calls_by_thread[this_thread], "pages were mapped ahead"
    assert steps_with_calls <= 0.05 * 600
    assert torch_vtensor.stats().devices[CPU].num_device_waits == 0


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_captured_append_keeps_its_memory(memory: Memory, by_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays at the same addresses: as long as it may, nothing is unmapped there."""
    copier = row_copier(CPU)
    write = copier.write

    def captured(*arguments: Any) -> int:
        return NOT_COPIED if by_torch else write(*arguments) | CAPTURED

    cache = grown(1000)
    grow(cache, 1)  # from here on nothing but the common step happens
    held: list[object] = []
    monkeypatch.setattr(HostDriver, "retain_in_capture", lambda driver, owner: held.append(owner))
    monkeypatch.setattr(copier, "write", captured)
    grow(cache, 1)
    memory.settle()
    committed_bytes = cache.memory().committed_bytes
    del cache
    garbage.collect()
    assert memory.live_bytes == committed_bytes
    held.clear()
    assert memory.live_bytes == 0


@pytest.mark.parametrize("room", [0, 40, 90])  # a layer of strips takes 32 pages
def test_a_batch_that_cannot_change_in_all_layers_changes_in_none(memory: Memory, room: int) -> None:
    """Six slots, none of which ends with a page, become eight: pages for some layers' new ones, not for all."""
    cache = grown(999, batch=6)
    expected = [layer.keys.clone() for layer in cache.layers]
    slots = torch.tensor([0, 1, 2, 3, 4, 5, 0, 3])
    memory.settle()
    pool = default_pool(CPU)
    pool.budget_bytes = memory.live_bytes + (room if memory.layout == "strips" else 0) * PAGE_BYTES
    with pytest.raises(OutOfPagesError):
        cache.batch_select_indices(slots)
    memory.settle()
    for layer, keys in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, keys)
    pool.check_integrity()
    pool.budget_bytes = None
    cache.batch_select_indices(slots)
    grow(cache, 30, batch=8)
    for layer, keys in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys[:, :, :999], keys[slots])
        assert layer.keys.shape[2] == 1029
