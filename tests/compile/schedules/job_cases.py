"""Random programs of jobs, a blocking interpreter to run their schedules, and the jobs of a pipeline."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from torch_vtensor.compile.schedules import Action, Job, Place, Result, Schedule, Value, order_jobs
from torch_vtensor.compile.schedules.pipelines import Orders


@dataclass
class Program:
    """Arguments of `order_jobs`."""

    jobs: list[Job] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    constraints: list[tuple[str, str]] = field(default_factory=list)
    explicit: dict[int, list[str]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def ordered(self) -> Schedule:
        return order_jobs(self.jobs, self.values, self.constraints, self.explicit, self.results)

    def value(self, rank: int, key: str, num_bytes: int = 8, kind: str = "activation", pinned: bool = False) -> str:
        self.values.append(Value(key, rank, num_bytes, kind, pinned))
        return key


class _Maker:
    """Adds one random job after the other; every job reads what is there."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.program = Program()
        self.num_ranks = rng.randint(1, 4)
        self.keys: dict[int, list[str]] = {rank: [] for rank in range(self.num_ranks)}
        for rank in self.keys:
            self.new_value(rank, f"w{rank}", "parameter", pinned=True)
            self.new_value(rank, f"x{rank}", "input")

    def new_value(self, rank: int, key: str, kind: str = "activation", pinned: bool = False) -> str:
        self.program.value(rank, key, self.rng.choice([0, 1, 8, 64]), kind, pinned)
        self.keys[rank].append(key)
        return key

    def some(self, rank: int) -> tuple[str, ...]:
        return tuple(self.rng.sample(self.keys[rank], self.rng.randint(1, min(3, len(self.keys[rank])))))

    def add(self, kind: str, ranks: tuple[int, ...], reads: dict, writes: dict, **more: object) -> None:
        name = f"{kind}{len(self.program.jobs)}"
        seconds = self.rng.choice([0.0, 1.0, 1.0, 2.5])
        workspace_bytes = self.rng.choice([0, 0, 16])
        self.program.jobs.append(
            Job(name, kind, ranks, reads, writes, name, seconds=seconds, workspace_bytes=workspace_bytes, **more)
        )

    def local(self, kind: str) -> None:
        rank, number = self.rng.randrange(self.num_ranks), len(self.program.jobs)
        reads = {rank: self.some(rank)}
        writes = [
            self.new_value(rank, f"v{number}.{i}", pinned=self.rng.random() < 0.1)
            for i in range(self.rng.randint(0, 2))
        ]
        self.add(kind, (rank,), reads, {rank: tuple(writes)})

    def transfer(self) -> None:
        source, destination = self.rng.sample(range(self.num_ranks), 2)
        key = self.rng.choice(self.keys[source])
        there = f"{key}@{len(self.program.jobs)}" if key in self.keys[destination] else key
        self.new_value(destination, there)
        self.add("transfer", (source, destination), {source: (key,)}, {destination: (there,)}, wire_bytes=8)

    def collective(self) -> None:
        ranks, number = (
            self.rng.sample(range(self.num_ranks), self.rng.randint(2, self.num_ranks)),
            len(self.program.jobs),
        )
        reads = {rank: (self.rng.choice(self.keys[rank]),) for rank in ranks}
        writes = {rank: (self.new_value(rank, f"c{number}"),) for rank in ranks}
        self.add("collective", tuple(ranks), reads, writes, wire_bytes=8)

    def gradient(self, name: str) -> None:
        """Addends on several ranks, sent to one and added up there."""
        home = self.rng.randrange(self.num_ranks)
        total: str | None = None
        num_addends = self.rng.randint(1, 3)
        for addend in range(num_addends):
            rank, key = self.rng.randrange(self.num_ranks), f"{name}.{addend}"
            reads = {rank: self.some(rank)}
            self.new_value(rank, key, "gradient")
            self.add(self.rng.choice(["B", "dW"]), (rank,), reads, {rank: (key,)}, contributes=(name,))
            if rank != home:
                self.new_value(home, key, "gradient")
                self.add("transfer", (rank, home), {rank: (key,)}, {home: (key,)}, wire_bytes=8)
            addends = (key,) if total is None else (total, key)
            total = self.new_value(home, f"{name}.sum{addend}", "gradient")
            self.add("move", (home,), {home: addends}, {home: (total,)})
        assert total is not None
        self.program.results.append(Result(name, home, total, num_addends))


