"""A plan says what is cut, where it runs and in which order; torchrun starts the ranks; the training loop stays as is.

    python examples/train_with_a_plan.py                                 # one process: nothing to cut it over
    torchrun --nproc-per-node=2 examples/train_with_a_plan.py            # "dp2", a ready plan by its name
    torchrun --nproc-per-node=2 examples/train_with_a_plan.py own        # the plan that is written below

Look at: `own_plan`, which is all that it takes to write one, and the schedule, a row for each rank.
"""

import os
import sys

import torch
from torch import nn

import torch_vtensor.compile as ss


class Block(nn.Module):
    """A layer to cut: `hidden` lies between its two products."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def own_plan(graph: ss.Graph, mesh: ss.Mesh) -> None:
    """First block cut over all ranks along its hidden dimension, everything else on every rank."""
    ss.op_assign(graph.tasks, mesh)
    first, *_ = graph.layers("*")
    ss.op_assign(ss.op_trans(first, "hidden", len(mesh)), mesh.ranks)


torch.manual_seed(0)
rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
model = nn.Sequential(Block(16, 64), Block(16, 64), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
plan = own_plan if "own" in sys.argv else f"dp{num_ranks}"
compilations = []

options = {"plan": plan, "codegen": "eager", "inspect": compilations.append}
step = torch.compile(lambda x, y: nn.functional.mse_loss(model(x), y), backend="superscaler", options=options)
inputs = torch.randn(32, 16)
for number in range(21):
    loss = step(inputs, inputs.square().sum(1, keepdim=True))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and number % 10 == 0:
        print(f"step {number}  loss {loss.item():.4f}")
if rank == 0:
    print(f"\nplan {plan}\n{compilations[0].schedule}")
if num_ranks > 1:
    torch.distributed.destroy_process_group()
