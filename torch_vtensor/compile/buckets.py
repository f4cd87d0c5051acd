"""Gradients of parameters that one backward pass makes move together: few large collectives instead of many small ones.

::

    B layer 1 makes d w, d v, d b      all_reduce d w            all_reduce [d w, d v, d b]
                                       all_reduce d v      →
                                       all_reduce d b

A bucket waits for nothing that its members would not wait for, so communication overlaps with backward as before.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torch_vtensor.compile.communication import Buffer, Collective, Step
from torch_vtensor.compile.schedules.job import Job
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask
from torch_vtensor.compile.topology import Topology

if TYPE_CHECKING:
    from torch_vtensor.compile.program import Move

BUCKET_BYTES = 25 * 2**20
"""The most that a bucket holds; a larger gradient moves alone, uncopied. DistributedDataParallel's default."""


class Bucket(NamedTuple):
    """Collectives of several gradients in one: ``step`` is of all their elements, one behind the other.

    For a reduce-scatter these are the first rank's shards of all, then the second rank's.
    """

    moves: tuple[Move, ...]
    step: Collective

    @property
    def tensor(self) -> LogicalTensor:
        """One of the tensors, for the dtype that all have."""
        return self.moves[0].tensor

    def keys(self, rank: int, *, written: bool) -> list[str]:
        """What the rank gives or gets, in order."""
        return [
            move.keys[buffer]
            for move in self.moves
            for buffer in (move.step.writes(rank) if written else move.step.reads(rank))
        ]

    def put_together(self, gradients: Sequence[Tensor]) -> Tensor:
        """What a rank gives to the step."""
        num_parts = len(self.step.ranks) if self.step.kind == "reduce_scatter" else 1
        shards = []
        for move, gradient in zip(self.moves, gradients, strict=True):
            dim = getattr(move.step, "scatter_dim", None) or 0
            shards.append([gradient] if num_parts == 1 else gradient.chunk(num_parts, dim))
        return torch.cat([parts[number].reshape(-1) for number in range(num_parts) for parts in shards])

    def take_apart(self, whole: Tensor, rank: int) -> list[Tensor]:
        """What the rank gets, out of what the step brings: views."""
        shapes = [move.step.writes(rank)[0].mask.shape for move in self.moves]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def fill_buckets(jobs: Sequence[Job], work: dict[str, Any], topology: Topology) -> tuple[list[Job], dict[str, Any]]:
    """Jobs in which gradients of one pass move in buckets, and the work of these; the rest as it is."""
    groups = _group(jobs, work)
    made: dict[str, Job] = {}
    member_of: dict[str, str] = {}
    filled = dict(work)
    for members in groups:
        bucket = Bucket(tuple(work[job.name] for job in members), _step([work[job.name].step for job in members]))
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
    """The members of each bucket: collectives of a kind among the same ranks, of what the same passes make."""
    writer = {(rank, key): job for job in jobs for rank, keys in job.writes.items() for key in keys}
    full: list[list[Job]] = []
    open_: dict[tuple[Any, ...], list[Job]] = {}
    number_of: dict[str, int] = {}  # of the bucket that a collective is in
    numbers: dict[tuple[Any, ...], int] = {}
    sizes: defaultdict[tuple[Any, ...], int] = defaultdict(int)

    def origin(rank: int, key: str) -> Any:
        job = writer.get((rank, key))
        while job is not None and job.kind == "move" and job.reads.get(rank):
            job = writer.get((rank, job.reads[rank][-1]))
        return None if job is None else number_of.get(job.name, job.name)

    for job in jobs:
        move = work[job.name]
        if job.kind != "collective" or move.tensor.kind != "parameter":
            continue
        step: Step = move.step
        if not isinstance(step, Collective) or step.kind not in ("all_reduce", "reduce_scatter"):
            continue
        num_bytes = step.inputs[0].mask.num_elements * move.tensor.dtype.itemsize
        if num_bytes > BUCKET_BYTES or any(len(keys) != 1 for keys in job.reads.values()):
            continue
        origins = tuple(origin(rank, keys[0]) for rank, keys in job.reads.items())
        kind = (step.kind, step.ranks, move.tensor.dtype, job.microbatch, origins)
        if kind not in open_ or sizes[kind] + num_bytes > BUCKET_BYTES:
            open_[kind], sizes[kind], numbers[kind] = [], 0, len(full)
            full.append(open_[kind])
        open_[kind].append(job)
        sizes[kind] += num_bytes
        number_of[job.name] = numbers[kind]
    return [members for members in full if len(members) > 1]


def _step(steps: Sequence[Collective]) -> Collective:
    """One collective of all elements."""
    first = steps[0]
    given = sum(step.inputs[0].mask.num_elements for step in steps)
    got = sum(step.outputs[0].mask.num_elements for step in steps)

    def flat(buffers: Iterable[Buffer], size: int) -> tuple[Buffer, ...]:
        return tuple(Buffer(buffer.rank, Mask.of((size,))) for buffer in buffers)

    dim = 0 if first.kind == "reduce_scatter" else None
    return Collective(first.kind, flat(first.inputs, given), flat(first.outputs, got), None, dim)


def _job(members: Sequence[Job], bucket: Bucket, topology: Topology) -> Job:
    first, itemsize = members[0], bucket.tensor.dtype.itemsize
    ranks = bucket.step.ranks
    return Job(
        f"{first.name} and {len(members) - 1} more",
        "collective",
        first.ranks,
        reads={rank: tuple(bucket.keys(rank, written=False)) for rank in first.ranks},
        writes={rank: tuple(bucket.keys(rank, written=True)) for rank in first.ranks},
        stage=first.stage,
        microbatch=first.microbatch,
        seconds=bucket.step.seconds(itemsize, topology),
        wire_bytes=sum(bucket.step.bytes_sent(rank, itemsize) for rank in ranks),
        workspace_bytes=bucket.step.inputs[0].mask.num_elements * itemsize,  # the copy that lies in one piece
        one_by_one=True,
    )


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
