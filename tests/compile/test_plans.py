"""What plans decide is recorded, checked and refused before anything is compiled."""

from graphlib import CycleError, TopologicalSorter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from torch_vtensor.compile import Compilation, Graph, Mesh, op_assign
from torch_vtensor.compile.capture import Task, TaskGraph, Value
from torch_vtensor.compile.materialize import find_transfers, materialize
from torch_vtensor.compile.plans import single_device
from torch_vtensor.compile.primitives import Plan, record
from torch_vtensor.compile.schedule import order

EMPTY_MODULE = fx.GraphModule(nn.Module(), fx.Graph())
TWO_RANKS = Mesh((0, 1))


def make_graph() -> TaskGraph:
    """Two layers and their gradients: x → a → b → loss, and back."""
    return TaskGraph(
        inputs=(Value("input", "x", "x", "float32[4]"), Value("tangent", "loss", "t", "float32[]")),
        tasks=(
            Task("a", "aten.sin.default", "layers.0", "forward", ("x",), "float32[4]"),
            Task("b", "aten.cos.default", "layers.1.mlp", "forward", ("a",), "float32[4]"),
            Task("db", "aten.mul.Tensor", "layers.1.mlp", "backward", ("t", "a"), "float32[4]"),
            Task("da", "aten.mul.Tensor", "layers.0", "backward", ("db", "x"), "float32[4]"),
        ),
        outputs=(Value("output", "output[0]", "b", "float32[4]"), Value("gradient", "x", "da", "float32[4]")),
        is_joint=True,
        module=EMPTY_MODULE,
    )


def names(tasks: Any) -> list[str]:
    return [task.name for task in tasks]


def two_layers_on(first: int, second: int) -> Any:
    def plan(graph: Graph, mesh: Mesh) -> None:
        op_assign(graph.select("layers.0"), first)
        op_assign(graph.select("layers.1"), second)

    return plan


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.0", ["a", "da"]),
        ("layers.1", ["b", "db"]),
        ("layers.*", ["a", "b", "db", "da"]),
        ("*.mlp", ["b", "db"]),
    ],
)
def test_modules_are_selected_with_what_is_inside_them(pattern: str, expected: list[str]) -> None:
    graph = Graph(make_graph(), Mesh())
    assert names(graph.select(pattern)) == expected
    assert len(graph.select("layers.*").select(pattern)) == len(expected)


def test_a_pattern_that_selects_nothing_is_refused_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no module matches 'layer\.0' among 2; the closest are 'layers\.0'"):
        Graph(make_graph(), Mesh()).select("layer.0")


def test_the_single_device_plan_puts_everything_on_one_rank() -> None:
    plan = record(single_device, make_graph(), Mesh())
    assert set(plan.rank_of.values()) == {0}
    schedule = order(plan)
    assert str(schedule) == "rank 0 | F(2) B(2)"
    assert [(action.direction, action.tasks) for action in schedule.actions[0]] == [
        ("forward", ("a", "b")),
        ("backward", ("db", "da")),
    ]
    assert str(materialize(schedule)) == "rank 0 | F(2) B(2)\nno communication"


def test_inference_has_no_backward_action() -> None:
    joint = make_graph()
    graph = TaskGraph(joint.inputs[:1], joint.tasks[:2], joint.outputs[:1], False, EMPTY_MODULE)
    assert str(order(record(single_device, graph, Mesh()))) == "rank 0 | F(2)"


def test_a_task_placed_again_moves() -> None:
    def plan(graph: Graph, mesh: Mesh) -> None:
        op_assign(graph.tasks, 0)
        op_assign(graph.select("*.mlp"), 1)

    assert dict(record(plan, make_graph(), TWO_RANKS).rank_of) == {"a": 0, "b": 1, "db": 1, "da": 0}


def test_a_rank_that_the_mesh_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op_assign got rank 1, which is not in the Mesh of 1 rank: 0"):
        record(two_layers_on(0, 1), make_graph(), Mesh())


