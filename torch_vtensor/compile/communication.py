"""Communication as data: which parts of a tensor move between which ranks, in which order.

A step reads and writes named buffers. Run in the order given, each rank its own, with every step waited for, the steps
cannot deadlock: each rank's are a subsequence of one order that all share.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from torch_vtensor.compile.tensor_view import Mask
from torch_vtensor.compile.topology import Topology


class Placed(NamedTuple):
    """A part of a tensor on a rank."""

    rank: int
    mask: Mask

    def __str__(self) -> str:
        """``rank 2 [0:4, 2:6]``."""
        return f"rank {self.rank} {self.mask}"


class Buffer(NamedTuple):
    """Bytes on a rank by name. Its shape is the mask's; ``tag`` is 0 for what existed before, unique for all others.

    The chunk of a buffer that a step writes tells which addend of how many it is there, in no relation to what the
    addends were before.
    """

    rank: int
    mask: Mask
    tag: int = 0

    def __str__(self) -> str:
        """``2:[0:4, 2:6]'7``: rank, part, tag."""
        tag = f"'{self.tag}" if self.tag else ""
        return f"{self.rank}:{self.mask}{tag}"


CollectiveKind: TypeAlias = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


class Collective(NamedTuple):
    """One collective call of a group of ranks, shards even and in the order of ``inputs``.

    ``inputs`` and ``outputs`` hold one buffer for each rank, in an order that need not be ascending; of a broadcast
    ``inputs`` is the first rank's buffer and ``outputs`` are those of the others.

    ============== ================================================================================
    all_reduce     every output is the sum of all inputs
    all_gather     every output is the concatenation of all inputs along ``gather_dim``
    reduce_scatter output i is shard i along ``scatter_dim`` of the sum of all inputs
    all_to_all     output i is the concatenation along ``gather_dim`` of all inputs' shards i along ``scatter_dim``
    broadcast      every output is the input
    ============== ================================================================================
    """

    kind: CollectiveKind
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    gather_dim: int | None = None
    scatter_dim: int | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who takes part, in the order of shards; the one who has it first, for a broadcast."""
        buffers = self.inputs if self.kind != "broadcast" else self.inputs + self.outputs
        return tuple(buffer.rank for buffer in buffers)

    @property
    def copies_what_it_takes(self) -> bool:
        """Whether each rank's input is copied to begin, for its shards to lie one behind the other."""
        return self.scatter_dim is not None and not self._is_in_order(self.scatter_dim)

    @property
    def copies_what_it_brings(self) -> bool:
        """Whether the shards that a rank gets are copied in the end, to lie as those of one tensor do."""
        return self.gather_dim is not None and not self._is_in_order(self.gather_dim)

    def _is_in_order(self, dim: int) -> bool:
        """Whether shards along a dimension lie in memory as torch takes and brings them, by ascending ranks."""
        return dim == 0 and all(one < other for one, other in itertools.pairwise(self.ranks))

    def reads(self, rank: int) -> tuple[Buffer, ...]:
        """Buffers that this rank gives."""
        return tuple(buffer for buffer in self.inputs if buffer.rank == rank)

    def writes(self, rank: int) -> tuple[Buffer, ...]:
        """Buffers that this rank gets."""
        return tuple(buffer for buffer in self.outputs if buffer.rank == rank)

    def bytes_sent(self, rank: int, itemsize: int) -> int:
        """Bytes that this rank sends, in the usual ring algorithm rounded up to whole elements."""
        ranks = self.ranks
        if rank not in ranks:
            return 0
        others, elements = len(ranks) - 1, self.inputs[0].mask.num_elements
        if self.kind == "broadcast":  # handed on from rank to rank
            return 0 if rank == ranks[-1] else elements * itemsize
        if self.kind == "all_gather":
            return others * elements * itemsize
        times = 2 if self.kind == "all_reduce" else 1
        return -(-times * elements * others // len(ranks)) * itemsize

    def workspace_bytes(self, itemsize: int) -> int:
        """Bytes that each rank needs until it is done, besides inputs and outputs: copies of the one and the other.

        Outputs are copied at the end alone, when nothing else is computed.
        """
        num_elements = self.inputs[0].mask.num_elements * self.copies_what_it_takes
        num_elements += self.outputs[0].mask.num_elements * self.copies_what_it_brings
        return num_elements * itemsize

    def seconds(self, itemsize: int, topology: Topology) -> float:
        """Predicted time."""
        return topology.collective_seconds(self.kind, self.ranks, self.inputs[0].mask.num_elements * itemsize)

    def renamed(self, buffer: Callable[[Buffer], Buffer]) -> Collective:
        """The same with other buffers."""
        return self._replace(inputs=tuple(map(buffer, self.inputs)), outputs=tuple(map(buffer, self.outputs)))

    def __str__(self) -> str:
        """``all_gather dim 0 of ranks 0, 1: 0:[0:2], 1:[2:4] -> 0:[0:4]'1, 1:[0:4]'2``."""
        dims = "".join(
            f" {word} {dim}"
            for word, dim in (("scatters dim", self.scatter_dim), ("gathers dim", self.gather_dim))
            if dim is not None
        )
        inputs, outputs = (", ".join(map(str, buffers)) for buffers in (self.inputs, self.outputs))
        return f"{self.kind}{dims} of ranks {', '.join(map(str, self.ranks))}: {inputs} -> {outputs}"


class Transfer(NamedTuple):
    """One message: the part of ``source`` that ``destination`` names goes to another rank."""

    source: Buffer
    destination: Buffer

    @property
    def ranks(self) -> tuple[int, ...]:
        """Sender, receiver."""
        return self.source.rank, self.destination.rank

    def reads(self, rank: int) -> tuple[Buffer, ...]:
        """The source, on its rank."""
        return (self.source,) if rank == self.source.rank else ()

    def writes(self, rank: int) -> tuple[Buffer, ...]:
        """The destination, on its rank."""
        return (self.destination,) if rank == self.destination.rank else ()

    def bytes_sent(self, rank: int, itemsize: int) -> int:
        """All of the destination, by the sender."""
        return self.destination.mask.num_elements * itemsize if rank == self.source.rank else 0

    def renamed(self, buffer: Callable[[Buffer], Buffer]) -> Transfer:
        """The same with other buffers."""
        return Transfer(buffer(self.source), buffer(self.destination))

    def __str__(self) -> str:
        """``transfer 0:[0:4] -> 1:[0:2]'1``."""
        return f"transfer {self.source} -> {self.destination}"


class Part(NamedTuple):
    """A region of a buffer, in the indices of the tensor."""

    buffer: Buffer
    region: Mask

    def __str__(self) -> str:
        """The buffer, with the region where that is not all of it."""
        whole = self.buffer.mask.intervals == self.region.intervals
        return str(self.buffer) if whole else f"{self.buffer} at {self.region}"


class Assemble(NamedTuple):
    """Local work of one rank: parts put side by side, added up where they overlap, zeros where none is."""

    parts: tuple[Part, ...]
    output: Buffer

    @property
    def ranks(self) -> tuple[int, ...]:
        """The one rank."""
        return (self.output.rank,)

    @property
    def is_view(self) -> bool:
        """Whether the output is a slice of the one part's buffer, so that nothing has to be copied."""
        return len(self.parts) == 1 and self.parts[0].region.intervals == self.output.mask.intervals

    def reads(self, rank: int) -> tuple[Buffer, ...]:
        """The parts' buffers, on its rank, each once."""
        return tuple(dict.fromkeys(part.buffer for part in self.parts)) if rank == self.output.rank else ()

    def writes(self, rank: int) -> tuple[Buffer, ...]:
        """The output, on its rank."""
        return (self.output,) if rank == self.output.rank else ()

    def bytes_sent(self, rank: int, itemsize: int) -> int:
        """None: this is local."""
        return 0

    def renamed(self, buffer: Callable[[Buffer], Buffer]) -> Assemble:
        """The same with other buffers."""
        return Assemble(tuple(Part(buffer(part.buffer), part.region) for part in self.parts), buffer(self.output))

    def __str__(self) -> str:
        """``assemble 0:[0:4], 0:[4:8]'2 -> 0:[0:8]'3``."""
        return f"assemble {', '.join(map(str, self.parts)) or 'zeros'} -> {self.output}"


Step: TypeAlias = Collective | Transfer | Assemble


class StepFacts(NamedTuple):
    """What a step reads and writes on each of those of its ranks that are looked at, its predicted time, and bytes.

    Units:  ``wire_bytes`` that all ranks together send, ``workspace_bytes`` that each needs besides.
    """

    step: Step
    ranks: tuple[int, ...]
    reads: Mapping[int, tuple[Buffer, ...]]
    writes: Mapping[int, tuple[Buffer, ...]]
    seconds: float
    wire_bytes: int
    workspace_bytes: int

    @classmethod
    def of(cls, step: Step, itemsize: int, topology: Topology, planned: Collection[int] | None = None) -> StepFacts:
        """Look at a step of a tensor with elements of this size, on all of its ranks or on those that are planned."""
        ranks = step.ranks if planned is None else tuple([rank for rank in step.ranks if rank in planned])
        reads = {rank: tuple(dict.fromkeys(buffers)) for rank in ranks if (buffers := step.reads(rank))}
        writes = {rank: buffers for rank in ranks if (buffers := step.writes(rank))}
        wire_bytes = sum(step.bytes_sent(rank, itemsize) for rank in step.ranks)
        workspace_bytes = step.workspace_bytes(itemsize) if isinstance(step, Collective) else 0
        return cls(step, ranks, reads, writes, seconds_of((step,), itemsize, topology), wire_bytes, workspace_bytes)


@dataclass(frozen=True)
class Communication:
    """How what ranks need of a tensor comes to exist, from what they have.

    ``have`` and ``need`` name the buffer of each part. A need that is met by what the rank has, as it is, is that very
    buffer. What several steps read must not be overwritten; nothing here overwrites. ``planned`` are the ranks that
    this is about where it is not about all that take part in the steps.
    """

    have: Mapping[Placed, Buffer]
    need: Mapping[Placed, Buffer]
    steps: tuple[Step, ...]
    planned: frozenset[int] | None = None

    def on(self, ranks: frozenset[int]) -> Communication:
        """What it is to these ranks alone; their steps have all members nevertheless."""
        have, need = (
            {part: buffer for part, buffer in buffers.items() if part.rank in ranks}
            for buffers in (self.have, self.need)
        )
        return Communication(
            have, need, tuple([step for step in self.steps if not ranks.isdisjoint(step.ranks)]), ranks
        )

    def of_rank(self, rank: int) -> tuple[Step, ...]:
        """The steps that a rank takes part in, in order."""
        return tuple(step for step in self.steps if rank in step.ranks)

    def bytes_sent(self, itemsize: int) -> Counter[int]:
        """Bytes that each rank sends."""
        sent: Counter[int] = Counter()
        for step in self.steps:
            for rank in step.ranks:
                sent[rank] += step.bytes_sent(rank, itemsize)
        return +sent

    @cached_property
    def sent(self) -> frozenset[Buffer]:
        """Every buffer that some step reads."""
        return frozenset(buffer for step in self.steps for rank in self._ranks_of(step) for buffer in step.reads(rank))

    @cached_property
    def buffers(self) -> frozenset[Buffer]:
        """Every buffer."""
        written = (buffer for step in self.steps for rank in self._ranks_of(step) for buffer in step.writes(rank))
        return frozenset((*self.have.values(), *self.need.values(), *self.sent, *written))

    def _ranks_of(self, step: Step) -> Iterable[int]:
        return step.ranks if self.planned is None else self.planned.intersection(step.ranks)

    def facts(self, itemsize: int, topology: Topology) -> tuple[StepFacts, ...]:
        """About each step, in order; found out once for each size of elements."""
        asked = itemsize, topology
        if asked not in self._facts:
            self._facts[asked] = tuple(StepFacts.of(step, itemsize, topology, self.planned) for step in self.steps)
        return self._facts[asked]

    @cached_property
    def _facts(self) -> dict[tuple[int, Topology], tuple[StepFacts, ...]]:
        return {}

    @cached_property
    def given(self) -> tuple[Placed, ...]:
        """The parts that are there before and that steps read."""
        there = (Placed(buffer.rank, buffer.mask) for buffer in self.sent)
        return tuple(part for part in there if self.have.get(part) in self.sent)

    @cached_property
    def met(self) -> Mapping[Placed, Placed]:
        """Needs met by what is there before, and by which part of that: of a whole value the first chunk is all."""
        parts = {need: Placed(buffer.rank, buffer.mask) for need, buffer in self.need.items()}
        return {need: part for need, part in parts.items() if self.have.get(part) == self.need[need]}

    def shifted(self, by: int) -> Communication:
        """The same between ranks of other numbers."""
        ranks = {buffer.rank for buffer in self.buffers}
        return self.renamed({rank: rank + by for rank in ranks}, ())

    def renamed(self, rank_of: Mapping[int, int], offsets: Sequence[int]) -> Communication:
        """The same between other ranks, of another region of the tensor."""
        renamed: dict[Buffer, Buffer] = {}
        moved: dict[Mask, Mask] = {}
        stays = not any(offsets)

        def move(mask: Mask) -> Mask:
            if stays:
                return mask
            new = moved.get(mask)
            if new is None:
                new = moved[mask] = mask.moved(offsets)
            return new

        def rename(buffer: Buffer) -> Buffer:
            new = renamed.get(buffer)
            if new is None:
                new = renamed[buffer] = Buffer(rank_of[buffer.rank], move(buffer.mask), buffer.tag)
            return new

        def rename_step(step: Step) -> Step:
            if isinstance(step, Assemble) and not stays:
                step = Assemble(tuple(Part(part.buffer, move(part.region)) for part in step.parts), step.output)
            return step.renamed(rename)

        have, need = (
            {Placed(rank_of[placed.rank], move(placed.mask)): rename(buffer) for placed, buffer in buffers.items()}
            for buffers in (self.have, self.need)
        )
        return Communication(have, need, tuple(map(rename_step, self.steps)))

    def __str__(self) -> str:
        """One line a step; what is met without one is not mentioned."""
        return "\n".join(map(str, self.steps)) or "no communication"


def batch_seconds(batch: Iterable[Transfer], itemsize: int, topology: Topology) -> dict[int, float]:
    """How long a batch of messages keeps each rank busy: what it sends and what it receives run at the same time."""
    latency: dict[int, float] = {}
    sending: dict[int, float] = {}
    receiving: dict[int, float] = {}
    for transfer in batch:
        source, destination = transfer.ranks
        link = topology.link((source, destination))
        seconds = transfer.destination.mask.num_elements * itemsize / link.bytes_per_second
        sending[source] = sending.get(source, 0.0) + seconds
        receiving[destination] = receiving.get(destination, 0.0) + seconds
        for rank in transfer.ranks:
            latency[rank] = latency.get(rank, topology.launch_seconds) + link.latency_seconds
    return {rank: wait + max(sending.get(rank, 0.0), receiving.get(rank, 0.0)) for rank, wait in latency.items()}


def seconds_of(steps: Iterable[Step], itemsize: int, topology: Topology) -> float:
    """Predicted time until the last rank is done: steps of different ranks run side by side.

    Messages that follow each other directly are one batch; local work is free.
    """
    done: dict[int, float] = {}
    for is_batch, run in itertools.groupby(steps, lambda step: isinstance(step, Transfer)):
        if is_batch:
            batch = [step for step in run if isinstance(step, Transfer)]
            busy = batch_seconds(batch, itemsize, topology)
            starts = dict(done)
            for transfer in batch:
                end = max(starts.get(rank, 0.0) + busy[rank] for rank in transfer.ranks)
                done.update({rank: max(done.get(rank, 0.0), end) for rank in transfer.ranks})
            continue
        for step in run:
            if isinstance(step, Collective):
                start = max(done.get(rank, 0.0) for rank in step.ranks)
                done.update(dict.fromkeys(step.ranks, start + step.seconds(itemsize, topology)))
    return max(done.values(), default=0.0)
