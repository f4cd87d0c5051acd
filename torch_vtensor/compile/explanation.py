"""What a plan would do, on any number of ranks, without running it: no other process, no GPU, no memory for weights."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
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
from torch_vtensor.compile.mesh import Mesh, name_ranks
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

    planned: Compilation
    plan_all: Callable[[], Compilation] | None = None

    @cached_property
    def compilation(self) -> Compilation:
        """Every phase's value, for all ranks; ``planned`` may be for one of those that do the same."""
        return self.planned if self.plan_all is None else self.plan_all()

    @cached_property
    def timelines(self) -> tuple[Timeline, ...]:
        """The simulated step, or the forward and the backward pass, of all ranks."""
        if self.planned is self.compilation:
            return self._timelines
        return tuple(simulate(schedule) for schedule in self.compilation.passes.schedules)

    @cached_property
    def _timelines(self) -> tuple[Timeline, ...]:
        return tuple(simulate(schedule) for schedule in self.planned.passes.schedules)

    @property
    def _like(self) -> Mapping[int, int]:
        """The rank that is planned in the place of each."""
        return self.planned.program.flow.like

    @property
    def seconds(self) -> float:
        """Predicted time of a step."""
        return sum(timeline.makespan for timeline in self._timelines)

    @property
    def peak_bytes(self) -> dict[int, int]:
        """Predicted most bytes of each rank."""
        reports = self.planned.passes.reports
        return {rank: max(report.peak_bytes[like] for report in reports) for rank, like in self._like.items()}

    @property
    def sent_bytes(self) -> Mapping[str, Counter[int]]:
        """Bytes that each rank sends in a step, by the kind of communication."""
        return self.planned.program.sent_bytes

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
        if self.planned.choice is not None:
            yield f"{self.planned.choice}\n"
        yield str(self.planned.plan)
        names = ("step",) if len(self._timelines) == 1 else ("forward", "backward")
        for name, timeline in zip(names, self._timelines, strict=True):
            yield f"\n{name}, forward and backward passes of stages and microbatches by time:"
            yield grid(timeline.schedule, timeline.spans, self._like)
        yield "\nbytes sent in a step, by the rank that sends most:"
        for kind, by_rank in self.sent_bytes.items():
            rank = max(by_rank, key=by_rank.__getitem__)
            most, all_ = readable_bytes(by_rank[rank]), readable_bytes(by_rank.total())
            yield f"  {kind:14} {most:>12} by rank {rank}, {all_} by all"
        if not self.sent_bytes:
            yield "  none"
        if self.planned.program.buckets:
            count, num_buckets = self._count_buckets()
            yield f"  {count} collectives of parameters and gradients, with all ranks, move in {num_buckets} buckets"
        yield "\nmemory at its peak, predicted:"
        yield from self._memory_lines()
        yield f"\ntime of a step, predicted: {self.seconds * 1e3:.3g} ms; {self._bubble:.0%} of the ranks' time is idle"

    @property
    def _bubble(self) -> float:
        """The part of all ranks' time in the first pass in which they do not compute."""
        timeline, like = self._timelines[0], self._like
        available = timeline.makespan * len(like)
        return 1 - sum([timeline.busy_seconds[one] for one in like.values()]) / available if available else 0.0

    def _count_buckets(self) -> tuple[int, int]:
        """How many collectives move in how many buckets, on all ranks."""
        num_like, num_moves, num_buckets = Counter(self._like.values()), Fraction(0), Fraction(0)
        for bucket in self.planned.program.buckets:
            # Each rank that is like a member has such a bucket, those that are members of one have one.
            members = Counter(self._like[rank] for rank in bucket.steps[0].ranks)
            one = next(iter(members))
            num_alike = Fraction(num_like[one], members[one])
            num_moves += num_alike * len(bucket.moves)
            num_buckets += num_alike
        return int(num_moves), int(num_buckets)

    def _memory_lines(self) -> Iterator[str]:
        peaks = self.peak_bytes
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for rank, like in self._like.items():
            at_peak = max((r.memory[like] for r in self.planned.passes.reports), key=lambda m: m.peak_bytes)
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
        return _look_at(captured, function_of_plan, on)
    tracer = Tracer(_torch_compat.device_of(_torch_compat.leaves([*arguments, keywords])), {})
    fitted = fit(captured, None if plan is None else function_of_plan, on, budget, tracer, trains=True)
    if isinstance(fitted, Choice):
        whole = compile_plan(captured, by_layers(function_of_plan), on, trains=True, measure=tracer)
        fitted = replace(whole, choice=fitted)
    return Explanation(fitted)


def _look_at(captured: Captured, function: PlanFunction, mesh: Mesh) -> Explanation:
    """Plan one rank of those that do the same, or all if one cannot be planned: the error is about all of them."""

    def plan_all() -> Compilation:
        return compile_plan(captured, function, mesh, trains=True)

    try:
        planned = compile_plan(captured, function, mesh, trains=True, one_of_each=True)
    except ValueError:
        return Explanation(plan_all())
    return Explanation(planned, None if planned.program.flow.is_of_all else plan_all)


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

    def see(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        names = name_inputs(gm, example_inputs)
        captured = capture(gm, example_inputs, names, cuts_classes=cuts_classes)
        found.append(CapturedCall(captured, list(example_inputs)))

    function = _torch_compat.original_of(function)
    torch.compiler.reset()
    try:
        with no_garbage():
            try:
                _torch_compat.see_one_graph(function, see)(*arguments, **keywords)
            except torch._dynamo.exc.BackendCompilerFailed:
                raise
            except Exception:  # several graphs; what else is wrong shows again
                found.clear()
                torch.compiler.reset()
                _torch_compat.see_graphs(function, see)(*arguments, **keywords)
    finally:
        torch.compiler.reset()
    if len(found) != 1:
        raise RuntimeError(
            f"the call is {len(found)} graphs, and a plan is for one. See where it breaks with "
            f"torch._dynamo.explain(function)(...)."
        )
    return found[0]
