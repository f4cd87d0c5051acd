"""Continuous batching: transformers' own manager against ours, as it is, captured, and with prefixes reused.

    python benchmarks/bench_serving.py [--device cuda] [--workloads batch,forks] [--modes stock,captured] [--quick]

Workloads: ``batch``, 32 prompts of 1,024 tokens and 256 new ones each, all at once; the vTensor paper's three:
``single`` (one long prompt), ``chat`` and ``chats`` (one user, and several, who go on turn by turn), ``forks``
(branches of one beginning); ``arrivals``, requests at random with lengths as are told of ShareGPT's; ``nosharing``,
prompts of which nobody shares anything, with prefixes reused and not, in turns. Some answers are compared with
generate() of each prompt alone: in float32 they have to be equal. Writes benchmarks/results/serving_<device>_<date>.md
after every measurement, also when one fails or runs out of its time, losses included.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from bench_generate import make_model
from memory import give_back, used_bytes
from serving_loads import LOADS, Load, Told, greedy
from transformers import ContinuousBatchingConfig

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler

GIB = 2**30
MODES = {
    "stock": "transformers",
    "plain": "torch_vtensor",
    "captured": "torch_vtensor, compile=True",
    "prefixes": "torch_vtensor, compile=True, prefix_cache=True",
}
OF_WORKLOAD = {
    "batch": ("captured", "plain", "stock"),
    "single": ("captured", "stock"),
    "chat": ("prefixes", "captured", "stock"),
    "chats": ("prefixes", "captured", "stock"),
    "forks": ("prefixes", "captured", "stock"),
    "arrivals": ("captured", "stock"),
    "nosharing": ("captured", "prefixes"),
}
NO_CUT = 10**6
REHEARSED = 4  # new tokens of a rehearsal
CHECKED, CHECKED_TOKENS = 2, 16  # answers that are compared, and how many tokens of each
NOTABLE = ("uncompiled", "failed", "gave way", "held back", "limited", "not honoured", "out of memory", "stock")
LEGEND = (
    "Greedy. Tokens/s are all new ones over the time of the whole load; the time to the first token is from a "
    "request's arrival, that to the next the mean of each request (of chats, of the last turn): medians with the 10th "
    "and 90th percentile of requests. GiB in use are above the weights, at most and when all have been answered; KV "
    "is what torch_vtensor has committed at most, over what the tokens at the end take if none is there twice. As "
    "alone: how far answers are those of generate(). The rehearsal, which compiles and captures, is not measured. ≈: "
    "answers were cut at the length told, and the rest counts as if it went on at the same pace."
)
HEADER = (
    "", "tokens/s", "s", "first token, ms", "next token, ms", "GiB at peak / idle", "KV GiB / of tokens", "as alone",
    "rehearsal, s",
)  # fmt: skip


class OutOfTime(BaseException):
    """Raised wherever the main thread is; no Exception, as transformers goes on after those."""


class Heard(NamedTuple):
    """One run of a load."""

    total_s: float
    told: list[Told]
    peak_bytes: int
    idle_bytes: int
    kv_bytes: int


class Book:
    """What was measured so far, written to the result file with every row."""

    def __init__(self, arguments: argparse.Namespace, shape: str) -> None:
        self.device, self.out, self.shape = torch.device(arguments.device), arguments.out, shape
        self.rows: dict[str, list[Sequence[str]]] = {}
        self.notes: list[str] = []
        self.has_failed = False

    def add(self, title: str, row: Sequence[str]) -> None:
        self.rows.setdefault(title, []).append(row)
        print(*row, sep=" | ", flush=True)
        self.write()

    def fail(self, what: str, error: object) -> None:
        self.has_failed = True
        self.note(f"{what}: {error}")

    def note(self, text: str) -> None:
        self.notes.append(f"- {text}")
        print(text, flush=True)
        self.write()

    def write(self) -> Path:
        sections = [f"{self.shape}. {LEGEND}"]
        sections += [f"## {title}\n\n{report.table(HEADER, rows)}" for title, rows in self.rows.items()]
        if self.notes:
            sections.append("## Notes\n\n" + "\n".join(self.notes))
        return report.write("serving", self.device, "\n\n".join(sections), self.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default=",".join(OF_WORKLOAD))
    parser.add_argument("--modes", default=",".join(MODES), help="of those that a workload has; stock comes last")
    parser.add_argument("--batch", default="32x1024x256", help="prompts x tokens x new tokens")
    parser.add_argument("--single", default="16384x128", help="tokens x new tokens")
    parser.add_argument("--chat", default="1x5x256x128", help="users x turns x tokens x new tokens")
    parser.add_argument("--chats", default="8x5x256x128", help="users x turns x tokens x new tokens")
    parser.add_argument("--forks", default="64x4096x16x64", help="branches x shared x own x new tokens")
    parser.add_argument("--nosharing", default="32x256x64", help="prompts x tokens x new tokens")
    parser.add_argument("--requests", type=int, default=160, help="how many arrive")
    parser.add_argument("--rate", type=float, default=8.0, help="how many arrive in a second, on average")
    parser.add_argument("--repeats", type=int, default=5, help="of nosharing; of others there is one run")
    parser.add_argument("--stock-new", type=int, default=None, help="cut stock answers at; default on a GPU: 24")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one run of a workload")
    parser.add_argument("--rehearsal-limit", type=float, default=200.0, help="seconds of one rehearsal")
    parser.add_argument("--total", type=float, default=1500.0, help="seconds of everything; then what is there counts")
    parser.add_argument("--quick", action="store_true", help="a few short requests: whether it runs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    arguments = parser.parse_args()
    began, device = time.perf_counter(), torch.device(arguments.device)
    if arguments.quick:
        arguments.batch, arguments.single, arguments.chat, arguments.chats = "4x40x12", "300x8", "1x3x20x6", "3x3x20x6"
        arguments.forks, arguments.nosharing, arguments.requests, arguments.rate = "6x130x5x6", "4x40x8", 8, 20.0
    model, shape = make_model(device, arguments.quick)
    book = Book(arguments, shape)
    give_up_after(arguments.total - (time.perf_counter() - began), book)
    jobs = [
        (name, mode)
        for name in arguments.workloads.split(",")
        for mode in OF_WORKLOAD[name]
        if mode in arguments.modes.split(",")
    ]
    jobs = [job for job in jobs if job[1] != "stock"] + [job for job in jobs if job[1] == "stock"]
    loads = {name: LOADS[name](arguments, model.config.vocab_size) for name, _ in jobs}
    for name in dict.fromkeys(name for name, _ in jobs):
        several = [mode for other, mode in jobs if other == name]
        if name == "nosharing":
            take_turns(model, loads[name], several, arguments, book)
        else:
            for mode in [mode for mode in several if mode != "stock"]:
                measure(model, loads[name], mode, arguments, book)
    for name, mode in jobs:
        if mode == "stock":
            measure(model, loads[name], mode, arguments, book)
    print(book.write())
    # Threads of a manager that hangs would have the process wait for them.
    sys.stdout.flush()
    os._exit(int(book.has_failed))


def measure(model: Any, load: Load, mode: str, arguments: argparse.Namespace, book: Book) -> None:
    """One row of a workload's table, or a note why there is none."""
    cut = NO_CUT
    if mode == "stock" and load.cuts:
        cut = arguments.stock_new or (24 if model.device.type == "cuda" else NO_CUT)
    what = f"{load.title}, {mode}"
    try:
        with torch_vtensor.enabled(**enabling(mode)) if mode != "stock" else contextlib.nullcontext():
            rehearsal_s = rehearse(model, load, mode, arguments)
            heard = run(model, load, mode, 1, cut, arguments.limit)
            note_counts(book, what)
        if len(heard.told) < load.num_asked:
            book.note(
                f"{what}: stopped after {arguments.limit:g} s, with {len(heard.told)} of {load.num_asked} heard of"
            )
        book.add(load.title, row_of(model, load, mode, heard, cut, f"{rehearsal_s:.0f}"))
    except (Exception, OutOfTime) as error:
        book.fail(what, f"{type(error).__name__}: {str(error)[:300]}")
    with contextlib.suppress(Exception):
        give_back(model.device)


