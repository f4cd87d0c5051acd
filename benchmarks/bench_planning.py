"""What planning costs on the host: capture, plan, check and explain a Llama-3-8B of some layers on some ranks.

    python benchmarks/bench_planning.py [--sizes 4x64 32x64 …] [--repeats N] [--quick] [--out FOLDER]

A size is LAYERSxRANKS. Work is shared between what is alike: layers, microbatches, stages, and ranks, of which one of
each kind is planned. First it is shown that a program captured and planned with sharing is the one without, action by
action, and that what is said of all ranks is the same. Then each size is measured in processes of its own, which have
found out nothing yet. Writes benchmarks/results/planning_cpu_<date>.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import report
import torch
from plan_models import LLAMA_3_8B, Shape, decoder_config

from torch_vtensor.compile import backend, capture
from torch_vtensor.compile.backend import Compilation
from torch_vtensor.compile.capture import Captured
from torch_vtensor.compile.dataflow import find_dataflow
from torch_vtensor.compile.explanation import CapturedCall, Explanation, capture_call
from torch_vtensor.compile.passes import order_passes
from torch_vtensor.compile.plan import record
from torch_vtensor.compile.plans import cuts_classes
from torch_vtensor.compile.plans.resolve import resolve
from torch_vtensor.compile.program import build_program
from torch_vtensor.compile.segment import find_segments
from torch_vtensor.compile.task_graph import Operator
from torch_vtensor.compile.topology import Topology

Made = TypeVar("Made")

_SMALL = Shape(40, 32, 48, 4, 4)
_AXES: Mapping[int, tuple[int, int, int]] = {  # pp, dp, tp, by the number of ranks
    8: (2, 2, 2),
    16: (4, 2, 2),
    32: (4, 2, 4),
    64: (4, 4, 4),
    128: (4, 8, 4),
    256: (8, 8, 4),
}
_SIZES = ("4x64", "8x64", "16x64", "32x64", "32x8", "32x16", "32x32", "32x128", "32x256")
_NUM_MICROBATCHES = 8
_PARTS = ("capture", "record", "dataflow", "segments", "program", "order and check", "explain")


def main() -> None:
    """Check, measure all sizes and write the result file; or measure one size, for the process that does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=_SIZES, metavar="LAYERSxRANKS", help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="the best of how many runs counts (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*map(int, arguments.one.split("x")))))
        return
    check_sharing()
    load = os.getloadavg()[0]
    sizes = ["2x8"] if arguments.quick else arguments.sizes
    rows = [row(size, 1 if arguments.quick else arguments.repeats) for size in sizes]
    header = ["layers", "ranks", "of which planned", "tasks", "jobs", "actions", *_PARTS, "all", "all, by the clock"]
    body = (
        f"Llama-3-8B's shape of so many layers, 4096 tokens, {_NUM_MICROBATCHES} microbatches, pp, dp and tp as in "
        f"`_AXES`; nothing but shapes, no weights. Jobs and actions are of planned ranks. CPU seconds of one process, "
        f"the best of {1 if arguments.quick else arguments.repeats} runs, each in a new process; capture includes what "
        f"torch imports for it. The machine had {os.cpu_count()} CPUs and a load of {load:.1f} when this began: at a "
        f"load above 1 CPU seconds are longer, too, and the clock tells little.\n\n"
        "Checked before: captured and planned with and without sharing, a small model's actions are the same, and what "
        "is explained.\n\n"
    )
    path = report.write("planning", torch.device("cpu"), body + report.table(header, rows), arguments.out)
    print(path.read_text())


