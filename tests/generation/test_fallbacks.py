"""Where growing in place is impossible or would be wrong: the results of stock transformers, and the reason counted."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_memory import Memory
from tiny_models import FAMILIES, VERSION, Inputs, model_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CompileConfig, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

import torch_vtensor
from torch_vtensor.allocator.pools import default_pool
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation._transformers_compat import CACHE_NAME

CPU = torch.device("cpu")
RunPython = Callable[..., str]


def generate(model: Any, inputs: Inputs | None = None, *, new_tokens: int = 12, **options: Any) -> Any:
    return model.generate(
        **(inputs or FAMILIES["llama"].inputs(2)),
        max_new_tokens=new_tokens,
        suppress_tokens=[2],  # the end of a sequence
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def assert_same(ours: Any, theirs: Any) -> None:
    """Two outputs of generate(): the same tokens by the same scores."""
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores)
    for our, their in zip(ours.scores, theirs.scores, strict=True):
        assert torch.equal(our, their)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reasons(memory: Memory) -> set[str]:
    return {reason for reason in memory.appends if reason.startswith("stock")}


# What generate() can be asked for


class Backend:
    """Compiles to eager code, and counts the graphs."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_compiled_forward_compiles_as_often_and_says_the_same(memory: Memory) -> None:
    def run() -> tuple[Any, int]:
        torch._dynamo.reset()
        model, backend = copy.deepcopy(model_of("llama")), Backend()
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
        return generate(model), backend.num_graphs

    theirs, num_graphs = run()
    with torch_vtensor.enabled():
        ours, our_num_graphs = run()
    assert_same(ours, theirs)
    assert our_num_graphs == num_graphs > 0
    assert "zero-copy" not in memory.appends


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_prompt_eager_and_decoding_compiled(memory: Memory) -> None:
    """Compiled code gets views of our memory, and its results come back to us."""
    model = model_of("llama")
    compiled = torch.compile(model.forward, backend="eager", dynamic=True)
    ids = FAMILIES["llama"].inputs(2)["input_ids"]

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        torch._dynamo.reset()
        cache = DynamicCache(config=model.config)
        logits = [model(ids, past_key_values=cache).logits]
        for step, forward in enumerate((compiled, model, compiled)):
            logits.append(forward(torch.full((2, 1), 7 + step), past_key_values=cache).logits)
        assert cache.get_seq_length() == ids.shape[1] + 3
        return logits

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
    assert memory.appends["zero-copy"] > 0
    assert memory.appends["import"] > 0


def _compiled_static() -> dict[str, Any]:
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True  # on the CPU it is not compiled unless asked for
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
@pytest.mark.parametrize(
    "options", [lambda: {"cache_implementation": "static"}, _compiled_static], ids=["", "compiled"]
)
def test_a_static_cache_stays_what_it_is(options: Callable[[], dict[str, Any]], memory: Memory) -> None:
    theirs = generate(model_of("llama"), **options())
    with torch_vtensor.enabled():
        ours = generate(model_of("llama"), **options())
    assert_same(ours, theirs)
    assert type(ours.past_key_values) is type(theirs.past_key_values)
    assert memory.appends == {}
    assert memory.live_bytes == 0


@pytest.mark.gpu
def test_an_offloading_cache_stays_what_it_is(memory: Memory) -> None:
    model = copy.deepcopy(model_of("llama")).cuda()
    inputs = {name: tensor.cuda() for name, tensor in FAMILIES["llama"].inputs(2).items()}
    theirs = generate(model, inputs, cache_implementation="offloaded")
    with torch_vtensor.enabled():
        ours = generate(model, inputs, cache_implementation="offloaded")
    assert_same(ours, theirs)
    assert reasons(memory) == {"stock: the cache offloads its layers"} == set(memory.appends)


def test_a_quantized_cache_stays_what_it_is(memory: Memory) -> None:
    """With a quantizer of our own: transformers' are packages that need not be there."""
    from transformers.cache_utils import QuantizedLayer

    class Rounded(QuantizedLayer):
        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return (tensor * 64).round().to(torch.int16)

        def _dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
            return quantized.to(torch.float32) / 64

    def run() -> Any:
        layers = [Rounded(residual_length=8) for _ in range(3)]
        return generate(model_of("llama"), past_key_values=Cache(layers=layers))

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    assert_same(ours, theirs)
    assert memory.appends == {}


