"""Schedule → Program: the communication that a schedule needs, made explicit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch_vtensor.compile.schedule import Schedule


class Transfer(NamedTuple):
    """A value that one rank makes and another reads."""

    task: str
    source: int
    destination: int


@dataclass(frozen=True)
class Program:
    """What every rank runs, with all communication in it."""

    schedule: Schedule

    def __str__(self) -> str:
        """Draw the schedule's grid and name the communication."""
        return f"{self.schedule}\nno communication"


def materialize(schedule: Schedule) -> Program:
    """Find what has to move between ranks. On one rank, which is all that runs today, that is nothing."""
    transfers = find_transfers(schedule)
    assert not transfers, f"a mesh of one rank needs no communication, got {transfers[0]}"
    return Program(schedule)


def find_transfers(schedule: Schedule) -> tuple[Transfer, ...]:
    """Each value that is read on another rank than the one that makes it, once for each such rank, in order."""
    rank_of = schedule.plan.rank_of
    found = {
        Transfer(name, rank_of[name], rank_of[task.name]): None
        for task in schedule.plan.graph.tasks
        for name in task.reads
        if name in rank_of and rank_of[name] != rank_of[task.name]
    }
    return tuple(found)
