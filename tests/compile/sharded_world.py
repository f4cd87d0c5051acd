"""What two ranks do in test_parameters.py: a program, whose argument is the folder for what they have to say."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forked_ranks import prepare_to_fork, run_world
from torch import Tensor, nn
from torch.nn import functional as F

import torch_vtensor.compile as ss
from torch_vtensor.compile.primitives import PlanFunction

MAX_NORM = 0.5
NUM_STEPS = 5
STEPS_BEFORE_CHECKPOINT = 3


class Tiny(nn.Module):
    """Two blocks between an embedding and a head that share their weight, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 17), nn.GELU(), nn.Linear(17, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def batches() -> list[Tensor]:
    """One batch for each step, one of them of another size."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(12, (size, 6), generator=generator) for size in (4, 4, 2, 4, 4)]


def adamw(model: nn.Module, **how: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, **how)


def train(
    function: Callable[[Tensor], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer],
    data: Sequence[Tensor],
    clip: Callable[..., Tensor] = ss.clip_grad_norm_,
) -> Iterator[tuple[float, float]]:
    """Train; yields the loss and the norm of the gradients of each step."""
    for ids in data:
        loss = function(ids)
        loss.backward()
        norm = clip(model.parameters(), MAX_NORM)
        if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


def tensor_parallel(graph: ss.Graph, mesh: ss.Mesh) -> None:
    for block in graph.layers("blocks.*"):
        ss.op_assign(ss.op_trans(block, "hidden", len(mesh)), mesh.ranks)
    ss.op_assign(graph.select("embed") + graph.select("head") + graph.select(""), mesh.ranks)


def one_f_one_b(graph: ss.Graph, mesh: ss.Mesh) -> None:
    microbatches = graph.microbatch(2)
    for rank, block in enumerate(graph.layers("blocks.*")):
        ss.op_assign(block, rank)
    ss.order.one_f_one_b(microbatches)


def data_parallel(graph: ss.Graph, mesh: ss.Mesh) -> None:
    ss.op_assign(ss.op_trans(graph.tasks, "batch", len(mesh)), mesh.ranks)


def zero(graph: ss.Graph, mesh: ss.Mesh) -> None:
    data_parallel(graph, mesh)
    ss.store(graph, mesh.ranks)


@dataclass
class Trained:
    """What one rank says about one plan."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    num_compilations: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    """Elements of each parameter that the rank keeps."""
    state_elements: dict[str, int] = field(default_factory=dict)
    gradient_elements: dict[str, int] = field(default_factory=dict)
    evaluation: float = 0.0
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def compiled(model: nn.Module, plan: PlanFunction, found: list[Any] | None = None) -> Any:
    inspect = None if found is None else found.append
    options = {"plan": plan, "codegen": "eager", "inspect": inspect}
    torch._dynamo.reset()  # all models here have one code object, and its compilations are limited
    return torch.compile(model, backend="superscaler", options=options, dynamic=False)


def num_here(tensor: Tensor) -> int:
    return tensor.local.numel() if isinstance(tensor, ss.ShardedTensor) else tensor.numel()


def run(plan: PlanFunction, how: str, evaluates_by: PlanFunction) -> Trained:
    """Train by a plan, evaluate by another, and tell what is where.

    how: "before" the first call the optimizer is made, or "after" it, or it has "stepped" without a plan.
    """
    trained, compilations = Trained(), []
    model = Tiny()
    step = compiled(model, plan, compilations)
    data = batches()
    if how == "before":
        optimizer = adamw(model, foreach=True)
    elif how == "stepped":
        optimizer = adamw(model, foreach=False)
        trained.steps += train(model, model, optimizer, data[:1], nn.utils.clip_grad_norm_)
    made: list[torch.optim.Optimizer] = [] if how == "after" else [optimizer]

    def make() -> torch.optim.Optimizer:
        made.append(adamw(model, fused=True))
        return made[0]

    trained.steps += train(step, model, made[0] if made else make, data[len(trained.steps) :])
    trained.num_compilations = len(compilations)
    step(data[0]).backward()
    for name, parameter in model.named_parameters():
        trained.kept[name] = num_here(parameter)
        trained.gradient_elements[name] = num_here(parameter.grad)
        trained.state_elements[name] = num_here(made[0].state[parameter]["exp_avg"])
    trained.model, trained.optimizer = ss.state_dict(step), ss.state_dict(made[0])
    with torch.no_grad():
        trained.evaluation = compiled(model, evaluates_by)(data[0]).item()
    return trained


def whole(step: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": ss.state_dict(step), "optimizer": ss.state_dict(optimizer)}


def parts(step: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves and loads: each rank's parts."""
    return {"model": ss.state_dict(step, whole=False), "optimizer": ss.state_dict(optimizer, whole=False)}


def train_and_save(plan: PlanFunction, folder: Path) -> dict[str, Any]:
    """Begin to train; what is returned is whole, and every rank writes its parts into the folder."""
    model = Tiny()
    step, optimizer = compiled(model, plan), adamw(model)
    list(train(step, model, optimizer, batches()[:STEPS_BEFORE_CHECKPOINT]))
    dcp.save(parts(step, optimizer), checkpoint_id=folder)
    return whole(model, optimizer)


def load_and_train(plan: PlanFunction, saved: dict[str, Any] | Path) -> dict[str, Any]:
    """Go on from what is whole, or from parts in a folder, of which each rank reads those that its plan keeps."""
    model = Tiny()
    step, optimizer = compiled(model, plan), adamw(model)
    with torch.no_grad():
        step(batches()[0])  # shards the parameters: what is loaded is cut
    if isinstance(saved, Path):
        state = parts(step, optimizer)
        dcp.load(state, checkpoint_id=saved)
    else:
        state = copy.deepcopy(saved)
    ss.load_state_dict(step, state["model"])
    ss.load_state_dict(optimizer, state["optimizer"])
    list(train(step, model, optimizer, batches()[STEPS_BEFORE_CHECKPOINT:]))
    return whole(model, optimizer)


def train_scaled(function: Callable[[Tensor], Tensor], model: Tiny, *, breaks: bool) -> dict[str, Any]:
    """Train with a GradScaler; if this process `breaks`, the second step's gradient is infinite here."""
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2), adamw(model)
    for number, ids in enumerate(batches()):
        scaler.scale(function(ids)).backward()
        if number == 1 and breaks:
            gradient = model.blocks[0][1].weight.grad
            (gradient.local if isinstance(gradient, ss.ShardedTensor) else gradient)[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"model": ss.state_dict(model), "scale": scaler.get_scale()}


