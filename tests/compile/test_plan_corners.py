"""Plans that are awkward in one way each: they compute what one process does, or say what is wrong."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from plan_models import Case, capture_case
from plan_worlds import plan_case, run_steps
from torch import Tensor, nn
from torch.nn import functional as F

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.pieces import cut, replicate, split_value
from torch_vtensor.compile.plan import record
from torch_vtensor.compile.primitives import Graph, PlanFunction, Tasks, op_assign, op_order, op_trans, store
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import Interval


class Model(nn.Module):
    """Every corner in few operators: an input that is returned, unused outputs, a tensor read twice, global sums."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        self.mean.copy_(x.detach().mean((0, 1)))
        hidden = F.gelu(self.up(x - self.mean))
        left, _, right = hidden.split([2, 1, 3], -1)
        largest, _ = hidden.max(-1, keepdim=True)
        hidden = torch.cat([right * right, left, largest], -1)
        hidden = self.down(hidden - hidden.mean()) + x
        loss = F.cross_entropy(hidden.flatten(0, 1), targets.flatten())
        return loss, x, hidden, hidden, hidden.argmax(-1), targets


@cache
def the_case() -> Case:
    torch.manual_seed(0)
    model = Model().double()
    x = torch.randn(5, 3, 6, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 6, (5, 3))
    targets[0, 1:] = -100
    return capture_case("corners", model, (x, targets))


def named(graph: Graph, name: str) -> list[Task]:
    return [task for task in graph.tasks if task.operator.name == name]


def everywhere(graph: Graph, mesh: Mesh) -> None:
    op_assign(graph.tasks, mesh.all)


def only_one_task_is_placed(graph: Graph, mesh: Mesh) -> None:
    op_assign(Tasks(graph, named(graph, "linear_1")), mesh.ranks[-1])


