"""A schedule on paper as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_vtensor.compile.schedules.action import Action
from torch_vtensor.compile.schedules.simulate import Timeline

_MICROSECONDS = 1e6
_THREADS = {"compute": 0, "send": 1, "receive": 2}

Event = dict[str, Any]


def trace(timeline: Timeline) -> dict[str, Any]:
    """Chrome's trace format: a process for each rank, with threads for computing, sending and receiving.

    Arrows lead from each send to its receive, and a counter shows the rank's bytes. Collectives are in both threads of
    all members.
    """
    events: list[Event] = []
    numbers = {name: number for number, name in enumerate(timeline.spans)}
    for rank, row in timeline.schedule.actions.items():
        events.append(_about(rank, "process_name", name=f"rank {rank}"))
        events.append(_about(rank, "process_sort_index", sort_index=rank))
        for name, thread in _THREADS.items():
            events.append(_about(rank, "thread_name", thread, name=name))
        for action in row:
            events += _of_action(timeline, action, numbers)
        events += (
            {
                "ph": "C",
                "name": "memory",
                "pid": rank,
                "ts": at.seconds * _MICROSECONDS,
                "args": {"bytes": at.num_bytes},
            }
            for at in timeline.memory[rank]
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the trace as JSON; open it at ui.perfetto.dev."""
    path.write_text(json.dumps(trace(timeline)))


def _about(rank: int, what: str, thread: int = 0, **args: object) -> Event:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": args}


def _of_action(timeline: Timeline, action: Action, numbers: dict[str, int]) -> Iterator[Event]:
    """A slice in each thread that the action occupies, and the end of an arrow in those of transfers."""
    if action.kind == "FREE":
        return
    job, span = timeline.schedule.jobs[action.name], timeline.spans[action.name]
    threads = {"SEND": ("send",), "RECV": ("receive",), "COLLECTIVE": ("send", "receive")}.get(
        action.kind, ("compute",)
    )
    args = {"job": job.name, "stage": job.stage, "microbatch": job.microbatch, "wire_bytes": job.wire_bytes}
    start = span.start * _MICROSECONDS
    for thread in threads:
        where = {"pid": action.rank, "tid": _THREADS[thread], "ts": start}
        name = _label(action) if job.computes else f"{action.kind} {job.name}"
        yield {"ph": "X", "name": name, "cat": action.kind, "dur": span.seconds * _MICROSECONDS, "args": args} | where
        if job.kind == "transfer":
            arrow = {"ph": "s"} if action.kind == "SEND" else {"ph": "f", "bp": "e"}
            yield arrow | {"name": job.name, "cat": "transfer", "id": numbers[job.name]} | where


def _label(action: Action) -> str:
    return (
        f"{action.kind}{action.stage}"
        if action.microbatch is None
        else f"{action.kind}{action.stage}.{action.microbatch}"
    )
