"""Parameters that one pass reads, and gradients that one makes, move together: few collectives instead of many.

::

    B layer 1 makes d w, d v, d b      reduce_scatter d w        reduce_scatter [d w, d v, d b]
                                       reduce_scatter d v   →
                                       reduce_scatter d b

    F layer 2 reads w, v, b            all_gather w              all_gather [w, v, b]
                                       all_gather v         →
                                       all_gather b

Each tensor keeps memory of its own: nothing is copied to put them together, and what the collective of one alone would
copy is copied of all at once. A bucket waits for nothing that its members
would not wait for, and nothing waits for it that would not wait for each of them, so communication overlaps with passes
as before.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_vtensor.compile.communication import Collective, Step
from torch_vtensor.compile.schedules.job import Job, Keys
from torch_vtensor.compile.tensor_view import LogicalTensor
from torch_vtensor.compile.topology import Topology

if TYPE_CHECKING:
    from torch_vtensor.compile.program import Move

BUCKET_BYTES = 25 * 2**20
"""The most that a bucket of gradients holds; a larger gradient moves alone. DistributedDataParallel's default."""


class Bucket(NamedTuple):
    """Collectives of one kind among the same ranks, of several tensors of one dtype, begun as one."""

    moves: tuple[Move, ...]

    @property
    def tensor(self) -> LogicalTensor:
        """One of the tensors, for the dtype that all have."""
        return self.moves[0].tensor

    @property
    def steps(self) -> tuple[Collective, ...]:
        """The collective of each tensor."""
        return tuple(move.step for move in self.moves if isinstance(move.step, Collective))


def fill_buckets(jobs: Sequence[Job], work: dict[str, Any], topology: Topology) -> tuple[list[Job], dict[str, Any]]:
    """Jobs in which parameters and gradients of one pass move in buckets, and the work of these; the rest as it is."""
    groups = _group(jobs, work)
    made: dict[str, Job] = {}
    member_of: dict[str, str] = {}
    filled = dict(work)
    for members in groups:
        bucket = Bucket(tuple(work[job.name] for job in members))
        job = _job(members, bucket, topology)
        made[job.name], filled[job.name] = job, bucket
        for member in members:
            member_of[member.name] = job.name
            del filled[member.name]
    if not made:
        return list(jobs), filled
    named = dict.fromkeys(member_of.get(job.name, job.name) for job in jobs)
    by_name = {job.name: job for job in jobs} | made
    return _after_what_they_read([by_name[name] for name in named]), filled


def _group(jobs: Sequence[Job], work: Mapping[str, Any]) -> list[list[Job]]:
    """The members of each bucket.

    These are gradients that the same passes make, summed among the same ranks, and parameters in shards that the same
    passes read, gathered among the same ranks.
    """
    ends = _Ends(jobs)
    full: list[list[Job]] = []
    open_: dict[Hashable, int] = {}  # the number of the bucket that takes more of a kind
    sizes: defaultdict[int, int] = defaultdict(int)
    for job in jobs:
        step = _step_of(job, work)
        if step is None or any(len(keys) != 1 for keys in job.reads.values()):
            continue
        tensor = work[job.name].tensor
        writers = ends.writers(job)
        kind: Hashable = (step.kind, step.ranks, tensor.dtype, job.microbatch, writers)
        if step.kind == "all_gather":
            # Shards that are there from the start have in common who reads them, what is made of these the bucket.
            kind = kind if any(writers) else (kind, ends.readers(job))
            num_bytes = 0  # a pass has to have all that it reads, however much that is
        else:
            num_bytes = step.inputs[0].mask.num_elements * tensor.dtype.itemsize
            if num_bytes > BUCKET_BYTES:
                continue
        if kind not in open_ or sizes[open_[kind]] + num_bytes > BUCKET_BYTES:
            open_[kind] = len(full)
            full.append([])
        number = open_[kind]
        full[number].append(job)
        sizes[number] += num_bytes
        ends.join(job, number)
    return [members for members in full if len(members) > 1]


