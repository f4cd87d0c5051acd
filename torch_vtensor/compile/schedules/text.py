"""A schedule as complete text, to keep, compare, edit and read back.

::

    rank 0
      F       layers.0-3 mb 0
      SEND    h3 mb 0 to 1
      FREE    h3.0
    rank 1
      RECV    h3 mb 0 to 1
      …

A line is a kind and a name: of the job, for FREE of the value. What else an action has comes from its job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from torch_vtensor.compile.schedules.action import ACTION_KINDS, Action, Schedule
from torch_vtensor.compile.schedules.job import Dataflow, Job, Place, PlanError, Result, Value

_WIDTH = max(map(len, ACTION_KINDS))
_RANK = re.compile(r"rank (-?\d+)\s*")


def dumps(schedule: Schedule) -> str:
    """All actions of all ranks, one a line."""
    lines = []
    for rank, row in schedule.actions.items():
        lines.append(f"rank {rank}")
        lines += [f"  {action.kind:{_WIDTH}} {_quoted(action.name)}" for action in row]
    return "\n".join([*lines, ""])


def parse(text: str, jobs: Iterable[Job], values: Iterable[Value], results: Iterable[Result] = ()) -> Schedule:
    """The schedule that `dumps` wrote, or that someone wrote like it, for these jobs; `check` tells if it can run.

    Empty lines mean nothing.

    Raises:  PlanError for a line that is no action of these jobs, with its number.
    """
    flow = Dataflow.of(jobs, values)
    rows: dict[int, list[Action]] = {}
    rank: int | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if header := _RANK.fullmatch(line):
            rank = int(header[1])
            if rank in rows:
                raise PlanError(f"line {number} begins rank {rank} again. Give each rank one list.", rank=rank)
            rows[rank] = []
        elif rank is None:
            raise PlanError(f"line {number} is {line!r}; a schedule begins with 'rank' and its number.")
        else:
            rows[rank].append(_action(number, line, rank, flow))
    return Schedule({}, flow, tuple(results)).with_actions(rows)


def _action(number: int, line: str, rank: int, flow: Dataflow) -> Action:
    kind, _, quoted = line.strip().partition(" ")
    name = _unquoted(quoted.strip())
    where = f"line {number}, {line.strip()!r}, of rank {rank}"
    if kind not in ACTION_KINDS:
        raise PlanError(f"{where}: {kind!r} is no kind of action; they are {', '.join(ACTION_KINDS)}.", rank=rank)
    if kind == "FREE":
        if Place(rank, name) not in flow.values:
            raise PlanError(f"{where}: there is no value {name!r} on this rank to free.", rank=rank)
        return Action.free(flow.values[Place(rank, name)])
    if name not in flow.jobs or rank not in flow.jobs[name].ranks:
        has = f"it runs on ranks {flow.jobs[name].ranks}" if name in flow.jobs else "there is no job of that name"
        raise PlanError(f"{where}: {has}. Name a job of this rank.", rank=rank, job=name)
    action = Action.of(flow.jobs[name], rank)
    if action.kind != kind:
        raise PlanError(f"{where}: what this rank does for {flow.jobs[name]} is {action.kind}.", rank=rank, job=name)
    return action


def _quoted(name: str) -> str:
    """The name, as a JSON string if it could not be told from the line around it otherwise."""
    plain = name.isprintable() and name == name.strip() and name and not name.startswith('"')
    return name if plain else json.dumps(name)


def _unquoted(name: str) -> str:
    if not name.startswith('"'):
        return name
    try:
        return str(json.loads(name))
    except json.JSONDecodeError as error:
        raise PlanError(f"{name} is no quoted name: {error}. Quote it as a JSON string.") from error
