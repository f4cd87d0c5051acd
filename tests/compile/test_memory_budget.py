"""A memory budget: what is chosen, that it computes the same, and what is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import torch_vtensor.compile as ss
from torch_vtensor.compile import Compilation, Uncut

BATCH, LENGTH, WIDTH = 4, 64, 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """Four layers, and a head as large as asked for."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def make(vocabulary: int, batch: int = BATCH, steps: int = 1) -> tuple[nn.Module, list[tuple[Tensor]]]:
    torch.manual_seed(0)
    model = LanguageModel(vocabulary).double()
    return model, [(torch.randint(vocabulary, (batch, LENGTH)),) for _ in range(steps)]


@pytest.fixture
def choose(compiled: Callable[..., Any], compilations: list[Compilation | Uncut]) -> Callable[..., Compilation | Uncut]:
    def run(model: nn.Module, arguments: Sequence[Tensor], budget: float, **options: Any) -> Compilation | Uncut:
        compiled(lambda *xs: loss_of(model, *xs), memory_budget=budget, **options)(*arguments)
        return compilations[-1]

    return run


def test_nothing_is_cut_where_everything_fits(choose: Callable[..., Any]) -> None:
    model, ((tokens,),) = make(64)
    chosen = choose(model, (tokens,), 1.0)
    assert isinstance(chosen, Uncut)
    assert [candidate.name for candidate in chosen.choice.considered] == [""]


def test_a_large_head_is_cut_and_nothing_is_computed_twice(choose: Callable[..., Any]) -> None:
    model, ((tokens,),) = make(1000)
    chosen = choose(model, (tokens,), 0.8)
    assert chosen.choice.chosen.name == "chunked_loss4+layerwise"
    assert chosen.predicted_peak_bytes == chosen.choice.chosen.peak_bytes <= chosen.choice.budget_bytes
    assert not any(segment.recomputes for segment in chosen.program.segments)


def test_a_batch_of_one_row_is_recomputed_as_little_as_will_do(choose: Callable[..., Any]) -> None:
    model, ((tokens,),) = make(16, batch=1)
    x = tokens.repeat(1, 8)
    uncut = choose(model, (x,), 1.0).choice.chosen
    chosen = choose(model, (x,), 0.9)
    recomputed = sum(segment.recomputes for segment in chosen.program.segments)
    assert 1 <= recomputed < 4
    assert chosen.choice.chosen.name == f"recompute{recomputed}+layerwise"
    assert chosen.choice.chosen.seconds > uncut.seconds


def test_what_is_chosen_trains_like_eager(assert_trains_like_eager: Callable[..., None]) -> None:
    model, batches = make(500, steps=2)
    assert_trains_like_eager(model, batches, loss_of, memory_budget=0.6)


def test_a_budget_that_cannot_be_met_is_refused_with_the_numbers(choose: Callable[..., Any]) -> None:
    model, ((tokens,),) = make(64)
    with pytest.raises(
        BackendCompilerFailed, match=r"memory_budget is 1000 bytes.*takes least.*Uncut.*Raise the budget"
    ):
        choose(model, (tokens,), 1000)


def test_a_plan_has_to_fit(choose: Callable[..., Any]) -> None:
    model, ((tokens,),) = make(1000)
    assert choose(model, (tokens,), 0.9, plan="chunked_loss4").choice is None
    with pytest.raises(BackendCompilerFailed, match="limit"):
        choose(model, (tokens,), 0.5, plan="single")


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "a lot"])
def test_meaningless_budgets_are_refused(budget: Any, compiled: Callable[..., Any]) -> None:
    with pytest.raises((ValueError, BackendCompilerFailed), match="memory_budget"):
        compiled(lambda x: x + 1, memory_budget=budget)(torch.ones(2))


def test_explain_tells_the_choice() -> None:
    model, ((tokens,),) = make(1000)
    page = str(ss.explain(lambda x: loss_of(model, x), tokens, memory_budget=0.88))
    assert "chosen chunked_loss4+layerwise" in page
    assert "uncut:" in page


@pytest.mark.slow
def test_predicted_memory_is_what_generated_code_holds(choose: Callable[..., Any]) -> None:
    """All that is allocated during a step on a CPU, by torch's profiler, against the schedule's peak."""
    model, ((tokens,),) = make(512, batch=8)
    predicted = choose(model, (tokens,), 0.7, codegen="inductor").predicted_peak_bytes
    step = torch.compile(
        lambda x: loss_of(model, x), backend="superscaler", options={"memory_budget": 0.7}, dynamic=False
    )
    step(tokens).backward()
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = step(tokens)
    del loss
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    there = sum(parameter.nbytes for parameter in model.parameters()) + tokens.nbytes
    assert predicted == pytest.approx(peak + there, rel=0.15)
