"""Random small models in fp64, captured once, and what one process computes with them, for plans to be held against."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_vtensor.compile.capture import Captured, capture
from torch_vtensor.compile.names import name_inputs
from torch_vtensor.compile.tensor_view import LogicalTensor

VOCABULARY = 11
HEADS = {4: 2, 5: 5, 6: 3, 7: 1, 8: 4}
KINDS = (
    "linear", "tied", "mlp", "gated", "norm", "skip", "skip", "attention", "activation", "square", "gram", "maximum",
    "statistics", "second", "detach", "turn", "scale", "flat", "centred", "pooled", "masked", "outer",
)  # fmt: skip
LOSSES = ("cross entropy", "cross entropy", "tied cross entropy", "squares", "distance", "several losses")
RETURNS = ("loss", "loss", "loss", "hidden", "hidden twice", "input", "classes", "positions")


class RandomModel(nn.Module):
    """Layers in a row over the last activation, some of which look back to earlier ones."""

    def __init__(self, choose: random.Random, num_layers: int) -> None:
        super().__init__()
        self.choose = choose
        self.width = choose.choice(list(HEADS))
        self.heads = HEADS[self.width]
        self.has_tokens = choose.random() < 0.5
        self.embedding = nn.Embedding(VOCABULARY, self.width)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, nn.Module | None, int]] = []
        for _ in range(num_layers):
            kind = choose.choice(KINDS)
            layer = self._layer(kind)
            self.steps.append((kind, layer, choose.randrange(100)))
            self.layers.append(layer)
        self.loss = choose.choice(LOSSES)
        self.returns = choose.choice(RETURNS)
        self.reduction = choose.choice(["mean", "sum"])
        self.head = nn.Linear(self.width, VOCABULARY, bias=choose.random() < 0.5)
        if self.loss == "tied cross entropy":
            self.head.weight = self.embedding.weight
        self.register_buffer("statistics", torch.randn(self.width))

    def _layer(self, kind: str) -> nn.Module:
        width, choose = self.width, self.choose
        inner = choose.choice([2, 5, 6])
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        if kind == "linear" or (kind == "tied" and not linears):
            return nn.Linear(width, width, bias=choose.random() < 0.5)
        if kind == "tied":
            return choose.choice(linears)
        if kind == "mlp":
            return nn.Sequential(
                nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width, bias=choose.random() < 0.5)
            )
        if kind == "gated":
            return nn.ModuleDict({"up": nn.Linear(width, 2 * inner), "down": nn.Linear(inner, width, bias=False)})
        if kind == "attention":
            kv = choose.choice([1, self.heads])
            size = width // self.heads * kv
            return nn.ModuleDict(
                {
                    "q": nn.Linear(width, width),
                    "k": nn.Linear(width, size, bias=False),
                    "v": nn.Linear(width, size, bias=False),
                    "o": nn.Linear(width, width, bias=False),
                }
            )
        if kind == "scale":
            return nn.ParameterList([torch.randn(width), torch.randn(width)])
        if kind == "activation":
            return choose.choice([nn.Tanh(), nn.SiLU(), nn.Softmax(dim=-1)])
        return nn.LayerNorm(width) if kind == "norm" else nn.Identity()

    def forward(self, start: Tensor, second: Tensor, targets: Tensor) -> Any:
        states = [self.embedding(start) if self.has_tokens else start]
        for kind, layer, number in self.steps:
            states.append(self._run_layer(kind, layer, states[-1], states[number % len(states)], second))
        hidden = states[-1]
        loss = self._loss_of(hidden, second, targets)
        return {
            "loss": loss,
            "hidden": (loss, hidden),
            "hidden twice": (loss, hidden, hidden),
            "input": (loss, start, second),
            "classes": (loss, hidden.argmax(-1)),
            "positions": (loss, torch.arange(hidden.shape[1]) + start.shape[0]),
        }[self.returns]

    def _loss_of(self, hidden: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        reduce = torch.mean if self.reduction == "mean" else torch.sum
        if self.loss == "squares":
            return reduce(hidden * hidden)
        if self.loss == "distance":
            return F.mse_loss(hidden, second, reduction=self.reduction)
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=self.reduction)
        return loss + 0.1 * reduce(logits.square()) if self.loss == "several losses" else loss

    def _run_layer(self, kind: str, layer: Any, last: Tensor, earlier: Tensor, second: Tensor) -> Tensor:
        match kind:
            case "gated":
                gate, up = layer["up"](last).chunk(2, -1)
                return layer["down"](F.silu(gate) * up)
            case "skip":
                return last + earlier
            case "attention":
                return self._attention(layer, last)
            case "square":
                return last * last * 0.1
            case "gram":
                return torch.softmax(last @ last.transpose(1, 2), -1) @ earlier
            case "maximum":
                values, _ = last.max(-1, keepdim=True)
                return earlier - values
            case "statistics":
                self.statistics.mul_(0.9).add_(last.detach().mean((0, 1)))
                return last + self.statistics
            case "second":
                return last + second
            case "detach":
                return last * earlier.detach()
            case "turn":
                left, _, right = last.split([1, 1, self.width - 2], -1)
                return torch.cat([right, left, left * 0.5], -1)
            case "scale":
                return last * layer[0] + layer[1]
            case "flat":
                return last.reshape(-1, self.width).tanh().view(last.shape)
            case "centred":
                return last - last.mean()
            case "pooled":
                return last * torch.sigmoid(earlier.sum(1, keepdim=True))
            case "masked":
                return last.masked_fill(second > 0.5, 0.0)
            case "outer":
                return torch.where(second > 0, last, earlier.sum(0))
            case _:
                return layer(last)

    def _attention(self, layer: Any, last: Tensor) -> Tensor:
        batch, length, width = last.shape

        def heads(name: str) -> Tensor:
            return layer[name](last).view(batch, length, -1, width // self.heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(heads("q"), heads("k"), heads("v"), is_causal=True, enable_gqa=True)
        return last + layer["o"](mixed.transpose(1, 2).reshape(batch, length, width))


@dataclass(frozen=True)
class Step:
    """What one process has after a step: outputs, gradients by argument, and the arguments updated."""

    outputs: Mapping[LogicalTensor, Tensor]
    gradients: Mapping[LogicalTensor, Tensor | None]
    arguments: Mapping[LogicalTensor, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A captured model with its arguments, the caller's gradients, and two steps of one process."""

    name: str
    captured: Captured
    function: Callable[..., Any] = field(repr=False)
    arguments: Mapping[LogicalTensor, Tensor] = field(repr=False)
    seeds: Mapping[LogicalTensor, Tensor] = field(repr=False)

    @cache  # noqa: B019 (cases live as long as the tests)
    def steps(self, optimizer: str) -> tuple[Step, ...]:
        """Two steps in one process."""
        update, arguments, steps = Optimizer(optimizer), dict(self.arguments), []
        for _ in range(2):
            steps.append(self._step(arguments, update))
            arguments = dict(steps[-1].arguments)
        return tuple(steps)

    def _step(self, arguments: Mapping[LogicalTensor, Tensor], update: "Optimizer") -> Step:
        given = {t: value.clone().requires_grad_(t.differentiable) for t, value in arguments.items()}
        returned = self.function(*(given[tensor] for tensor in self.captured.arguments))
        outputs = dict(zip(self.captured.results, returned, strict=True))
        pairs = [(outputs[tensor], seed) for tensor, seed in self.seeds.items() if outputs[tensor].requires_grad]
        wanted = [tensor for tensor in given if tensor.differentiable]
        found = torch.autograd.grad(
            [output for output, _ in pairs], [given[t] for t in wanted], [seed for _, seed in pairs], allow_unused=True
        )
        gradients = dict(zip(wanted, found, strict=True))
        after = {
            tensor: update(tensor, value.detach(), gradients[tensor])
            if tensor.kind == "parameter" and gradients.get(tensor) is not None
            else value.detach()
            for tensor, value in given.items()
        }
        return Step({tensor: output.detach() for tensor, output in outputs.items()}, gradients, after)