def every_second_task_is_placed(graph: Graph, mesh: Mesh) -> None:
    for index, task in enumerate(list(graph.tasks)):
        if index % 2:
            op_assign(Tasks(graph, [task]), index // 2 % len(mesh))


def replicas_that_nobody_reads(graph: Graph, mesh: Mesh) -> None:
    everywhere(graph, mesh)
    op_assign(Tasks(graph, named(graph, "linear_1")), 0)
    op_assign(Tasks(graph, named(graph, "cross_entropy_loss")), 0)


def microbatches(graph: Graph, mesh: Mesh) -> None:
    """Each reads a mean over all of them."""
    everywhere(graph, mesh)
    graph.microbatch(3)


def one_microbatch(graph: Graph, mesh: Mesh) -> None:
    everywhere(graph, mesh)
    graph.microbatch(1)


def microbatches_of_data_parallel(graph: Graph, mesh: Mesh) -> None:
    """Two cuts along the batch: the loss is divided in chunks of chunks."""
    micro = graph.microbatch(2)
    for index in range(2):
        op_assign(op_trans(micro[index], "batch", 2), mesh.ranks[:2])


def split_within_a_microbatch(graph: Graph, mesh: Mesh) -> None:
    everywhere(graph, mesh)
    graph.microbatch(2)
    graph.replace(task := named(graph, "div")[1], split_value(task, (0,), 2))


def cut_again_in_one_piece(graph: Graph, mesh: Mesh) -> None:
    """Addends of the gradient of what all pieces read: three of all of it, and two halves of a fourth."""
    everywhere(graph, mesh)
    (task,) = named(graph, "linear")
    first, last = cut(task, "n", [Interval(0, 5), Interval(5, 6)])
    graph.replace(task, (first, last))
    graph.replace(first, cut(first, "n", [Interval(0, 2), Interval(2, 4), Interval(4, 5)]))
    graph.replace(last, cut(last, "k", [Interval(0, 2), Interval(2, 6)]))


def cut_what_reads_half_a_bias(graph: Graph, mesh: Mesh) -> None:
    """One chunk of the bias is read by two pieces, which add up, the other by one, which has all of the gradient."""
    (task,) = named(graph, "linear")
    halves = split_value(task, (0, 2), 2)
    graph.replace(task, halves)
    graph.replace(halves[0], cut(halves[0], "b", [Interval(0, 1), Interval(1, 3)]))
    everywhere(graph, mesh)
    op_assign(Tasks(graph, named(graph, "linear")[-1:]), mesh.ranks[-1])


def sums_of_sums(graph: Graph, mesh: Mesh) -> None:
    """Ranks that hold chunks of different fineness, one of which has the number of its rank's sum."""
    (task,) = named(graph, "linear")
    pieces = cut(task, "k", [Interval(0, 1), Interval(1, 3), Interval(3, 6)])
    graph.replace(task, pieces)
    graph.replace(pieces[1], cut(pieces[1], "b", [Interval(0, 1), Interval(1, 3)]))
    graph.replace(pieces[2], cut(pieces[2], "k", [Interval(3, 4), Interval(4, 5), Interval(5, 6)]))
    everywhere(graph, mesh)
    for index, piece in enumerate(named(graph, "linear")):
        op_assign(Tasks(graph, [piece]), index % len(mesh))


def parameters_read_on_some_ranks(graph: Graph, mesh: Mesh) -> None:
    op_assign(graph.tasks, 0)
    op_assign(Tasks(graph, named(graph, "linear_1")), mesh.ranks[-1])
    store(graph, mesh.ranks)


def recomputed_across_ranks_in_turn(graph: Graph, mesh: Mesh) -> None:
    tasks = Tasks(graph, [task for name in ("linear", "gelu") for task in named(graph, name)])
    groups = op_trans(tasks, "up.weight:0", 3, recompute=True)
    op_order(*groups)
    everywhere(graph, mesh)
    op_assign(groups[1], 0)


PLANS: list[PlanFunction] = [
    everywhere,
    only_one_task_is_placed,
    every_second_task_is_placed,
    replicas_that_nobody_reads,
    microbatches,
    one_microbatch,
    microbatches_of_data_parallel,
    split_within_a_microbatch,
    cut_again_in_one_piece,
    cut_what_reads_half_a_bias,
    sums_of_sums,
    parameters_read_on_some_ranks,
    recomputed_across_ranks_in_turn,
]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_an_awkward_plan_is_right(plan: PlanFunction, num_ranks: int) -> None:
    run_steps(plan_case(the_case(), plan, num_ranks), "adamw", emits=True)


def in_halves_and_thirds(graph: Graph, first: Task, second: Task) -> None:
    graph.replace(first, cut(first, "b", [Interval(0, 1), Interval(1, 3)]))
    graph.replace(second, cut(second, "b", [Interval(0, 1), Interval(1, 2), Interval(2, 3)]))


def one_only(graph: Graph, first: Task, second: Task) -> None:
    graph.replace(second, cut(second, "k", [Interval(0, 1), Interval(1, 6)]))


def sums_in_another_order(graph: Graph, first: Task, second: Task) -> None:
    for task, sizes in ((first, (1, 5)), (second, (2, 4))):
        graph.replace(task, cut(task, "k", [Interval(0, sizes[0]), Interval(sizes[0], 6)]))


@pytest.mark.parametrize("differently", [in_halves_and_thirds, one_only, sums_in_another_order])
def test_replicas_that_are_cut_differently_are_refused(differently: Callable[[Graph, Task, Task], None]) -> None:
    def plan(graph: Graph, mesh: Mesh) -> None:
        (task,) = named(graph, "linear")
        replicas = replicate(task, 2)
        graph.replace(task, replicas)
        differently(graph, *replicas)
        everywhere(graph, mesh)

    with pytest.raises(ValueError, match=r"replicas of linear .* are cut differently.*Cut all replicas alike"):
        plan_case(the_case(), plan, 2)


def test_what_was_cut_inside_a_sequence_is_cut_along_the_batch_as_well() -> None:
    def plan(graph: Graph, mesh: Mesh) -> None:
        (task,) = named(graph, "cross_entropy_loss")
        graph.replace(task, cut(task, "a", [Interval(0, 7), Interval(7, 15)]))
        pieces = op_trans(Tasks(graph, named(graph, "cross_entropy_loss")), "batch", 2)
        found.extend([tuple(task.cuts["a"]) for group in pieces for task in group])

    found: list[tuple[int, ...]] = []
    record(plan, the_case().captured.graph, Mesh((0,)))
    assert sorted(found) == [(0, 3), (3, 7), (7, 10), (10, 15)]
