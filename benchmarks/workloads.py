"""Whole calls of generate(): one sequence, a batch, a chat of five turns, a long prompt; and how far from the floor.

The floor of a step is reading the weights that it uses, and the keys and values of half of the new tokens, at the
device's read bandwidth, which is measured in the same run.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import device_limits
import report
import torch
from memory import give_back, used_bytes
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import torch_vtensor

__all__ = ["WORKLOADS", "measure_workloads", "options_of"]

GIB = 2**30
STOCK_TOKENS = 32  # of modes that launch every kernel from the host: a step takes as long as the one before
REPEATS = 3
PROFILED_TOKENS = 16


class Workload(NamedTuple):
    """``turns`` calls that continue one another, of ``batch`` sequences: new tokens in, new tokens out."""

    batch: int
    prompt: int
    answer: int
    turns: int = 1


WORKLOADS = {
    "single": Workload(1, 512, 512),
    "batch": Workload(32, 1024, 256),
    "chat": Workload(1, 256, 128, turns=5),
    "long": Workload(1, 32768, 128),
}
HEADER = (
    "workload",
    "mode",
    "decoding, tokens/s",
    "floor, tokens/s",
    "of floor",
    "all, tokens/s",
    "first token of the last turn, ms",
    "peak GiB",
    "idle GiB",
)
LEGEND = (
    "Decoding: the batch over the median time between tokens, of the last turn. All: new tokens of all turns over the "
    "time of all calls, prompts included. The floor of decoding reads the weights that a step uses, and the keys and "
    "values of all tokens but half of the new ones, at {bandwidth:.0f} GB/s, measured in this run. GiB are what the "
    "device says is in use above what was in use before the model ({weights:.2f} GiB) was made: at most after a turn, "
    "and after all of them and trim() and empty_cache(). The first call of each is not measured. Answers of modes that "
    f"launch their kernels one by one are cut at {STOCK_TOKENS} tokens, without a figure for all."
)


class Arrivals(BaseStreamer):
    """When each token was handed on."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        pass


class Outcome(NamedTuple):
    """One run of a workload."""

    total_s: float
    first_s: float  # of the last turn
    between_s: float  # median of the last turn
    peak_bytes: int


