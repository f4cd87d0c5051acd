"""Layers that dynamo traces once are captured as if it had traced each of them."""

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from virtual import Captures, capture_call

import torch_vtensor.compile as ss
from torch_vtensor.compile import _torch_compat, capture, regions

NUM_LAYERS, WIDTH, BATCH = 6, 8, 4

needs_reuse = pytest.mark.skipif(not _torch_compat.reuses_regions(), reason="this torch traces each region")


class Config:
    def __init__(self, factor: float) -> None:
        self.factor = factor


CONFIG = Config(3.0)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.config = CONFIG
        self.sizes: dict[str, Any] = {"power": 2, "bounds": [-9, 9]}
        self.bias: float | None = None
        self.shift = 1.0
        self.up = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.gelu = nn.GELU()
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("offset", torch.ones(WIDTH))

    def forward(self, x: Tensor, scale: Tensor | float = 1.0, *, pair: tuple[Tensor | None, ...] = (None, 1)) -> Tensor:
        x = x + self.drop(self.gelu(self.up(self.norm(x)))) * self.config.factor
        x = self.down(x).pow(self.sizes["power"]).clamp(*self.sizes["bounds"]) * scale + self.offset + self.shift
        if self.bias is not None:
            x = x + self.bias
        return x if pair[0] is None else x * pair[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(number) for number in range(NUM_LAYERS))
        self.keywords: list[dict[str, Any]] = [{} for _ in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.config.factor
        for layer, keywords in zip(self.layers, self.keywords, strict=True):
            x = layer(x, **keywords)
        return x.sum()


def change(number: int, path: str, value: Any) -> Callable[[Model], None]:
    """Set an attribute of a layer, or of what lies in it."""

    def apply(model: Model) -> None:
        *holders, name = path.split(".")
        held: Any = model.layers[number]
        for holder in holders:
            held = getattr(held, holder)
        setattr(held, name, value)

    return apply


def change_others(path: str, value: Any) -> Callable[[Model], None]:
    """Set an attribute of all layers but the first, which is the one that is traced."""
    return lambda model: [change(number, path, value)(model) for number in range(1, NUM_LAYERS)] and None


def call_with(number: int, **keywords: Any) -> Callable[[Model], None]:
    return lambda model: model.keywords[number].update(keywords)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "nothing": lambda model: None,
    "number": change(3, "shift", 2.0),
    "number of each": lambda model: [change(n, "shift", float(n))(model) for n in range(NUM_LAYERS)],
    "none": change(3, "bias", 2.0),
    "in a dict": change(3, "sizes", {"power": 3, "bounds": [-9, 9]}),
    "deep in a dict": change(3, "sizes", {"power": 2, "bounds": [-9, 5]}),
    "of a builtin": change(3, "norm.eps", 0.5),
    "activation": change(3, "gelu.approximate", "tanh"),
    "module": change(3, "gelu", nn.ReLU()),
    "mode": lambda model: model.layers[3].drop.eval(),
    "object": change(3, "config", Config(4.0)),
    "object that the first shares with the model": change_others("config", Config(4.0)),
    "frozen": lambda model: model.layers[3].up.weight.requires_grad_(False),
    "frozen input": lambda model: [module.requires_grad_(False) for module in (model.embed, model.layers[0])],
    "shape": change(3, "offset", torch.ones(1, WIDTH)),
    "buffer that two share": lambda model: change(3, "offset", model.layers[2].offset)(model),
    "weight tied inside the first": lambda model: change(0, "down.weight", model.layers[0].up.weight)(model),
    "weight tied inside another": lambda model: change(3, "down.weight", model.layers[3].up.weight)(model),
    "weight tied outside the first": lambda model: change(0, "up.weight", model.embed.weight)(model),
    "weight tied outside another": lambda model: change(3, "up.weight", model.embed.weight)(model),
    "module shared outside the first": lambda model: change(0, "up", model.embed)(model),
    "layer called twice": lambda model: model.layers.__setitem__(4, model.layers[1]),
    "own forward": lambda model: change(3, "forward", MethodType(lambda self, x: self.up(x), model.layers[3]))(model),
    "own forward inside": lambda model: change(3, "up.forward", MethodType(lambda up, x: x, model.layers[3].up))(model),
    "hook": lambda model: model.layers[3].register_forward_hook(lambda module, args, made: made * 2),
    "hook inside the first": lambda model: model.layers[0].up.register_forward_pre_hook(lambda up, args: args[0] * 2),
    "argument": call_with(3, scale=2.0),
    "tensor for a number": call_with(3, scale=torch.ones(1)),
    "type of an argument": lambda model: [call_with(n, scale=2 if n % 2 else 2.0)(model) for n in range(NUM_LAYERS)],
    "tuple": call_with(3, pair=(torch.ones(1), None)),
}  # fmt: skip


