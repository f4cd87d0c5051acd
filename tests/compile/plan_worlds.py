"""Plans run on all ranks of a virtual world, over two steps of training, and held against one process."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plan_models import Case, Optimizer, Step
from plan_strategies import random_order
from torch import Tensor

from torch_vtensor.compile.codegen import CodeGenerator, Recorded
from torch_vtensor.compile.dataflow import find_dataflow
from torch_vtensor.compile.executor import Code
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.parameters import part_of
from torch_vtensor.compile.pieces import local_call
from torch_vtensor.compile.plan import record
from torch_vtensor.compile.primitives import PlanFunction
from torch_vtensor.compile.program import Program, build_program
from torch_vtensor.compile.schedules import Schedule, check, order_jobs
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.segment import Segment, find_segments
from torch_vtensor.compile.stages import find_constraints, find_turns
from torch_vtensor.compile.task_graph import Slot, Task
from torch_vtensor.compile.topology import Topology
from torch_vtensor.compile.virtual_world import run_all

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Planned:
    """A case's program by a plan, and the order that its ranks follow."""

    case: Case
    program: Program
    schedule: Schedule


def plan_case(case: Case, plan: PlanFunction, num_ranks: int, shuffle: random.Random | None = None) -> Planned:
    """All phases; `shuffle` replaces the order by a random one of those that data and constraints allow.

    Raises:  ValueError for a plan that cannot run.
    """
    topology = Topology()
    recorded = record(plan, case.captured.graph, Mesh(tuple(range(num_ranks))))
    flow = find_dataflow(recorded, topology, trains=True)
    segments = find_segments(flow)
    program = build_program(flow, segments, topology)
    constraints = find_constraints(segments)
    turns: Mapping[int, Any] = find_turns(recorded, segments, program.jobs)
    if shuffle is not None and not turns:
        turns = _random_turns(program, constraints, shuffle)
    schedule = order_jobs(program.jobs, program.values, constraints, turns, program.results)
    check(schedule)
    return Planned(case, program, schedule)


def _random_turns(program: Program, constraints: list[tuple[str, str]], shuffle: random.Random) -> dict[int, list[str]]:
    """Every rank's jobs, in one random global order."""
    writer = {place: job.name for job in program.jobs for place in job.written_places()}
    before = {job.name: {writer[p] for p in job.read_places() if p in writer} for job in program.jobs}
    for first, second in constraints:
        before[second].add(first)
    turns: defaultdict[int, list[str]] = defaultdict(list)
    ranks_of = {job.name: job.ranks for job in program.jobs}
    for name in random_order(shuffle, before):
        for rank in ranks_of[name]:
            turns[rank].append(name)
    return turns


def interpret(segment: Segment) -> Code:
    """Runs a segment task by task: what `emit` writes down, without writing it down, which takes most of the time."""
    arrived = {
        (reader.task, reader.position): number
        for number, readers in enumerate(segment.arrivals.values())
        for reader in readers
    }
    steps = []
    for task in segment.tasks:
        call = local_call(task)
        target = torch.ops.aten.reshape.default if call.target is torch.ops.aten.view.default else call.target
        steps.append((task, target, (tuple(call.args), dict(call.kwargs))))

    def function(*inputs: Tensor) -> list[Tensor]:
        made: dict[Any, Tensor] = {}

        def value(task: Task, argument: Any) -> Any:
            if isinstance(argument, Slot):
                view = task.inputs[argument.position]
                inside = (task, argument.position) in segment.internal
                return made[view.tensor, view.mask] if inside else inputs[arrived[task, argument.position]]
            if isinstance(argument, list | tuple):
                return type(argument)(value(task, item) for item in argument)
            return argument

        for task, target, (args, kwargs) in steps:
            found = target(*value(task, args), **{name: value(task, item) for name, item in kwargs.items()})
            found = [found] if len(task.outputs) == 1 and task.outputs[0] is not None else found
            for view, tensor in zip(task.outputs, found, strict=True):
                if view is not None:
                    made[view.tensor, view.mask] = tensor
        return [made[view.tensor, view.mask] for view in segment.departures]

    return Interpreted(segment, function)


