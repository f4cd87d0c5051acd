"""generate() with DynamicCache, StaticCache (compiled) and torch_vtensor: speed, memory and driver calls.

    python benchmarks/bench_generate.py [--device cuda] [--points 1x1024,8x32768] [--modes dynamic,vtensor] [--quick]

The model is random: Llama-3-8B's shape in bfloat16 on a GPU, eight layers of a 0.1B shape in float32 on a CPU. Tokens
of every mode are compared with DynamicCache's. Writes
benchmarks/results/generate_<device>_<date>.md, losses included.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler

GIB = 2**30
GPU_POINTS = "1x1024,1x8192,1x32768,8x1024,8x8192,8x32768,32x1024,32x8192"
CPU_POINTS = "1x1024,1x4096,1x12288,4x2048"
STATIC_POINTS = {"1x1024", "8x8192"}  # each shape costs up to a minute of compiling


class Run(NamedTuple):
    """One mode at one point. Bytes of KV and what else was allocated while decoding, above the weights."""

    first_s: float
    steps_s: list[float]
    now_bytes: int
    peak_bytes: int
    after_bytes: int
    live_bytes: int
    calls: list[tuple[int, int]]
    waits: int
    tokens: torch.Tensor


class Probe(LogitsProcessor):
    """Sees every step of generate(): its time, and the driver calls made since the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.calls: list[tuple[int, int]] = []
        self.committed_bytes = 0
        self._main = threading.get_ident()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.times:
            report.synchronize(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        self.times.append(time.perf_counter())
        pool = default_scheduler(self.device).pool
        counts = dict(pool.driver.num_calls_by_thread)
        main = counts.pop(self._main, 0)
        self.calls.append((main, sum(counts.values())))
        self.committed_bytes = max(self.committed_bytes, pool.ledger.committed_bytes)
        return scores


def main() -> None:
    """Run every point in every mode and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--points", help="batch x context, comma separated")
    parser.add_argument("--modes", default="dynamic,vtensor,static")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2, help="how often each mode is measured at each point")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    points = (arguments.points or (GPU_POINTS if device.type == "cuda" else CPU_POINTS)).split(",")
    model, shape = make_model(device, arguments.quick)
    rows, notes = [], []
    for point in tqdm(points, desc="points"):
        batch, context = (int(number) for number in point.split("x"))
        prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
        modes = [mode for mode in arguments.modes.split(",") if mode != "static" or is_cheap(point, device)]
        runs: dict[str, list[Run]] = {mode: [] for mode in modes}
        # Modes take turns, so that a slow phase of the machine meets all of them.
        for turn in range(arguments.turns):
            for mode in modes:
                try:
                    runs[mode].append(run(model, prompt, mode, arguments.new_tokens, warm_up=turn == 0))
                except torch.OutOfMemoryError as error:
                    notes.append(f"- {point} {mode}: out of memory ({str(error)[:120]})")
                    clean(device)
        baseline = merge(runs["dynamic"]) if runs.get("dynamic") else None
        for mode in modes:
            if runs[mode]:
                rows.append(row(point, mode, merge(runs[mode]), baseline))
                tqdm.write(" | ".join(str(cell) for cell in rows[-1]))
    body = f"Model: {shape}. Greedy, {arguments.new_tokens} new tokens a sequence, eager unless said.\n\n"
    body += report.table(HEADER, rows) + "\n\n" + LEGEND
    path = report.write("generate", device, body + "\n" + "\n".join(notes), arguments.out)
    print(path.read_text())


HEADER = (
    "batch x context",
    "mode",
    "tokens/s",
    "vs dynamic",
    "ms a step (10th-90th)",
    "first token s",
    "MiB now",
    "MiB peak",
    "MiB after",
    "committed / live",
    "driver calls a step: decoding thread, background",
    "steps without",
    "waits",
    "same tokens",
)
LEGEND = (
    "tokens/s is the batch over the median decoding step. MiB are physical bytes above the weights: at the end of "
    "decoding, the most while decoding, and after the cache is gone and trim() / empty_cache() was called. Driver "
    "calls and waits for the device are torch_vtensor's own, while decoding. Same tokens: against DynamicCache."
)


def is_cheap(point: str, device: torch.device) -> bool:
    """Whether compiling a StaticCache at this point is worth its minute."""
    return device.type != "cuda" or point in STATIC_POINTS


def merge(runs: list[Run]) -> Run:
    """One run that has the steps of all."""
    return runs[-1]._replace(
        first_s=min(run.first_s for run in runs),
        steps_s=[step for run in runs for step in run.steps_s],
        calls=[call for run in runs for call in run.calls],
        waits=sum(run.waits for run in runs),
        peak_bytes=max(run.peak_bytes for run in runs),
    )


def row(point: str, mode: str, result: Run, baseline: Run | None) -> tuple[object, ...]:
    """One line of the table."""
    step = report.timing(result.steps_s)
    ours = mode == "vtensor"
    main = [call for call, _ in result.calls]
    background = [call for _, call in result.calls]
    return (
        point,
        {"dynamic": "DynamicCache", "static": "StaticCache, compiled", "vtensor": "torch_vtensor"}[mode],
        f"{result.tokens.shape[0] / step.median:.1f}",
        f"{report.timing(baseline.steps_s).median / step.median:.2f}x" if baseline else "-",
        f"{step:ms}",
        f"{result.first_s:.3f}",
        f"{result.now_bytes / 2**20:.0f}",
        f"{result.peak_bytes / 2**20:.0f}",
        f"{result.after_bytes / 2**20:.0f}",
        f"{result.now_bytes / result.live_bytes:.3f}" if result.live_bytes else "-",
        f"{sum(main) / len(main):.2f}, {sum(background) / len(background):.2f}" if ours else "-",
        f"{sum(calls == 0 for calls in main) / len(main):.1%}" if ours else "-",
        result.waits if ours else "-",
        f"{(result.tokens == baseline.tokens).float().mean().item():.1%}" if baseline else "-",
    )


def make_model(device: torch.device, quick: bool) -> tuple[LlamaForCausalLM, str]:
    """A random model and its description."""
    torch.manual_seed(0)
    if device.type == "cuda" and not quick:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_theta=500000.0,
        )
        shape, dtype = "Llama-3-8B's shape, random weights, bfloat16", torch.bfloat16
    else:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=32768,
        )
        shape, dtype = "8 layers, 8 heads of 64, random weights, float32", torch.float32
    config.pad_token_id = config.eos_token_id = None
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model, shape


def run(model: LlamaForCausalLM, prompt: torch.Tensor, mode: str, new_tokens: int, warm_up: bool) -> Run:
    """Generate, measured; before that once to warm up, if asked."""
    device = prompt.device
    options: dict[str, Any] = {"cache_implementation": "static"} if mode == "static" else {}

    def generate(num_tokens: int, probe: Probe) -> Any:
        return model.generate(
            prompt,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([probe]),
            return_dict_in_generate=True,
            **options,
        )

    context: Callable[[], Any] = torch_vtensor.enabled if mode == "vtensor" else contextlib.nullcontext
    with context():
        if warm_up:  # with the same length: StaticCache compiles for it
            generate(new_tokens if mode == "static" else 4, Probe(device))
        clean(device)
        scheduler = default_scheduler(device)
        before, waits = used_bytes(device), scheduler.num_device_waits
        allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        probe = Probe(device)
        start = time.perf_counter()
        output = generate(new_tokens, probe)
        report.synchronize(device)
        cache = output.past_key_values
        held = torch_vtensor.memory(cache)
        now = held.committed_bytes + held.ordinary_bytes
        peak = held.ordinary_bytes
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) - allocated
        peak += probe.committed_bytes
        tokens = output.sequences.clone()
        del cache, output
        clean(device)
        after_bytes = used_bytes(device) - before
    return Run(
        first_s=probe.times[0] - start,
        steps_s=[after - before for before, after in pairwise(probe.times)],
        now_bytes=now,
        peak_bytes=peak,
        after_bytes=after_bytes,
        live_bytes=held.written_bytes,
        calls=[(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(probe.calls)],
        waits=scheduler.num_device_waits - waits,
        tokens=tokens,
    )


def clean(device: torch.device) -> None:
    """Give back everything that is not in use."""
    gc.collect()
    torch_vtensor.trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def used_bytes(device: torch.device) -> int:
    """Physical bytes in use, as the system counts them."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return int(default_scheduler(device).pool.driver.inner.physical_bytes())


if __name__ == "__main__":
    main()