def take_turns(model: Any, load: Load, modes: list[str], arguments: argparse.Namespace, book: Book) -> None:
    """A load by several modes in turns, each turn with prompts of its own; how much longer they take than the first."""
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    rehearsals, heard = {}, {}
    try:
        for turn in range(arguments.repeats):
            for mode in modes if turn % 2 == 0 else modes[::-1]:
                with torch_vtensor.enabled(**enabling(mode)):
                    if turn == 0:
                        rehearsals[mode] = rehearse(model, load, mode, arguments)
                    heard[mode] = run(model, load, mode, 1 + turn, NO_CUT, arguments.limit)
                seconds[mode].append(heard[mode].total_s)
    except (Exception, OutOfTime) as error:
        book.fail(load.title, f"{type(error).__name__}: {str(error)[:300]}")
    for mode in modes:
        if mode in heard:
            book.add(load.title, row_of(model, load, mode, heard[mode], NO_CUT, f"{rehearsals[mode]:.0f}"))
    for mode in modes[1:]:
        ratios = [own / first for own, first in zip(seconds[mode], seconds[modes[0]], strict=False)]
        if ratios:
            told = f"{statistics.median(ratios):.3f} of the time of {modes[0]} ({min(ratios):.3f}-{max(ratios):.3f})"
            book.note(f"{load.title}: {mode} takes {told}, median and range of {len(ratios)} turns")


