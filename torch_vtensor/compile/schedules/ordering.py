"""Jobs → Schedule: list scheduling on paper, then one action list per rank.

There is one global order of all jobs, and every rank's list is what that order says about the rank. Whichever job comes
first among those not yet done, all its ranks come to it: no rank waits for ever, however sends and receives block.

::

    rank 0 computes   F0  F1  F2  B0  ...   of the ready jobs, the one with the longest path to the end
    rank 0 sends        x0  x1  x2          at once: the value changes sides, memory stays the same …
    rank 1 gathers    w1      w2            … but what takes memory waits until just ahead of its reader
    rank 1 computes       F0  F1  F2  B0
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch_vtensor.compile.schedules.action import Action, Schedule
from torch_vtensor.compile.schedules.job import COMPUTE, Dataflow, Job, Place, Result, Value
from torch_vtensor.compile.schedules.job_graph import JobGraph


def order_jobs(
    jobs: Iterable[Job],
    values: Iterable[Value],
    constraints: Iterable[tuple[str, str]] = (),
    explicit: Mapping[int, Sequence[str]] = MappingProxyType({}),
    results: Iterable[Result] = (),
) -> Schedule:
    """Order jobs into one action list per rank, in which each value is freed after its last reader there.

    Each of `constraints` names two jobs, the first to run before the second; between jobs that share no rank it decides
    their places in the global order, and neither rank waits. `explicit` names, for a rank, jobs that run on it in that
    order; jobs not named find their places. Values that are pinned or results are not freed. Equal input gives an equal
    schedule: of jobs with equally long paths to the end, the one given first runs first.

    Raises:  PlanError for jobs that wait for each other in a circle, naming them, and for jobs, values, constraints or
             explicit orders that do not fit together.
    """
    flow = Dataflow.of(jobs, values)
    results = tuple(results)
    graph = JobGraph(flow, tuple(constraints), explicit)
    positions = _put_off(graph, _Simulation(graph).run())
    in_order = [graph.jobs[number] for number in sorted(range(len(graph.jobs)), key=positions.__getitem__)]
    actions = _actions(in_order, flow, kept={result.place for result in results})
    return Schedule(actions, flow, results)


class _Start(NamedTuple):
    """When a job starts on paper, and how many jobs were started before it."""

    seconds: float
    position: int


class _Simulation:
    """Every rank computes one job at a time, sends one and receives one; links serve jobs in the order they get ready.

    A local move takes its turn among the rank's computations: at once if it frees memory, as a sum of gradients does.
    """

    def __init__(self, graph: JobGraph) -> None:
        self._jobs = graph.jobs
        self._successors = graph.successors
        self._missing = list(graph.num_predecessors)
        # A heap gives its smallest first: the longest path, and among equals the job given first.
        self._urgency = [
            (-math.inf if job.kind == "move" and _growth_bytes(job, graph.flow) <= 0 else -path, number)
            for number, (job, path) in enumerate(zip(graph.jobs, graph.longest_paths(), strict=True))
        ]
        self._waiting: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self._busy: set[int] = set()
        self._free_at: dict[tuple[str, int], float] = defaultdict(float)
        self._running: list[tuple[float, int]] = []
        self._starts: dict[int, _Start] = {}

    def run(self) -> list[_Start]:
        """Let every job start as early as its inputs and its ranks allow."""
        now, ready = 0.0, [number for number, count in enumerate(self._missing) if not count]
        self._start(now, ready, set())
        while self._running:
            now, ready, idle = self._running[0][0], [], set()
            while self._running and self._running[0][0] == now:
                number = heapq.heappop(self._running)[1]
                if not self._jobs[number].communicates:
                    idle.add(self._jobs[number].ranks[0])
                for after in self._successors[number]:
                    self._missing[after] -= 1
                    if not self._missing[after]:
                        ready.append(after)
            self._start(now, ready, idle)
        return [self._starts[number] for number in range(len(self._jobs))]

    def _start(self, now: float, ready: list[int], idle: set[int]) -> None:
        """Hand communication to its links, and give every rank that has nothing to do its most urgent job."""
        self._busy -= idle
        ranks = idle
        for urgency in sorted(self._urgency[number] for number in ready):
            job = self._jobs[urgency[1]]
            if job.communicates:
                self._communicate(now, urgency[1], job)
            else:
                heapq.heappush(self._waiting[job.ranks[0]], urgency)
                ranks.add(job.ranks[0])
        for rank in sorted(ranks):
            if rank not in self._busy and self._waiting[rank]:
                number = heapq.heappop(self._waiting[rank])[1]
                self._busy.add(rank)
                self._record(now, number)

    def _communicate(self, now: float, number: int, job: Job) -> None:
        links = links_of(job)
        start = max(now, *(self._free_at[link] for link in links))
        for link in links:
            self._free_at[link] = start + job.seconds
        self._record(start, number)

    def _record(self, start: float, number: int) -> None:
        self._starts[number] = _Start(start, len(self._starts))
        heapq.heappush(self._running, (start + self._jobs[number].seconds, number))


def links_of(job: Job) -> tuple[tuple[str, int], ...]:
    """What a communication occupies: sending of the source and receiving of the destination, both of each member."""
    if job.kind == "transfer":
        return ("send", job.ranks[0]), ("receive", job.ranks[1])
    return tuple((link, rank) for rank in job.ranks for link in ("send", "receive"))


_Position = tuple[int, int, int]


def _put_off(graph: JobGraph, starts: list[_Start]) -> list[_Position]:
    """Where each job stands in the global order, once those that take memory wait until they are needed.

    Put off are moves and communications that write more bytes than they could free: a move until right before its first
    reader, a communication until the computation before that, or as many as its seconds need to pass unseen.

    A position is (p, 1, p) of the job started as number p, and (q, 0, p) if it was put off to right before number q.
    """
    computations = _computations(graph, starts)
    positions: list[_Position] = [(start.position, 1, start.position) for start in starts]
    latest = [start.seconds for start in starts]
    links_needed: dict[tuple[str, int], float] = {}
    for number in sorted(range(len(starts)), key=lambda number: -starts[number].position):
        job, successors = graph.jobs[number], graph.successors[number]
        if job.computes or not successors or _growth_bytes(job, graph.flow) <= 0:
            continue
        before = min(positions[after][0] for after in successors)
        deadline = min(latest[after] for after in successors)
        if job.communicates:
            links = links_of(job)
            deadline = min(deadline, *(links_needed.get(link, deadline) for link in links))
            late = max(deadline - job.seconds, starts[number].seconds)
            links_needed.update(dict.fromkeys(links, late))
            for rank in job.ranks:
                times, order = computations[rank]
                current = bisect_right(times, late) - 1
                before = min(before, order[current] if current >= 0 else 0)
        else:
            late = deadline
        latest[number] = late
        if before > starts[number].position:
            positions[number] = (before, 0, starts[number].position)
    return positions


def _computations(graph: JobGraph, starts: list[_Start]) -> dict[int, tuple[list[float], list[int]]]:
    """For each rank, its forward and backward jobs in order: when they start, and their positions."""
    found: dict[int, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
    for number in sorted(range(len(starts)), key=lambda number: starts[number].position):
        job = graph.jobs[number]
        if job.computes:
            times, order = found[job.ranks[0]]
            times.append(starts[number].seconds)
            order.append(starts[number].position)
    return found


def _growth_bytes(job: Job, flow: Dataflow) -> int:
    """Bytes by which a job's memory grows if it is the last reader of all that it reads."""
    values, growth = flow.values, 0
    for place in flow.writes[job.name]:
        growth += values[place].num_bytes
    for place in flow.reads[job.name]:
        value = values[place]
        if not value.pinned:
            growth -= value.num_bytes
    return growth


