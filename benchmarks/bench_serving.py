"""generate_batch() and requests that arrive at random: transformers' own manager against ours, as it is and captured.

    python benchmarks/bench_serving.py [--device cuda] [--workloads batch,arrivals] [--modes stock,plain] [--quick]

Workloads: ``batch``, 32 prompts of 1,024 tokens and 256 new ones each, all at once through generate_batch();
``arrivals``, Poisson arrivals of requests whose lengths are drawn from log-normal distributions with the means that are
told of ShareGPT's (prompts 220 tokens, answers 200). Answers are compared with generate() of each prompt alone: in
float32 they have to be equal. Writes benchmarks/results/serving_<device>_<date>.md, losses included.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from bench_generate import make_model
from memory import give_back, used_bytes
from transformers import ContinuousBatchingConfig, GenerationConfig

import torch_vtensor

GIB = 2**30
MODES = {"stock": "transformers", "plain": "torch_vtensor", "captured": "torch_vtensor, compile=True"}
CHECKED, CHECKED_TOKENS = 4, 32  # requests whose answers are compared, and how many tokens of each
PROMPT_MEAN, ANSWER_MEAN, SIGMA = 220, 200, 0.9


class Asked(NamedTuple):
    """One request: when it comes, its prompt, and how many tokens it gets."""

    at_s: float
    prompt: list[int]
    num_new: int


class Heard(NamedTuple):
    """What one mode made of a workload; ``gaps_s`` are between the tokens of a request."""

    total_s: float
    num_tokens: int
    first_s: list[float]
    gaps_s: list[float]
    peak_bytes: int
    idle_bytes: int
    answers: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default="batch,arrivals")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--batch", default="32x1024x256", help="requests, tokens of prompts, new tokens")
    parser.add_argument("--requests", type=int, default=200, help="how many arrive")
    parser.add_argument("--rate", type=float, default=8.0, help="how many arrive in a second, on average")
    parser.add_argument("--quick", action="store_true", help="a few short requests: whether it runs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model, shape = make_model(device, arguments.quick)
    if arguments.quick:
        arguments.batch, arguments.requests, arguments.rate = "4x40x12", 8, 20.0
    workloads = {
        "batch": batch(*map(int, arguments.batch.split("x")), model.config.vocab_size),
        "arrivals": arrivals(arguments.requests, arguments.rate, model.config.vocab_size, 8 if arguments.quick else 1),
    }
    told = {
        "batch": f"{arguments.batch.replace('x', ' × ', 1).replace('x', ' → ')}, all at once, through generate_batch()",
        "arrivals": f"{arguments.requests} requests, {arguments.rate:g} a second",
    }
    sections = [f"{shape}. Greedy. Memory is above the weights; it is idle when all requests have been answered."]
    for name in arguments.workloads.split(","):
        sections.append(compare(model, told[name], workloads[name], arguments.modes.split(","), name == "batch"))
    print(report.write("serving", device, "\n\n".join(sections), arguments.out))


def batch(num_requests: int, num_prompt: int, num_new: int, vocab: int) -> list[Asked]:
    """Requests of one size that are all there at the beginning."""
    drawn = random.Random(0)
    return [Asked(0.0, drawn.choices(range(vocab), k=num_prompt), num_new) for _ in range(num_requests)]


def arrivals(num_requests: int, rate: float, vocab: int, shorter: int) -> list[Asked]:
    """Requests of many sizes, the times between them drawn from an exponential distribution."""
    drawn, at_s, asked = random.Random(1), 0.0, []

    def length(mean: int) -> int:
        # A log-normal distribution's mean is exp(mu + sigma² / 2).
        return max(2, min(int(drawn.lognormvariate(0.0, SIGMA) * mean * 0.667 / shorter), 2048))

    for _ in range(num_requests):
        at_s += drawn.expovariate(rate)
        asked.append(Asked(at_s, drawn.choices(range(vocab), k=length(PROMPT_MEAN)), length(ANSWER_MEAN)))
    return asked


def compare(model: Any, title: str, asked: list[Asked], modes: list[str], at_once: bool) -> str:
    """One workload by every mode, as a section with a table."""
    expected = [alone(model, one) for one in asked[:CHECKED]]
    rows = []
    for mode in modes:
        with torch_vtensor.enabled(compile=mode == "captured") if mode != "stock" else contextlib.nullcontext():
            began = time.perf_counter()
            serve(model, asked if mode == "captured" else asked[:CHECKED], mode, at_once)
            warm_up_s = time.perf_counter() - began
            give_back(model.device)
            heard = serve(model, asked, mode, at_once)
        same = [same_tokens(answer, other) for answer, other in zip(heard.answers, expected, strict=False)]
        if model.dtype is torch.float32 and mode != "stock" and min(same) < 1:
            raise SystemExit(f"{mode}: answers are not those of generate(): {same}")
        first, gap = report.timing(heard.first_s), report.timing(heard.gaps_s)
        rows.append(
            [
                MODES[mode],
                f"{heard.num_tokens / heard.total_s:,.0f}",
                f"{heard.total_s:.2f}",
                f"{first:ms}",
                f"{gap:ms}",
                f"{heard.peak_bytes / GIB:.2f} / {heard.idle_bytes / GIB:.2f}",
                f"{sum(same) / len(same):.0%}",
                f"{warm_up_s:.0f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
        give_back(model.device)
    header = ["", "tokens/s", "s", "first token, ms", "next token, ms", "GiB at peak / idle", "as alone", "warm-up, s"]
    return f"## {title}\n\n{report.table(header, rows)}"


def alone(model: Any, one: Asked) -> list[int]:
    """What generate() answers, to begin with."""
    ids = torch.tensor([one.prompt], device=model.device)
    config = greedy(min(one.num_new, CHECKED_TOKENS))
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(one.prompt) :].tolist()


def greedy(num_new: int) -> GenerationConfig:
    """Nothing ends an answer but its length."""
    return GenerationConfig(max_new_tokens=num_new, do_sample=False, pad_token_id=0)


def serve(model: Any, asked: list[Asked], mode: str, at_once: bool) -> Heard:
    """Have all requests answered."""
    options: dict[str, Any] = {"generation_config": greedy(asked[0].num_new)}
    if mode == "stock" and model.device.type == "cpu":  # it would fill most of the machine's memory with blocks
        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
    watch = Watch(model.device)
    began = time.perf_counter()
    with watch:
        if at_once:
            outputs = model.generate_batch([one.prompt for one in asked], record_timestamps=True, **options)
        else:
            outputs = answer(model, asked, options)
        total_s = time.perf_counter() - began
    ordered = [outputs[request_id] for request_id in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]
    errors = {output.error for output in ordered} - {None}
    if errors or len(ordered) != len(asked):
        raise SystemExit(f"{mode}: {len(ordered)} of {len(asked)} requests were answered; {errors}")
    gc.collect()
    return Heard(
        total_s,
        sum(len(output.generated_tokens) for output in ordered),
        [output.timestamps[0] - output.created_time for output in ordered],
        [
            (output.timestamps[-1] - output.timestamps[0]) / (len(output.timestamps) - 1)
            for output in ordered
            if len(output.timestamps) > 1
        ],
        watch.peak_bytes,
        used_bytes(model.device) - watch.before_bytes,
        [output.generated_tokens for output in ordered],
    )


def answer(model: Any, asked: list[Asked], options: dict[str, Any]) -> dict[str, Any]:
    """The outputs of requests that come at their times."""
    outputs: dict[str, Any] = {}
    with model.continuous_batching_context_manager(**options) as manager:

        def ask() -> None:
            began = time.perf_counter()
            for index, one in enumerate(asked):
                time.sleep(max(0.0, began + one.at_s - time.perf_counter()))
                manager.add_request(
                    one.prompt, request_id=f"req_{index}", max_new_tokens=one.num_new, record_timestamps=True
                )

        asking = threading.Thread(target=ask)
        asking.start()
        while len(outputs) < len(asked):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                outputs[output.request_id] = output
            elif output is None and not manager.is_running():
                break
        asking.join()
    return outputs


class Watch:
    """Notes the most memory in use at any time of a block, above what was in use before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before_bytes = used_bytes(device)
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, used_bytes(self.device) - self.before_bytes)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def same_tokens(answer: list[int], other: list[int]) -> float:
    """The part of the beginning of an answer that is the same before it first differs."""
    same = next((index for index, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), len(other))
    return same / max(len(other), 1)


if __name__ == "__main__":
    main()
