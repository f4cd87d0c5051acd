"""`torch.compile(model, backend="superscaler")`: the phases, in order."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from torch_vtensor.compile import _torch_compat, worlds
from torch_vtensor.compile.budget import Choice, choose
from torch_vtensor.compile.capture import Captured, capture
from torch_vtensor.compile.codegen import CodeGenerator
from torch_vtensor.compile.dataflow import NOTHING_KEPT, find_dataflow
from torch_vtensor.compile.footprint import Measure, Tracer, estimate
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.names import name_inputs
from torch_vtensor.compile.options import Options, parse_options
from torch_vtensor.compile.parameters import Parts, find_kept, shard_parameters
from torch_vtensor.compile.passes import Passes, order_passes
from torch_vtensor.compile.plan import Plan, record
from torch_vtensor.compile.plans import cuts_classes, named
from torch_vtensor.compile.plans.layerwise import by_layers
from torch_vtensor.compile.plans.resolve import resolve
from torch_vtensor.compile.primitives import Graph, PlanFunction
from torch_vtensor.compile.program import Program, build_program
from torch_vtensor.compile.runtime import Runtime
from torch_vtensor.compile.schedules import Schedule, check
from torch_vtensor.compile.segment import find_segments
from torch_vtensor.compile.tensor_view import LogicalTensor
from torch_vtensor.compile.topology import Topology
from torch_vtensor.compile.uncut import Whole


@dataclass(frozen=True)
class Compilation:
    """What every phase made of one captured graph. Prints as all of them in turn."""

    captured: Captured
    plan: Plan
    program: Program
    passes: Passes
    choice: Choice | None = None

    @property
    def predicted_peak_bytes(self) -> int:
        """The most bytes that a rank holds at once."""
        return max(max(report.peak_bytes.values()) for report in self.passes.reports)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the whole step, or of the forward pass."""
        return self.passes.forward

    def __str__(self) -> str:
        """Print each phase's value."""
        phases = (self.captured.graph, self.choice, self.plan, self.program, self.passes)
        return "\n\n".join(str(phase) for phase in phases if phase is not None)


def superscaler(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a dynamo graph by a plan. Found by torch under its name; nothing has to be imported.

    ``mode`` and ``options`` are those of torch.compile; `torch_vtensor.compile.options.Options` lists the options.
    Without a plan, inductor compiles the graph whole.

    Raises:  BackendCompilerFailed, with the ValueError or TypeError of an option or a plan that cannot be honoured.
    Source:  SuperScaler (arXiv 2301.08984); inductor generates the code.
    """
    asked = parse_options(mode, options)
    if asked.plan is None and asked.memory_budget is None:
        return _compile_whole(gm, example_inputs, asked)

    _torch_compat.refuse_autocast()
    if asked.plan is None and worlds.num_ranks() > 1:
        raise ValueError(
            f"memory_budget finds plans for one device, and there are {worlds.num_ranks()} ranks. Give a plan for them."
        )
    plan, mesh = resolve(asked.plan or "single", asked.mesh, worlds.num_ranks())
    names = name_inputs(gm, example_inputs)
    with no_garbage():
        captured = capture(gm, example_inputs, names, cuts_classes=cuts_classes(plan))
    examples = _torch_compat.leaves(list(example_inputs))
    kept = find_kept(captured.arguments, examples)
    if asked.memory_budget is None:
        compilation = compile_plan(captured, plan, mesh, trains=torch.is_grad_enabled(), kept=kept)
    else:
        tracer = Tracer(_torch_compat.device_of(examples), asked.config_patches)
        given = None if asked.plan is None else plan
        fitted = fit(captured, given, mesh, asked.memory_budget, tracer, trains=torch.is_grad_enabled(), kept=kept)
        if isinstance(fitted, Choice):
            return _compile_whole(gm, example_inputs, asked, fitted)
        compilation = fitted
    if asked.inspect is not None:
        asked.inspect(compilation)
    transport, rank = worlds.join(compilation.program)
    code = CodeGenerator(asked.codegen, asked.config_patches)
    seeds = worlds.find_seeds(compilation.program, _torch_compat.device_of(examples))
    runtime = Runtime(captured, compilation.program, compilation.passes, rank, code, transport, seeds)
    shard_parameters(captured.arguments, examples, compilation.program.flow.storage, mesh.ranks, rank)
    return _torch_compat.called_with_leaves(runtime)


def _compile_whole(
    gm: GraphModule, example_inputs: Sequence[Any], asked: Options, choice: Choice | None = None
) -> Callable[..., Any]:
    """Compile a graph as inductor does."""
    whole = Whole(asked.inspect, eager=asked.codegen == "eager", cache_key=asked.cache_key, choice=choice)
    return _torch_compat.drive_inductor(gm, example_inputs, whole, asked.config_patches)


def compile_plan(
    captured: Captured,
    function: PlanFunction,
    mesh: Mesh,
    *,
    trains: bool,
    kept: Mapping[LogicalTensor, Parts] = NOTHING_KEPT,
    measure: Measure = estimate,
    one_of_each: bool = False,
) -> Compilation:
    """Plan, materialize, segment, order and check: everything that needs no other rank and no device.

    ``kept`` are the parts of parameters that ranks keep since an earlier compilation; ``measure`` tells what memory
    segments take; ``one_of_each`` asks for one rank of those that do the same, to look at: `Dataflow.like` has which.

    Raises:  ValueError for a plan that cannot run.
    """
    topology = Topology()
    with no_garbage():
        plan = record(function, captured.graph, mesh)
        flow = find_dataflow(plan, topology, trains=trains, kept=kept, one_of_each=one_of_each)
        segments = find_segments(flow)
        program = build_program(flow, segments, topology, measure)
        return Compilation(captured, plan, program, order_passes(program))


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Do not look for garbage: planning keeps all that it makes, and going over that again and again takes long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def fit(
    captured: Captured,
    function: PlanFunction | None,
    mesh: Mesh,
    budget: float,
    measure: Measure,
    *,
    trains: bool,
    kept: Mapping[LogicalTensor, Parts] = NOTHING_KEPT,
) -> Compilation | Choice:
    """Find what fits a memory budget, or check that a plan does; the choice alone where nothing has to be cut.

    Raises:  PlanError for a budget that cannot be met.
    """

    def evaluate(plan: PlanFunction) -> Compilation:
        return compile_plan(captured, plan, mesh, trains=trains, kept=kept, measure=measure)

    if function is None:
        choice, chosen = choose(Graph(captured.graph, mesh), budget, lambda name: evaluate(named(name, 1)))
        return choice if chosen is None else replace(chosen, choice=choice)
    compilation = evaluate(function)
    uncut = by_layers(named("single", 1))
    limit = math.floor(budget * evaluate(uncut).predicted_peak_bytes) if isinstance(budget, float) else budget
    for report, schedule in zip(compilation.passes.reports, compilation.passes.schedules, strict=True):
        if max(report.peak_bytes.values()) > limit:
            check(schedule, limit)
    return compilation


# torch._dynamo.reset() calls this.
superscaler.reset = _torch_compat.reset_cuda_graphs  # type: ignore[attr-defined]
