"""What a step like the one before costs the host: Python's calls and calls into C, counted. Times are benchmarks'."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from paged_memory import Memory
from tiny_models import sizes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import torch_vtensor
from torch_vtensor.allocator.pools import default_pool, default_scheduler
from torch_vtensor.errors import OutOfPagesError
from torch_vtensor.generation import attention, layers

NUM_LAYERS = 6
HEADS, DIM = 2, 16
PROMPT_TOKENS = 300
WINDOW = 64
PACKAGE = str(Path(torch_vtensor.__file__).parent)


class Calls(Counter[str]):
    """Calls by name: those of Python's functions, and those into C, which end in "()"."""

    @property
    def num_python(self) -> int:
        return sum(count for name, count in self.items() if not name.endswith("()"))


def calls_of(run: Callable[[], object], folder: str = "") -> Calls:
    """What is called in code that lies in ``folder``."""
    calls = Calls()

    def count(frame: FrameType, event: str, function: Any) -> None:
        if not frame.f_code.co_filename.startswith(folder):
            return
        if event == "call":
            calls[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            calls[f"{function.__name__}()"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def config_of(window: int | None) -> Any:
    changes = {"num_hidden_layers": NUM_LAYERS, "num_key_value_heads": HEADS, "head_dim": DIM}
    if window is None:
        return transformers.LlamaConfig(**sizes(**changes))
    return transformers.MistralConfig(**sizes(**changes, sliding_window=window))


def step_of(cache: Any, num_tokens: int) -> Callable[[], None]:
    """One more step of every layer, of rows as a model makes them: [B, T, H, D] in memory."""
    key, value = (torch.randn(2, num_tokens, HEADS, DIM).transpose(1, 2) for _ in range(2))

    def step() -> None:
        for layer in range(NUM_LAYERS):
            cache.update(key, value, layer)

    return step


def quiet(step: Callable[[], None]) -> Calls:
    """The calls of the cheapest of some steps: others grow, or give a page back, which is not every step's."""
    return min((calls_of(step) for _ in range(24)), key=lambda calls: calls.num_python)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("explicit", [True, False])
def test_an_append_is_a_handful_of_calls(memory: Memory, explicit: bool, window: int | None) -> None:
    config = config_of(window)
    with torch.no_grad(), torch_vtensor.enabled():
        cache = torch_vtensor.VTensorCache(config=config) if explicit else DynamicCache(config=config)
        step_of(cache, PROMPT_TOKENS)()
        step = step_of(cache, 1)
        step()
        calls = quiet(step)
    # A launch a layer, views of keys and values, a window's also of what is kept; nothing else of torch's.
    num_views = 2 if window is None else 4
    of_torch = {"as_strided()", "narrow()", "copy_()", "cat()", "slice()", "clone()", "empty()", "set_()"}
    assert {name: count / NUM_LAYERS for name, count in calls.items() if name in of_torch} == {
        "as_strided()": num_views
    }
    assert calls["write()"] == NUM_LAYERS
    # Among C's, a lock of the layers and a lease of their rows.
    num_python, num_c = (7, 7 + num_views) if window is None else (9, 9 + num_views)
    if memory.layout == "strips":  # where no layer goes by what another one has asked
        num_c += 3
    assert calls.num_python <= num_python * NUM_LAYERS, calls.most_common()
    assert calls.total() - calls.num_python <= num_c * NUM_LAYERS, calls.most_common()


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
@pytest.mark.parametrize("batch", [1, 3])
def test_steady_decoding_makes_no_driver_call_and_holds_a_page_a_sequence_more(memory: Memory, batch: int) -> None:
    """16 KiB a token and sequence, so a page of 2 MiB is full after 128 steps."""
    device, heads, dim, num_steps = torch.device("cuda"), 8, 128, 600
    config = transformers.LlamaConfig(
        **sizes(num_hidden_layers=4, num_attention_heads=heads, num_key_value_heads=heads, head_dim=dim)
    )
    cache, pool = torch_vtensor.VTensorCache(config=config), default_pool(device)
    scheduler, quiet_steps, over = default_scheduler(device), 0, 0

    def append(num_tokens: int) -> None:
        for layer in range(4):
            new = torch.randn(batch, num_tokens, heads, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
            cache.update(new, new, layer)

    with torch.no_grad():
        append(640)
        waits = scheduler.num_device_waits
        for _ in range(num_steps):
            time.sleep(1e-3)  # as long as the shortest of a model's steps, in which memory is mapped ahead
            before = pool.driver.num_calls_by_thread[threading.get_ident()]
            append(1)
            quiet_steps += pool.driver.num_calls_by_thread[threading.get_ident()] == before
            held = cache.memory()
            over = max(over, held.committed_bytes - held.written_bytes)
    assert quiet_steps >= 0.95 * num_steps
    assert scheduler.num_device_waits == waits
    assert over <= batch * pool.page_bytes


class Depth:
    """A lock that knows how often its holder has taken it."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.depth = self.most = 0

    def __enter__(self) -> None:
        self._lock.__enter__()
        self.depth += 1
        self.most = max(self.most, self.depth)

    def __exit__(self, *exception: object) -> None:
        self.depth -= 1
        self._lock.__exit__(*exception)


def test_an_append_holds_its_lease_once() -> None:
    """Also where it finds no memory yet."""
    cache = torch_vtensor.VTensorCache(config=config_of(None))
    with torch.no_grad():
        step_of(cache, PROMPT_TOKENS)()
        state = layers.state_of(cache.layers[0])
        assert state is not None
        store: Any = state.column.store
        store.lease = state.column._lease = Depth(store.lease)
        committed, step = store.committed, step_of(cache, 1)
        for _ in range(100):
            step()
    assert store.committed > committed
    assert (store.lease.most, store.lease.depth) == (1, 0)


class Seen(TorchDispatchMode):
    """Counts the operators that a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_what_is_written() -> None:
    """As one may be tracing; it sees operators alone, and nothing of a call into C."""
    caches = [make(config=config_of(None)) for make in (DynamicCache, torch_vtensor.VTensorCache)]
    with torch.no_grad():
        prompt, step = (torch.randn(2, HEADS, tokens, DIM) for tokens in (PROMPT_TOKENS, 1))
        for layer in range(NUM_LAYERS):
            for cache in caches:
                cache.update(prompt, prompt, layer)
        for layer in range(NUM_LAYERS):
            caches[0].update(step, step, layer)
            with Seen() as seen:
                caches[1].update(step, step, layer)
            assert seen.operators["copy_"] == 2
            assert torch.equal(caches[0].layers[layer].keys, caches[1].layers[layer].keys)


def repeat(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def traced(step: Callable[[], None]) -> None:
    """The step, while a tracer is at work."""
    torch.func.vmap(lambda x: (step(), x)[1])(torch.zeros(1))


@pytest.mark.parametrize("memory", ["token-major"], indirect=True)
def test_a_step_that_was_taken_back_leaves_nothing_to_the_next_one(memory: Memory) -> None:
    """Two layers share a store whose pages are good for more tokens than those of the other, which is refused more."""
    kinds = ["full_attention" if layer in (1, 3, 4, 5) else "sliding_attention" for layer in range(NUM_LAYERS)]
    changes = {"num_hidden_layers": NUM_LAYERS, "sliding_window": WINDOW, "layer_types": kinds}
    cache = torch_vtensor.VTensorCache(config=transformers.Gemma3TextConfig(**sizes(**changes)))
    with torch.no_grad():
        step_of(cache, PROMPT_TOKENS)()
        step = step_of(cache, 1)
        pool = default_pool(torch.device("cpu"))
        pool.budget_bytes = pool.ledger.committed_bytes
        with pytest.raises(OutOfPagesError):
            repeat(step, PROMPT_TOKENS)
        pool.budget_bytes = None
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
        memory.forget_appends()
        traced(step)
    assert memory.appends == {"stock: traced or transformed": NUM_LAYERS}


def test_a_step_that_ended_in_the_middle_leaves_nothing_to_the_next_one(memory: Memory) -> None:
    row = torch.randn(2, HEADS, 1, DIM)
    for num_tokens in range(PROMPT_TOKENS, PROMPT_TOKENS + 4):  # in some of them the memory that there is suffices
        cache = torch_vtensor.VTensorCache(config=config_of(None))
        with torch.no_grad():
            step_of(cache, num_tokens)()
            step = step_of(cache, 1)
            step()
            for layer in range(2):
                cache.update(row, row, layer)
            for each in cache.layers[:2]:
                each.keys, each.values = each.keys[:, :, :-1], each.values[:, :, :-1]
            memory.forget_appends()
            traced(step)
        assert memory.appends == {"stock: traced or transformed": NUM_LAYERS}


def test_attention_of_a_step_is_decided_once() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config_of(None)).eval()
    cache, token = torch_vtensor.VTensorCache(config=model.config), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad(), torch_vtensor.enabled(attention="fast"):
        model(torch.ones(1, PROMPT_TOKENS, dtype=torch.int64), past_key_values=cache)
        model(token, past_key_values=cache)
        attention.counters.clear()
        calls = calls_of(lambda: model(token, past_key_values=cache), f"{PACKAGE}/generation/attention.py")
        assert attention.counters == {"fast": NUM_LAYERS}
    assert calls["_attend"] == 1
    assert calls["Turn.attend"] == NUM_LAYERS - 1
    # The rest is the way there: the function itself, the look-up and, where a call's details are told, their types.
    assert calls.num_python <= 3 * NUM_LAYERS + 25, calls.most_common()


def test_layers_of_two_kinds_take_turns() -> None:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    config = transformers.Gemma3TextConfig(
        **sizes(num_hidden_layers=NUM_LAYERS, layer_types=kinds, sliding_window=WINDOW)
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    cache, token = torch_vtensor.VTensorCache(config=config), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad(), torch_vtensor.enabled(attention="fast"):
        model(torch.ones(1, PROMPT_TOKENS, dtype=torch.int64), past_key_values=cache)
        for num_begun in (2, 1):  # a window's keys look in the second step as they did in the first
            calls = calls_of(lambda: model(token, past_key_values=cache), f"{PACKAGE}/generation/attention.py")
            assert (calls["_attend"], calls["Turn.attend"]) == (num_begun, NUM_LAYERS - num_begun)


def test_a_turn_ends_with_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    keep = attention.Turns.keep

    def noted(self: attention.Turns, key: torch.Tensor, turn: attention.Turn) -> None:
        keep(self, key, turn)
        made.append(self.find(key) is turn)
        made.append(self)

    monkeypatch.setattr(attention.Turns, "keep", noted)
    model = transformers.LlamaForCausalLM(config_of(None)).eval()
    cache, token = torch_vtensor.VTensorCache(config=model.config), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad(), torch_vtensor.enabled(attention="fast"):
        model(torch.ones(1, 40, dtype=torch.int64), past_key_values=cache)
        model(token, past_key_values=cache)
    found, turns = made
    assert found
    shape = cache.layers[0].keys.shape
    assert turns.find(torch.empty(shape)) is not None
    del cache
    assert turns.find(torch.empty(shape)) is None
