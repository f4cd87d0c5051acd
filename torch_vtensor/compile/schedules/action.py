"""A schedule as data: one list of actions per rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from torch_vtensor.compile.schedules.job import Dataflow, Job, JobKind, Place, Result, Value

ActionKind = Literal["F", "B", "dI", "dW", "SEND", "RECV", "COLLECTIVE", "MOVE", "FREE"]
ACTION_KINDS: tuple[ActionKind, ...] = get_args(ActionKind)

_KIND_OF: dict[JobKind, ActionKind] = {
    "F": "F",
    "B": "B",
    "dI": "dI",
    "dW": "dW",
    "move": "MOVE",
    "collective": "COLLECTIVE",
}


class Action(NamedTuple):
    """What one rank does for a job; or FREE, which gives up a value.

    ``name`` is the job's name, of a FREE the value's key. ``peers`` are the other ranks that take part.
    """

    kind: ActionKind
    rank: int
    name: str
    stage: str = ""
    microbatch: int | None = None
    peers: tuple[int, ...] = ()

    @classmethod
    def of(cls, job: Job, rank: int) -> Action:
        """The rank's part in a job: of a transfer SEND on its source and RECV on its destination."""
        if job.kind == "transfer":
            kind: ActionKind = "SEND" if rank == job.ranks[0] else "RECV"
        else:
            kind = _KIND_OF[job.kind]
        peers = _peers(job.ranks, rank) if len(job.ranks) > 1 else ()
        return cls(kind, rank, job.name, job.stage, job.microbatch, peers)

    @classmethod
    def free(cls, value: Value) -> Action:
        """Give up a value, and with it its memory."""
        return cls("FREE", value.rank, value.key)

    @property
    def computes(self) -> bool:
        """Whether it is forward or backward work."""
        return self.kind in ("F", "B", "dI", "dW")

    def __str__(self) -> str:
        """``F 'layer0.3'``, ``SEND 'h0.3' to rank 1``, ``FREE 'h0.3'``."""
        to = {"SEND": " to rank", "RECV": " from rank", "COLLECTIVE": " with ranks"}.get(self.kind, "")
        return f"{self.kind} {self.name!r}{to}{to and ' '}{', '.join(map(str, self.peers))}"


@functools.lru_cache(1 << 16)
def _peers(ranks: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple([peer for peer in ranks if peer != rank])


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order, and the jobs, values and results that this is about. Prints as a grid."""

    actions: Mapping[int, tuple[Action, ...]]
    flow: Dataflow
    results: tuple[Result, ...] = ()

    @property
    def jobs(self) -> Mapping[str, Job]:
        """All jobs, by name."""
        return self.flow.jobs

    @property
    def values(self) -> Mapping[Place, Value]:
        """All values, by rank and key."""
        return self.flow.values

    def with_actions(self, actions: Mapping[int, Sequence[Action]]) -> Schedule:
        """The same jobs with other action lists, which nobody has checked."""
        return replace(self, actions=MappingProxyType({rank: tuple(row) for rank, row in actions.items()}))

    @property
    def num_actions(self) -> int:
        """Actions of all ranks together."""
        return sum(map(len, self.actions.values()))

    def compute_actions(self, rank: int) -> Iterator[Action]:
        """The rank's forward and backward work, in order."""
        return (action for action in self.actions[rank] if action.computes)

    def __str__(self) -> str:
        """Forward and backward work of each rank, a row each, by simulated time."""
        from torch_vtensor.compile.schedules.grid import grid

        return grid(self)