def tell(folder: Path) -> None:
    """What one rank does; what it has to say is in a file named after it."""
    results: dict[str, Any] = {
        "tensor_parallel": vars(run(tensor_parallel, "before", data_parallel)),
        "one_f_one_b": vars(run(one_f_one_b, "after", one_f_one_b)),
        "zero": vars(run(zero, "stepped", tensor_parallel)),
    }
    results["checkpoint"] = train_and_save(zero, folder / "parts")
    results["loaded"] = load_and_train(tensor_parallel, results["checkpoint"])
    results["loaded_parts"] = load_and_train(tensor_parallel, folder / "parts")
    results["part_bytes"] = [file.stat().st_size for file in (folder / "parts").glob("*.distcp")]
    model = Tiny()
    results["scaled"] = train_scaled(compiled(model, one_f_one_b), model, breaks=dist.get_rank() == 0)
    on_one = ss.state_dict(Tiny(), on_rank=1)
    results["num_on_rank_1"] = len(on_one)
    torch.save(results, folder / f"{dist.get_rank()}.pt")


def main(folder: Path) -> None:
    prepare_to_fork()
    codes = run_world(folder / "world", 2, partial(tell, folder))
    if any(codes):
        sys.exit("\n".join(log.read_text() for log in sorted((folder / "world").glob("rank*.txt"))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
