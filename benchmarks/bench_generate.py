"""generate() with DynamicCache, StaticCache (compiled) and torch_vtensor, eager, with fast attention and compiled.

    python benchmarks/bench_generate.py [--device cuda] [--points 1x1024,8x32768] [--modes dynamic,vtensor] [--quick]
    python benchmarks/bench_generate.py --workloads single,batch,chat,long

The model is random: Llama-3-8B's shape in bfloat16 on a GPU, eight layers of a 0.1B shape in float32 on a CPU. Tokens
of every mode are compared with DynamicCache's. Points measure single steps at one context, workloads whole calls
(workloads.py). Writes benchmarks/results/generate_<device>_<date>.md, or workloads_<device>_<date>.md, losses included.
"""

from __future__ import annotations

import argparse
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import report
import torch
from memory import Peak, give_back, used_bytes
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from workloads import measure_workloads, options_of

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler

GPU_POINTS = "1x1024,1x8192,1x32768,8x1024,8x8192,8x32768,32x1024,32x8192"
CPU_POINTS = "1x1024,1x4096,1x12288,4x2048"
STATIC_POINTS = {"1x1024", "1x4096", "4x2048", "8x1024", "8x8192", "32x1024"}  # each is compiled, for up to a minute
MODES = {
    "dynamic": "DynamicCache",
    "vtensor": "torch_vtensor",
    "fast": 'torch_vtensor, attention="fast"',
    "compiled": "torch_vtensor, compiled",
    "static": "StaticCache, compiled",
}
OURS = ("vtensor", "fast", "compiled")
NOTED_FIRST_CALL_S = 5
LONG_PROMPT_TOKENS = 64 * 1024  # of all sequences: more are taken up in parts, whose activations fit beside the cache
PROFILED_STEPS = 3


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
    total_s: float
    device_s: float | None  # how long the GPU worked in a step, whatever it waited for


class Probe:
    """Notes every step of generate(): its time, and the driver calls made since the step before."""

    def __init__(self, device: torch.device, profile_from: int | None = None) -> None:
        self.device = device
        self.profile_from = profile_from
        self.device_s: float | None = None
        self._profiler = profile(activities=[ProfilerActivity.CUDA]) if profile_from is not None else None
        self.times: list[float] = []
        self.calls: list[tuple[int, int]] = []
        self.committed_bytes = 0
        self.peak = Peak(device)
        self._main = threading.get_ident()

    def note(self) -> None:
        """A step is done: for eager decoding launched, for compiled decoding finished."""
        if not self.times:
            report.synchronize(self.device)
            self.peak.start()
        self._profile()
        if self.profile_from is None or len(self.calls) < self.profile_from:  # the profiler slows what it looks at
            self.times.append(time.perf_counter())
        counts = dict(default_scheduler(self.device).pool.driver.num_calls_by_thread)
        main = counts.pop(self._main, 0)
        self.calls.append((main, sum(counts.values())))
        self.see_memory()

    def see_memory(self) -> None:
        """Take into account what is committed now."""
        committed_bytes = default_scheduler(self.device).pool.ledger.committed_bytes
        self.committed_bytes = max(self.committed_bytes, committed_bytes)

    def _profile(self) -> None:
        if self._profiler is None or self.profile_from is None:
            return
        if len(self.calls) == self.profile_from:
            self._profiler.start()
        elif len(self.calls) == self.profile_from + PROFILED_STEPS:
            report.synchronize(self.device)
            self._profiler.stop()
            busy_us = sum(event.self_device_time_total for event in self._profiler.key_averages())
            self.device_s = busy_us / 1e6 / PROFILED_STEPS


class EagerProbe(LogitsProcessor):
    """Has the probe note every step of a loop that calls logits processors on the host."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.probe.note()
        return scores


class CompiledProbe(BaseStreamer):
    """Has the probe note every step of a loop that does not: it hands tokens on as the device finishes them."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.probe.note()
        self.has_prompt = True

    def end(self) -> None:
        pass


