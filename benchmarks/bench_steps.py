"""Eager decoding steps over several caches in turn, each step of one right before that of the next.

    python benchmarks/bench_steps.py [--device cuda] [--points 1x1024,8x8192] [--steps 48]
        [--kv-heads 8] [--dtype bfloat16]

A host that launches kernels has fast and slow phases, of seconds and up to twice as slow: times of calls that ran one
after the other say little about a few percent. Ratios of neighbouring steps do. The models are bench_generate.py's.
Writes benchmarks/results/steps_<device>_<date>.md, losses included; a dtype or number of heads given is in the name.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import report
import torch
from bench_generate import CPU_POINTS, GPU_POINTS, make_model
from memory import give_back
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

import torch_vtensor

NUM_WARM_STEPS = 3
HEADER = ("batch x context", "DynamicCache, ms", "torch_vtensor, ms", "ratio", 'attention="fast", ms', "ratio")
LEGEND = (
    "One step of each in turn, {steps} times over the same lengths, which torch's cuDNN attention has planned before. "
    "Caches are filled with random numbers, not by a prompt. Ratio: DynamicCache's step over the one right behind it, "
    "median (10th-90th). Above 1 ours is faster."
)


def main() -> None:
    """Measure every point and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--points", help="batch x context, comma separated")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values, fewer than the queries' to group them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    points = (arguments.points or (GPU_POINTS if device.type == "cuda" else CPU_POINTS)).split(",")
    model, shape = make_model(
        device, arguments.quick, arguments.kv_heads, arguments.dtype and getattr(torch, arguments.dtype)
    )
    rows, notes = [], []
    for point in tqdm(points, desc="points"):
        batch, context = map(int, point.split("x"))
        try:
            rows.append((point, *measure_point(model, batch, context, arguments.steps)))
            tqdm.write(" | ".join(rows[-1]))
        except torch.OutOfMemoryError as error:
            notes.append(f"- {point}: out of memory ({str(error)[:120]})")
        give_back(device)
    legend = LEGEND.format(steps=arguments.steps)
    body = "\n\n".join((f"Model: {shape}.", report.table(HEADER, rows), legend, "\n".join(notes)))
    variants = (arguments.dtype, arguments.kv_heads and f"{arguments.kv_heads}-kv-heads")
    subject = "-".join(("steps", *(variant for variant in variants if variant)))
    print(report.write(subject, device, body, arguments.out).read_text())


def measure_point(model: PreTrainedModel, batch: int, context: int, num_steps: int) -> tuple[str, ...]:
    """The cells of one line of the table."""
    config, device = model.config, model.device
    caches: dict[str, Any] = {"dynamic": DynamicCache(config=config)}
    caches |= {name: torch_vtensor.VTensorCache(config=config) for name in ("vtensor", "fast")}
    size = batch, config.num_key_value_heads, context, config.head_dim
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            key, value = (torch.randn(size, dtype=model.dtype, device=device) for _ in range(2))
            for cache in caches.values():
                cache.update(key, value, layer)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    times: dict[str, list[float]] = {}
    for _ in range(2):  # the first time over these lengths everything that a length costs once is done
        times = {name: [] for name in caches}
        for _ in range(NUM_WARM_STEPS + num_steps):
            for name, cache in caches.items():
                with torch_vtensor.enabled(attention="fast") if name == "fast" else contextlib.nullcontext():
                    times[name].append(_step(model, cache, token))
        for cache in caches.values():
            cache.crop(context - cache.get_seq_length())
    dynamic, vtensor, fast = (seconds[NUM_WARM_STEPS:] for seconds in times.values())
    return (
        f"{report.timing(dynamic):ms}",
        f"{report.timing(vtensor):ms}",
        _ratio(dynamic, vtensor),
        f"{report.timing(fast):ms}",
        _ratio(dynamic, fast),
    )


def _step(model: PreTrainedModel, cache: Any, token: torch.Tensor) -> float:
    report.synchronize(model.device)
    began = time.perf_counter()
    with torch.no_grad():
        model(token, past_key_values=cache).logits.argmax(-1)
    report.synchronize(model.device)
    return time.perf_counter() - began


def _ratio(of: list[float], to: list[float]) -> str:
    ratios = report.timing([a / b for a, b in zip(of, to, strict=True)])
    return f"{ratios.median:.2f}x ({ratios.low:.2f}-{ratios.high:.2f})"


if __name__ == "__main__":
    main()