class Interpreted(Recorded):
    """Recorded by autograd, which cannot do half of it: dI computes all gradients, and keeps those that dW is for."""

    def __init__(self, segment: Segment, function: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__(segment, function)
        self._parts = segment.parts

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        outputs, saved = super().forward(inputs)
        return outputs, [*saved, *(None for _ in self._parts)][: len(self._parts)]

    def backward(
        self,
        part: JobKind,
        saved: Sequence[Any],
        inputs: Sequence[Tensor | None],
        tangents: Sequence[Tensor | None],
    ) -> tuple[Sequence[Tensor | None], Any]:
        if part == "dW":
            gradients = saved[-1]
        else:
            for leaf, again in zip(saved[0][0], inputs, strict=True):
                assert again is None or leaf is None or torch.equal(leaf, again)
            gradients, _ = super().backward(part, saved[:1], inputs, tangents)
        mine = [gradient if index in self._parts[part] else None for index, gradient in enumerate(gradients)]
        return mine, gradients


def run_steps(planned: Planned, optimizer: str = "sgd", num_steps: int = 2, *, emits: bool = False) -> None:
    """Train on every rank, and compare all that one process knows after every step; `emits` runs segments as fx graphs.

    Raises:  AssertionError, or what a wrong program or schedule runs into.
    """
    program, case = planned.program, planned.case
    make = CodeGenerator("eager", {}) if emits else interpret
    codes = {segment: make(segment) for segment in program.segments}
    parts = parts_at_start(planned)
    updates: defaultdict[int, Optimizer] = defaultdict(lambda: Optimizer(optimizer))
    for expected in case.steps(optimizer)[:num_steps]:
        values = run_once(planned, parts, codes)
        _compare(planned, values, expected)
        _update(planned, values, parts, updates)


def parts_at_start(planned: Planned) -> dict[tuple[int, str], Tensor]:
    """What every rank has before the first step."""
    given = {**planned.case.arguments, **planned.case.captured.constants}
    return {place: part_of(given[view.tensor], view.mask) for place, view in planned.program.arguments.items()}


def run_once(
    planned: Planned, parts: Mapping[tuple[int, str], Tensor], codes: Mapping[Segment, Code]
) -> dict[int, dict[str, Any]]:
    """Run all ranks once; what each has in the end."""
    values: dict[int, dict[str, Any]] = {rank: {} for rank in planned.schedule.actions}
    for (rank, key), part in parts.items():
        values[rank][key] = part
    for (rank, key), tensor in planned.program.seeds.items():
        values[rank][key] = planned.case.seeds[tensor]
    run_all(planned.program, planned.schedule, values, codes.__getitem__, torch.device("cpu"))
    return values


def _compare(planned: Planned, values: Mapping[int, dict[str, Any]], expected: Step) -> None:
    program, graph = planned.program, planned.case.captured.graph
    ranks = program.flow.plan.mesh.ranks
    for tensor in dict.fromkeys((*graph.outputs, *graph.mutations.values())):
        old = next((old for old, new in graph.mutations.items() if new is tensor), None)
        wanted = expected.outputs[tensor] if tensor in expected.outputs else expected.arguments[old]  # type: ignore[index]
        for rank in ranks:
            _assert_equal(values[rank][program.outputs[rank, tensor]], wanted, f"{tensor.name} on rank {rank}")
    for (rank, key), view in program.arguments.items():
        gradient = expected.gradients.get(view.tensor)
        if gradient is None or view.tensor.kind not in ("parameter", "input"):
            continue
        found = program.gradients.get((rank, view.tensor))
        assert found is not None, f"no gradient of {key} on rank {rank}"
        name, mask = found
        assert mask == view.mask, f"the gradient on rank {rank} is of {view.tensor.name}{mask}, kept is {view}"
        _assert_equal(values[rank][name], part_of(gradient, mask), f"gradient of {key} on rank {rank}")
    for (rank, tensor), (name, _) in program.gradients.items():
        if expected.gradients.get(tensor) is None:
            _assert_equal(values[rank][name], torch.zeros_like(values[rank][name]), f"gradient of {tensor.name}")


def _assert_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    bounds = {"rtol": TOLERANCE, "atol": _absolute_tolerance(wanted)}
    is_alike = found.shape == wanted.shape and found.dtype == wanted.dtype
    if not is_alike or not torch.allclose(found, wanted, **bounds):
        torch.testing.assert_close(found, wanted, **bounds, msg=lambda text: f"{what}: {text}")


def _absolute_tolerance(wanted: Tensor) -> float:
    """Of a sum that cancels out, the error is that of what was summed: some models square until that is 1e9."""
    largest = float(wanted.abs().max()) if wanted.is_floating_point() and wanted.numel() else 1.0
    return TOLERANCE * max(largest, 1.0)


def _update(
    planned: Planned,
    values: Mapping[int, dict[str, Any]],
    parts: dict[tuple[int, str], Tensor],
    updates: Mapping[int, Optimizer],
) -> None:
    """What the next step starts from, of each rank out of what it has itself."""
    program, mutations = planned.program, planned.case.captured.graph.mutations
    for (rank, key), view in program.arguments.items():
        if view.tensor in mutations:
            parts[rank, key] = part_of(values[rank][program.outputs[rank, mutations[view.tensor]]], view.mask)
        elif view.tensor.kind == "parameter" and (rank, view.tensor) in program.gradients:
            name, _ = program.gradients[rank, view.tensor]
            parts[rank, key] = updates[rank](key, parts[rank, key], values[rank][name])