def check_sharing() -> None:
    """Raise if sharing work between what is alike changes the program, the plan or any action.

    Without sharing, every operator is like no other, and a graph is traced at once. That numbers names otherwise, where
    something is left out that nothing depends on; the calls are the same.
    """
    plan, mesh = resolve("pp2+dp2+tp2+1f1b/2", None, 8)

    def small() -> Captured:
        return capture_model(3, _SMALL, batch=8, sequence=16, cuts=cuts_classes(plan)).captured

    shared = backend.compile_plan(small(), plan, mesh, trains=True)
    with patch.object(Operator, "likeness", None):
        alone = backend.compile_plan(small(), plan, mesh, trains=True)
    assert shared.schedule.actions == alone.schedule.actions
    assert shared.program.jobs == alone.program.jobs
    assert str(Explanation(shared)) == str(Explanation(alone))
    with patch.object(capture, "find_stretches", lambda gm: None):
        at_once = small()
    assert list(calls(shared.captured)) == list(calls(at_once))
    one_of_each = backend.compile_plan(shared.captured, plan, mesh, trains=True, one_of_each=True)
    assert len(one_of_each.program.flow.plan.mesh) < len(mesh)
    assert str(Explanation(one_of_each)) == str(Explanation(shared))


def calls(captured: Captured) -> Iterator[tuple[object, ...]]:
    """What each operator does, with numbers for tensors."""
    number = {tensor: index for index, tensor in enumerate(captured.graph.inputs)}
    for operator in captured.graph.operators:
        reads = tuple(number[tensor] for tensor in operator.inputs)
        for made in operator.outputs:
            if made is not None:
                number[made] = len(number)
        kinds = tuple(made and (made.shape, made.dtype, made.differentiable) for made in operator.outputs)
        yield operator.target, operator.args, operator.kwargs, operator.module, reads, kinds


def capture_model(num_layers: int, shape: Shape, *, batch: int, sequence: int, cuts: bool) -> CapturedCall:
    """A Llama with its loss, captured on the device meta."""
    from transformers import AutoModelForCausalLM

    config = decoder_config("llama", num_layers, shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    tokens = torch.zeros(batch, sequence, dtype=torch.long, device="meta")

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return capture_call(loss_of, [tokens], cuts_classes=cuts)


def measure(num_layers: int, num_ranks: int) -> dict[str, Any]:
    """CPU seconds of each phase, and how large its result is; the phases are those of `compile_plan`, one by one."""
    pp, dp, tp = _AXES[num_ranks]
    function, mesh = resolve(f"pp{pp}+dp{dp}+tp{tp}+1f1b/{_NUM_MICROBATCHES}", None, num_ranks)
    seconds: dict[str, float] = {}

    def timed(part: str, action: Callable[[], Made]) -> Made:
        start = time.process_time()
        made = action()
        seconds[part] = time.process_time() - start
        return made

    began = time.perf_counter()
    batch, topology = dp * _NUM_MICROBATCHES, Topology()
    call = timed("capture", lambda: capture_model(num_layers, LLAMA_3_8B, batch=batch, sequence=4096, cuts=True))
    with backend.no_garbage():
        plan = timed("record", lambda: record(function, call.captured.graph, mesh))
        flow = timed("dataflow", lambda: find_dataflow(plan, topology, trains=True, one_of_each=True))
        segments = timed("segments", lambda: find_segments(flow))
        program = timed("program", lambda: build_program(flow, segments, topology))
        passes = timed("order and check", lambda: order_passes(program))
        timed("explain", lambda: str(Explanation(Compilation(call.captured, plan, program, passes))))
    counts = {
        "planned": len(flow.plan.mesh),
        "tasks": len(plan.tasks),
        "jobs": len(program.jobs),
        "actions": passes.forward.num_actions,
    }
    return {**counts, "seconds": seconds, "clock": time.perf_counter() - began}


def row(size: str, repeats: int) -> list[object]:
    """A size: what it is made of, and the seconds of the run that took least."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--one", size]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    best = min(runs, key=lambda run: sum(run["seconds"].values()))
    seconds = [best["seconds"][part] for part in _PARTS]
    counts = [f"{best[count]:,}" for count in ("planned", "tasks", "jobs", "actions")]
    times = [f"{part:.2f}" for part in (*seconds, sum(seconds), best["clock"])]
    return [*size.split("x"), *counts, *times]


if __name__ == "__main__":
    main()
