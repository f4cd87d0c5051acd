"""Runs action lists on paper with blocking semantics: whoever sends, receives or joins waits for all others.

Only the order of jobs is looked at, not the values. A schedule that gets through here gets through with any backend:
one that blocks less waits less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from torch_vtensor.compile.schedules.action import Action, Schedule
from torch_vtensor.compile.schedules.job import Job, PlanError

_MOST_LINES = 16


def run_blocking(schedule: Schedule) -> Iterator[Job]:
    """The jobs in an order in which blocking ranks get them done; all jobs must be known and on their ranks once.

    Raises:  PlanError where all ranks that are not done wait, telling who waits for whom.
    """
    rows = {rank: [a for a in row if a.kind != "FREE"] for rank, row in schedule.actions.items()}
    jobs, at = schedule.jobs, dict.fromkeys(rows, 0)
    arrived: dict[str, int] = defaultdict(int)
    active = sorted(rows, reverse=True)
    while active:
        rank = active.pop()
        while at[rank] < len(rows[rank]):
            job = jobs[rows[rank][at[rank]].name]
            arrived[job.name] += 1
            if arrived[job.name] < len(job.ranks):
                break
            yield job
            at[rank] += 1
            for peer in job.ranks:
                if peer != rank:
                    at[peer] += 1
                    active.append(peer)
    waiting = {rank: rows[rank][at[rank]] for rank in rows if at[rank] < len(rows[rank])}
    if waiting:
        raise _deadlock(schedule, waiting)


def _deadlock(schedule: Schedule, waiting: dict[int, Action]) -> PlanError:
    """Follow who waits for whom until it comes back to a rank, and tell that circle."""

    def blocker(rank: int) -> int:
        job = schedule.jobs[waiting[rank].name]
        return next(
            peer for peer in job.ranks if peer != rank and (peer not in waiting or waiting[peer].name != job.name)
        )

    walk: dict[int, None] = {}
    rank = min(waiting)
    while rank not in walk and rank in waiting:
        walk[rank] = None
        rank = blocker(rank)
    circle = list(walk)[list(walk).index(rank) :] if rank in walk else list(walk)
    lines = [f"  rank {member} is at {waiting[member]} and waits for rank {blocker(member)}" for member in circle]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES // 2 : -_MOST_LINES // 2] = [f"  … {len(lines) - _MOST_LINES} more"]
    first = waiting[circle[0]]
    text = "\n".join([f"{len(circle)} ranks wait for each other for ever:", *lines])
    return PlanError(
        f"{text}\nMove one of these actions so that all ranks meet in the same order, as lists that follow one global "
        f"order do.",
        rank=first.rank,
        job=first.name,
    )


def check_meeting_order(schedule: Schedule) -> None:
    """Every two ranks send in the order in which the other receives; every group runs its collectives in one order.

    Messages between two ranks carry no name: what is sent first is taken for what is received first.

    Raises:  PlanError with the first message or collective that would be taken for another.
    """
    orders: dict[tuple[str, tuple[int, ...]], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    jobs = schedule.jobs
    ordered: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rank, row in schedule.actions.items():
        for action in row:
            if action.peers:
                job = jobs[action.name]
                group = job.ranks
                if job.kind != "transfer":
                    group = ordered.get(job.ranks) or ordered.setdefault(job.ranks, tuple(sorted(job.ranks)))
                orders[job.kind, group][rank].append(job.name)
    for (kind, group), by_rank in orders.items():
        for (one, names), (other, others) in pairwise(by_rank.items()):
            if names == others:
                continue
            for first, second in zip(names, others, strict=True):
                if first != second:
                    what = (
                        f"{kind}s from rank {group[0]} to {group[1]}" if kind == "transfer" else f"{kind}s of {group}"
                    )
                    raise PlanError(
                        f"the {what} differ in order: where rank {one} has {first!r}, rank {other} has {second!r}, so "
                        f"one would be taken for the other. Put them in the same order on both ranks.",
                        rank=other,
                        job=second,
                    )
