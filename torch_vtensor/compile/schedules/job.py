"""What a schedule is made of: jobs, the values that they read and write, and the results that have to come out.

A value lives on one rank and is written once. What is sent keeps its key: the transfer reads it on one rank and writes
it on another. Values that no job writes are there from the start: parameters and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

JobKind = Literal["F", "B", "dI", "dW", "move", "transfer", "collective"]
ValueKind = Literal["activation", "saved", "parameter", "gradient", "input"]
Keys = Mapping[int, tuple[str, ...]]

COMPUTE: frozenset[str] = frozenset(("F", "B", "dI", "dW"))
COMMUNICATION: frozenset[str] = frozenset(("transfer", "collective"))
_THERE_FROM_THE_START = ("parameter", "input")
BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_NOTHING: Keys = MappingProxyType({})
_ITS_OWN: Mapping[str, tuple[str, ...]] = MappingProxyType({})
_Key = TypeVar("_Key")
_Item = TypeVar("_Item")


class PlanError(ValueError):
    """A plan or schedule that cannot run, or would compute something else; the message says where, why, and what helps.

    ``rank`` and ``job`` are where it was noticed, None where the trouble is not in one place.
    """

    def __init__(self, message: str, *, rank: int | None = None, job: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.job = job


class Place(NamedTuple):
    """Where a value is: its key on a rank."""

    rank: int
    key: str

    def __str__(self) -> str:
        """``'h3' on rank 1``."""
        return f"{self.key!r} on rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor, or several that live and die together, on one rank.

    ``kind`` is activation (gradients of activations too), saved (kept from forward for backward), parameter, gradient
    (of a parameter, or an addend of one) or input. A `pinned` value stays to the end.
    """

    key: str
    rank: int
    num_bytes: int
    kind: ValueKind = "activation"
    pinned: bool = False

    @property
    def place(self) -> Place:
        """Its key and rank."""
        return Place(self.rank, self.key)


@dataclass(frozen=True, slots=True)
class Result:
    """A value that has to be there at the end: an output, the gradient of a parameter.

    ``num_addends`` addends of jobs whose `Job.contributes` has the result's name must have gone into it, through values
    of kind gradient; 0 for what is no sum. Replicas are results of the same name on several ranks.
    """

    name: str
    rank: int
    key: str
    num_addends: int = 0

    @property
    def place(self) -> Place:
        """Its key and rank."""
        return Place(self.rank, self.key)


@dataclass(frozen=True, slots=True)
class Job:
    """A unit of work of the program on all ranks.

    ``kind`` is one of

    ==========  ==================================================================================
    F           forward
    B           backward
    dI          backward for the inputs only
    dW          the rest of that backward: gradients of the weights
    move        slices, concatenations and sums of what a rank has
    transfer    a send and its receive; ``ranks`` are (source, destination)
    collective  ``ranks`` are all members
    ==========  ==================================================================================

    ``reads`` and ``writes`` tell the keys of the values by rank. ``stage`` says what it computes, for people.
    ``contributes`` names the results of which it computes an addend; where other jobs compute the same, as replicas do,
    ``addends`` names it, or several, by result.
    Units: ``seconds`` on its ranks, estimated; ``wire_bytes`` sent by all ranks together; ``workspace_bytes`` that each
    of its ranks needs while it runs, besides what it reads and writes; negative where it frees some of what it reads
    before it makes some of what it writes. A collective runs, beside other work of a rank, until that reads what it
    brings or gives up what it reads. With ``one_by_one``, the values that it writes depend each on those alone
    that stand in the same place among what it reads, on any rank.
    """

    name: str
    kind: JobKind
    ranks: tuple[int, ...]
    reads: Keys = field(default_factory=lambda: _NOTHING)
    writes: Keys = field(default_factory=lambda: _NOTHING)
    stage: str = ""
    microbatch: int | None = None
    seconds: float = 0.0
    wire_bytes: int = 0
    workspace_bytes: int = 0
    contributes: tuple[str, ...] = ()
    addends: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ITS_OWN)
    one_by_one: bool = False

    @property
    def computes(self) -> bool:
        """Whether it is forward or backward work, as opposed to moving data."""
        return self.kind in COMPUTE

    @property
    def communicates(self) -> bool:
        """Whether several ranks take part."""
        return self.kind in COMMUNICATION

    def read_places(self) -> tuple[Place, ...]:
        """All that it reads, by rank."""
        return tuple([Place(rank, key) for rank, keys in self.reads.items() for key in keys])

    def written_places(self) -> tuple[Place, ...]:
        """All that it writes, by rank."""
        return tuple([Place(rank, key) for rank, keys in self.writes.items() for key in keys])

    def sources(self, place: Place) -> tuple[Place, ...]:
        """What a value that it writes depends on."""
        if not self.one_by_one:
            return self.read_places()
        index = self.writes[place.rank].index(place.key)
        return tuple(Place(rank, keys[index]) for rank, keys in self.reads.items())

    def __str__(self) -> str:
        """Kind, name and ranks: ``transfer 'h0' (ranks 0, 1)``."""
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.kind} {self.name!r} (rank{'s' if len(self.ranks) != 1 else ''} {ranks})"


