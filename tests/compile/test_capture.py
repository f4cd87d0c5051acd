"""A captured program is described in the names that the user gave."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from virtual import capture_call

from torch_vtensor.compile.task_graph import OperatorGraph


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, shift: dict[str, torch.Tensor]) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.norm(x) * self.scale + shift["b"]


@pytest.fixture
def graph() -> OperatorGraph:
    return capture_call(Model(), torch.randn(3, 4), {"b": torch.randn(3, 4)}).captured.graph


def named(graph: OperatorGraph, kind: str) -> set[str]:
    return {tensor.name for tensor in graph.inputs if tensor.kind == kind}


def names_of_targets(graph: OperatorGraph) -> list[str]:
    return [str(operator.target) for operator in graph.operators]


def test_inputs_are_named_like_the_state_dict(graph: OperatorGraph) -> None:
    model = Model()
    assert named(graph, "parameter") == {name for name, _ in model.named_parameters()}
    assert named(graph, "buffer") == {name for name, _ in model.named_buffers()}
    assert named(graph, "input") == {"x", "shift.b"}


def test_operators_know_their_module(graph: OperatorGraph) -> None:
    linears = [operator.module for operator in graph.operators if str(operator.target) == "aten.linear.default"]
    assert linears == ["layers.0", "layers.1"]
    assert {"layers.0", "layers.1", "norm", ""} == {operator.module for operator in graph.operators}


def test_operators_read_what_was_made_before_them(graph: OperatorGraph) -> None:
    known = set(graph.inputs)
    for operator in graph.operators:
        assert known.issuperset(operator.inputs)
        known.update(tensor for tensor in operator.outputs if tensor is not None)
    assert known.issuperset(graph.outputs)


def test_buffers_that_forward_overwrites_are_mutations(graph: OperatorGraph) -> None:
    names = {tensor.name for tensor in graph.mutations}
    assert names == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_gradients_flow_through_what_depends_on_parameters(graph: OperatorGraph) -> None:
    assert all(tensor.differentiable for tensor in graph.outputs)
    assert {tensor.name for tensor in graph.inputs if tensor.differentiable} == named(graph, "parameter")


def test_no_gradient_flows_through_what_is_computed_without() -> None:
    linear = nn.Linear(4, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = linear(x).sum()
        return (linear(x) * scale).detach() + linear(x) * scale

    graph = capture_call(function, torch.randn(3, 4)).captured.graph
    by_name = {tensor.name: tensor for operator in graph.operators for tensor in operator.outputs if tensor}
    assert not by_name["sum_1"].differentiable
    assert not by_name["detach"].differentiable
    assert graph.outputs[0].differentiable


def test_tied_weights_are_one_parameter() -> None:
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    graph = capture_call(lambda tokens: head(embedding(tokens)), torch.zeros(2, 3, dtype=torch.long)).captured.graph
    assert len(named(graph, "parameter")) == 1


def test_two_models_keep_their_variable_names() -> None:
    generator, judge = nn.Linear(2, 2), nn.Linear(2, 2)
    graph = capture_call(lambda x: judge(generator(x)), torch.randn(1, 2)).captured.graph
    assert named(graph, "parameter") == {"generator.weight", "generator.bias", "judge.weight", "judge.bias"}


def test_a_model_in_a_closure_s_closure_or_an_attribute_has_the_names_of_its_state_dict() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def inner(x: Tensor) -> Tensor:
        return model(x)

    def outer(x: Tensor) -> Tensor:
        return inner(x).sum()

    holder = SimpleNamespace(trained=SimpleNamespace(model=model))
    for function in (outer, lambda x: holder.trained.model(x)):
        graph = capture_call(function, torch.randn(3, 2)).captured.graph
        assert named(graph, "parameter") == set(model.state_dict())
        assert {"0", "1"} <= {operator.module for operator in graph.operators}


def test_two_models_in_closures_have_no_numbers_for_names() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def wrap(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x)

    first, second = map(wrap, models)
    graph = capture_call(lambda x: second(first(x)), torch.randn(3, 2)).captured.graph
    assert named(graph, "parameter") == {
        f"{function}.cell0.{name}" for function in ("first", "second") for name in ("weight", "bias")
    }


def test_a_mean_over_rows_becomes_a_sum_and_a_count() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    graph = capture_call(lambda y: F.cross_entropy(logits, y), torch.tensor([1, 2, -100, 0])).captured.graph
    (loss,) = (operator for operator in graph.operators if "cross_entropy" in str(operator.target))
    assert loss.args[3:4] == (2,)  # reduction="sum"
    assert names_of_targets(graph)[-1] == "aten.div.Tensor"


def test_what_nothing_depends_on_is_left_out() -> None:
    graph = capture_call(lambda x: (x.exp(), x + 1)[1], torch.ones(2)).captured.graph
    assert names_of_targets(graph) == ["aten.add.Tensor"]


def test_sizes_are_fixed_and_constants_come_along() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * x.shape[0]
        y[:, 0] = 2.0
        return y

    captured = capture_call(function, torch.ones(3, 4)).captured
    assert [tensor.shape for tensor in captured.graph.outputs] == [(3, 4)]
    assert [value.item() for value in captured.constants.values()] == [2.0]


def test_a_program_prints_a_line_for_everything(graph: OperatorGraph) -> None:
    first, *lines = str(graph).splitlines()
    assert first == f"{len(graph.operators)} operators, {len(graph.inputs)} inputs, {len(graph.outputs)} outputs"
    assert len(lines) == len(graph.inputs) + len(graph.operators) + len(graph.outputs) + len(graph.mutations)
    assert any("float32[4, 4]" in line and "layers.0.weight" in line for line in lines)


def test_nested_regions_are_refused_with_a_remedy() -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Linear(4, 4)
    with pytest.raises(Exception, match=r"nested region.*recompute=True") as caught:
        capture_call(lambda x: checkpoint(model, x, use_reentrant=False), torch.randn(3, 4))
    inner: Any = caught.value
    assert isinstance(inner.inner_exception, NotImplementedError)
