"""Under a plan for several ranks, what ranks compute alike they draw alike, and parts draw numbers of their own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from virtual import capture_call, run_plan

from torch_vtensor.compile import Graph, Mesh, Tasks, op_assign, op_trans, segment
from torch_vtensor.compile.backend import Compilation
from torch_vtensor.compile.plans import named

KEPT = 0.5


class Model(nn.Module):
    """Two layers with dropout between and behind; it returns what it dropped, so that masks can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)]) for _ in range(2)])

    def forward(self, x: Tensor, masks: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        dropped = []

        def drop(value: Tensor, name: str) -> Tensor:
            made = F.dropout(value, 1 - KEPT) if masks is None else value * masks[name] / KEPT
            dropped.append(made)
            return made

        for number, (up, down) in enumerate(self.layers):
            inner = drop(F.relu(up(x)) + 1, f"inner{number}")
            x = x + drop(down(inner), f"outer{number}")
        return (x.square().sum(), *(value.detach() for value in dropped))


NAMES = ("inner0", "outer0", "inner1", "outer1")


def model_and_batch() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model().double(), torch.randn(8, 4, 8, dtype=torch.double)


def returned(compilation: Compilation, values: Mapping[int, dict[str, Any]], rank: int) -> list[Tensor]:
    outputs = compilation.program.outputs
    return [values[rank][outputs[rank, tensor]] for tensor in compilation.captured.graph.outputs]


def everywhere(graph: Graph, mesh: Mesh) -> None:
    op_assign(graph.tasks, mesh)


def hidden_in_two(graph: Graph, mesh: Mesh) -> None:
    """Tensor parallel, though what is dropped inside of layers is returned."""
    op_assign(graph.tasks, mesh)
    for name in ("layers.0.0.weight:0", "layers.1.0.weight:0"):
        along = graph.dimension(name, graph.tasks).identifiers
        tasks = Tasks(graph, [task for task in graph.tasks if task.operator in along])
        op_assign(op_trans(tasks, name, 2), mesh.ranks)


def recomputed(graph: Graph, mesh: Mesh, plan: Callable[[Graph, Mesh], None]) -> None:
    plan(graph, mesh)
    for layer in graph.layers("layers.*"):
        op_trans(layer, recompute=True)


PLANS: Mapping[str, Callable[[], Callable[[Graph, Mesh], None]]] = {
    "replicated": lambda: everywhere,
    **{name: partial(named, name, 2) for name in ("dp2", "1f1b/4", "zero3/2", "zb/2")},
    "hidden": lambda: hidden_in_two,
    "hidden, recomputed": lambda: partial(recomputed, plan=hidden_in_two),
    "dp2, recomputed": lambda: partial(recomputed, plan=named("dp2", 2)),
}


@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_one_process_that_drops_the_same(name: str) -> None:
    assert_drops_alike(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hidden", "dp2, recomputed", "zb/2"])
def test_generated_code_drops_alike(name: str) -> None:
    assert_drops_alike(name, "inductor")


def assert_drops_alike(name: str, codegen: str) -> None:
    model, batch = model_and_batch()
    call = capture_call(model, batch)
    torch.manual_seed(3)
    compilation, values = run_plan(call, PLANS[name](), Mesh((0, 1), getattr(PLANS[name](), "axes", {})), codegen)
    loss, *dropped = returned(compilation, values, 0)
    for other in returned(compilation, values, 1)[1:]:
        assert any(torch.equal(other, one) for one in dropped)
    masks = {name: (value != 0).double() for name, value in zip(NAMES, dropped, strict=True)}
    for mask in masks.values():
        assert 0.35 < mask.mean() < 0.65
    halves = {part.numpy().tobytes() for mask in masks.values() for part in mask.chunk(8)}
    assert len(halves) == 32, "two rows, or two layers, dropped the same"
    expected, *_ = model(batch, masks)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    parameters = dict(model.named_parameters())
    seen = set()
    for (rank, tensor), (key, mask) in compilation.program.gradients.items():
        if tensor.kind == "parameter":
            seen.add(tensor.name)
            wanted = parameters[tensor.name].grad
            assert wanted is not None
            torch.testing.assert_close(values[rank][key], wanted[mask.within(tensor.whole.mask)], rtol=1e-9, atol=1e-9)
    assert seen == set(parameters)


def test_a_seed_decides_and_other_draws_of_the_caller_do_not_change() -> None:
    model, batch = model_and_batch()
    call = capture_call(model, batch)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        compilation, values = run_plan(call, hidden_in_two, Mesh((0, 1)))
        after = torch.rand(4)
        torch.manual_seed(seed)
        torch.randint(2**62, ())
        assert torch.equal(after, torch.rand(4))
        runs.append(returned(compilation, values, 0))
    assert all(torch.equal(*pair) for pair in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(runs[0], runs[2], strict=True))


def test_what_lies_between_other_draws_on_other_ranks_is_drawn_in_a_segment_of_its_own() -> None:
    whole, parted = nn.Dropout(KEPT), nn.Dropout(KEPT)

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return whole(x), parted(y), x + y  # a sum has both in one batch

    def plan(graph: Graph, mesh: Mesh) -> None:
        """Every rank drops all of one tensor, and its rows of the other."""
        op_assign(graph.tasks, mesh)
        op_assign(op_trans(graph.select("parted"), "batch", 2), mesh.ranks)

    x, y = torch.ones(4, 6, 4), torch.ones(4, 6, 4)
    compilation, values = run_plan(capture_call(function, x, y), plan, Mesh((0, 1)))
    (first, second, _), (same, *_) = (returned(compilation, values, rank) for rank in (0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(second[:2], second[2:])


def test_what_is_drawn_alone_has_others_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_batch()
    call = capture_call(lambda x: model(x)[0], x)
    looked_at: list[int] = []
    drawn = [operator for operator in call.captured.graph.operators if "dropout" in str(operator.target)]

    def one_more(segments: Any, random: Any) -> frozenset[Any]:
        """As if each cut that is made had another operator drawn between something else."""
        looked_at.append(len(segments))
        return frozenset(drawn[: len(looked_at)][:3])

    monkeypatch.setattr(segment, "find_unlike", one_more)
    compilation, _ = run_plan(call, everywhere, Mesh((0, 1)))
    assert len(looked_at) == 4
    assert sorted(looked_at) == looked_at
    draws = [[task.operator for task in one.tasks if task.operator in drawn] for one in compilation.program.segments]
    assert all([operator] in draws for operator in drawn[:3])
