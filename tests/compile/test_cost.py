"""What tasks cost: products by their multiplications, and stages of a pipeline by that."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from virtual import capture_call

import torch_vtensor.compile as ss
from torch_vtensor.compile.cost import task_work
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.primitives import Graph

ROWS, WIDTH = 8, 16


def work(function: Callable[..., Any], *arguments: Tensor) -> Counter[str]:
    """The work of each operator of a function."""
    found: Counter[str] = Counter()
    for task in Graph(capture_call(function, *arguments).captured.graph, Mesh((0,))).tasks:
        found[str(task.operator.target).split(".")[1]] += task_work(task)
    return found


def test_products_count_their_multiplications() -> None:
    x, weight = torch.empty(2, ROWS, WIDTH), torch.empty(24, WIDTH)
    assert work(F.linear, x, weight)["linear"] == 2 * ROWS * WIDTH * 24
    assert work(torch.matmul, x, weight.T)["matmul"] == 2 * ROWS * WIDTH * 24


def test_attention_counts_a_product_with_the_keys_and_one_with_the_values() -> None:
    q, k, v = torch.empty(2, 4, ROWS, WIDTH), torch.empty(2, 2, 12, WIDTH), torch.empty(2, 2, 12, 24)
    attend = work(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v)
    assert attend["scaled_dot_product_attention"] == 2 * 4 * ROWS * 12 * (WIDTH + 24)


def test_a_convolution_counts_its_places_and_not_what_they_see() -> None:
    x, weight = torch.empty(2, 6, 10, 10), torch.empty(8, 3, 3, 3)
    convolve = work(lambda x, w: F.conv2d(x, w, groups=2), x, weight)
    assert sum(convolve.values()) == 2 * 8 * 8 * 8 * 3 * 3 * 3


def test_what_is_looked_up_put_together_or_cut_out_counts_by_its_elements() -> None:
    table, rows = torch.empty(1000, WIDTH), torch.zeros(ROWS, dtype=torch.long)
    assert work(F.embedding, rows, table)["embedding"] == table.numel()
    joined = work(lambda x: torch.cat([x[:, 2:], x], 1), torch.empty(ROWS, WIDTH))
    assert joined["cat"] == ROWS * (2 * WIDTH - 2)
    assert joined["slice"] <= 2 * ROWS * WIDTH


class Model(nn.Module):
    """Six layers, a head that multiplies as much as two of them, and a table that is larger than all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100_000, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.head = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).square().sum()


def test_stages_have_equal_work_with_what_lies_around_the_layers() -> None:
    with torch.device("meta"):
        model, rows = Model(), torch.zeros(2**16, dtype=torch.long)
    plan = ss.explain(model, rows, plan="1f1b/2", mesh=2).compilation.plan
    ranks = {task.operator.module: plan.ranks[task] for task in plan.tasks if "linear" in str(task.operator.target)}
    assert [rank for (rank,) in ranks.values()] == [0, 0, 0, 0, 1, 1, 1]
