"""Exact point-to-point: for any parts that ranks have and any that they need, the messages that make the one the other.

What a rank has it never receives. What it lacks comes from the nearest rank that has it: the same node first, then the
one that sends least. Addends that one rank has are added up before they are sent, and where several ranks need a sum,
each adds up one piece of it for all; what is too small for pieces is reduced where its addends are and sent from there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch_vtensor.compile.communication import (
    Assemble,
    Buffer,
    Collective,
    Part,
    Placed,
    Step,
    Transfer,
    seconds_of,
)
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, Mask, ValueChunk, cells, cut_evenly, merge, tiling
from torch_vtensor.compile.topology import Topology


def find_point_to_point(
    have: Iterable[Buffer], need: Sequence[Placed], itemsize: int, topology: Topology, tags: Iterator[int]
) -> tuple[dict[Placed, Buffer], tuple[Step, ...]]:
    """Which buffer holds each need, and the steps that fill those buffers.

    Effects: takes a tag for each buffer that a step writes.
    Raises:  ValueError for a need of what nobody has.
    """
    return _Planner(tuple(have), itemsize, topology, tags).plan(need)


@dataclass(frozen=True)
class _Sum:
    """Addends of a box: who holds each."""

    box: Mask
    holders: Mapping[ValueChunk, tuple[Buffer, ...]]


@dataclass
class _Planner:
    have: tuple[Buffer, ...]
    itemsize: int
    topology: Topology
    tags: Iterator[int]
    # Steps in the order of these lists: addends of one rank, messages, sums, messages that spread them, what is needed.
    local_sums: list[Step] = field(default_factory=list)
    messages: list[Transfer] = field(default_factory=list)
    sums: list[Step] = field(default_factory=list)
    spreads: list[Transfer] = field(default_factory=list)
    results: list[Step] = field(default_factory=list)
    num_sent: Counter[int] = field(default_factory=Counter)  # elements
    sent: dict[tuple[Buffer, Mask, int], Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.holders: defaultdict[Mask, list[Buffer]] = defaultdict(list)  # of whole values
        self.local: defaultdict[int, list[Buffer]] = defaultdict(list)  # whole values of a rank, also received ones
        for buffer in self.have:
            if buffer.mask.chunk == WHOLE_VALUE:
                self.holders[buffer.mask].append(buffer)
                self.local[buffer.rank].append(buffer)

    def plan(self, need: Sequence[Placed]) -> tuple[dict[Placed, Buffer], tuple[Step, ...]]:
        parts: dict[Placed, list[Part]] = {}
        wanted: defaultdict[tuple[Mask, tuple[ValueChunk, ...]], list[Placed]] = defaultdict(list)
        addends: dict[tuple[Mask, tuple[ValueChunk, ...]], _Sum] = {}
        # The largest first: the smaller ones may lie within them.
        for placed in sorted(dict.fromkeys(need), key=lambda placed: -placed.mask.num_elements):
            parts[placed], sums = self._collect(placed, need)
            for sum_ in sums:
                key = sum_.box, tuple(sum_.holders)
                addends[key] = sum_
                wanted[key].append(placed)
        for key, sum_ in addends.items():
            for placed, found in self._add_up(sum_, wanted[key]):
                parts[placed] += found
        buffers = {placed: self._result(placed, parts[placed]) for placed in need}
        return buffers, (
            *self.local_sums,
            *self._batch(self.messages),
            *self.sums,
            *self._batch(self.spreads),
            *self.results,
        )

    def _collect(self, placed: Placed, need: Sequence[Placed]) -> tuple[list[Part], list[_Sum]]:
        """What of a need exists as it is, sent here; and what has to be added up."""
        if not placed.mask.num_elements:
            return [], []
        if placed.mask.chunk == WHOLE_VALUE:
            found, missing = self._whole_values(placed)
            if not missing:
                return found, []
            edges = [buffer.mask for buffer in self.have if buffer.mask.chunk != WHOLE_VALUE]
        else:
            found, missing = [], [placed.mask.region]
            edges = [buffer.mask for buffer in self.have]
            edges += [other.mask for other in need if other.mask.chunk != WHOLE_VALUE]
        sums = []
        alone: defaultdict[tuple[Buffer, ...], list[Mask]] = defaultdict(list)
        for box in missing:
            for cell in cells(box, edges):
                sum_ = self._addends(cell, placed, need)
                if len(sum_.holders) > 1:
                    sums.append(sum_)
                for holders in sum_.holders.values() if len(sum_.holders) == 1 else ():
                    alone[holders].append(cell)
        for holders, boxes in alone.items():
            found += [self._bring(holders, cell, placed.rank) for cell in merge(boxes)]
        return found, sums

    def _whole_values(self, placed: Placed) -> tuple[list[Part], list[Mask]]:
        """Whole values that cover the need, and the boxes of it of which nobody has the whole value."""
        rank, rest, found = placed.rank, [placed.mask.region], []
        here = [(both, buffer) for buffer in self.local[rank] if (both := buffer.mask.overlap(placed.mask))]
        here.sort(key=lambda one: -one[0].num_elements)
        for both, buffer in here:
            taken, rest = _take(both, rest)
            found += [Part(buffer, box) for box in taken]
        if not rest:
            return found, rest
        elsewhere = [(both, mask) for mask in self.holders if (both := mask.overlap(placed.mask))]
        far = {mask: min(self._distance(buffer, rank) for buffer in self.holders[mask]) for _, mask in elsewhere}
        elsewhere.sort(key=lambda one: (far[one[1]], -one[0].num_elements, one[0].intervals))
        for both, mask in elsewhere:
            taken, rest = _take(both, rest)
            for box in taken:
                part = self._bring(self.holders[mask], box, rank)
                self.local[rank].append(part.buffer)
                found.append(part)
        return found, rest

    def _addends(self, cell: Mask, placed: Placed, need: Sequence[Placed]) -> _Sum:
        """The addends, among those that exist of a box, whose sum is this need's value chunk of it.

        All needs of a box look at the same addends, which begin one after the other in [0, 1): each need takes those
        that begin in its chunk. So chunks that exist are passed on as they are, and of a value that exists whole the
        chunk that begins at 0 is all and the others are zero.
        """
        inside = [buffer for buffer in self.have if buffer.mask.overlaps(cell)]
        of_box: defaultdict[tuple[Interval, ...], list[Buffer]] = defaultdict(list)
        for buffer in inside:
            of_box[buffer.mask.intervals].append(buffer)
        counts = {
            other.mask.chunk.of
            for other in (need if placed.mask.chunk != WHOLE_VALUE else ())
            if other.mask.chunk != WHOLE_VALUE and other.mask.overlaps(cell)
        }
        exactly = [buffer for buffer in inside if {buffer.mask.chunk.of} == counts]
        # Addends of one box belong together; those of different boxes are mixed only if no box has all.
        for families in ([exactly], of_box.values(), [inside]):
            tilings = [(tiles, family) for family in families if (tiles := tiling(one.mask.chunk for one in family))]
            if tilings:
                break
        else:
            raise ValueError(self._nobody_has(cell, placed))
        chosen, family = min(tilings, key=lambda one: len(one[0]))
        start, of = placed.mask.chunk
        return _Sum(
            cell,
            {
                chunk: tuple(buffer for buffer in family if buffer.mask.chunk == chunk)
                for chunk in chosen
                if start * chunk.of <= chunk.number * of < (start + 1) * chunk.of
            },
        )

    def _nobody_has(self, cell: Mask, placed: Placed) -> str:
        there = [f"rank {buffer.rank} has {buffer.mask}" for buffer in self.have if buffer.mask.overlaps(cell)]
        if there:
            exists = f"of it {', '.join(there[:8])}{' …' if len(there) > 8 else ''}, and these do not add up to it"
        else:
            exists = f"what exists is {', '.join(sorted({str(buffer.mask) for buffer in self.have})[:8]) or 'nothing'}"
        return (
            f"rank {placed.rank} needs {placed.mask}, but nobody has {cell}: {exists}. "
            "Every index and every addend that is read has to be written by some task."
        )

    def _add_up(self, sum_: _Sum, wanted: list[Placed]) -> Iterator[tuple[Placed, list[Part]]]:
        """Parts on each rank that needs a sum: its addends if all are here or nobody else needs it, or pieces of it."""
        ranks = list(dict.fromkeys(placed.rank for placed in wanted))
        if len(ranks) == 1 or all(
            any(buffer.rank == rank for buffer in holders) for rank in ranks for holders in sum_.holders.values()
        ):
            parts_on = {rank: self._gather(sum_.box, sum_.holders, rank) for rank in ranks}
        elif (total_on := self._all_reduce(sum_, ranks)) is not None:
            parts_on = {rank: [Part(total, sum_.box)] for rank, total in total_on.items()}
            for rank in ranks:
                if rank not in parts_on:
                    source = self._nearest(total_on.values(), rank)
                    self.num_sent[source.rank] += sum_.box.num_elements
                    copy = Buffer(rank, sum_.box, next(self.tags))
                    self.spreads.append(Transfer(source, copy))
                    parts_on[rank] = [Part(copy, sum_.box)]
        else:
            parts_on = {rank: [] for rank in ranks}
            for rank, box in zip(ranks, self._cut(sum_.box, len(ranks)), strict=False):
                piece = Buffer(rank, box, next(self.tags))
                self.sums.append(Assemble(tuple(self._gather(box, sum_.holders, rank)), piece))
                parts_on[rank].append(Part(piece, box))
                for other in ranks:
                    if other != rank:
                        copy = Buffer(other, box, next(self.tags))
                        self.spreads.append(Transfer(piece, copy))
                        parts_on[other].append(Part(copy, box))
        for placed in wanted:
            yield placed, parts_on[placed.rank]

    def _all_reduce(self, sum_: _Sum, ranks: Sequence[int]) -> dict[int, Buffer] | None:
        """The sum on every rank that has addends of it, by collectives of replicas, each with all addends once.

        Two of these may round it differently, in the last bit.

        None where ranks cannot be grouped like that, where some of these do not need the sum, or if it is large, so
        that each rank had better add up a piece of it.
        """
        if len(self._cut(sum_.box, 2)) > 1:
            return None
        addends_of: defaultdict[int, list[Buffer]] = defaultdict(list)
        for buffers in sum_.holders.values():
            for buffer in buffers:
                addends_of[buffer.rank].append(buffer)
        ranks_with: defaultdict[tuple[ValueChunk, ...], list[int]] = defaultdict(list)
        for rank, addends in sorted(addends_of.items()):
            ranks_with[tuple(buffer.mask.chunk for buffer in addends)].append(rank)
        if not set(addends_of) <= set(ranks) or sum(map(len, ranks_with)) != len(sum_.holders):
            return None
        replicas = list(ranks_with.values())
        if len({len(some) for some in replicas}) > 1:
            return None
        totals: dict[int, Buffer] = {}
        for group in zip(*replicas, strict=True):
            inputs: list[Buffer] = []
            for number, rank in enumerate(group):
                addends = addends_of[rank]
                total = addends[0]
                if len(addends) > 1 or total.mask.intervals != sum_.box.intervals:
                    chunk = ValueChunk(number, len(group))
                    total = Buffer(rank, sum_.box.with_chunk(chunk), next(self.tags))
                    self.local_sums.append(Assemble(tuple(Part(addend, sum_.box) for addend in addends), total))
                inputs.append(total)
            outputs = [Buffer(rank, sum_.box, next(self.tags)) for rank in group] if len(group) > 1 else inputs
            if len(group) > 1:
                self.sums.append(Collective("all_reduce", tuple(inputs), tuple(outputs)))
            totals.update(zip(group, outputs, strict=True))
        return dict(sorted(totals.items()))

    def _cut(self, box: Mask, num_parts: int) -> list[Mask]:
        """A box in as many parts, if what sending less at a time saves is more than what starting to send costs."""
        num_bytes = box.num_elements * self.itemsize
        if not box.intervals or num_bytes < self.topology.launch_seconds * self.topology.inside.bytes_per_second:
            return [box]
        dim = max(range(len(box.intervals)), key=lambda dim: box.intervals[dim].size)
        start, stop = box.intervals[dim]
        return [
            box.with_interval(dim, Interval(start + part.start, start + part.stop))
            for part in cut_evenly(stop - start, min(num_parts, stop - start))
        ]

    def _gather(self, box: Mask, holders: Mapping[ValueChunk, Sequence[Buffer]], rank: int) -> list[Part]:
        """All addends of a box on one rank, those that are together elsewhere added up there."""
        held_by: defaultdict[int, dict[ValueChunk, Buffer]] = defaultdict(dict)
        for chunk, buffers in holders.items():
            for buffer in buffers:
                held_by[buffer.rank].setdefault(chunk, buffer)
        left = dict.fromkeys(holders)
        parts: dict[ValueChunk, Part] = {chunk: Part(buffer, box) for chunk, buffer in held_by.pop(rank, {}).items()}
        for chunk in parts:
            del left[chunk]
        while left:
            source = min(
                held_by,
                key=lambda source: (
                    -len(left.keys() & held_by[source].keys()),
                    self.topology.node(source) != self.topology.node(rank),
                    self.num_sent[source],
                ),
            )
            addends = {chunk: buffer for chunk, buffer in held_by.pop(source).items() if chunk in left}
            for chunk in addends:
                del left[chunk]
            first, buffer = next(iter(addends.items()))
            mask = box.with_chunk(first)
            if len(addends) > 1:
                total = Buffer(source, mask, next(self.tags))
                self.local_sums.append(Assemble(tuple(Part(addend, box) for addend in addends.values()), total))
                buffer = total
            parts[first] = self.sent.get((buffer, mask, rank)) or self._send(buffer, mask, rank)
        # One order on every rank, so that sums are equal to the last bit.
        return [parts[chunk] for chunk in holders if chunk in parts]

    def _bring(self, holders: Sequence[Buffer], box: Mask, rank: int) -> Part:
        """A box from the nearest of those that have it."""
        source = self._nearest(holders, rank)
        if source.rank == rank:
            return Part(source, box)
        mask = box.with_chunk(source.mask.chunk)
        sent = (self.sent.get((buffer, mask, rank)) for buffer in holders)
        return next(filter(None, sent), None) or self._send(source, mask, rank)

    def _send(self, source: Buffer, mask: Mask, rank: int) -> Part:
        destination = Buffer(rank, mask, next(self.tags))
        self.messages.append(Transfer(source, destination))
        self.num_sent[source.rank] += mask.num_elements
        part = self.sent[source, mask, rank] = Part(destination, mask.region)
        return part

    def _nearest(self, holders: Iterable[Buffer], rank: int) -> Buffer:
        """The buffer on the nearest rank, of several that which has sent least."""
        return min(holders, key=lambda buffer: (self._distance(buffer, rank), self.num_sent[buffer.rank]))

    def _distance(self, buffer: Buffer, rank: int) -> int:
        return 0 if buffer.rank == rank else 1 if self.topology.node(buffer.rank) == self.topology.node(rank) else 2

    def _result(self, placed: Placed, parts: list[Part]) -> Buffer:
        """The buffer that is a need: the only part, if it is all of a buffer, or one put together."""
        region = placed.mask.region
        if len({part.buffer for part in parts}) == 1:
            # Pieces of one buffer: taken out at once, if they are all of the need.
            if sum(part.region.num_elements for part in parts) == region.num_elements:
                parts = [Part(parts[0].buffer, region)]
            if parts[0].region == region == parts[0].buffer.mask.region:
                return parts[0].buffer
        buffer = Buffer(placed.rank, placed.mask, next(self.tags))
        self.results.append(Assemble(tuple(parts), buffer))
        return buffer

    def _batch(self, messages: list[Transfer]) -> Sequence[Step]:
        """Messages in rounds in which a rank sends to one and receives from one; broadcasts, where those are faster."""
        num_ranks = 1 + max((rank for message in messages for rank in message.ranks), default=0)
        messages = sorted(messages, key=lambda message: (message.ranks[1] - message.ranks[0]) % num_ranks)
        alike: defaultdict[tuple[Buffer, Mask], list[Transfer]] = defaultdict(list)
        for message in messages:
            alike[message.source, message.destination.mask].append(message)
        senders, receivers = ({message.ranks[end] for message in messages} for end in (0, 1))
        # Where many send, sending side by side is as good as handing on.
        if len(alike) == len(messages) or 2 * len(senders) > len(receivers):
            return messages
        broadcasts: list[Step] = []
        rest: list[Step] = []
        for (source, mask), group in alike.items():
            if len(group) == 1:
                rest += group
                continue
            if mask.intervals != source.mask.intervals:
                part = Buffer(source.rank, mask, next(self.tags))
                broadcasts.append(Assemble((Part(source, mask.region),), part))
                source = part
            broadcasts.append(Collective("broadcast", (source,), tuple(message.destination for message in group)))
        steps = [*broadcasts, *rest]
        faster = seconds_of(steps, self.itemsize, self.topology) < seconds_of(messages, self.itemsize, self.topology)
        return steps if faster else messages


def _take(wanted: Mask, boxes: Sequence[Mask]) -> tuple[list[Mask], list[Mask]]:
    """What of the boxes lies in a region, and what is left of them."""
    taken: list[Mask] = []
    left: list[Mask] = []
    for box in boxes:
        both = box.overlap(wanted)
        if both is None:
            left.append(box)
        else:
            taken.append(both)
            left += box.difference(both)
    return taken, left
