"""A training step on one GPU: what plans save and cost, against torch.compile with and without its own means.

    python benchmarks/bench_plans.py [--models qwen3 swin evoformer] [--modes …] [--batch N] [--layers N] [--quick]

bfloat16 parameters, fused AdamW. Every point runs in a process of its own: one that fails or runs out of memory is a
row of the table. Before a time counts, the first step's gradients have to be about as near as torch.compile's to those
of the same weights in float32, eager and row by row. Plans on several GPUs: bench_parallel_plans.py.
Writes benchmarks/results/plans-<model>_<device>_<date>.md, anew after each point.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import points
import report
import torch
from plan_models import DEFAULT_BATCH, DEFAULT_LAYERS, SUBJECTS, Subject
from torch import Tensor, nn

BASELINES = ("compile", "activation_memory_budget=0.5", "activation_memory_budget=0.2")
CHECKPOINT = {"qwen3": "checkpoint", "swin": "checkpoint_blocks", "evoformer": "checkpoint"}
OURS = {
    "qwen3": ("uncut", "chunked_loss4", "accumulate2+layerwise", "recompute+layerwise", "memory_budget=0.7"),
    "swin": ("uncut", "accumulate4+layerwise", "accumulate4+recompute+layerwise", "memory_budget=0.3"),
    "evoformer": ("uncut", "accumulate4+layerwise", "accumulate4+recompute+layerwise", "memory_budget=0.3"),
}
GIB = 2**30
# Roundings to bfloat16 add up over layers, differently in every correct implementation.
MOST_OF_BASELINE = 1.25
_SAMPLES = 1 << 16
HEADER = (
    *("mode", "speed", "of compile", "peak GiB", "of compile", "predicted GiB", "compile s", "loss"),
    *("gradients off by", "what was chosen"),
)


def main() -> None:
    """Run all points of all models, or, as a child, one point."""
    parser = points.parser(
        __doc__,
        SUBJECTS,
        modes="instead of all: compile, checkpoint, uncut, a plan's name, …",
        batch="rows, images, proteins; by default what the baseline has room for",
        layers="blocks; by default the published model's, 8 of the Evoformer",
    )
    points.run_all(parser.parse_args(), point, measure)


def measure(model: str, arguments: argparse.Namespace, clock: points.Clock) -> Path:
    """Run all points of a model; the file that has them."""
    batch, layers = sizes(model, arguments)
    title = f"{SUBJECTS[model].__doc__}\n\nBatch {batch}, {layers} layers, bfloat16, fused AdamW."
    unit = {"qwen3": "tokens", "swin": "images", "evoformer": "residues"}[model]
    header = [f"{unit}/s (10th-90th)" if name == "speed" else name for name in HEADER]
    rows: list[list[str]] = []
    base = None
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "gradients.pt"
        found = points.run_point(__file__, model, "reference", reference, arguments, clock)
        if "error" in found:
            title += f"\n\nThere are no gradients to compare with: {found['error']}."
        for mode in arguments.modes or (*BASELINES, CHECKPOINT[model], *OURS[model]):
            found = points.run_point(__file__, model, mode, reference, arguments, clock)
            if mode == "compile":
                base = found
            rows.append(row(mode, found, base))
            print(model, *rows[-1], sep=" | ", flush=True)
            text = f"{title}\n\n" + report.table(header, rows)
            path = report.write(f"plans-{model}", torch.device(arguments.device), text, arguments.out)
    return path


def row(mode: str, found: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    """One line of the table."""
    if "error" in found:
        return [mode, found["error"], *[""] * 8]
    speed = found["tokens"] / found["seconds"][0]
    low, high = (found["tokens"] / seconds for seconds in reversed(found["seconds"][1:]))
    has_base = base is not None and "error" not in base
    error, usual = (one.get("error_of_gradients", 0.0) for one in (found, base if has_base else found))
    if error > MOST_OF_BASELINE * usual + 1e-3:
        return [
            mode,
            f"wrong: gradients are off by {error:.4f} of their norm, torch.compile's by {usual:.4f}",
            *[""] * 8,
        ]
    ratio = f"{base['seconds'][0] / found['seconds'][0]:.3f}" if has_base else ""
    memory = f"{found['peak'] / base['peak']:.3f}" if has_base and base["peak"] else ""
    predicted = "" if found["predicted"] is None else f"{found['predicted'] / GIB:.2f}"
    return [
        mode,
        f"{speed:,.0f} ({low:,.0f}-{high:,.0f})",
        ratio,
        f"{found['peak'] / GIB:.2f}",
        memory,
        predicted,
        f"{found['compile']:.0f}",
        f"{found['loss']:.4f}",
        f"{error:.4f}" if "error_of_gradients" in found else "not compared",
        found["chosen"],
    ]


def sizes(model: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """Batch and layers of a model."""
    small = 2 if arguments.quick else None
    return arguments.batch or (4 if small else DEFAULT_BATCH[model]), arguments.layers or small or DEFAULT_LAYERS[model]


def point(model: str, mode: str, reference: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some steps in one mode: gradients first, then time and memory."""
    device = torch.device(arguments.device)
    subject = SUBJECTS[model](*sizes(model, arguments), device, tiny=arguments.quick)
    if mode == "reference":
        return exact(subject, reference)
    made: list[Any] = []
    step = compiled(subject, mode, made, arguments.codegen)
    optimizer = torch.optim.AdamW(subject.model.parameters(), 1e-4, fused=True)
    begin = time.perf_counter()
    loss = step(*subject.arguments)
    loss.backward()
    report.synchronize(device)
    compile_seconds = time.perf_counter() - begin
    found: dict[str, Any] = {"loss": loss.item(), "compile": compile_seconds, "tokens": subject.num_tokens}
    found |= compare(subject.model, loss, reference) if reference.exists() else {}
    optimizer.step()
    optimizer.zero_grad()

    def train() -> None:
        step(*subject.arguments).backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = report.measure(train, device, 2 if arguments.quick else arguments.repeats, warmup=1)
    found["seconds"] = times
    found["peak"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    predicted = [peak for one in made if (peak := getattr(one, "predicted_peak_bytes", None)) is not None]
    # The state of AdamW lies beside what the step holds.
    state = sum(value.nbytes for group in optimizer.state.values() for value in group.values())
    found["predicted"] = predicted[0] + state if predicted else None
    choices = [one.choice.chosen.name or "uncut" for one in made if one.choice is not None]
    found["chosen"] = ", ".join(choices)
    for one in made:
        print(one.choice, *getattr(getattr(one, "passes", None), "reports", ()), sep="\n", file=sys.stderr)
    return found


def compiled(subject: Subject, mode: str, made: list[Any], codegen: str) -> Callable[..., Tensor]:
    """The step in a mode: a baseline's name, "uncut", "memory_budget=…" or the name of a plan."""
    stock = "inductor" if codegen == "inductor" else "aot_eager"
    if mode == "compile":
        return torch.compile(subject.loss_of, backend=stock)
    if mode == "checkpoint":
        checkpoint_layers(subject.model, subject.layer)
        return torch.compile(subject.loss_of, backend=stock)
    if mode == "checkpoint_blocks":
        # Dynamo traces no checkpoint of a layer that changes itself, as Swin's do: each is compiled, then checkpointed.
        torch._dynamo.config.recompile_limit = 64
        for module in subject.model.modules():
            if isinstance(module, subject.layer):
                module.compile(backend=stock)
        checkpoint_layers(subject.model, subject.layer)
        return subject.loss_of
    name, _, value = mode.partition("=")
    if name == "activation_memory_budget":
        from torch._functorch import config

        config.activation_memory_budget = float(value)
        return torch.compile(subject.loss_of, backend=stock)
    options: dict[str, Any] = {"codegen": codegen}
    if mode != "uncut":
        # Any budget has memory predicted from traced passes, also for a plan by name.
        budget = {"memory_budget": float(value) if "." in value else int(value)} if value else {}
        options |= budget or {"plan": mode, "memory_budget": 1 << 50}
        options["inspect"] = made.append
    return torch.compile(subject.loss_of, backend="superscaler", options=options)


def checkpoint_layers(model: nn.Module, layer: type[nn.Module]) -> None:
    """Recompute every layer in backward, as torch's own wrapper does."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))


def compare(model: nn.Module, loss: Tensor, reference: Path) -> dict[str, Any]:
    """How far gradients are from exact ones, in their norm, all parameters together.

    Raises:  AssertionError for another loss, or gradients of other parameters.
    """
    sample = _samples(model)
    expected_loss, expected = torch.load(reference)
    assert sample.keys() == expected.keys(), "other parameters have gradients"
    difference = sum((sample[name] - expected[name]).square().sum().item() for name in sample) ** 0.5
    norm = sum(expected[name].square().sum().item() for name in sample) ** 0.5
    assert abs(loss.item() - expected_loss) <= 0.01 * abs(expected_loss), f"{loss.item()} is not {expected_loss}"
    return {"error_of_gradients": difference / norm}


def exact(subject: Subject, reference: Path) -> dict[str, Any]:
    """Leave the loss and a sample of the gradients in float32, computed row by row: each has an equal share."""
    model = subject.model.float()
    arguments = [value.float() if value.is_floating_point() else value for value in subject.arguments]
    num_rows, total = len(arguments[0]), 0.0
    for row_ in range(num_rows):
        loss = subject.loss_of(*(value[row_ : row_ + 1] for value in arguments)) / num_rows
        loss.backward()
        total += loss.item()
    torch.save((total, _samples(model)), reference)
    return {"loss": total}


def _samples(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("_checkpoint_wrapped_module.", ""): _sample(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu()


if __name__ == "__main__":
    main()