def enabling(mode: str) -> dict[str, Any]:
    return {"compile": mode in ("captured", "prefixes"), "prefix_cache": mode == "prefixes"}


def rehearse(model: Any, load: Load, mode: str, arguments: argparse.Namespace) -> float:
    """Have everything compiled, captured and loaded that the load needs; how long it took."""
    began = time.perf_counter()
    run(model, load, mode, 0, REHEARSED, arguments.rehearsal_limit)
    give_back(model.device)
    return time.perf_counter() - began


def run(model: Any, load: Load, mode: str, seed: int, cut: int, limit_s: float) -> Heard:
    """The load once.

    Raises: OutOfTime after a little more than ``limit_s``.
    """
    options: dict[str, Any] = {}
    if mode == "stock" and model.device.type == "cpu":  # it would fill most of the machine's memory with blocks
        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
    watch = Watch(model.device)
    began = time.perf_counter()
    with limited(limit_s + 10), watch:
        told = load.run(model, options, seed, cut, began + limit_s)
        total_s = time.perf_counter() - began
    gc.collect()
    idle_bytes = used_bytes(model.device) - watch.before_bytes
    return Heard(total_s, told, watch.peak_bytes, idle_bytes, watch.kv_bytes)


def row_of(model: Any, load: Load, mode: str, heard: Heard, cut: int, rehearsal_s: str) -> Sequence[str]:
    """A row of the table.

    Raises: RuntimeError if answers in float32 are not those of ``generate()``.
    """
    measured = [one for one in heard.told if one.is_measured]
    if not measured:
        raise RuntimeError(f"out of time: {len(heard.told)} of {load.num_asked} were answered")
    checked = measured[:CHECKED]
    same = [same_tokens(one.tokens, alone(model, one)) for one in checked]
    if model.dtype is torch.float32 and mode != "stock" and min(same) < 1:
        raise RuntimeError(f"answers are not those of generate(): {same}")
    num_tokens, rest_s = sum(len(one.tokens) for one in heard.told), load.rest_s(heard.told, cut)
    if rest_s > 0:
        num_tokens = load.num_asked * num_new(load)
    speed = f"{'≈ ' if rest_s > 0 else ''}{num_tokens / (heard.total_s + rest_s):,.0f}"
    nexts = [one.next_s for one in measured if one.next_s is not None]
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    kv = f"{heard.kv_bytes / GIB:.2f} / {load.num_live * token_bytes / GIB:.2f}" if mode != "stock" else ""
    return (
        MODES[mode] + (f", {cut} new tokens" if cut < NO_CUT else ""),
        speed,
        f"{heard.total_s:.2f}",
        f"{report.timing([one.first_s for one in measured]):ms}",
        f"{report.timing(nexts):ms}" if nexts else "",
        f"{heard.peak_bytes / GIB:.2f} / {heard.idle_bytes / GIB:.2f}",
        kv,
        f"{sum(same) / len(same):.0%}",
        rehearsal_s,
    )


def num_new(load: Any) -> int:
    return int(load.sizes[-1])


def alone(model: Any, one: Told) -> list[int]:
    """What generate() answers, to begin with."""
    ids = torch.tensor([one.prompt], device=model.device)
    config = greedy(min(len(one.tokens), CHECKED_TOKENS))
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens: list[int] = output[0, len(one.prompt) :].tolist()
    return tokens


def same_tokens(answer: list[int], other: list[int]) -> float:
    """The part of the beginning of an answer that is the same before it first differs."""
    same = next((index for index, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), len(other))
    return same / max(len(other), 1)


def note_counts(book: Book, what: str) -> None:
    """What went another way than it should."""
    counts = {name: count for name, count in torch_vtensor.stats().serving.items() if name.startswith(NOTABLE)}
    if counts:
        book.note(f"{what}, counted since the process began: {counts}")


class Watch:
    """Notes the most memory in use at any time of a block, above what was in use before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before_bytes = used_bytes(device)
        self.peak_bytes = self.kv_bytes = 0
        self._ledger = default_scheduler(device).pool.ledger
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, used_bytes(self.device) - self.before_bytes)
            counts = self._ledger.counts()
            self.kv_bytes = max(self.kv_bytes, counts.committed_bytes - counts.free_bytes)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread if a block takes longer."""

    def ring(*args: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def give_up_after(seconds: float, book: Book) -> None:
    """End the process then, wherever it is, with what was written and where all threads were."""

    def give_up() -> None:
        faulthandler.dump_traceback(all_threads=True)
        book.fail("everything", "out of time; what is not in the tables was not run")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
