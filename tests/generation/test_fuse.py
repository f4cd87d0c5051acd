"""fuse() rewrites the graph of a step to fewer operators that compute the same, and leaves alone what it must."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_models import sizes
from torch import nn
from torch.nn import functional

from torch_vtensor.generation.decode.fuse import fuse
from torch_vtensor.generation.decode.step import GroupRows, LayerRows, Step, step_forward, twin_of
from torch_vtensor.ops.skinny_linear import MAX_ROWS

HEADS, DIM, ROOM, LENGTH = 2, 16, 12, 7
pytestmark = pytest.mark.parametrize("memory", ["strips"], indirect=True)


class Rewritten:
    """A backend that runs the graph as it was and as it is after `fuse`."""

    def __init__(self) -> None:
        self.before: Counter[str] = Counter()
        self.after: Counter[str] = Counter()
        self.is_fused = True
        self._graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        assert not self._graphs, "one graph, compiled once"
        original = copy.deepcopy(graph_module)
        self.before = calls(graph_module)
        fuse(graph_module)
        self.after = calls(graph_module)
        self._graphs = [original, graph_module]
        return lambda *inputs: self._graphs[self.is_fused](*inputs)


def calls(graph_module: torch.fx.GraphModule) -> Counter[str]:
    """How often the operators that matter here are called; cached_attention with a rotation counts apart."""
    counts: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
        if node.op == "call_function" and name in (
            "linear",
            "skinny_linear",
            "skinny_linear_normed",
            "skinny_gated_linear",
            "cached_attention",
        ):
            counts[name] += 1
            counts["rotations inside"] += name == "cached_attention" and len(node.args) > 19
    return +counts


class Rows:
    """Keys and values of every layer, at addresses, random up to LENGTH."""

    def __init__(self, model: Any, batch: int) -> None:
        config, dtype = model.config, model.dtype
        generator = torch.Generator().manual_seed(3)
        shape = (config.num_hidden_layers, 2, batch, HEADS, ROOM, DIM)
        self.tensor = torch.randn(shape, generator=generator).to(dtype)
        layer_elements, part_elements, slot_elements = self.tensor.stride()[:3]
        slots = [self.tensor.data_ptr() + slot * slot_elements * dtype.itemsize for slot in range(batch)]
        addresses = torch.tensor(slots)
        zeros = torch.zeros(batch, dtype=torch.int32)
        strides = (ROOM * DIM, DIM)
        layers = [
            LayerRows(0, index * layer_elements, index * layer_elements + part_elements, strides, strides, None, HEADS,
                      DIM, DIM, dtype)
            for index in range(config.num_hidden_layers)
        ]  # fmt: skip
        group = GroupRows(addresses, addresses, zeros + LENGTH, zeros)
        self.step = Step(tuple(layers), (group,), torch.zeros(0), torch.zeros(0, dtype=torch.int32))


def decoder(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes(num_hidden_layers=2, **changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(dtype)


def run(
    model: Any, backend: Any, batch: int = 1, is_fused: bool = True, of_any_batch: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the model: its logits, and all rows after it."""
    rows = Rows(model, batch)
    tokens, positions = torch.full((batch, 1), 11), torch.full((batch, 1), LENGTH)
    mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool)
    backend.is_fused = is_fused
    if of_any_batch:
        (group,) = rows.step.groups
        for tensor in (tokens, positions, mask, group.key_addresses, group.lengths, group.firsts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch.no_grad():
        return backend.forward(tokens, positions, mask, rows.step), rows.tensor


def compiled(model: Any) -> Rewritten:
    backend: Any = Rewritten()
    torch._dynamo.reset()
    forward = step_forward(twin_of(model))
    forward.__code__ = forward.__code__.replace()
    backend.forward = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
    return backend  # type: ignore[no-any-return]


BATCH = {
    "skinny_linear": 4,
    "skinny_linear_normed": 3,
    "skinny_gated_linear": 2,
    "cached_attention": 2,
    "rotations inside": 2,
}
BLOCK = {"skinny_linear": 3, "skinny_gated_linear": 1, "cached_attention": 1, "rotations inside": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "block"),
    [("Llama", BLOCK), ("Mistral", BLOCK), ("Qwen2", BLOCK), ("Qwen3", BLOCK)],
)
def test_a_step_computes_the_same_in_fewer_operators(kind: str, block: dict[str, int], dtype: torch.dtype) -> None:
    model = decoder(kind, dtype, **({"sliding_window": None} if kind == "Mistral" else {}))
    backend = compiled(model)
    fused, fused_rows = run(model, backend)
    plain, plain_rows = run(model, backend, is_fused=False)
    assert backend.before == {"linear": 2 * 7 + 1, "cached_attention": 2}
    expected = Counter({name: 2 * count for name, count in block.items()}) + Counter({"skinny_linear": 1})
    assert backend.after == expected
    if dtype is torch.float32:
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused_rows, plain_rows, rtol=1e-5, atol=1e-5)
        return
    # As far from the float32 model as the unfused step is, or twice that: it rounds at no more places.
    exact, exact_rows = run(wide := copy.deepcopy(model).float(), compiled(wide), is_fused=False)
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max() > 0
    assert (fused_rows - exact_rows).abs().max() <= 2 * (plain_rows - exact_rows).abs().max() + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [2, 64])
