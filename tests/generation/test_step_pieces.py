"""compile_in_pieces(): what is compiled of a step is compiled once for all layers that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from test_fuse import LENGTH, Rows
from tiny_models import sizes
from torch import nn

from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.decode.fuse import fuse
from torch_vtensor.generation.decode.pieces import _kind, compile_in_pieces
from torch_vtensor.generation.decode.step import GroupRows, step_forward, twin_of
from torch_vtensor.generation.shared_reads import SharedTables

NUM_LAYERS, MOST = 5, 8
pytestmark = pytest.mark.parametrize("memory", ["strips"], indirect=True)


class Pieces:
    """A backend that runs pieces as they are, and notes which were compiled."""

    def __init__(self, prepare: Callable[[torch.fx.GraphModule], None] = lambda graph_module: None) -> None:
        self.compiled: list[torch.fx.GraphModule] = []
        self.num_called = 0
        self._prepare = prepare

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self._prepare(graph_module)
        return compile_in_pieces(graph_module, example_inputs, self.compile)

    def compile(self, graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.compiled.append(graph_module)
        assert len(example_inputs) == len(graph_module.graph.find_nodes(op="placeholder"))

        def call(*inputs: Any) -> Any:
            self.num_called += 1
            return graph_module(*inputs)

        return call

    def run(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        torch._dynamo.reset()
        forward.__code__ = forward.__code__.replace()
        with torch.no_grad():
            return torch.compile(forward, backend=self, fullgraph=True, dynamic=False)(*inputs)


def decoder(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    text = "Text" * (kind == "Gemma3")
    config = getattr(transformers, f"{kind}{text}Config")(**sizes(num_hidden_layers=NUM_LAYERS, **changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # no two layers' weights are equal, norms' neither
        for number, weight in enumerate(model.parameters()):
            weight.mul_(1 + number / 100)
    return model.eval()


def inputs_of(model: Any, batch: int, num_groups: int | None = None) -> tuple[tuple[Any, ...], torch.Tensor]:
    """Arguments of one step, and the rows that it appends to; with tables of so many groups that share nothing."""
    rows, config = Rows(model, MOST), model.config
    windows = [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in getattr(config, "layer_types", ["full_attention"] * NUM_LAYERS)
    ]
    layers = [layer._replace(window=window) for layer, window in zip(rows.step.layers, windows, strict=True)]
    group, shared = rows.step.groups[0], None
    if num_groups is not None:
        nobody = torch.full((num_groups, batch), -1, dtype=torch.int32)
        shared = SharedTables(nobody, torch.zeros(batch, dtype=torch.int32))
    group = GroupRows(*(numbers[:batch] for numbers in group[:4]), shared)
    step = rows.step._replace(layers=tuple(layers), groups=(group,))
    tokens, positions = torch.arange(11, 11 + batch)[:, None], torch.full((batch, 1), LENGTH)
    return (tokens, positions, torch.ones(batch, 1, 1, 1, dtype=torch.bool), step), rows.tensor


def answer(model: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the step computes, and the rows after it."""
    inputs, rows = inputs_of(model, batch)
    with torch.no_grad():
        return step_forward(twin_of(model))(*inputs), rows


MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Qwen2", {"use_sliding_window": False}),
        ("Qwen3", {}),
        ("Mixtral", {"num_local_experts": 2, "sliding_window": None}),
        ("Gemma3", {"sliding_window": 512, "layer_types": MIXED}),  # windows and angles are no part of pieces
    ],
)
def test_layers_that_are_alike_are_compiled_once(kind: str, changes: dict[str, Any], batch: int) -> None:
    model = decoder(kind, **changes)
    expected, expected_rows = answer(model, batch)
    inputs, rows = inputs_of(model, batch)
    pieces = Pieces()
    assert torch.equal(pieces.run(step_forward(twin_of(model)), *inputs), expected)
    assert torch.equal(rows, expected_rows)
    assert len(pieces.compiled) == 3, "before the first attention, between two, and behind the last one"
    assert pieces.num_called == NUM_LAYERS + 1


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_steps_are_cut_too(batch: int) -> None:
    model = decoder("Llama")
    expected, expected_rows = answer(model, batch)
    inputs, rows = inputs_of(model, batch)
    pieces = Pieces(fuse)
    torch.testing.assert_close(pieces.run(step_forward(twin_of(model)), *inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-5)
    assert len(pieces.compiled) == 3
    targets = [node.target for piece in pieces.compiled for node in piece.graph.nodes]
    assert torch.nn.functional.linear not in targets, "nothing is left of what a norm or a sum moves into"


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 0.5),
        lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        lambda layer: setattr(layer.mlp, "down_proj", nn.Linear(48, 32)),
        lambda layer: layer.mlp.double(),
        lambda layer: setattr(layer.mlp.up_proj, "weight", layer.mlp.gate_proj.weight),
        lambda layer: setattr(layer.mlp.up_proj, "weight", nn.Parameter(layer.mlp.up_proj.weight.T.contiguous().T)),
    ],
    ids=["constant", "function", "bias", "dtype", "shared", "strides"],
)
def test_a_layer_that_differs_is_compiled_for_itself(change: Callable[[Any], Any]) -> None:
    model = decoder("Llama")
    change(model.model.layers[2])
    if model.model.layers[2].mlp.down_proj.weight.dtype is torch.float64:
        mlp, forward = model.model.layers[2].mlp, model.model.layers[2].mlp.forward
        mlp.forward = lambda x: forward(x.double()).float()
    expected, _ = answer(model, 2)
    inputs, _ = inputs_of(model, 2)
    pieces = Pieces()
    assert torch.equal(pieces.run(step_forward(twin_of(model)), *inputs), expected)
    assert len(pieces.compiled) == 4


