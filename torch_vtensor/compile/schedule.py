"""Plan → Schedule: what each rank does, in order; checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch_vtensor.compile.capture import Direction
from torch_vtensor.compile.primitives import Plan

_LETTERS: dict[Direction, str] = {"forward": "F", "backward": "B"}


class Action(NamedTuple):
    """Tasks that one rank runs as one piece of compiled code."""

    rank: int
    direction: Direction
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        """``F`` or ``B``, with the number of tasks."""
        return f"{_LETTERS[self.direction]}({len(self.tasks)})"


@dataclass(frozen=True)
class Schedule:
    """One action list per rank. Prints as a grid, a row for each rank."""

    plan: Plan
    actions: Mapping[int, tuple[Action, ...]]

    def __str__(self) -> str:
        """Draw the grid."""
        return "\n".join(f"rank {rank} | {' '.join(map(str, row))}" for rank, row in self.actions.items())


def order(plan: Plan) -> Schedule:
    """Order each rank's tasks: all forward ones in the order of capture, then all backward ones.

    Raises:  ValueError if some action would wait for ever, naming the rank and the operator that it waits for.
    """
    directions: tuple[Direction, ...] = ("forward", "backward") if plan.graph.is_joint else ("forward",)
    actions = {
        rank: tuple(
            Action(
                rank,
                direction,
                tuple(t.name for t in plan.graph.tasks if plan.rank_of[t.name] == rank and t.direction == direction),
            )
            for direction in directions
        )
        for rank in plan.mesh.ranks
    }
    schedule = Schedule(plan, MappingProxyType(actions))
    check(schedule)
    return schedule


def check(schedule: Schedule) -> None:
    """Run the schedule on paper: each rank starts its next action once everything that the action reads is there.

    Raises:  ValueError if that comes to a stop before the end.
    """
    reads = {task.name: task.reads for task in schedule.plan.graph.tasks}
    ready = {value.task for value in schedule.plan.graph.inputs}
    waiting = {rank: list(row) for rank, row in schedule.actions.items()}
    while any(waiting.values()):
        stopped = []
        for row in filter(None, waiting.values()):
            missing = _first_missing(row[0], reads, ready)
            if missing is None:
                ready.update(row.pop(0).tasks)
                break
            stopped.append((row[0], missing))
        else:
            action, missing = stopped[0]
            raise ValueError(
                f"the schedule cannot run: {action.direction} of rank {action.rank} waits for {missing!r}, which no "
                f"rank can compute before it. Place tasks so that ranks do not wait for each other:\n{schedule}"
            )


def _first_missing(action: Action, reads: Mapping[str, tuple[str, ...]], ready: set[str]) -> str | None:
    own: set[str] = set()
    for task in action.tasks:
        for name in reads[task]:
            if name not in ready and name not in own:
                return name
        own.add(task)
    return None