def make_program(rng: random.Random, num_jobs: int) -> Program:
    """A random program, with an explicit order and constraints that it can follow."""
    maker = _Maker(rng)
    kinds = ["F", "F", "B", "dI", "dW", "move"] + ["transfer", "collective"] * 3 * (maker.num_ranks > 1)
    while len(maker.program.jobs) < num_jobs:
        kind = rng.choice(kinds)
        if kind in ("transfer", "collective"):
            getattr(maker, kind)()
        else:
            maker.local(kind)
    for name in ("grad.a", "grad.b")[: rng.randint(0, 2)]:
        maker.gradient(name)
    program = maker.program
    order = random_order(program.jobs, rng)
    program.constraints = [
        tuple(job.name for job in pair) for pair in zip(order, order[3:], strict=False) if rng.random() < 0.2
    ]
    for rank in range(maker.num_ranks):
        if rng.random() < 0.5:
            program.explicit[rank] = [job.name for job in order if job.computes and job.ranks[0] == rank]
    rng.shuffle(program.jobs)
    return program


def random_order(jobs: Sequence[Job], rng: random.Random) -> list[Job]:
    """The jobs in an order in which every one finds what it reads."""
    unwritten = {place for job in jobs for place in job.written_places()}
    left, order = list(jobs), []
    while left:
        job = rng.choice([job for job in left if unwritten.isdisjoint(job.read_places())])
        left.remove(job)
        order.append(job)
        unwritten -= set(job.written_places())
    return order


@st.composite
def programs(draw: st.DrawFn, most_jobs: int = 25) -> Program:
    """Random programs of up to four ranks."""
    return make_program(draw(st.randoms(use_true_random=False)), draw(st.integers(0, most_jobs)))


class Stuck(Exception):
    """All ranks that are not done wait."""


def contents(program: Program) -> dict[Place, object]:
    """What every value holds, job after job on one machine: the job's name, and what that job read."""
    there: dict[Place, object] = {}
    for job in random_order(program.jobs, random.Random(0)):
        read = tuple(there.get(place, place) for place in sorted(job.read_places()))
        there.update((place, (job.name, read, place.key)) for place in job.written_places())
    return there


class Interpreter:
    """Runs action lists in turns. Sends, receives and collectives wait; messages and collectives carry no names.

    A value holds what `contents` says if the schedule is right. Reading what is not there raises KeyError.
    """

    def __init__(self, program: Program, actions: Mapping[int, Sequence[Action]]) -> None:
        self.jobs = {job.name: job for job in program.jobs}
        self.todo = {rank: list(row) for rank, row in actions.items()}
        written = {place for job in program.jobs for place in job.written_places()}
        self.there: dict[int, dict[str, object]] = {rank: {} for rank in actions}
        for value in program.values:
            if value.place not in written:
                self.there[value.rank][value.key] = value.place
        self.done: list[str] = []

    def run(self) -> Interpreter:
        while any(self.todo.values()):
            moved = [self._step(rank) for rank in self.todo]
            if not any(moved):
                raise Stuck({rank: row[0] for rank, row in self.todo.items() if row})
        return self

    def _step(self, rank: int) -> bool:
        """Let a rank do its next action if all that take part are there; tell whether it did."""
        if not self.todo[rank]:
            return False
        action = self.todo[rank][0]
        if action.kind == "FREE":
            del self.there[rank][action.name]
            self.todo[rank].pop(0)
            return True
        group = (rank, *action.peers)
        heads = [self.todo[member][0] for member in group if self.todo[member]]
        wanted = {"SEND": "RECV", "RECV": "SEND"}.get(action.kind, action.kind)
        meets = len(heads) == len(group) and all(
            head.kind == wanted and {head.rank, *head.peers} == set(group) for head in heads[1:]
        )
        if not meets:
            return False
        parts = [self.jobs[head.name] for head in heads]
        read = tuple(
            self.there[place.rank][place.key]
            for place in sorted(
                place
                for head, job in zip(heads, parts, strict=True)
                for place in job.read_places()
                if place.rank == head.rank
            )
        )
        name = next((job.name for head, job in zip(heads, parts, strict=True) if head.kind == "SEND"), parts[0].name)
        for head, job in zip(heads, parts, strict=True):
            for key in job.writes.get(head.rank, ()):
                self.there[head.rank][key] = (name, read, key)
            self.todo[head.rank].pop(0)
        self.done.append(name)
        return True