def test_autocast(memory: Memory) -> None:
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return generate(model_of("llama"))

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    assert_same(ours, theirs)
    assert reasons(memory) <= {"stock: keys and values differ in dtype or device"}
    for our, their in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert (our.keys.dtype, our.values.dtype) == (their.keys.dtype, their.values.dtype)


# Tracing


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
def test_exporting_a_model_with_its_cache(memory: Memory) -> None:
    integration = pytest.importorskip("transformers.integrations.executorch")
    ids, mask = FAMILIES["llama"].inputs(1)["input_ids"][:, :9], torch.ones(1, 9, dtype=torch.long)

    def export() -> Any:
        return integration.export_with_dynamic_cache(model_of("llama"), ids, mask)

    theirs = export()
    with torch_vtensor.enabled():
        ours = export()
        assert str(ours.graph) == str(theirs.graph)
        cache = DynamicCache(config=model_of("llama").config)
        inputs = {"input_ids": ids, "attention_mask": mask, CACHE_NAME: cache, "use_cache": True}
        with torch.no_grad():
            found = ours.module()(**inputs).logits
            expected = model_of("llama")(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)


def test_fake_tensors_and_meta_tensors(memory: Memory) -> None:
    with torch_vtensor.enabled(), torch.no_grad():
        for mode, device in ((FakeTensorMode(), "cpu"), (nullcontext(), "meta")):
            with mode:
                cache = DynamicCache()
                for num_new in (130, 1, 1):
                    tokens = torch.empty(2, 2, num_new, 16, device=device)
                    keys, values = cache.update(tokens, tokens, 0)
                assert keys.shape == values.shape == (2, 2, 132, 16)
                cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=device))
                assert cache.get_seq_length() == 132
    assert reasons(memory) == {"stock: a tensor subclass", "stock: no memory driver for meta"}
    assert memory.num_mapped == 0


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 makes no masks on meta")
def test_a_model_on_meta_runs(memory: Memory) -> None:
    model, ids = copy.deepcopy(model_of("gemma3")).to("meta"), torch.zeros(2, 60, dtype=torch.long, device="meta")
    with torch_vtensor.enabled(), torch.no_grad():
        cache = model(ids).past_key_values
        logits = model(ids[:, :1], past_key_values=cache).logits
    assert logits.shape[:2] == (2, 1)
    assert reasons(memory) == set(memory.appends) == {"stock: no memory driver for meta"}


def test_another_default_device_means_nothing_to_a_cache_on_the_cpu() -> None:
    tokens, one, order = noise(2, 2, 300, 16), noise(2, 2, 1, 16), torch.tensor([1, 1])
    with torch_vtensor.enabled(), torch.no_grad(), torch.device("meta"):
        cache = DynamicCache()
        cache.update(tokens, tokens, 0)
        cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        fork = copy.deepcopy(cache)
        keys, _ = fork.update(one.repeat(2, 1, 1, 1), one.repeat(2, 1, 1, 1), 0)
    assert torch.equal(keys, torch.cat([tokens[[1, 1, 1, 1]], one.repeat(2, 1, 1, 1)], 2))


# Tensors that do not fit


def _two_dtypes() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step, dtype in enumerate((torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)):
        yield noise(2, 2, 70, 16, seed=step, dtype=dtype), noise(2, 2, 70, 16, seed=9 - step, dtype=dtype)


def _keys_unlike_values() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(3):
        yield noise(2, 2, 70, 16, seed=step), noise(2, 2, 70, 16, seed=9 - step, dtype=torch.bfloat16)


def _fewer_keys_than_values() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(3):
        yield noise(2, 2, 70, 16, seed=step), noise(2, 2, 71, 16, seed=9 - step)


def _without_tokens() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for num_new in (70, 0, 70):
        yield noise(2, 2, num_new, 16), noise(2, 2, num_new, 16, seed=1)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (_two_dtypes, "stock: keys and values do not fit the tokens before them"),
        (_keys_unlike_values, "stock: keys and values differ in dtype or device"),
        (_fewer_keys_than_values, "stock: empty, or not [batch, heads, tokens, dim]"),
        (_without_tokens, "stock: empty, or not [batch, heads, tokens, dim]"),
    ],
)
def test_tensors_that_do_not_fit(steps: Any, reason: str, memory: Memory) -> None:
    theirs = DynamicCache()
    with torch.no_grad():
        expected = [theirs.update(key, value, 0) for key, value in steps()]
        with torch_vtensor.enabled():
            ours = DynamicCache()
            found = [ours.update(key, value, 0) for key, value in steps()]
    for our_pair, their_pair in zip(found, expected, strict=True):
        for our, their in zip(our_pair, their_pair, strict=True):
            assert our.dtype == their.dtype
            assert torch.equal(our, their)
    assert reason in reasons(memory)


