"""What a schedule would take: time, bubbles and memory, from the jobs' estimated seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from torch_vtensor.compile.schedules.action import Action, Schedule
from torch_vtensor.compile.schedules.job import Place
from torch_vtensor.compile.schedules.ordering import links_of
from torch_vtensor.compile.schedules.rendezvous import run_blocking


class Span(NamedTuple):
    """Seconds from the beginning at which a job starts and finishes."""

    start: float
    finish: float

    @property
    def seconds(self) -> float:
        """How long it runs."""
        return self.finish - self.start


class MemoryAt(NamedTuple):
    """Bytes that a rank holds from this second on."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Timeline:
    """When every job runs, and what every rank holds over time.

    ``busy_seconds`` are those in which a rank computes.
    """

    schedule: Schedule
    spans: Mapping[str, Span]
    busy_seconds: Mapping[int, float]

    @cached_property
    def memory(self) -> Mapping[int, tuple[MemoryAt, ...]]:
        """What every rank holds from when on."""
        schedule = self.schedule
        at_start: dict[int, int] = dict.fromkeys(schedule.actions, 0)
        for place, value in schedule.values.items():
            if place not in schedule.flow.writer:
                at_start[place.rank] = at_start.get(place.rank, 0) + value.num_bytes
        rows = schedule.actions.items()
        return {rank: _memory(schedule, rank, row, at_start[rank], self.spans) for rank, row in rows}

    @property
    def makespan(self) -> float:
        """Seconds until the last job has finished."""
        return max((span.finish for span in self.spans.values()), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """The part of all ranks' time in which they do not compute."""
        available = self.makespan * len(self.busy_seconds)
        return 1 - sum(self.busy_seconds.values()) / available if available else 0.0

    @property
    def peak_bytes(self) -> dict[int, int]:
        """The most bytes that each rank holds at once."""
        return {rank: max(point.num_bytes for point in points) for rank, points in self.memory.items()}


def simulate(schedule: Schedule) -> Timeline:
    """Run the schedule on paper, communication beside computation as on streams of a GPU.

    A rank computes in the order of its list, and sends and receives beside it, each in that order. A job starts once
    what it reads has been written; a communication not before its ranks are through with the computations before it in
    their lists. A value takes memory from the start of its writer until, if it is freed, its last reader has finished.

    Raises:  PlanError for a schedule that gets stuck; `check` tells about all else that may be wrong.
    """
    finish: dict[tuple[int, str], float] = {}  # of the writer of each value; 0 for what is there from the start
    computed_until: dict[int, float] = defaultdict(float)
    link_free_at: dict[tuple[str, int], float] = defaultdict(float)
    busy_seconds = dict.fromkeys(schedule.actions, 0.0)
    spans: dict[str, Span] = {}
    for job in run_blocking(schedule):
        start = max((finish.get(place, 0.0) for place in schedule.flow.reads[job.name]), default=0.0)
        start = max(start, *(computed_until[rank] for rank in job.ranks))
        if job.communicates:
            links = links_of(job)
            start = max(start, *(link_free_at[link] for link in links))
            link_free_at.update(dict.fromkeys(links, start + job.seconds))
        else:
            computed_until[job.ranks[0]] = start + job.seconds
            busy_seconds[job.ranks[0]] += job.seconds
        spans[job.name] = Span(start, start + job.seconds)
        finish.update(dict.fromkeys(schedule.flow.writes[job.name], start + job.seconds))
    return Timeline(schedule, spans, busy_seconds)


def _memory(
    schedule: Schedule, rank: int, row: tuple[Action, ...], at_start: int, spans: Mapping[str, Span]
) -> tuple[MemoryAt, ...]:
    changes: dict[float, int] = defaultdict(int, {0.0: at_start})
    used_until: dict[str, float] = defaultdict(float)
    for action in row:
        if action.kind == "FREE":
            changes[used_until[action.name]] -= schedule.values[Place(rank, action.name)].num_bytes
            continue
        job, span = schedule.jobs[action.name], spans[action.name]
        written = job.writes.get(rank, ())
        for key in (*job.reads.get(rank, ()), *written):
            used_until[key] = max(used_until[key], span.finish)
        changes[span.start] += sum(schedule.values[Place(rank, key)].num_bytes for key in written)
        changes[span.start] += job.workspace_bytes
        changes[span.finish] -= job.workspace_bytes
    held = accumulate(changes[seconds] for seconds in sorted(changes))
    return tuple(MemoryAt(*point) for point in zip(sorted(changes), held, strict=True))