def test_nothing_is_cut_inside_of_a_state_that_is_entered() -> None:
    model = decoder("Llama")
    twin = twin_of(model)
    step = step_forward(twin)

    def forward(*inputs: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.mm(torch.ones(2, 3), torch.ones(3, 2))
        return step(*inputs) + hidden.sum()

    def inside(*inputs: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return step(*inputs) + 6 * 2

    expected, _ = answer(model, 2)
    for function, num_pieces in ((forward, 3), (inside, 1)):
        pieces, (inputs, _rows) = Pieces(), inputs_of(model, 2)
        assert torch.equal(pieces.run(function, *inputs), expected + 12)
        assert len(pieces.compiled) == num_pieces


def test_changes_in_place_are_seen_by_later_pieces() -> None:
    model = decoder("Llama")
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x).add_(1.0)
        norm = layer.input_layernorm.forward
        layer.input_layernorm.forward = lambda x, norm=norm: norm(x.mul_(1.5))  # the residual is changed as well
    expected, expected_rows = answer(model, 2)
    inputs, rows = inputs_of(model, 2)
    pieces = Pieces()
    assert torch.equal(pieces.run(step_forward(twin_of(model)), *inputs), expected)
    assert torch.equal(rows, expected_rows)
    assert len(pieces.compiled) == 3


def test_overlaps_that_differ_are_compiled_apart() -> None:
    """What is changed in place and what is read may lie in one storage: code is for how they overlap there."""
    whole = torch.arange(32.0)
    kinds = [
        [_kind(view, storages) for view in (base[0:16], base[start : start + 16])]
        for base, start, storages in ((whole.clone(), 4, {}), (whole.clone(), 8, {}), (whole.clone(), 4, {}))
    ]
    assert kinds[0] != kinds[1]
    assert kinds[0] == kinds[2]


def test_one_that_fails_to_compile_leaves_the_graph_as_it_was() -> None:
    model = decoder("Llama")
    seen: list[tuple[str, str]] = []

    class Broken(Pieces):
        def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            before = str(graph_module.graph)
            with pytest.raises(RuntimeError, match="no compiler"):
                super().__call__(graph_module, example_inputs)
            seen.append((before, str(graph_module.graph)))
            return graph_module

        def compile(self, graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
            if self.compiled:
                raise RuntimeError("no compiler")
            return super().compile(graph_module, example_inputs)

    expected, _ = answer(model, 2)
    inputs, _rows = inputs_of(model, 2)
    assert torch.equal(Broken().run(step_forward(twin_of(model)), *inputs), expected)
    (graphs_seen,) = seen
    assert graphs_seen[0] == graphs_seen[1]


@pytest.mark.parametrize("first_groups", [0, 4])
def test_a_step_of_any_batch_is_traced_once(first_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Pieces()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", pieces.compile)
    model = decoder("Llama")
    torch._dynamo.reset()
    forward = graphs.compile_step(step_forward(twin_of(model)), of_any_batch=True)
    for batch, num_groups in ((3, first_groups), (2, 4), (8, 0), (5, 4), (5, 0)):
        expected, expected_rows = answer(model, batch)
        inputs, rows = inputs_of(model, batch, num_groups)
        with torch.no_grad():
            torch.testing.assert_close(forward(*inputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-5)
    assert len(pieces.compiled) == 3
    symbols = {str(node.meta["example_value"]) for node in pieces.compiled[1].graph.find_nodes(op="placeholder")
               if isinstance(node.meta["example_value"], torch.SymInt)}  # fmt: skip
    assert len(symbols) == 1, "the number of sequences; no other size is left open"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_inductors_code_for_pieces(batch: int) -> None:
    model = decoder("Llama")
    expected, expected_rows = answer(model, batch)
    torch._dynamo.reset()
    forward = graphs.compile_step(step_forward(twin_of(model)), of_any_batch=batch > 1)
    inputs, rows = inputs_of(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(forward(*inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