def test_gradients_flow_through_a_cache(memory: Memory) -> None:
    def run() -> torch.Tensor:
        cache, leaf = DynamicCache(), noise(2, 2, 70, 16).requires_grad_()
        with torch.no_grad():
            cache.update(noise(2, 2, 130, 16), noise(2, 2, 130, 16), 0)
        for step in range(2):
            keys, values = cache.update(leaf * (step + 1), leaf.sin(), 0)
        (keys * noise(2, 2, 270, 16, seed=5) + values**2).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    assert torch.equal(ours, theirs)
    assert reasons(memory) == {"stock: gradients are enabled (use torch.no_grad())"}


def test_function_transforms(memory: Memory) -> None:
    earlier, tokens = noise(2, 2, 130, 16), noise(5, 2, 2, 70, 16, seed=1)

    def attend(new: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache()
        cache.update(earlier, earlier, 0)
        cache.update(new, new * 2, 0)
        keys, values = cache.update(new[:, :, :1], new[:, :, :1], 0)
        return (keys * values.cos()).sum()

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            mapped = torch.func.vmap(attend)(tokens)
        return [mapped, torch.func.grad(attend)(tokens[0]), torch.func.jvp(attend, (tokens[0],), (tokens[1],))[1]]

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)
    assert "stock: traced or transformed" in reasons(memory)


# Programs that do more with a cache


class Halving(DynamicLayer):
    """Keeps what it is given, and shows attention half of it."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kw)
        return keys / 2, values / 2


class Own(DynamicLayer):
    """Grows by itself."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if self.get_seq_length():
            key_states = torch.cat([self.keys, key_states], 2)
            value_states = torch.cat([self.values, value_states], 2)
        self.is_initialized = True
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        return self.keys, self.values


@pytest.mark.parametrize(("kind", "is_ours"), [(Halving, True), (Own, False)])
def test_a_layer_with_an_update_of_its_own(kind: type[DynamicLayer], is_ours: bool, memory: Memory) -> None:
    def run(**options: Any) -> Any:
        return generate(model_of("llama"), past_key_values=Cache(layers=[kind() for _ in range(3)]), **options)

    for options in ({}, {"num_beams": 3}):
        theirs = run(**options)
        with torch_vtensor.enabled():
            assert_same(run(**options), theirs)
    assert ("zero-copy" in memory.appends) == is_ours


def test_a_program_may_assign_and_crop_between_steps() -> None:
    model, ids = model_of("llama"), FAMILIES["llama"].inputs(2)["input_ids"]

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        cache, logits = DynamicCache(config=model.config), []

        def step(num_new: int) -> None:
            logits.append(model(ids[:, :num_new], past_key_values=cache).logits)

        step(130)
        cache.layers[1].keys = cache.layers[1].keys * 0.5  # of one layer, keys only
        step(1)
        step(1)
        cache.crop(-40)
        step(3)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 10:], layer.values[:, :, 10:]
        step(1)
        for layer in cache.layers:
            layer.values = layer.values.clone().flip(2)
        step(60)
        cache.crop(50 - cache.get_seq_length())
        step(1)
        return logits

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


def _saved(cache: DynamicCache) -> DynamicCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), _saved])
def test_copies_in_mid_conversation_go_their_own_ways(family: str, copied: Callable[[Any], Any]) -> None:
    model, inputs = model_of(family), FAMILIES[family].inputs(2)

    def run() -> list[Any]:
        first = generate(model, inputs)
        caches = [first.past_key_values, copied(first.past_key_values), copied(first.past_key_values)]
        outputs = [first]
        for turn in range(2):  # in turns, so that each grows after the others have
            for index in range(3):
                question = torch.full((2, 5 + index), 10 + 3 * turn + index)
                before = outputs[-3] if turn else first
                ids = torch.cat([before.sequences, question], 1)
                outputs.append(generate(model, {"input_ids": ids}, past_key_values=caches[index]))
        return outputs

    theirs = run()
    with torch_vtensor.enabled():
        ours = run()
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)