def pipeline(orders: Orders, seconds: Mapping[str, float], transfer_seconds: float = 0.0) -> Program:
    """Training with one weight a stage; stages without backward work keep nothing for it."""
    program = Program()
    rank_of = {compute.stage: rank for rank, order in orders.items() for compute in order}
    splits = any(compute.kind == "dI" for order in orders.values() for compute in order)
    trained = {compute.stage for order in orders.values() for compute in order if compute.kind != "F"}
    microbatches = sorted({compute.microbatch for order in orders.values() for compute in order})
    for stage, rank in rank_of.items():
        program.value(rank, f"w{stage}", 4096, "parameter", pinned=True)

    def moved(key: str, source: int, destination: int) -> str:
        program.value(source, key, 256)
        if source != destination:
            program.value(destination, key, 256)
            where = ({source: (key,)}, {destination: (key,)})
            program.jobs.append(
                Job(f"send {key}", "transfer", (source, destination), *where, seconds=transfer_seconds, wire_bytes=256)
            )
        return key

    def add(kind: str, stage: int, microbatch: int, reads: list[str], writes: list[str], *contributes: str) -> None:
        rank = rank_of[stage]
        places = ({rank: tuple(reads)}, {rank: tuple(writes)})
        name = f"{kind}{stage}.{microbatch}"
        program.jobs.append(
            Job(name, kind, (rank,), *places, str(stage), microbatch, seconds[kind], contributes=contributes)
        )

    last = max(rank_of)
    for stage, microbatch in itertools.product(sorted(rank_of), microbatches):
        rank, number = rank_of[stage], f"{stage}.{microbatch}"
        read = f"h{stage - 1}.{microbatch}" if stage else program.value(rank, f"x.{microbatch}", 256, "input")
        written = [moved(f"h{number}", rank, rank_of[stage + 1])] if stage < last else []
        saved = [program.value(rank, f"s{number}", 1024, "saved")] if stage in trained else []
        add("F", stage, microbatch, [read, f"w{stage}"], written + saved)
        if stage not in trained:
            continue
        gradient = [f"g{stage + 1}.{microbatch}"] if stage < last else []
        onward = [moved(f"g{number}", rank, rank_of[stage - 1])] if stage - 1 in trained else []
        summed = [f"G{stage}.{microbatch - 1}"] if microbatch else []
        is_last = microbatch == microbatches[-1]
        total = program.value(rank, f"G{number}", 4096, "gradient", pinned=is_last)
        if splits:
            kept = program.value(rank, f"t{number}", 512, "saved")
            add("dI", stage, microbatch, [*saved, *gradient, f"w{stage}"], [*onward, kept])
            add("dW", stage, microbatch, [*saved, kept, *summed], [total], f"G{stage}")
        else:
            add("B", stage, microbatch, [*saved, *gradient, f"w{stage}", *summed], [*onward, total], f"G{stage}")
        if is_last:
            program.results.append(Result(f"G{stage}", rank, total, len(microbatches)))
    program.explicit = {rank: [str(compute) for compute in order] for rank, order in orders.items()}
    return program