def _actions(in_order: Sequence[Job], flow: Dataflow, kept: set[Place]) -> Mapping[int, tuple[Action, ...]]:
    """What the global order says about each rank, and FREE behind the last use of every value that is not kept."""
    values, reads, writes = flow.values, flow.reads, flow.writes
    # What is met for the first time from the end is used for the last time.
    unseen = {place: value for place, value in values.items() if not value.pinned and place not in kept}
    ranks = {rank for job in in_order for rank in job.ranks} | {place.rank for place in values}
    actions: dict[int, list[Action]] = {rank: [] for rank in sorted(ranks)}
    held: dict[int, dict[str, list[Action]]] = defaultdict(dict)  # by what collectives, until these are done
    for job in reversed(in_order):
        name = job.name
        for place in writes[name]:
            if (value := unseen.pop(place, None)) is not None:
                actions[place.rank].append(Action.free(value))
        for place in reads[name]:
            if (value := unseen.pop(place, None)) is not None:
                if job.kind == "collective":
                    held[place.rank].setdefault(name, []).append(Action.free(value))
                else:
                    actions[place.rank].append(Action.free(value))
        for rank in job.ranks:
            actions[rank].append(Action.of(job, rank))
    for row in actions.values():
        row.reverse()
    for rank, frees in held.items():
        actions[rank] = _free_once_done(actions[rank], frees, rank, flow.jobs)
    return MappingProxyType({rank: tuple(row) for rank, row in actions.items()})


def _free_once_done(
    row: Sequence[Action], frees: Mapping[str, Sequence[Action]], rank: int, jobs: Mapping[str, Job]
) -> list[Action]:
    """A rank's actions, with FREE of what collectives read as soon as it costs no waiting.

    That is before what they bring is read, or behind the next pass, or, where no pass follows, the next collective::

        COLLECTIVE d w    B layer 1    FREE d w'    COLLECTIVE d v    COLLECTIVE d u    FREE d v'    FREE d u'
    """
    last_pass = next((number for number in reversed(range(len(row))) if row[number].kind in COMPUTE), -1)
    found: list[Action] = []
    under_way: dict[str, None] = {}
    brings: dict[str, str] = {}  # the collective under way that brings a value

    def finish(name: str) -> None:
        found.extend(frees[name])
        del under_way[name]
        for key in jobs[name].writes.get(rank, ()):
            del brings[key]

    for number, action in enumerate(row):
        name, kind = action.name, action.kind
        if brings and kind != "FREE":
            for key in jobs[name].reads.get(rank, ()):
                if key in brings:
                    finish(brings[key])
        found.append(action)
        if under_way and (kind in COMPUTE or (kind == "COLLECTIVE" and number > last_pass)):
            for one in list(under_way):
                finish(one)
        if kind == "COLLECTIVE" and name in frees:
            under_way[name] = None
            brings.update(dict.fromkeys(jobs[name].writes.get(rank, ()), name))
    for one in list(under_way):
        finish(one)
    return found