def _step_of(job: Job, work: Mapping[str, Any]) -> Collective | None:
    """The collective of a job that may move in a bucket: of a parameter or its gradient."""
    if job.kind != "collective" or work[job.name].tensor.kind != "parameter":
        return None
    step: Step = work[job.name].step
    kinds = ("all_reduce", "reduce_scatter", "all_gather")
    return step if isinstance(step, Collective) and step.kind in kinds else None


class _Ends:
    """Where what a collective moves comes from, and where it goes."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._writer = {(rank, key): job for job in jobs for rank, keys in job.writes.items() for key in keys}
        self._bucket_of: dict[str, int] = {}

    @cached_property
    def _readers(self) -> Mapping[tuple[int, str], Sequence[Job]]:
        found: defaultdict[tuple[int, str], list[Job]] = defaultdict(list)
        for job in self._jobs.values():
            for rank, keys in job.reads.items():
                for key in keys:
                    found[rank, key].append(job)
        return found

    def join(self, job: Job, number: int) -> None:
        """Note the number of the bucket that a job is a member of."""
        self._bucket_of[job.name] = number

    def writers(self, job: Job) -> tuple[frozenset[str | int], ...]:
        """By rank, the passes, communications and buckets that make what it reads, through whatever sums these."""
        return tuple([self._writers_of([(rank, key) for key in keys]) for rank, keys in job.reads.items()])

    def _writers_of(self, ahead: list[tuple[int, str]]) -> frozenset[str | int]:
        found: set[str | int] = set()
        seen: set[str] = set()
        while ahead:
            job = self._writer.get(ahead.pop())
            if job is None or job.name in seen:
                continue
            seen.add(job.name)
            if job.kind == "move":
                ahead += job.read_places()
            else:
                found.add(self._bucket_of.get(job.name, job.name))
        return frozenset(found)

    def readers(self, job: Job) -> frozenset[str]:
        """The passes that read what it writes, through whatever else moves that."""
        found: set[str] = set()
        seen: set[str] = set()
        ahead = list(job.written_places())
        while ahead:
            for reader in self._readers.get(ahead.pop(), ()):
                if reader.name in seen:
                    continue
                seen.add(reader.name)
                if reader.computes:
                    found.add(reader.name)
                else:
                    ahead += reader.written_places()
        return frozenset(found)


def _job(members: Sequence[Job], bucket: Bucket, topology: Topology) -> Job:
    first, steps, itemsize = members[0], bucket.steps, bucket.tensor.dtype.itemsize
    num_bytes = sum(step.inputs[0].mask.num_elements for step in steps) * itemsize
    return Job(
        f"{first.name} and {len(members) - 1} more",
        "collective",
        first.ranks,
        reads=_together([job.reads for job in members]),
        writes=_together([job.writes for job in members]),
        stage=first.stage,
        microbatch=first.microbatch,
        seconds=topology.collective_seconds(steps[0].kind, steps[0].ranks, num_bytes),
        wire_bytes=sum(job.wire_bytes for job in members),
        workspace_bytes=sum(job.workspace_bytes for job in members),
        one_by_one=True,
    )


def _together(keys_of: Sequence[Keys]) -> Keys:
    return {rank: tuple([key for keys in keys_of for key in keys[rank]]) for rank in keys_of[0]}


def _after_what_they_read(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs, each after those that it reads from, otherwise in the order given."""
    writer = {
        (rank, key): number for number, job in enumerate(jobs) for rank, keys in job.writes.items() for key in keys
    }
    readers: list[list[int]] = [[] for _ in jobs]
    missing = [0] * len(jobs)
    for number, job in enumerate(jobs):
        places = ((rank, key) for rank, keys in job.reads.items() for key in keys)
        for before in {writer[place] for place in places if place in writer}:
            readers[before].append(number)
            missing[number] += 1
    ready = [number for number, count in enumerate(missing) if not count]
    ordered: list[Job] = []
    while ready:
        number = heapq.heappop(ready)
        ordered.append(jobs[number])
        for after in readers[number]:
            missing[after] -= 1
            if not missing[after]:
                heapq.heappush(ready, after)
    assert len(ordered) == len(jobs), "a bucket waits for itself"
    return ordered