def main() -> None:
    """Run every point in every mode and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--points", help="batch x context, comma separated")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2, help="how often each mode is measured, after a first call")
    parser.add_argument("--workloads", help="measure these instead of points, comma separated")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    points = (arguments.points or (GPU_POINTS if device.type == "cuda" else CPU_POINTS)).split(",")
    before = used_bytes(device)
    model, shape = make_model(device, arguments.quick)
    if arguments.workloads:
        names, modes = arguments.workloads.split(","), arguments.modes.split(",")
        body = measure_workloads(model, names, modes, arguments.quick, used_bytes(device) - before)
        print(report.write("workloads", device, f"Model: {shape}. Greedy.\n\n{body}", arguments.out).read_text())
        return
    rows, notes = [], []
    for point in tqdm(points, desc="points"):
        batch, context = (int(number) for number in point.split("x"))
        prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
        modes = [mode for mode in arguments.modes.split(",") if mode != "static" or point in STATIC_POINTS]
        runs: dict[str, list[Run]] = {mode: [] for mode in modes}
        # Modes take turns, so that a slow phase of the machine meets all of them. The first call of each is apart:
        # torch plans cuDNN's attention for every length that it sees for the first time, and compiled code is made.
        for _ in range(1 + arguments.turns):
            for mode in modes:
                try:
                    runs[mode].append(run(model, prompt, mode, arguments.new_tokens))
                except torch.OutOfMemoryError as error:
                    notes.append(f"- {point} {mode}: out of memory ({str(error)[:120]})")
                    give_back(device)
        for mode in modes:
            if len(runs[mode]) > 1:
                rows.append(row(point, mode, runs[mode], runs.get("dynamic") or []))
                tqdm.write(" | ".join(str(cell) for cell in rows[-1]))
                first, again = runs[mode][:2]
                if first.total_s - again.total_s > NOTED_FIRST_CALL_S:
                    notes.append(
                        f"- {point} {mode}: the first call took {first.total_s:.1f} s, the next {again.total_s:.1f}."
                    )
        body = f"Model: {shape}. Greedy, {arguments.new_tokens} new tokens a sequence, eager unless said.\n\n"
        body += report.table(HEADER, rows) + "\n\n" + LEGEND + "\n\n" + "\n".join(notes)
        path = report.write("generate", device, body, arguments.out)  # after each point: the last may run out of time
    print(path.read_text())


HEADER = (
    "batch x context",
    "mode",
    "tokens/s",
    "vs dynamic",
    "ms a step (10th-90th)",
    "in the first call",
    "GPU ms a step",
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
    "tokens/s is the batch over the median decoding step, vs dynamic the median over turns of DynamicCache's median "
    "step over this one's in the same turn (and the least and most of a turn). In the first call every length is new "
    "to torch's cuDNN attention, which plans it then. GPU ms is how long kernels and copies ran in an eager step: "
    "where it is far below the step's time, the host could not launch them any faster. First token s is the least over "
    "turns. MiB are physical bytes: of the cache, at the end of decoding; the most while decoding, the model's "
    "activations included, and after the cache is gone and trim() / empty_cache() was called, both above what was in "
    "use before (on a CPU, what the system kept resident for this process). Driver calls and waits for the device are "
    "torch_vtensor's own, while decoding. Same tokens: against DynamicCache; weights are random, so the two highest "
    "logits are often a rounding apart."
)


def merge(runs: list[Run]) -> Run:
    """One run that has the steps of all."""
    return runs[-1]._replace(
        first_s=min(run.first_s for run in runs),
        steps_s=[step for run in runs for step in run.steps_s],
        calls=[call for run in runs for call in run.calls],
        waits=sum(run.waits for run in runs),
        peak_bytes=max(run.peak_bytes for run in runs),
    )


def row(point: str, mode: str, runs: list[Run], baseline: list[Run]) -> tuple[object, ...]:
    """One line of the table. The first of ``runs`` is the mode's first call."""
    result = merge(runs[1:])
    step = report.timing(result.steps_s)
    ratios = [median(stock.steps_s) / median(run.steps_s) for stock, run in zip(baseline[1:], runs[1:], strict=False)]
    ours = mode in OURS
    main = [call for call, _ in result.calls]
    background = [call for _, call in result.calls]
    return (
        point,
        MODES[mode],
        f"{result.tokens.shape[0] / step.median:.1f}",
        f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-",
        f"{step:ms}",
        f"{report.timing(runs[0].steps_s):ms}",
        f"{result.device_s * 1e3:.2f}" if result.device_s is not None else "-",
        f"{result.first_s:.3f}",
        f"{result.now_bytes / 2**20:.0f}",
        f"{result.peak_bytes / 2**20:.0f}",
        f"{result.after_bytes / 2**20:.0f}",
        f"{result.now_bytes / result.live_bytes:.3f}" if result.live_bytes else "-",
        f"{sum(main) / len(main):.2f}, {sum(background) / len(background):.2f}" if ours else "-",
        f"{sum(calls == 0 for calls in main) / len(main):.1%}" if ours else "-",
        result.waits if ours else "-",
        f"{(result.tokens == baseline[0].tokens).float().mean().item():.1%}" if baseline else "-",
    )