class Optimizer:
    """SGD or AdamW, one element like the other, for whole tensors and parts of them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._moments: dict[Any, tuple[Tensor, Tensor, int]] = {}

    def __call__(self, name: Any, value: Tensor, gradient: Tensor) -> Tensor:
        """The value after a step."""
        if self._kind == "sgd":
            return value - 0.05 * gradient
        first, second, count = self._moments.get(name, (torch.zeros_like(value), torch.zeros_like(value), 0))
        first, second, count = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square(), count + 1
        self._moments[name] = first, second, count
        # A large eps: otherwise a gradient of pure rounding noise becomes a step of the full learning rate.
        denominator = (second / (1 - 0.99**count)).sqrt() + 1e-2
        return value * (1 - 0.05 * 0.1) - 0.05 * (first / (1 - 0.9**count)) / denominator


@cache
def find_case(seed: int) -> Case:
    """Random model number `seed`, the later the larger."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    model = RandomModel(choose, num_layers=min(1 + seed // 4, 6)).double()
    for parameter in model.parameters():
        parameter.requires_grad_(choose.random() < 0.85)
    model.embedding.weight.requires_grad_(True)
    model.head.weight.requires_grad_(True)
    batch, length = choose.choice([2, 3, 4, 5]), choose.choice([1, 3, 4])
    second = torch.randn(batch, length, model.width, dtype=torch.double)
    targets = torch.randint(0, VOCABULARY, (batch, length))
    targets[torch.rand(batch, length) < 0.3] = -100
    targets[0, 0] = 1
    if model.has_tokens:
        start = torch.randint(0, VOCABULARY, (batch, length))
    else:
        start = torch.randn(batch, length, model.width, dtype=torch.double, requires_grad=True)
    kinds = ", ".join(kind for kind, _, _ in model.steps)
    name = f"model {seed}: {kinds}; {model.loss} {model.reduction}; returns {model.returns}; {tuple(second.shape)}"
    return capture_case(name, model, (start, second, targets))


def capture_case(name: str, model: Callable[..., Any], arguments: Sequence[Tensor]) -> Case:
    """Capture a function at a call."""
    found: list[Case] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        captured = capture(gm, example_inputs, name_inputs(gm, example_inputs))
        given = {
            tensor: value.detach().clone()
            for tensor, value in zip(captured.arguments, example_inputs, strict=True)
            if tensor is not None
        }
        random_ = torch.Generator().manual_seed(0)
        seeds = {
            tensor: torch.randn(tensor.shape, dtype=tensor.dtype, generator=random_)
            if math.prod(tensor.shape) > 1
            else torch.ones(tensor.shape, dtype=tensor.dtype)
            for tensor in dict.fromkeys(captured.graph.outputs)
            if tensor.differentiable
        }
        found.append(Case(name, captured, gm.forward, given, seeds))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=False)(*arguments)
    (only,) = found
    return only