def test_a_plan_that_forgets_tasks_is_refused_with_the_first() -> None:
    def forgets(graph: Graph, mesh: Mesh) -> None:
        op_assign(graph.select("layers.0"), 0)

    with pytest.raises(ValueError, match=r"'forgets' leaves 2 of 4 tasks .* aten\.cos\.default 'b' \(forward, .*mlp'"):
        record(forgets, make_graph(), Mesh())


def test_stages_in_a_chain_can_run() -> None:
    plan = record(two_layers_on(0, 1), make_graph(), TWO_RANKS)
    schedule = order(plan)
    assert str(schedule) == "rank 0 | F(1) B(1)\nrank 1 | F(1) B(1)"
    assert [tuple(transfer) for transfer in find_transfers(schedule)] == [("a", 0, 1), ("db", 1, 0)]


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    graph = make_graph()
    back_on_rank_0 = Task("c", "aten.add.Tensor", "layers.0", "forward", ("b",), "float32[4]")
    tasks = (*graph.tasks[:2], back_on_rank_0, *graph.tasks[2:])
    entangled = TaskGraph(graph.inputs, tasks, graph.outputs, True, EMPTY_MODULE)
    with pytest.raises(ValueError, match=r"forward of rank 0 waits for 'b'"):
        order(record(two_layers_on(0, 1), entangled, TWO_RANKS))


def test_a_forward_task_that_needs_a_backward_one_is_refused() -> None:
    graph = make_graph()
    late = Task("late", "aten.add.Tensor", "", "forward", ("db",), "float32[4]")
    impossible = TaskGraph(graph.inputs, (*graph.tasks, late), graph.outputs, True, EMPTY_MODULE)
    with pytest.raises(ValueError, match=r"forward of rank 0 waits for 'db'"):
        order(record(single_device, impossible, Mesh()))


def test_a_plan_of_ones_own_runs(compiled: Any, compilations: list[Compilation]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    seen = []

    def plan(graph: Graph, mesh: Mesh) -> None:
        seen.append(len(graph.select("2")))
        single_device(graph, mesh)

    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(model, plan=plan)(x), model(x))
    assert seen == [sum(task.module == "2" for task in compilations[0].graph.tasks)]


def test_an_error_in_a_plan_reaches_the_user(compiled: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(BackendCompilerFailed, match=r"no module matches 'head' among 3; the closest are '0'"):
        compiled(model, plan=lambda graph, mesh: op_assign(graph.select("head"), 0))(torch.ones(1, 4))


@given(data=st.data(), num_tasks=st.integers(1, 12), num_ranks=st.integers(1, 3))
def test_a_schedule_is_accepted_if_and_only_if_its_actions_have_an_order(
    data: st.DataObject, num_tasks: int, num_ranks: int
) -> None:
    tasks, rank_of, edges = [], {}, set()
    for index in range(num_tasks):
        reads = data.draw(st.lists(st.integers(0, index - 1), max_size=2, unique=True)) if index else []
        forward_first = [i for i in reads if tasks[i].direction == "backward"]
        direction = "backward" if forward_first else data.draw(st.sampled_from(["forward", "backward"]))
        tasks.append(Task(f"t{index}", "op", "", direction, tuple(f"t{i}" for i in reads), "float32[]"))
        rank_of[f"t{index}"] = data.draw(st.integers(0, num_ranks - 1))
        action = (rank_of[f"t{index}"], direction)
        edges |= {((rank_of[f"t{i}"], tasks[i].direction), action) for i in reads}
    edges |= {((rank, "forward"), (rank, "backward")) for rank in range(num_ranks)}
    dependencies: dict[Any, set[Any]] = {}
    for before, after in edges:
        if before != after:
            dependencies.setdefault(after, set()).add(before)
    graph = TaskGraph((), tuple(tasks), (), True, EMPTY_MODULE)
    plan = Plan(graph, Mesh(tuple(range(num_ranks))), rank_of)
    try:
        TopologicalSorter(dependencies).prepare()
    except CycleError:
        with pytest.raises(ValueError, match="the schedule cannot run"):
            order(plan)
    else:
        placed = [name for row in order(plan).actions.values() for action in row for name in action.tasks]
        assert sorted(placed) == sorted(rank_of)
