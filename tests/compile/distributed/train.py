"""Worlds of gloo processes that train models with plans next to copies without one, and say how it went.

Run as ``python -m distributed.train folder world …`` with worlds such as ``2:dp2@gpt2@eager,die@dp2``: a number of
ranks, and tasks that each of them does in turn: ``plan@model@codegen``, ``draw@plan@codegen``,
``scale@plan@codegen``, ``begin@plan@codegen``, or ``die@plan``.
Rank 1 of the first world prints to folder/0/rank1.txt. The last line printed here lists the exit codes by world and
rank.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from forked_ranks import prepare_to_fork, run_world
from torch import Tensor, nn
from torch.nn import functional as F

import torch_vtensor.compile as ss
from torch_vtensor.compile.sharded_tensor import ShardedTensor
from torch_vtensor.compile.transport import ProcessGroups

NUM_STEPS = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def make(name: str, device: str) -> Any:
    """An example of ready_models.py, or the one for which transformers need not be imported."""
    if name != "mlp":
        example = getattr(import_module("ready_models"), name)()
        example.model.to(device)
        return replace(example, arguments=tuple(x.to(device) for x in example.arguments))
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double().to(device)
    batch = tuple(torch.randn(2, 8, 4, 8, dtype=torch.double).to(device))
    return SimpleNamespace(model=model, loss_of=lambda x, y: F.mse_loss(model(x), y), arguments=batch, tolerance=1e-9)


def train(plan: str, model: str, codegen: str, device: str = "cpu") -> None:
    """Five steps of AdamW give the losses and the parameters of one process."""
    ours, theirs = make(model, device), make(model, device)
    options = {"plan": plan, "codegen": codegen}
    step = torch.compile(ours.loss_of, backend="superscaler", options=options, dynamic=False)
    # A large eps: otherwise a gradient of pure rounding noise becomes a step of the full learning rate.
    optimizers = [torch.optim.AdamW(e.model.parameters(), 1e-2, eps=1e-3) for e in (ours, theirs)]
    close = partial(torch.testing.assert_close, rtol=ours.tolerance, atol=ours.tolerance)
    for number in range(NUM_STEPS):
        batch = [x.roll(number, 0) for x in ours.arguments]
        losses = [step(*batch), theirs.loss_of(*batch)]
        close(losses[0], losses[1], msg=lambda text: f"loss of {plan} in step {number}: {text}")  # noqa: B023
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        whole = expected[name].detach()
        if isinstance(parameter, ShardedTensor):
            close(parameter.local.detach(), parameter.keeps.cut(whole), msg=lambda text, name=name: f"{name}: {text}")
        else:
            close(parameter.detach(), whole, msg=lambda text, name=name: f"{name}: {text}")


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(Block(), nn.Dropout(0.5)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def draw(plan: str, codegen: str, device: str = "cpu") -> None:
    """Dropout by the seed of rank 0: losses, and gradients of what every rank keeps, are the same on all ranks."""
    torch.manual_seed(0)
    model = Dropping().double().to(device)
    x, y = torch.randn(2, 8, 4, 8, dtype=torch.double).to(device)
    options = {"plan": plan, "codegen": codegen}
    step = torch.compile(lambda x, y: F.mse_loss(model(x), y), backend="superscaler", options=options, dynamic=False)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed + 100 * dist.get_rank())
        loss = step(x, y)
        loss.backward()
        replicated = [p.grad.cpu() for p in model.parameters() if not isinstance(p, ShardedTensor)]
        made: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(made, (loss.item(), replicated))
        for other, gradients in made:
            assert other == loss.item(), f"losses differ between ranks: {made}"
            assert all(map(torch.equal, gradients, replicated)), "gradients differ between ranks"
        losses.append(loss.item())
        model.zero_grad()
    assert losses[0] == losses[1] != losses[2], losses


class HalfBlock(Block):
    """Computes in float16 out of float32 parameters."""

    def forward(self, x: Tensor) -> Tensor:
        norm = F.layer_norm(x, (8,), self.norm.weight.half(), self.norm.bias.half())
        inner = F.gelu(F.linear(norm, self.up.weight.half(), self.up.bias.half()))
        return x + F.linear(inner, self.down.weight.half(), self.down.bias.half())


def scale(plan: str, codegen: str, device: str = "cpu") -> None:
    """float16 with a GradScaler: small gradients stay, an infinity on the last rank has all ranks skip the step."""
    torch.manual_seed(0)
    ours = nn.Sequential(HalfBlock(), HalfBlock()).to(device)
    theirs = copy.deepcopy(ours)
    x = torch.randn(8, 4, 8).half().to(device)

    def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).float().square().mean() * 1e-7  # float16 can hold no gradient of this

    options = {"plan": plan, "codegen": codegen}
    step = torch.compile(loss_of(ours), backend="superscaler", options=options, dynamic=False)
    scaler = torch.amp.GradScaler(device.split(":")[0], init_scale=2.0**16, growth_interval=100)
    optimizer = torch.optim.SGD(ours.parameters(), 1e4)
    for number in range(4):
        before = ss.state_dict(ours)
        scaler.scale(step(x)).backward()
        if number == 2 and dist.get_rank() == dist.get_world_size() - 1:
            # Gradients that every rank has whole are the same on all; of parts one may be infinite on one rank alone.
            parts = (p.grad.local for p in ours.parameters() if isinstance(p.grad, ShardedTensor))
            next(part for part in parts if part.numel()).view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        after = ss.state_dict(ours)
        assert scaler.get_scale() == (2.0**16 if number < 2 else 2.0**15), f"{scaler.get_scale()} after step {number}"
        if number == 1:
            theirs.load_state_dict(before)
            (loss_of(theirs)(x) * 2.0**16).backward()
            for name, parameter in theirs.named_parameters():
                wanted = -1e4 * parameter.grad.cpu() / 2.0**16
                assert wanted.abs().max() > 0
                largest = wanted.abs().max().item()
                torch.testing.assert_close(after[name] - before[name], wanted, rtol=0.05, atol=0.02 * largest)
        if number == 2:
            assert all(torch.equal(after[name], before[name]) for name in after), "the step was not skipped"
        optimizer.zero_grad()


def begin(plan: str, codegen: str, device: str = "cpu") -> None:
    """A model made on meta has, in parts, what one process gets from rank 0's seed, and no rank ever holds it whole."""

    def make() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(*(Block() for _ in range(6)))

    x, y = torch.randn(2, 8, 4, 8, generator=torch.Generator().manual_seed(1)).to(device)
    ours, theirs = make(), make().to_empty(device=device)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(ours(x), y)

    held = []

    def fill(module: nn.Module) -> None:
        there = [p.local if isinstance(p, ShardedTensor) else p for p in ours.parameters()]
        held.append(sum(parameter.nbytes for parameter in there if not parameter.is_meta))
        module.reset_parameters()

    torch.manual_seed(7 + 100 * dist.get_rank())
    ss.initialize(ours, loss_of, x, y, plan=plan, init=fill, device=device)
    torch.manual_seed(7)
    torch.manual_seed(int(torch.randint(2**62, ())))
    theirs.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    expected = dict(theirs.named_parameters())
    kept = 0
    for name, parameter in ours.named_parameters():
        whole = expected[name].detach()
        if isinstance(parameter, ShardedTensor):
            assert torch.equal(parameter.local.detach(), parameter.keeps.cut(whole)), name
            kept += parameter.local.untyped_storage().nbytes()
        else:
            assert torch.equal(parameter.detach(), whole), name
            kept += whole.nbytes
    num_bytes = sum(parameter.nbytes for parameter in expected.values())
    assert kept < 0.65 * num_bytes, f"{kept} of {num_bytes} bytes are kept"
    assert max(held) < 0.8 * num_bytes, f"{max(held)} of {num_bytes} bytes were there at once"
    step = torch.compile(loss_of, backend="superscaler", options={"plan": plan, "codegen": codegen}, dynamic=False)
    loss, wanted = step(x, y), F.mse_loss(theirs(x), y)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        if isinstance(parameter, ShardedTensor):
            torch.testing.assert_close(parameter.grad.local, parameter.keeps.cut(gradient))
        else:
            torch.testing.assert_close(parameter.grad, gradient)