def count_bodies(gm: GraphModule) -> tuple[int, int]:
    """How many calls of regions a graph has, and of how many different ones."""
    called = [call.body for node in gm.graph.nodes if (call := _torch_compat.region_called(node))]
    return len(called), len(set(called))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """`count_bodies` of each graph that is captured."""
    found: list[tuple[int, int]] = []

    def noted(gm: GraphModule) -> GraphModule:
        found.append(count_bodies(gm))
        return regions.inline_regions(gm)

    monkeypatch.setattr(capture, "inline_regions", noted)
    return found


def capture_both(function: Callable[..., Any], *arguments: Any) -> Iterator[Captures]:
    """What is captured with regions, then what is captured without."""
    yield capture_call(function, *arguments)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(_torch_compat, "reuses_regions", lambda: False)
        yield capture_call(function, *arguments)


def assert_same_program(function: Callable[..., Any], *arguments: Any) -> None:
    with_regions, without = (call.captured for call in capture_both(function, *arguments))
    assert str(with_regions.graph) == str(without.graph)
    for one, other in zip(with_regions.graph.operators, without.graph.operators, strict=True):
        assert (one.target, repr(one.args), repr(one.kwargs)) == (other.target, repr(other.args), repr(other.kwargs))
        kinds = [[(made.dtype, made.differentiable) for made in o.outputs if made is not None] for o in (one, other)]
        assert kinds[0] == kinds[1]
    assert list(map(str, with_regions.results)) == list(map(str, without.results))


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_differs_is_captured_as_it_is(name: str) -> None:
    model = Model()
    CHANGES[name](model)
    assert_same_program(lambda x: model(x), torch.randn(BATCH, WIDTH))


@needs_reuse
def test_layers_that_are_alike_are_traced_once(counts: list[tuple[int, int]]) -> None:
    model = Model()
    captured = capture_call(lambda x: model(x), torch.randn(BATCH, WIDTH)).captured
    assert counts == [(NUM_LAYERS, 1)]
    modules = {operator.module for operator in captured.graph.operators}
    assert {f"layers.{number}.{name}" for number in range(NUM_LAYERS) for name in ("up", "norm", "down")} <= modules


@needs_reuse
def test_a_layer_that_differs_is_no_call_of_the_others_region(counts: list[tuple[int, int]]) -> None:
    model = Model()
    change(3, "config", Config(4.0))(model)
    capture_call(lambda x: model(x), torch.randn(BATCH, WIDTH))
    assert counts == [(NUM_LAYERS - 1, 1)]


@needs_reuse
def test_layers_of_lists_of_lists_are_traced_once(counts: list[tuple[int, int]]) -> None:
    stages = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), *map(Layer, range(4))) for _ in range(2)))
    assert_same_program(stages.forward, torch.randn(BATCH, WIDTH))
    assert counts[0] == (8, 1)


def test_the_model_of_a_method_s_object_is_found(counts: list[tuple[int, int]]) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = Model()

        def step(self, x: Tensor) -> Tensor:
            loss: Tensor = self.model(x)
            return loss

    assert_same_program(Trainer().step, torch.randn(BATCH, WIDTH))
    assert (counts[0][1] == 1) == _torch_compat.reuses_regions()


class Counted(Layer):
    """Counts its calls, and looks at its number."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.number += 1
        return super().forward(x) * self.number


@pytest.mark.parametrize("make", [nn.Identity, Counted, lambda n: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU(True))])
def test_what_is_no_region_is_traced_layer_by_layer(make: Callable[[int], nn.Module]) -> None:
    """Views of what goes in, layers of more kinds than dynamo keeps, buffers and inputs that are written to."""
    model = nn.Sequential(*map(make, range(12)))
    assert_same_program(lambda x: model(x).sum(), torch.randn(BATCH, WIDTH))


@pytest.mark.parametrize("fails", [False, True])
def test_layers_and_their_class_are_afterwards_as_before(fails: bool) -> None:
    model = Model()

    def function(x: Tensor) -> Tensor:
        if fails:
            raise ValueError("not today")
        loss: Tensor = model(x)
        return loss

    before = set(vars(model.layers[0])), set(vars(Layer))
    with pytest.raises(ValueError, match="not today") if fails else contextlib.nullcontext():
        capture_call(function, torch.randn(BATCH, WIDTH))
    assert (set(vars(model.layers[0])), set(vars(Layer))) == before


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_a_plan_trains_layers_that_their_author_marked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).double()

    def loss_of(x: Tensor) -> Tensor:
        loss: Tensor = model(x).square().sum()
        return loss

    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    loss_of(x).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    seen: list[ss.Compilation] = []
    options = {"plan": "single", "inspect": seen.append, "codegen": "eager"}
    torch.compile(loss_of, backend="superscaler", options=options)(x).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    modules = {operator.module for operator in seen[0].captured.graph.operators}
    assert modules == {f"{number}{inside}" for number in range(3) for inside in ("", ".linear")} | {""}


def test_a_region_of_several_modules_called_by_one_is_refused() -> None:
    """Nothing tells then which of the modules a node belongs to."""
    region = torch.compiler.nested_compile_region(lambda layer, x: layer(x))
    layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = region(layer, x)
        return x.square().sum()

    with pytest.raises(Exception, match="nested region"):
        capture_call(loss_of, torch.randn(BATCH, WIDTH))
