"""enable(), disable(), enabled(), explain() and what happens when memory runs out."""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
import threading

import pytest
import torch
from paged_memory import Memory
from tiny_models import FAMILIES, OWN_CACHE, model_of
from transformers import DynamicCache

import torch_vtensor
from torch_vtensor.allocator.pools import default_pool
from torch_vtensor.errors import DriverError, OutOfPagesError
from torch_vtensor.generation import layers
from torch_vtensor.generation.enable import REPLACEMENTS


def functions() -> list[object]:
    return [owner.__dict__.get(name) for owner, name in REPLACEMENTS]


def filled(tokens: int = 300) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        for layer in range(2):
            cache.update(torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16), layer)
    return cache


def test_disable_puts_the_very_functions_back() -> None:
    stock = functions()
    torch_vtensor.enable()
    torch_vtensor.enable()
    assert torch_vtensor.is_enabled()
    assert all(ours is not theirs for ours, theirs in zip(functions(), stock, strict=True))
    torch_vtensor.disable()
    assert not torch_vtensor.is_enabled()
    assert all(now is before for now, before in zip(functions(), stock, strict=True))


def test_blocks_nest_and_overlap_between_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with torch_vtensor.enabled():
            inside.set()
            leave.wait(30)

    with torch_vtensor.enabled():
        with torch_vtensor.enabled():
            pass
        assert torch_vtensor.is_enabled()
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(30)
    assert torch_vtensor.is_enabled(), "another thread is still in its block"
    leave.set()
    thread.join()
    assert not torch_vtensor.is_enabled()


def test_a_running_cache_outlives_disable(memory: Memory) -> None:
    torch_vtensor.enable()
    cache = filled()
    assert memory.num_mapped > 0
    before = [layer.keys.clone() for layer in cache.layers]
    torch_vtensor.disable()
    new = torch.randn(2, 2, 1, 16)
    for layer, keys in enumerate(before):
        grown, _ = cache.update(new, new, layer)
        assert torch.equal(grown, torch.cat([keys, new], 2))
    del keys, grown
    assert memory.live_bytes == 0, "its tokens moved to ordinary memory"


def test_a_saved_cache_is_as_large_as_its_tokens() -> None:
    with torch_vtensor.enabled():
        cache = filled()
        file = io.BytesIO()
        torch.save(cache, file)
        assert len(file.getvalue()) < 1.2 * sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, loaded.layers, strict=True))


def test_a_copy_that_cannot_share_pages_has_the_tokens_in_ordinary_memory(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ptr: int, nbytes: int, handle: int) -> None:
        raise DriverError("mmap", "ENOMEM", torch.device("cpu"), nbytes)

    with torch_vtensor.enabled():
        cache = filled()
        with monkeypatch.context() as patch:
            patch.setattr(default_pool(torch.device("cpu")).driver.inner, "map", refuse)
            copied = copy.deepcopy(cache)
        tokens = torch.randn(2, 2, 1, 16)
        with torch.no_grad():
            cache.layers[1].keys.zero_()
            expected = copied.layers[0].keys.clone()
            grown, _ = copied.update(tokens, tokens, 0)
        assert torch.equal(grown, torch.cat([expected, tokens], 2))
        assert copied.layers[1].keys.count_nonzero() > 0
        assert memory.appends["stock: memory driver: DriverError"] == 2


def test_compiled_decoding_that_cannot_be_loaded_leaves_nothing_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_vtensor.generation.decode.loop", None)
    with pytest.raises(ImportError):
        torch_vtensor.enable(compile=True)
    assert not torch_vtensor.is_enabled()
    with pytest.raises(ImportError), torch_vtensor.enabled(compile=True):
        pass
    assert not torch_vtensor.is_enabled()


def test_exhausted_budget_leaves_the_cache_usable() -> None:
    with torch_vtensor.enabled():
        cache = filled(64)
        pool = default_pool(torch.device("cpu"))
        pool.budget_bytes = pool.ledger.committed_bytes
        kept = cache.layers[0].keys.clone()
        many = torch.randn(2, 2, 500, 16)
        with torch.no_grad(), pytest.raises(OutOfPagesError, match="raise the budget") as caught:
            cache.update(many, many, 0)
        assert isinstance(caught.value, torch.OutOfMemoryError)
        assert torch.equal(cache.layers[0].keys, kept)
        del caught
        pool.budget_bytes = None
        with torch.no_grad():
            grown, _ = cache.update(many, many, 0)
        assert torch.equal(grown, torch.cat([kept, many], 2))


def test_stock_methods_are_counted_with_their_reason(memory: Memory) -> None:
    with torch_vtensor.enabled():
        cache, tokens = DynamicCache(), torch.randn(1, 1, 3, 8)
        with torch.enable_grad():
            cache.update(tokens, tokens, 0)
        assert any("gradients are enabled" in reason for reason in memory.appends)


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_explain_has_a_line_for_every_layer(family: str) -> None:
    if family not in FAMILIES or family in OWN_CACHE:
        pytest.skip(f"no tiny {family} here that uses DynamicCache")
    model = model_of(family)
    lines = torch_vtensor.explain(model)
    assert len(lines) == model.config.get_text_config().num_hidden_layers
    assert any(line.zero_copy for line in lines)
    assert str(lines).count("\n") == len(lines)


def test_explain_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="takes a transformers model or config, not a int"):
        torch_vtensor.explain(3)


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least one byte"):
        torch_vtensor.enable(budget_bytes=0)
    with pytest.raises(ValueError, match="budget_bytes: '8GB' is not a size"):
        torch_vtensor.enable(budget_bytes="8GB")
    with pytest.raises(TypeError, match=r"budget_bytes is 8.0: give a number of bytes, a text such as '8GiB', or None"):
        torch_vtensor.enable(budget_bytes=8.0)
    assert not torch_vtensor.is_enabled()


def test_a_blocks_budget_ends_with_it() -> None:
    pool = default_pool(torch.device("cpu"))
    before = pool.budget_bytes
    torch_vtensor.enable(budget_bytes="8MiB")
    with torch_vtensor.enabled(budget_bytes=2 << 20):
        assert pool.budget_bytes == 2 << 20
        with torch_vtensor.enabled():
            assert pool.budget_bytes == 2 << 20
    assert pool.budget_bytes == 8 << 20
    torch_vtensor.disable()
    assert pool.budget_bytes == before


def test_without_cuda_python_caches_on_a_gpu_stay_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    layers.why_no_driver.cache_clear()
    try:
        assert "pip install 'torch-vtensor[cuda]'" in str(layers.why_no_driver("cuda"))
        assert layers.why_no_driver("cpu") is None
    finally:
        layers.why_no_driver.cache_clear()