def make_model(
    device: torch.device, quick: bool, kv_heads: int | None = None, dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, str]:
    """A random model and its description; ``kv_heads`` heads of keys and values, by default as many as is usual."""
    torch.manual_seed(0)
    if device.type == "cuda" and not quick:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=kv_heads or 8,
            max_position_embeddings=131072,
            rope_theta=500000.0,
        )
        shape, dtype = "Llama-3-8B's shape", dtype or torch.bfloat16
    else:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=kv_heads or 8,
            max_position_embeddings=32768,
        )
        shape, dtype = f"8 layers, 8 heads of 64, {kv_heads or 8} of keys and values", dtype or torch.float32
    config.pad_token_id = config.eos_token_id = None
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model, f"{shape}, random weights, {str(dtype).removeprefix('torch.')}"


def run(model: LlamaForCausalLM, prompt: torch.Tensor, mode: str, new_tokens: int) -> Run:
    """Generate, measured."""
    device = prompt.device

    def generate(prompt: torch.Tensor, num_tokens: int, probe: Probe) -> Any:
        options: dict[str, Any] = {}
        if mode == "static":
            compile_config = CompileConfig()
            compile_config._compile_all_devices = True  # transformers compiles by itself on GPUs alone
            options |= {"cache_implementation": "static", "compile_config": compile_config}
        if prompt.numel() > LONG_PROMPT_TOKENS:
            options["prefill_chunk_size"] = LONG_PROMPT_TOKENS // len(prompt)
        if mode == "compiled":
            options["streamer"] = CompiledProbe(probe)
        else:
            options["logits_processor"] = LogitsProcessorList([EagerProbe(probe)])
        return model.generate(
            prompt,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )

    with options_of(mode):
        give_back(device)
        scheduler = default_scheduler(device)
        before, waits = used_bytes(device), scheduler.num_device_waits
        eager = mode in ("dynamic", "vtensor", "fast")
        profiled = eager and device.type == "cuda" and new_tokens >= 4 * PROFILED_STEPS
        probe = Probe(device, new_tokens - PROFILED_STEPS - 2 if profiled else None)
        start = time.perf_counter()
        output = generate(prompt, new_tokens, probe)
        report.synchronize(device)
        total_s = time.perf_counter() - start
        cache = output.past_key_values
        held = torch_vtensor.memory(cache)
        now = held.committed_bytes + held.ordinary_bytes
        probe.see_memory()
        peak = probe.peak.nbytes(probe.committed_bytes)
        tokens = output.sequences.clone()
        del cache, output
        give_back(device)
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
        total_s=total_s,
        device_s=probe.device_s,
    )


if __name__ == "__main__":
    main()