# Models spread over devices


@pytest.mark.parametrize("where", ["hooks", "cpu-offload", "disk-offload"])
def test_models_under_accelerate(where: str, memory: Memory, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(model_of("llama"))
    parts: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    parts |= {f"model.layers.{index}": "cpu" for index in range(3)}
    if where == "hooks":
        model = accelerate.dispatch_model(model, device_map=parts, force_hooks=True)
    elif where == "cpu-offload":
        model = accelerate.cpu_offload(model, execution_device=CPU)
    else:
        parts |= {"model.layers.1": "disk", "lm_head": "disk"}
        model = accelerate.dispatch_model(model, device_map=parts, main_device="cpu", offload_dir=tmp_path)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    theirs = generate(model)
    with torch_vtensor.enabled():
        ours = generate(model)
        beams = generate(model, num_beams=3)
    assert_same(ours, theirs)
    assert_same(beams, generate(model, num_beams=3))
    assert reasons(memory) == set()
    assert memory.appends["zero-copy"] > 0


# Out of memory


def test_out_of_pages_in_the_middle_of_generate(memory: Memory) -> None:
    model, inputs = model_of("llama"), FAMILIES["llama"].inputs(2)
    theirs = generate(model, inputs, new_tokens=120)
    with torch_vtensor.enabled():
        cache = generate(model, inputs, new_tokens=120).past_key_values
        needed_bytes = torch_vtensor.memory(cache).committed_bytes
    del cache
    memory.settle()
    torch_vtensor.trim()
    cache = DynamicCache(config=model.config)
    with (
        torch_vtensor.enabled(budget_bytes=needed_bytes * 4 // 5),
        pytest.raises(OutOfPagesError, match=r"asked for .* more with .* committed, .*raise the budget") as caught,
    ):
        generate(model, inputs, new_tokens=120, past_key_values=cache)
    assert caught.value.budget_bytes == needed_bytes * 4 // 5
    del caught
    assert 130 < cache.get_seq_length() < 250, "it ran out while decoding"
    assert default_pool(CPU).budget_bytes is None
    cache = None
    assert memory.live_bytes == 0, "what the failed call took is not in use any more"
    with torch_vtensor.enabled():
        assert_same(generate(model, inputs, new_tokens=120), theirs)


def test_out_of_pages_leaves_a_conversation_as_it_was(memory: Memory) -> None:
    model, inputs = model_of("gemma3"), FAMILIES["gemma3"].inputs(2)

    def turns(cache: Any, fails: bool) -> Any:
        first = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([first.sequences, torch.full((2, 9), 5)], 1)
        if fails:
            full = cache.layers[1]
            before, length = full.keys.clone(), cache.get_seq_length()
            pool = default_pool(CPU)
            pool.budget_bytes = pool.ledger.committed_bytes + 4 * pool.page_bytes
            with pytest.raises(OutOfPagesError):
                generate(model, {"input_ids": ids}, past_key_values=copy.deepcopy(cache), new_tokens=300)
            pool.budget_bytes = None
            assert cache.get_seq_length() == length
            assert torch.equal(full.keys, before)
        return generate(model, {"input_ids": ids}, past_key_values=cache, new_tokens=60)

    theirs = turns(DynamicCache(config=model.config), fails=False)
    with torch_vtensor.enabled():
        ours = turns(DynamicCache(config=model.config), fails=True)
    assert_same(ours, theirs)


@pytest.mark.parametrize("spare_pages", [2, 12])  # the first layer is refused more, or a later one
def test_a_cache_that_ran_out_keeps_its_tokens_and_goes_on(spare_pages: int, memory: Memory) -> None:
    model, inputs = model_of("llama"), FAMILIES["llama"].inputs(2)
    theirs = generate(model, inputs, new_tokens=60)
    ids = torch.cat([theirs.sequences, torch.full((2, 9), 5)], 1)
    theirs = generate(model, {"input_ids": ids}, past_key_values=theirs.past_key_values, new_tokens=60)
    with torch_vtensor.enabled():
        cache = torch_vtensor.VTensorCache(config=model.config)
        generate(model, inputs, new_tokens=60, past_key_values=cache)
        length, before = cache.get_seq_length(), [layer.keys.clone() for layer in cache.layers]
        pool = default_pool(CPU)
        pool.budget_bytes = pool.ledger.committed_bytes + spare_pages * pool.page_bytes
        with pytest.raises(OutOfPagesError):
            generate(model, {"input_ids": ids}, past_key_values=cache, new_tokens=400)
        pool.budget_bytes = None
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1, "the failed step was taken back"
        assert cache.get_seq_length() >= length
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys[:, :, :length], keys)
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())
        ours = generate(model, {"input_ids": ids}, past_key_values=cache, new_tokens=60)
    assert_same(ours, theirs)


