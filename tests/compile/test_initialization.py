"""Models made without memory: each rank gets that of its parts, filled as one process would fill the whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_vtensor.compile as ss
from torch_vtensor.compile import worlds
from torch_vtensor.compile.plans import named


class Net(nn.Module):
    """Two blocks, a buffer, and a weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.norm.running_mean).square().mean()


def on_rank(rank: int, world: int, plan: str, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Net:
    """What a rank has after initialization; this process stands for it."""
    monkeypatch.setattr(worlds, "num_ranks", lambda: world)
    monkeypatch.setattr(worlds, "this_rank", lambda: rank)
    monkeypatch.setattr(worlds, "from_rank_0", lambda seed: 5)
    with torch.device("meta"):
        model = Net()
    ss.initialize(model, model, torch.zeros(4, dtype=torch.long), plan=plan, **how)
    return model


def test_ranks_get_parts_of_what_one_process_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = on_rank(0, 1, "single", monkeypatch)
    expected = dict(whole.named_parameters())
    assert whole.head.weight is whole.embed.weight
    assert all(type(parameter) is nn.Parameter and not parameter.is_meta for parameter in expected.values())
    assert expected["blocks.0.0.weight"].std() > 0
    torch.testing.assert_close(whole.norm.running_var, torch.ones(8))
    kept: dict[str, int] = dict.fromkeys(expected, 0)
    for rank in range(2):
        model = on_rank(rank, 2, "zero3", monkeypatch)
        assert model.head.weight is model.embed.weight
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad
            if name.startswith("norm"):  # the function does not read it
                torch.testing.assert_close(parameter, expected[name])
                continue
            assert isinstance(parameter, ss.ShardedTensor)
            assert isinstance(parameter, nn.Parameter)
            torch.testing.assert_close(parameter.local, parameter.keeps.cut(expected[name].detach()))
            kept[name] += parameter.local.untyped_storage().nbytes() // 4
    assert kept == {name: 0 if name.startswith("norm") else p.numel() for name, p in expected.items()}


def test_an_initialized_model_trains_and_loads(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Any]) -> None:
    model = on_rank(0, 1, "single", monkeypatch, init=lambda module: None)
    source = Net()
    ss.load_state_dict(model, source.state_dict())
    ids = torch.arange(4)
    losses = [run(ids) for run in (compiled(model, plan=named("single", 1)), source)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(model.embed.weight.grad, source.embed.weight.grad)


def test_a_module_that_cannot_fill_itself_needs_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).sum()

    with torch.device("meta"):
        model = Scale()
    with pytest.raises(ValueError, match=r"Scale has parameters .* no reset_parameters\(\). Pass init="):
        ss.initialize(model, model, torch.ones(4), plan="single")
    assert model.weight.is_meta
    ss.initialize(model, model, torch.ones(4), plan="single", init=lambda module: nn.init.ones_(module.weight))
    torch.testing.assert_close(model.weight.detach(), torch.ones(4))
