"""Program → schedules: a whole step in one, or forward and backward apart where the caller computes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch_vtensor.compile.gathers import find_gathers
from torch_vtensor.compile.program import Program
from torch_vtensor.compile.schedules import Job, Report, Result, Schedule, Value, check, order_jobs
from torch_vtensor.compile.stages import find_constraints, find_turns


@dataclass(frozen=True, eq=False)
class Passes:
    """The schedules of a program, checked.

    ``backward`` is None where forward is the whole step, or all there is.
    """

    forward: Schedule
    backward: Schedule | None
    reports: tuple[Report, ...]

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """That of the step, or of the forward and the backward pass."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    def __str__(self) -> str:
        """Draw each schedule, and tell the memory of each rank."""
        pairs = zip(self.schedules, self.reports, strict=True)
        return "\n\n".join(f"{schedule}\n{report}" for schedule, report in pairs)


def order_passes(program: Program) -> Passes:
    """Order a program's jobs, and check the schedules.

    Raises:  PlanError for an order that cannot be.
    """
    if not program.seeds or program.flow.is_whole_step:
        forward = _order(program, program.jobs, program.values, program.results)
        return Passes(forward, None, (check(forward),))
    late = _depends_on_seeds(program) | program.again
    early_jobs = [job for job in program.jobs if job.name not in late]
    late_jobs = [job for job in program.jobs if job.name in late]
    written = {place for job in early_jobs for place in job.written_places()}
    handed_over = {place for job in late_jobs for place in job.read_places() if place in written}
    touched = {place for job in late_jobs for place in (*job.read_places(), *job.written_places())}
    results = [result for result in program.results if result.place in written or result.place not in touched]
    kept = {result.place for result in results}
    results += [Result(f"saved {place.key}", *place) for place in sorted(handed_over - kept)]
    forward = _order(program, early_jobs, _values_of(program, early_jobs, results), results)
    late_results = [result for result in program.results if result not in results]
    values = [
        replace(value, kind="input") if value.place in handed_over else value
        for value in _values_of(program, late_jobs, late_results)
    ]
    backward = _order(program, late_jobs, values, late_results)
    return Passes(forward, backward, (check(forward), check(backward)))


def _depends_on_seeds(program: Program) -> set[str]:
    """The jobs that wait for the caller's gradients, directly or not."""
    known = set(program.seeds)
    late: set[str] = set()
    for job in program.jobs:  # each of these comes after those that it waits for, as they were written
        if any((place.rank, place.key) in known for place in job.read_places()):
            late.add(job.name)
            known.update((place.rank, place.key) for place in job.written_places())
    return late


def _values_of(program: Program, jobs: Sequence[Job], results: Sequence[Result]) -> list[Value]:
    places = {place for job in jobs for place in (*job.read_places(), *job.written_places())}
    places.update(result.place for result in results)
    return [value for value in program.values if value.place in places]


def _order(program: Program, jobs: Sequence[Job], values: Sequence[Value], results: Sequence[Result]) -> Schedule:
    known = {job.name for job in jobs}
    plan = program.flow.plan
    turns = find_turns(plan, program.segments, jobs)
    asked = (*find_constraints(program.segments, plan.finishing), *find_gathers(program, turns))
    constraints = [pair for pair in asked if known.issuperset(pair)]
    schedule = order_jobs(jobs, values, constraints, turns, results)
    idle = {rank: () for rank in plan.mesh.ranks if rank not in schedule.actions}
    return schedule.with_actions({**schedule.actions, **idle}) if idle else schedule