def test_several_rows_are_normed_where_they_are_summed(batch: int, dtype: torch.dtype) -> None:
    model = decoder("Llama", dtype)
    backend = compiled(model)
    fused, _ = run(model, backend, batch)
    # Sums before the second block's norms and before the first one's second; the first input is no sum.
    assert backend.after == BATCH
    plain, _ = run(model, backend, batch, is_fused=False)
    if dtype is torch.float32:
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
        return
    exact, _ = run(wide := copy.deepcopy(model).float(), compiled(wide), batch, is_fused=False)
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max() > 0


def test_a_number_of_rows_that_is_not_known_counts_as_several() -> None:
    model = decoder("Llama")
    backend = compiled(model)
    fused, _ = run(model, backend, 5, of_any_batch=True)
    assert backend.after == BATCH
    plain, _ = run(model, backend, 5, is_fused=False, of_any_batch=True)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_more_rows_stay_as_they_are() -> None:
    backend = compiled(model := decoder("Llama"))
    run(model, backend, MAX_ROWS + 1)
    assert backend.after == {"linear": 15, "cached_attention": 2, "rotations inside": 2}


def test_gemma_norms_stay_as_they_are() -> None:
    """They scale by 1 + weight, so linear layers begin with what the norm leaves."""
    model = decoder("Gemma2", sliding_window=None, layer_types=["full_attention"] * 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
    backend = compiled(model)
    fused, _ = run(model, backend)
    assert backend.after["skinny_linear"] > 0
    torch.testing.assert_close(fused, run(model, backend, is_fused=False)[0], rtol=1e-4, atol=1e-4)


# Small graphs


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Counter[str], Any, Any]:
    """What operators ``function`` calls after `fuse`, and its results with and without."""
    backend: Any = Rewritten()
    torch._dynamo.reset()
    forward = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        fused = forward(*(tensor.clone() for tensor in inputs))
        backend.is_fused = False
        return backend.after, fused, forward(*(tensor.clone() for tensor in inputs))


X, GATE, UP = torch.randn(1, 1, 32), torch.randn(24, 32), torch.randn(24, 32)
WEIGHT, OTHER = torch.randn(32), torch.randn(1, 1, 24)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def norm_with_other_users(x: torch.Tensor) -> Any:
    normed = rms_norm(x, WEIGHT)
    return functional.linear(normed, GATE), normed.sum()


def result_that_is_used_twice(x: torch.Tensor) -> Any:
    out = functional.linear(x, GATE)
    return out + OTHER, out * 2


def gate_that_is_used_twice(x: torch.Tensor) -> Any:
    gate = functional.linear(x, GATE)
    return functional.silu(gate) * functional.linear(x, UP), gate


def broadcast_residual(x: torch.Tensor) -> Any:
    return functional.linear(x, GATE) + OTHER[0, 0]


def weight_by_its_name(x: torch.Tensor) -> Any:
    return functional.linear(x, weight=GATE), functional.linear(x, UP, bias=(GATE[:, 0] * x.sum()).sin())


def weight_made_on_the_way(x: torch.Tensor) -> Any:
    return functional.linear(x, GATE), functional.linear(x, UP * x.sum())


def input_changed_in_place(x: torch.Tensor) -> Any:
    first = functional.linear(x, GATE)
    x += 1
    return first + OTHER, functional.linear(x, UP)


def doubled(x: torch.Tensor) -> Any:
    out = functional.linear(x, GATE)
    return out + out


def many_of_one_input(x: torch.Tensor) -> Any:
    return [functional.linear(x, GATE * 1.0 if index < 0 else GATE) for index in range(7)]


def transposed_weight(x: torch.Tensor) -> Any:
    return functional.linear(x, GATE.T.contiguous().T)


def narrow_norm(x: torch.Tensor) -> Any:
    """In the input's own dtype, so not what skinny_linear does for 16-bit numbers."""
    x = x.to(torch.bfloat16)
    narrow = x.to(torch.bfloat16)
    narrow = narrow * torch.rsqrt(narrow.pow(2).mean(-1, keepdim=True) + 1e-5)
    return functional.linear(WEIGHT.bfloat16() * narrow.to(x.dtype), GATE.bfloat16()).float()


@pytest.mark.parametrize(
    "function",
    [
        norm_with_other_users,
        result_that_is_used_twice,
        gate_that_is_used_twice,
        broadcast_residual,
        weight_by_its_name,
        weight_made_on_the_way,
        input_changed_in_place,
        doubled,
        many_of_one_input,
        transposed_weight,
        narrow_norm,
    ],
)
def test_small_graphs_compute_the_same(function: Callable[..., Any]) -> None:
    _, fused, plain = traced(function, X)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_biases_and_a_norm_move_in() -> None:
    first, second = nn.Linear(32, 24), nn.Linear(32, 8, bias=False)

    def function(x: torch.Tensor) -> Any:
        normed = rms_norm(x, WEIGHT)
        return first(normed), second(normed)

    after, fused, plain = traced(function, X)
    assert after == {"skinny_linear": 1}
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_a_rotation_of_another_kind_stays_outside() -> None:
    """Pairs of neighbours instead of halves."""
    model = decoder("Cohere")
    backend = compiled(model)
    fused, _ = run(model, backend)
    assert backend.after["cached_attention"] == 2
    assert backend.after["rotations inside"] == 0
    torch.testing.assert_close(fused, run(model, backend, is_fused=False)[0], rtol=1e-5, atol=1e-5)