def measure_workloads(
    model: PreTrainedModel, names: list[str], modes: list[str], quick: bool, weights_bytes: int
) -> str:
    """Run every workload in every mode; returns the body of a result file.

    Args:
        weights_bytes: what the device had in use more after the model was made than before.
    """
    device = model.device
    bandwidth = device_limits.read_bandwidth(device)
    give_back(device)
    baseline = used_bytes(device) - weights_bytes
    rows, shares = [], []
    for name in tqdm(names, desc="workloads"):
        workload = WORKLOADS[name]
        if quick:
            workload = workload._replace(prompt=workload.prompt // 16, answer=workload.answer // 16)
        for mode in modes:
            with options_of(mode):
                answer = workload.answer if mode == "compiled" else min(workload.answer, STOCK_TOKENS)
                run(model, workload, answer, baseline)
                outcomes = [run(model, workload, answer, baseline) for _ in range(REPEATS)]
                if mode == "compiled" and device.type == "cuda":
                    shares.append(f"- {name}: {where_time_goes(model, workload)}")
                give_back(device)
                idle = used_bytes(device) - baseline
            between = median(outcome.between_s for outcome in outcomes)
            speed, best = workload.batch / between, workload.batch * bandwidth / step_bytes(model, workload)
            new_tokens = workload.batch * workload.answer * workload.turns
            rows.append(
                (
                    f"{name}: {workload.batch} x {workload.prompt} -> {workload.answer}"
                    + (f", {workload.turns} turns" if workload.turns > 1 else ""),
                    mode,
                    f"{speed:.1f}",
                    f"{best:.1f}",
                    f"{speed / best:.0%}",
                    f"{new_tokens / median(outcome.total_s for outcome in outcomes):.1f}"
                    if answer == workload.answer
                    else "-",
                    f"{median(outcome.first_s for outcome in outcomes) * 1e3:.1f}",
                    f"{max(outcome.peak_bytes for outcome in outcomes) / GIB:.2f}",
                    f"{idle / GIB:.2f}",
                )
            )
            tqdm.write(" | ".join(rows[-1]))
    legend = LEGEND.format(bandwidth=bandwidth / 1e9, weights=weights_bytes / GIB)
    body = f"{report.table(HEADER, rows)}\n\n{legend}"
    if shares:
        body += "\n\n## Where a compiled step's time goes\n\n" + "\n".join(shares)
    return body


def options_of(mode: str) -> Any:
    """The context in which ``generate()`` runs in this mode."""
    if mode in ("dynamic", "static"):
        return contextlib.nullcontext()
    return torch_vtensor.enabled(compile=mode == "compiled", attention="fast" if mode == "fast" else None)


def run(model: PreTrainedModel, workload: Workload, answer: int, baseline: int) -> Outcome:
    """All turns of a workload."""
    device, cache = model.device, DynamicCache(config=model.config)
    torch.manual_seed(0)
    tokens = torch.empty(workload.batch, 0, dtype=torch.int64, device=device)
    peak = 0
    report.synchronize(device)
    start = time.perf_counter()
    for _ in range(workload.turns):
        prompt = torch.randint(model.config.vocab_size, (workload.batch, workload.prompt), device=device)
        arrivals, began = Arrivals(), time.perf_counter()
        output: Any = model.generate(
            torch.cat([tokens, prompt], dim=1),
            past_key_values=cache,
            max_new_tokens=answer,
            min_new_tokens=answer,
            do_sample=False,
            streamer=arrivals,
            return_dict_in_generate=True,
            **({"prefill_chunk_size": 4096} if workload.prompt > 16384 else {}),
        )
        tokens, cache = output.sequences, output.past_key_values
        del output
        peak = max(peak, used_bytes(device) - baseline)
    report.synchronize(device)
    total = time.perf_counter() - start
    steps = [after - before for before, after in pairwise(arrivals.times)]
    return Outcome(total, arrivals.times[0] - began, median(steps), peak)


def step_bytes(model: PreTrainedModel, workload: Workload) -> float:
    """What a step of the last turn has to read."""
    unread = model.get_input_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters() if weight is not unread)
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    num_tokens = workload.turns * (workload.prompt + workload.answer) - workload.answer / 2
    return weights + workload.batch * num_tokens * token_bytes


def where_time_goes(model: PreTrainedModel, workload: Workload) -> str:
    """The share of each kind of kernel in the steps of one call."""
    short = workload._replace(turns=1, prompt=min(workload.prompt, 2048))
    run(model, short, 2, 0)  # what takes up a prompt of this length is captured
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(model, short, 2, 0)
    before = kinds_of(profiler)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(model, short, 2 + PROFILED_TOKENS, 0)
    shares = kinds_of(profiler)
    shares.subtract(before)
    total = sum(shares.values())
    parts = ", ".join(f"{kind} {share / total:.1%}" for kind, share in shares.most_common())
    return (
        f"{parts}; kernels that overlap count each in full, "
        f"{total / PROFILED_TOKENS / 1e3:.2f} ms a step at {short.prompt} tokens"
    )


def kinds_of(profiler: Any) -> Counter[str]:
    """Microseconds on the device by kind of kernel."""
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.lower()
        if any(word in name for word in ("_decode", "_prefill", "_prefix", "attention", "fmha")):
            kind = "attention"
        elif any(word in name for word in ("_linear", "gemm", "gemv", "nvjet", "cutlass", "splitk", "_mm")):
            kind = "matrix products"
        elif "memcpy" in name or "memset" in name:
            kind = "copies"
        else:
            kind = "the rest"
        kinds[kind] += event.self_device_time_total
    return kinds
