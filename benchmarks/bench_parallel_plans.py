"""A training step on several GPUs: plans against FSDP2, tensor parallel DTensors and torch.distributed.pipelining.

    python benchmarks/bench_parallel_plans.py [--ranks 2] [--models llama t5] [--modes …] [--batch N] [--quick]

bfloat16 parameters, fused AdamW, the same global batch for all; PyTorch's own are compiled, too. Every point runs in
processes of its own: one that fails or runs out of memory is a row of the table. Before a time counts, the first step's
loss and gradients have to be near those of the same weights in float32, on one device, eager and row by row.
Without GPUs ranks talk by gloo. Writes benchmarks/results/parallel-plans-<model>_<device>_<date>.md, anew after each
point.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import points
import report
import torch
import torch.distributed as dist
from contenders import NUM_MICROBATCHES, STOCK, Trainer, checkpoint_layers, make_trainer, plain_name
from parallel_models import DEFAULT_BATCH, DEFAULT_LAYERS, SUBJECTS, Subject
from torch import Tensor, nn

import torch_vtensor.compile as ss

# ------------------------------------------------------------------ what is compared
_EQUAL = f"{Path(__file__).with_name('pipeline_plans.py')}:equal_layers"
MODES = {
    "llama": (
        *("fsdp2", "zero3", "zero3+chunked_loss4", "zero2/2", "fsdp2_blocks", "fsdp2_checkpoint", "dtensor_tp"),
        *("dtensor_sp", "tp2", "sp2", "pipelining_1f1b", f"1f1b/{NUM_MICROBATCHES}", f"zb/{NUM_MICROBATCHES}"),
    ),
    "t5": ("fsdp2", _EQUAL, f"1f1b/{NUM_MICROBATCHES}", f"interlaced/{NUM_MICROBATCHES}", "zero3+chunked_loss4"),
}
GIB = 2**30
# Roundings to bfloat16 add up over layers, ranks and microbatches, differently in every correct implementation.
_MOST_OF_BASE, _MOST_ALONE = 1.25, 0.1
_SAMPLES = 1 << 16
_HEADER = ("mode", "tokens/s (10th-90th)", "of fsdp2", "peak GiB", "of fsdp2", "compile s", "loss", "gradients off by")


def main() -> None:
    """Run all points of all models, or, as a child, one rank of one point."""
    parser = points.parser(
        __doc__,
        SUBJECTS,
        modes=f"instead of all: {', '.join(STOCK)}, or a plan; 'equal' for T5's",
        batch="rows of all ranks together; default: llama 8, t5 32",
        layers="layers, of each half of t5; default: llama 16, t5 12",
    )
    parser.add_argument("--ranks", type=int, default=2)
    points.run_all(parser.parse_args(), point, measure)


def measure(model: str, arguments: argparse.Namespace, clock: points.Clock) -> Path:
    """Run all points of a model; the file that has them."""
    batch, layers = sizes(model, arguments)
    body = (
        f"{SUBJECTS[model].__doc__}\n\n{arguments.ranks} ranks, batch {batch}, {layers} layers, bfloat16, fused AdamW; "
        f"{NUM_MICROBATCHES} microbatches in pipelines. Memory is that of the rank that takes most."
    )
    rows: list[list[str]] = []
    base = None
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "gradients.pt"
        found = run(model, "reference", reference, arguments, clock)
        if "error" in found:
            body += f"\n\nThere are no gradients to compare with: {found['error']}."
        for mode in arguments.modes or MODES[model]:
            found = run(model, _EQUAL if mode == "equal" else mode, reference, arguments, clock)
            base = found if mode == "fsdp2" else base
            rows.append(row(mode.rpartition("/")[2] if mode == _EQUAL else mode, found, base))
            print(model, *rows[-1], sep=" | ", flush=True)
            path = report.write(
                f"parallel-plans-{model}",
                torch.device(arguments.device),
                f"{body}\n\n{report.table(_HEADER, rows)}",
                arguments.out,
            )
    return path


def row(mode: str, found: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    """One line of the table."""
    if "error" in found:
        return [mode, found["error"], *[""] * 6]
    has_base = base is not None and "error" not in base
    usual = _MOST_OF_BASE * base["off"] + 0.01 if has_base and "off" in base else _MOST_ALONE
    if found.get("off", 0.0) > min(usual, _MOST_ALONE):
        return [mode, f"wrong: gradients are off by {found['off']:.4f} of their norm", *[""] * 6]
    speed, low, high = (found["tokens"] / seconds for seconds in (found["seconds"][0], *found["seconds"][:0:-1]))
    return [
        mode,
        f"{speed:,.0f} ({low:,.0f}-{high:,.0f})",
        f"{base['seconds'][0] / found['seconds'][0]:.3f}" if has_base else "",
        f"{found['peak'] / GIB:.2f}",
        f"{found['peak'] / base['peak']:.3f}" if has_base and base["peak"] else "",
        f"{found['compile']:.0f}",
        f"{found['loss']:.4f}",
        f"{found['off']:.4f}" if "off" in found else "not compared",
    ]


def run(model: str, mode: str, reference: Path, arguments: argparse.Namespace, clock: points.Clock) -> dict[str, Any]:
    """A point in processes of its own; what went wrong, where something did."""
    num_ranks = 1 if mode == "reference" else arguments.ranks
    return points.run_point(__file__, model, mode, reference, arguments, clock, num_ranks)


def sizes(model: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """Batch and layers of a model."""
    default = (8, 4) if arguments.quick else (DEFAULT_BATCH[model], DEFAULT_LAYERS[model])
    return arguments.batch or default[0], arguments.layers or default[1]


# ------------------------------------------------------------------ one point, on each rank
def point(model: str, mode: str, reference: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some steps in one mode: gradients first, then time and memory."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    subject = SUBJECTS[model](*sizes(model, arguments), device, tiny=arguments.quick)
    if mode == "reference":
        return exact(subject, reference)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    made: list[Any] = []
    trainer = make_trainer(mode, subject, arguments.codegen, made)
    optimizer = make_optimizer(trainer)
    begin = time.perf_counter()
    loss = trainer.step()
    report.synchronize(device)
    found: dict[str, Any] = {"compile": time.perf_counter() - begin, "tokens": subject.num_tokens}
    samples = gathered(gradient_samples(trainer))
    losses = [one for one in everywhere(None if loss is None else loss.item()) if one is not None]
    found["loss"] = losses[0]
    if reference.exists() and dist.get_rank() == 0:
        found["off"] = compare(samples, losses[0], reference)
    optimizer.step()
    optimizer.zero_grad()

    def train() -> None:
        trainer.step()
        optimizer.step()
        optimizer.zero_grad()

    train()
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = report.measure(train, device, 2 if arguments.quick else arguments.repeats, warmup=1)
    found["seconds"] = max(everywhere(tuple(times)))
    found["peak"] = max(everywhere(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0))
    return found


def make_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """AdamW, with a group for each kind of parameter: a fused step takes no DTensor together with a tensor."""
    groups: dict[type, list[nn.Parameter]] = {}
    for parameter in trainer.parameters.values():
        groups.setdefault(type(parameter.data), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], 1e-4, fused=True)


def exact(subject: Subject, reference: Path) -> dict[str, Any]:
    """Leave the loss and a sample of the gradients in float32, computed row by row: each has an equal share."""
    checkpoint_layers(subject.model, subject.layers)
    model = subject.model.float()
    num_rows, total = len(subject.arguments[0]), 0.0
    for index in range(num_rows):
        loss = subject.loss_of(*(value[index : index + 1] for value in subject.arguments)) / num_rows
        loss.backward()
        total += loss.item()
    named = model.named_parameters()
    samples = {plain_name(name): _sample(parameter.grad) for name, parameter in named if parameter.grad is not None}
    torch.save((total, samples), reference)
    return {"loss": total}


def gradient_samples(trainer: Trainer) -> dict[str, Tensor]:
    """A sample of each whole gradient, of those that this rank has or, on rank 0, that are in parts."""
    parts, samples = nn.Module(), {}
    for name, parameter in trainer.parameters.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, ss.ShardedTensor):
            parts.register_buffer(name.replace(".", "/"), gradient)
        else:
            samples[name] = _sample(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
    whole = ss.state_dict(parts, on_rank=0)
    return samples | {name.replace("/", "."): _sample(gradient) for name, gradient in whole.items()}


def compare(samples: dict[str, Tensor], loss: float, reference: Path) -> float:
    """How far gradients are from exact ones, in their norm, all parameters together.

    Raises:  AssertionError for another loss, or gradients of other parameters.
    """
    expected_loss, expected = torch.load(reference)
    assert samples.keys() == expected.keys(), f"other parameters have gradients: {samples.keys() ^ expected.keys()}"
    assert abs(loss - expected_loss) <= 0.01 * abs(expected_loss), f"the loss {loss} is not {expected_loss}"
    difference = sum((samples[name] - expected[name]).square().sum().item() for name in samples) ** 0.5
    return difference / sum(one.square().sum().item() for one in expected.values()) ** 0.5


def gathered(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of all ranks together."""
    return {name: sample for one in reversed(everywhere(samples)) for name, sample in one.items()}


def everywhere(value: Any) -> list[Any]:
    """What every rank gave, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu()


if __name__ == "__main__":
    main()
