"""`torch.compile(model, backend="superscaler")`: the phases, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from torch_vtensor.compile._torch_compat import CutInTwo, drive_inductor, reset_cuda_graphs
from torch_vtensor.compile.capture import TaskGraph, capture
from torch_vtensor.compile.materialize import Program, materialize
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.names import name_inputs
from torch_vtensor.compile.options import parse_options
from torch_vtensor.compile.primitives import Plan, record
from torch_vtensor.compile.runtime import Runtime
from torch_vtensor.compile.schedule import Schedule, order
from torch_vtensor.compile.segment import Segments, segment


@dataclass(frozen=True)
class Compilation:
    """What every phase made of one captured graph. Prints as all of them in turn."""

    graph: TaskGraph
    plan: Plan
    schedule: Schedule
    program: Program
    segments: Segments

    def __str__(self) -> str:
        """Print each phase's value."""
        return "\n\n".join(map(str, (self.graph, self.plan, self.schedule, self.program, self.segments)))


def superscaler(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a dynamo graph by a plan. Found by torch under its name; nothing has to be imported.

    ``mode`` and ``options`` are those of torch.compile; `torch_vtensor.compile.options.Options` lists the options.

    Raises:  BackendCompilerFailed, with the ValueError or TypeError of an option or a plan that cannot be honoured.
    Source:  SuperScaler (arXiv 2301.08984); the captured graph is AOTAutograd's, the code generator inductor.
    """
    asked = parse_options(mode, options)
    names = name_inputs(gm, example_inputs)

    def phases(captured: GraphModule, min_cut: CutInTwo | None) -> Segments:
        graph = capture(captured, names, is_joint=min_cut is not None)
        plan = record(asked.plan, graph, Mesh())
        schedule = order(plan)
        program = materialize(schedule)
        segments = segment(program, min_cut)
        if asked.inspect is not None:
            asked.inspect(Compilation(graph, plan, schedule, program, segments))
        return segments

    runtime = Runtime(phases, eager=asked.codegen == "eager", cache_key=asked.cache_key)
    return drive_inductor(gm, example_inputs, runtime, asked.config_patches)


# torch._dynamo.reset() calls this.
superscaler.reset = reset_cuda_graphs  # type: ignore[attr-defined]