def die(plan: str, device: str = "cpu") -> None:
    """Train until, in the middle of a step, the last rank ends as if it had been killed."""
    if dist.get_rank() == dist.get_world_size() - 1:
        begin, num_begun = ProcessGroups.send if "1f1b" in plan else ProcessGroups.collective, 0

        def counted(*arguments: object) -> object:
            nonlocal num_begun
            num_begun += 1
            if num_begun == 5:
                os._exit(13)
            return begin(*arguments)  # type: ignore[arg-type]

        setattr(ProcessGroups, begin.__name__, counted)
    train(plan, "mlp", "eager", device)


def run_tasks(tasks: Sequence[str], device: str) -> None:
    """Do one task after the other, and say so."""
    for task in tasks:
        name, *rest = task.split("@")
        if name == "die":
            die(*rest, device)
        elif name == "draw":
            draw(*rest, device)
        elif name == "scale":
            scale(*rest, device)
        elif name == "begin":
            begin(*rest, device)
        else:
            train(name, *rest, device)
        torch.compiler.reset()
        print(task, "is right", flush=True)


def main(folder: str, *worlds: str) -> None:
    import_module("ready_models")
    prepare_to_fork()
    codes = []
    for number, world in enumerate(worlds):
        num_ranks, tasks = world.split(":")
        work = partial(run_tasks, tasks.split(","), "cpu")
        codes.append(run_world(Path(folder) / str(number), int(num_ranks), work))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
