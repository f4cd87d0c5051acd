"""A captured graph is described in the names that the user gave."""

from typing import Any

import pytest
import torch
from torch import nn

from torch_vtensor.compile import Compilation
from torch_vtensor.compile.capture import TaskGraph


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
def graph(compiled: Any, compilations: list[Compilation]) -> TaskGraph:
    compiled(Model())(torch.randn(3, 4), {"b": torch.randn(3, 4)})
    return compilations[0].graph


def named(graph: TaskGraph, kind: str) -> set[str]:
    return {value.name for value in (*graph.inputs, *graph.outputs) if value.kind == kind}


def test_inputs_are_named_like_the_state_dict(graph: TaskGraph) -> None:
    model = Model()
    assert named(graph, "parameter") == {name for name, _ in model.named_parameters()}
    assert named(graph, "buffer") == {name for name, _ in model.named_buffers()}
    assert named(graph, "input") == {"x", "shift.b"}


def test_gradients_are_named_after_what_they_belong_to(graph: TaskGraph) -> None:
    assert named(graph, "gradient") == {name for name, _ in Model().named_parameters()}
    assert named(graph, "tangent") == named(graph, "output") == {"output[0]"}


def test_tasks_know_their_module_forward_and_backward(graph: TaskGraph) -> None:
    for direction in ("forward", "backward"):
        multiplications = [t.module for t in graph.tasks if t.direction == direction and "mm" in t.op]
        assert set(multiplications) == {"layers.0", "layers.1"}
    assert {"layers.0", "layers.1", "norm", ""} == {task.module for task in graph.tasks}


def test_tasks_read_what_was_computed_before_them(graph: TaskGraph) -> None:
    known = {value.task for value in graph.inputs}
    for task in graph.tasks:
        assert known.issuperset(task.reads)
        known.add(task.name)
    assert known.issuperset(value.task for value in graph.outputs)


def test_what_depends_on_a_tangent_is_backward(graph: TaskGraph) -> None:
    backward = {value.task for value in graph.inputs if value.kind == "tangent"}
    for task in graph.tasks:
        if not backward.isdisjoint(task.reads):
            assert task.direction == "backward"
            backward.add(task.name)


def test_two_models_keep_their_variable_names(compiled: Any, compilations: list[Compilation]) -> None:
    generator, judge = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled(lambda x: judge(generator(x)))(torch.randn(1, 2))
    assert named(compilations[0].graph, "parameter") == {
        "generator.weight", "generator.bias", "judge.weight", "judge.bias",
    }  # fmt: skip


def test_dynamic_sizes_are_inputs(compiled: Any, compilations: list[Compilation]) -> None:
    compiled(lambda x: x * x.shape[0], dynamic=True)(torch.randn(3, 4))
    numbers = named(compilations[0].graph, "number")
    assert "x.size(0)" in numbers


def test_values_changed_in_place_are_outputs(compiled: Any, compilations: list[Compilation]) -> None:
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        total.add_(x)
        return total * 2

    x = torch.ones(2, requires_grad=True)
    compiled(function)(x, x * 2)
    assert named(compilations[0].graph, "mutation") == {"total"}
    assert named(compilations[0].graph, "tangent") == {"total", "output[0]"}


def test_a_graph_prints_a_line_for_everything(graph: TaskGraph) -> None:
    first, *lines = str(graph).splitlines()
    num_backward = sum(task.direction == "backward" for task in graph.tasks)
    assert first.startswith(f"TaskGraph of {len(graph.tasks) - num_backward} forward and {num_backward} backward tasks")
    assert len(lines) == len(graph.inputs) + len(graph.tasks) + len(graph.outputs)
    assert any("float32[4, 4]" in line and "layers.0.weight" in line for line in lines)


def test_every_phase_prints(compiled: Any, compilations: list[Compilation]) -> None:
    compiled(Model())(torch.randn(3, 4), {"b": torch.randn(3, 4)})
    (compilation,) = compilations
    printed = str(compilation)
    for value in (compilation.graph, compilation.plan, compilation.schedule, compilation.program, compilation.segments):
        assert str(value) in printed
    forward, backward = compilation.schedule.actions[0]
    assert f"rank 0 | F({len(forward.tasks)}) B({len(backward.tasks)})" in printed
    assert "no communication" in printed
    assert f"rank 0: {len(compilation.graph.tasks)} tasks" in printed