@dataclass(frozen=True)
class Dataflow:
    """Jobs and values, looked up: what each job reads and writes, and which job writes a value.

    Values without a writer are there from the start.
    """

    jobs: Mapping[str, Job]
    values: Mapping[Place, Value]
    reads: Mapping[str, tuple[Place, ...]]
    writes: Mapping[str, tuple[Place, ...]]
    writer: Mapping[Place, str]

    @classmethod
    def of(cls, jobs: Iterable[Job], values: Iterable[Value]) -> Dataflow:
        """Look up who writes what.

        Raises:  PlanError for names or values that occur twice, ranks that a kind cannot have, values that nobody
                 declares, writes, or that two jobs write.
        """
        jobs, values = tuple(jobs), tuple(values)
        by_name = _by("name", jobs, lambda job: job.name)
        by_place = _by("key and rank", values, lambda value: value.place)
        # One object for each place: a pair is equal to the place that it names, and quicker made.
        places: dict[tuple[int, str], Place] = {place: place for place in by_place}
        reads, writes, writer = {}, {}, dict[Place, str]()
        for job in jobs:
            reads[job.name] = _declared_places(job, "reads", job.reads, places)
            writes[job.name] = _declared_places(job, "writes", job.writes, places)
            _check_shape(job)
            for place in writes[job.name]:
                if place in writer:
                    raise PlanError(
                        f"{job} writes {place}, which job {writer[place]!r} writes too. A value has one writer: give "
                        f"each its own key, and add them in a job of its own.",
                        rank=place.rank,
                        job=job.name,
                    )
                writer[place] = job.name
        for place, value in by_place.items():
            if place not in writer and value.kind not in _THERE_FROM_THE_START:
                raise PlanError(
                    f"no job writes the {value.kind} {place}. Only parameters and inputs are there from the start: add "
                    f"the job that writes it, or leave the value out.",
                    rank=place.rank,
                )
        return cls(by_name, by_place, reads, writes, writer)


def _by(what: str, items: Iterable[_Item], key_of: Callable[[_Item], _Key]) -> dict[_Key, _Item]:
    found: dict[_Key, _Item] = {}
    for item in items:
        key = key_of(item)
        if key in found:
            raise PlanError(f"{type(item).__name__} {key} occurs twice. Give each its own {what}.")
        found[key] = item
    return found


def _check_shape(job: Job) -> None:
    if len(job.ranks) == 1 and job.kind not in COMMUNICATION:
        return
    least, most = {"transfer": (2, 2), "collective": (1, None)}.get(job.kind, (1, 1))
    if not least <= len(job.ranks) <= (most or len(job.ranks)) or len(set(job.ranks)) < len(job.ranks):
        rule = {"transfer": "(source, destination)", "collective": "different members"}.get(job.kind, "one rank")
        raise PlanError(f"{job} has ranks {job.ranks}; a {job.kind} job has {rule}.", job=job.name)
    if job.kind == "transfer":
        source, destination = job.ranks
        if set(job.reads) - {source} or set(job.writes) - {destination}:
            raise PlanError(
                f"{job} reads on ranks {sorted(job.reads)} and writes on ranks {sorted(job.writes)}; a transfer reads "
                f"on its source, rank {source}, and writes on its destination, rank {destination}.",
                job=job.name,
            )


def _declared_places(job: Job, verb: str, keys_of: Keys, places: Mapping[tuple[int, str], Place]) -> tuple[Place, ...]:
    """Where a job reads or writes, by rank."""
    found: list[Place] = []
    for rank, keys in keys_of.items():
        for key in keys:
            place = places.get((rank, key))
            if place is None:
                why = "is not declared. Add its Value"
            elif rank not in job.ranks:
                why = "is not one of its ranks. Send the value there first, or add the rank"
            else:
                found.append(place)
                continue
            raise PlanError(f"{job} {verb} {Place(rank, key)}, which {why}.", rank=rank, job=job.name)
    return tuple(found)


def readable_bytes(num_bytes: int) -> str:
    """``1.50 GiB``, ``3.00 MiB``, ``512 bytes``."""
    for unit, name in BYTE_UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.2f} {name}"
    return f"{num_bytes} bytes"