# Threads and processes


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once; raise what any of them raised."""
    raised: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_threads_generate_at_once(memory: Memory) -> None:
    jobs = [(family, {"num_beams": beams}) for family in ("llama", "gemma3") for beams in (1, 3)]
    theirs = [generate(model_of(family), FAMILIES[family].inputs(2), **options) for family, options in jobs]
    ours: list[list[Any]] = [[] for _ in jobs]

    def work(index: int) -> None:
        family, options = jobs[index]
        with torch_vtensor.enabled():
            for _ in range(2):
                ours[index].append(generate(model_of(family), FAMILIES[family].inputs(2), **options))

    in_threads(*(lambda index=index: work(index) for index in range(len(jobs))))
    for outputs, their in zip(ours, theirs, strict=True):
        for our in outputs:
            assert_same(our, their)
    assert memory.num_mapped > 0
    ours.clear()


def test_enable_and_disable_while_others_generate(memory: Memory) -> None:
    families = ("llama", "gemma3")
    theirs = {family: generate(model_of(family), FAMILIES[family].inputs(2), new_tokens=40) for family in families}
    done = threading.Event()

    def generate_all() -> None:
        try:
            for _ in range(3):
                for family in families:
                    out = generate(model_of(family), FAMILIES[family].inputs(2), new_tokens=40)
                    assert_same(out, theirs[family])
        finally:
            done.set()

    def switch() -> None:
        while not done.wait(0.001):
            torch_vtensor.enable()
            done.wait(0.005)
            torch_vtensor.disable()

    in_threads(generate_all, switch)
    assert not torch_vtensor.is_enabled()
    assert memory.appends["zero-copy"] > 0
    assert memory.appends["import"] > 0, "conversations were joined in the middle"


_FORK = """
import os, sys, warnings
sys.path.insert(0, {tests!r})
os.environ["TORCH_VTENSOR_PAGE_BYTES"] = "4096"
import torch
torch.set_num_threads(1)  # GNU OpenMP hangs in a child whose parent has run on several threads
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of threads at every fork
from tiny_models import FAMILIES, model_of
import torch_vtensor

model, inputs = model_of("llama"), FAMILIES["llama"].inputs(2)

def turn(before, cache=None):
    ids = inputs["input_ids"] if before is None else torch.cat([before, torch.full((2, 9), 5)], 1)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=20,
                         suppress_tokens=[2], return_dict_in_generate=True)
    return out.sequences, out.past_key_values

first, cache = turn(None)
second, _ = turn(first, cache)
torch_vtensor.enable()
sequences, cache = turn(None)
assert torch.equal(sequences, first) and torch_vtensor.memory(cache).committed_bytes > 0
committed_bytes = torch_vtensor.stats().devices[torch.device("cpu")].committed_bytes
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    assert torch.equal(turn(None)[0], first)  # in memory of its own
    assert torch_vtensor.stats().devices[torch.device("cpu")].live_bytes >= 0
    assert torch.equal(turn(first, cache)[0], second)  # the parent's conversation goes on here
    assert torch_vtensor.stats().appends["import"] > 0
    torch_vtensor.trim()
    print("child done", flush=True)
    sys.exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, f"the child ended with {{status}}"
assert torch_vtensor.stats().devices[torch.device("cpu")].committed_bytes == committed_bytes
assert torch.equal(turn(first, cache)[0], second)
print("parent done")
"""


@pytest.mark.parametrize("memory", ["strips"], indirect=True)
def test_a_child_process_goes_on_alone(memory: Memory, run_python: RunPython) -> None:
    tests = str(Path(__file__).parent)
    assert run_python(_FORK.format(tests=tests)).splitlines() == ["child done", "parent done"]
