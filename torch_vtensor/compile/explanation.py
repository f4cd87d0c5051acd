"""What a plan would do, on any number of ranks, without running it: no other process, no GPU, no memory for weights."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.backend import Compilation, compile_plan, fit, no_garbage
from torch_vtensor.compile.budget import Choice
from torch_vtensor.compile.capture import Captured, capture
from torch_vtensor.compile.footprint import Tracer
from torch_vtensor.compile.mesh import name_ranks
from torch_vtensor.compile.names import name_inputs
from torch_vtensor.compile.options import read_memory_budget
from torch_vtensor.compile.plans import cuts_classes
from torch_vtensor.compile.plans.layerwise import by_layers
from torch_vtensor.compile.plans.resolve import resolve
from torch_vtensor.compile.primitives import PlanFunction
from torch_vtensor.compile.schedules import Timeline, draw, grid, simulate, write_trace
from torch_vtensor.compile.schedules.job import readable_bytes


@dataclass(frozen=True, eq=False)
class Explanation:
    """A plan on a mesh: what runs when, what moves, what it takes. Prints as a page.

    Times and memory are estimated from shapes, for an H200; use them to compare plans.
    """

    compilation: Compilation

    @cached_property
    def timelines(self) -> tuple[Timeline, ...]:
        """The simulated step, or the forward and the backward pass."""
        passes = self.compilation.passes
        return tuple(simulate(schedule) for schedule in (passes.forward, passes.backward) if schedule is not None)

    @property
    def seconds(self) -> float:
        """Predicted time of a step."""
        return sum(timeline.makespan for timeline in self.timelines)

    @property
    def peak_bytes(self) -> dict[int, int]:
        """Predicted most bytes of each rank."""
        reports = self.compilation.passes.reports
        return {rank: max(report.peak_bytes[rank] for report in reports) for rank in reports[0].peak_bytes}

    @property
    def sent_bytes(self) -> Mapping[str, Counter[int]]:
        """Bytes that each rank sends in a step, by the kind of communication."""
        return self.compilation.program.sent_bytes

    def draw(self, path: str | Path, title: str = "") -> None:
        """Draw the timeline of a step, as a picture (needs matplotlib)."""
        draw(self.timelines[0], Path(path), title)

    def write_trace(self, path: str | Path) -> None:
        """Write the timeline as a Chrome trace, for Perfetto or chrome://tracing."""
        write_trace(self.timelines[0], Path(path))

    def __str__(self) -> str:
        """The plan, the grid of each pass, communication, memory and time."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.compilation.choice is not None:
            yield f"{self.compilation.choice}\n"
        yield str(self.compilation.plan)
        names = ("step",) if len(self.timelines) == 1 else ("forward", "backward")
        for name, timeline in zip(names, self.timelines, strict=True):
            yield f"\n{name}, forward and backward passes of stages and microbatches by time:"
            yield grid(timeline.schedule, timeline.spans)
        yield "\nbytes sent in a step, by the rank that sends most:"
        for kind, by_rank in self.sent_bytes.items():
            rank, most = by_rank.most_common(1)[0]
            yield f"  {kind:14} {readable_bytes(most):>12} by rank {rank}, {readable_bytes(by_rank.total())} by all"
        if not self.sent_bytes:
            yield "  none"
        if buckets := self.compilation.program.buckets:
            count = sum(len(bucket.moves) for bucket in buckets)
            yield f"  {count} collectives of parameters and gradients, with all ranks, move in {len(buckets)} buckets"
        yield "\nmemory at its peak, predicted:"
        yield from self._memory_lines()
        bubble = self.timelines[0].bubble_fraction
        yield f"\ntime of a step, predicted: {self.seconds * 1e3:.3g} ms; {bubble:.0%} of the ranks' time is idle"

    def _memory_lines(self) -> Iterator[str]:
        peaks = self.peak_bytes
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for rank in peaks:
            at_peak = max((r.memory[rank] for r in self.compilation.passes.reports), key=lambda m: m.peak_bytes)
            parts = ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in at_peak.bytes_by_kind().items())
            groups[f"{readable_bytes(peaks[rank])}: {parts}"].append(rank)
        yield from (f"  {name_ranks(ranks)}: {text}" for text, ranks in groups.items())


def explain(
    function: Callable[..., Any],
    *arguments: Any,
    plan: PlanFunction | str | None = None,
    mesh: Mapping[str, int] | int = 1,
    memory_budget: float | str | None = None,
    **keywords: Any,
) -> Explanation:
    """Plan a call of a function for a mesh, and check it, without compiling or running anything.

    `plan` is a function, a name such as ``"dp2+tp2+1f1b/8"``, or ``"file.py:function"``. `mesh` names the axes and
    their sizes, as ``{"pp": 2, "tp": 4}``, or is the number of ranks. A `memory_budget`, with a plan or without, is
    that of torch.compile's options; memory is then predicted from traced passes instead of shapes, which takes as long
    as torch takes to trace each different segment once: for a pipeline its stages. The model and the arguments may be
    on the device "meta": nothing is computed. `function` may also be what torch.compile returned.

    Raises:  ValueError for a plan that cannot run there; RuntimeError if the function is not one graph.
    """
    if plan is None and memory_budget is None:
        raise ValueError("explain got neither a plan nor a memory_budget; give one, plan='single' for no cuts.")
    num_ranks = mesh if isinstance(mesh, int) else math.prod(mesh.values())
    budget = read_memory_budget(memory_budget)
    function_of_plan, on = resolve(plan or "single", None if isinstance(mesh, int) else mesh, num_ranks)
    call = capture_call(function, arguments, keywords, cuts_classes=cuts_classes(function_of_plan))
    captured = call.captured
    if budget is None:
        return Explanation(compile_plan(captured, function_of_plan, on, trains=True))
    tracer = Tracer(_torch_compat.device_of(_torch_compat.leaves([*arguments, keywords])), {})
    fitted = fit(captured, None if plan is None else function_of_plan, on, budget, tracer, trains=True)
    if isinstance(fitted, Choice):
        whole = compile_plan(captured, by_layers(function_of_plan), on, trains=True, measure=tracer)
        fitted = replace(whole, choice=fitted)
    return Explanation(fitted)


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """A call as the backend sees it: the program, and its arguments, parameters among them."""

    captured: Captured
    arguments: Sequence[Any]


def capture_call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any] = MappingProxyType({}),
    *,
    cuts_classes: bool = False,
) -> CapturedCall:
    """Capture a function at a call, with a loss whose classes can be cut if that is asked for.

    Raises:  RuntimeError if the call is not one graph, with the number of graphs.
    """
    found: list[CapturedCall] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names = name_inputs(gm, example_inputs)
        captured = capture(gm, example_inputs, names, cuts_classes=cuts_classes)
        found.append(CapturedCall(captured, list(example_inputs)))
        return gm.forward

    function = _torch_compat.original_of(function)
    torch.compiler.reset()
    try:
        with no_garbage():
            torch.compile(function, backend=backend, dynamic=False)(*arguments, **keywords)
    finally:
        torch.compiler.reset()
    if len(found) != 1:
        raise RuntimeError(
            f"the call is {len(found)} graphs, and a plan is for one. See where it breaks with "
            f"torch._dynamo.explain(function)(...)."
        )
    return found[0]
