"""What scheduling costs on the host: ordering, checking, simulating and printing pipelines of up to 100,000 jobs.

    python benchmarks/bench_schedules.py [--quick] [--out FOLDER]

Every schedule is checked before its times count. Writes benchmarks/results/schedules_cpu_<date>.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import report
import torch

from torch_vtensor.compile.schedules import (
    Job,
    Result,
    Schedule,
    Value,
    check,
    dumps,
    grid,
    order_jobs,
    parse,
    simulate,
)

Made = TypeVar("Made")


def main() -> None:
    """Measure all sizes and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    sizes = [(4, 4, 8)] if arguments.quick else [(8, 8, 16), (64, 1, 128), (8, 24, 64), (8, 24, 260)]
    header = ["ranks", "layers a rank", "microbatches", "jobs", "actions", *_PARTS]
    body = "Seconds on one core, best of three; pipelines without an explicit order, one job a layer and pass.\n\n"
    path = report.write(
        "schedules", torch.device("cpu"), body + report.table(header, [row(*size) for size in sizes]), arguments.out
    )
    print(path.read_text())


_PARTS = ("order", "check", "simulate", "grid", "dumps", "parse")


def row(num_ranks: int, num_layers: int, num_microbatches: int) -> list[object]:
    """One size: its counts, and the seconds of each part."""
    jobs, values, results = pipeline(num_ranks, num_layers, num_microbatches)
    schedule, order = best(lambda: order_jobs(jobs, values, results=results))
    _, checked = best(lambda: check(schedule))
    _, simulated = best(lambda: simulate(schedule))
    _, printed = best(lambda: grid(schedule))
    text, dumped = best(lambda: dumps(schedule))
    again, parsed = best(lambda: parse(text, jobs, values, results))
    assert isinstance(schedule, Schedule)
    assert again.actions == schedule.actions
    seconds = (order, checked, simulated, printed, dumped, parsed)
    counts = (num_ranks, num_layers, num_microbatches, len(jobs), schedule.num_actions)
    return [*counts, *(f"{part:.3f}" for part in seconds)]


def best(action: Callable[[], Made], repeats: int = 3) -> tuple[Made, float]:
    """What the action makes, and the least seconds it took."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = action()
        times.append(time.perf_counter() - start)
    return made, min(times)


def pipeline(num_ranks: int, num_layers: int, num_microbatches: int) -> tuple[list[Job], list[Value], list[Result]]:
    """Training of consecutive layers on consecutive ranks, gradients added up microbatch by microbatch."""
    jobs, values, results = [], [], []
    last = num_ranks * num_layers - 1

    def new(key: str, rank: int, kind: str = "activation", pinned: bool = False) -> str:
        values.append(Value(key, rank, 2**20, kind, pinned))
        return key

    def send(key: str, source: int, destination: int) -> None:
        new(key, destination)
        where = ({source: (key,)}, {destination: (key,)})
        jobs.append(Job(f"send {key}", "transfer", (source, destination), *where, seconds=0.1, wire_bytes=2**20))

    for layer in range(last + 1):
        new(f"w{layer}", layer // num_layers, "parameter", pinned=True)
        final = f"G{layer}.{num_microbatches - 1}"
        results.append(Result(f"G{layer}", layer // num_layers, final, num_microbatches))
    for k in range(num_microbatches):
        new(f"h-1.{k}", 0, "input")
        for layer in range(last + 1):
            rank = layer // num_layers
            writes = {rank: (new(f"h{layer}.{k}", rank), new(f"s{layer}.{k}", rank, "saved"))}
            reads = {rank: (f"h{layer - 1}.{k}", f"w{layer}")}
            jobs.append(Job(f"F{layer}.{k}", "F", (rank,), reads, writes, str(layer), k, 1.0))
            if layer < last and (layer + 1) // num_layers != rank:
                send(f"h{layer}.{k}", rank, rank + 1)
        for layer in range(last, -1, -1):
            rank = layer // num_layers
            gradient = (f"g{layer + 1}.{k}",) if layer < last else ()
            summed = (f"G{layer}.{k - 1}",) if k else ()
            reads = {rank: (f"s{layer}.{k}", f"w{layer}", *gradient, *summed)}
            total = new(f"G{layer}.{k}", rank, "gradient", pinned=k == num_microbatches - 1)
            writes = {rank: (new(f"g{layer}.{k}", rank), total)}
            contributes = (f"G{layer}",)
            jobs.append(Job(f"B{layer}.{k}", "B", (rank,), reads, writes, str(layer), k, 2.0, contributes=contributes))
            if layer and (layer - 1) // num_layers != rank:
                send(f"g{layer}.{k}", rank, rank - 1)
    return jobs, values, results


if __name__ == "__main__":
    main()
