"""Ranks that do the same as others, so that one of each kind has to be planned.

Ranks are alike if each reads, makes, keeps, sends and receives parts of the same sizes in the same order, from and to
ranks that are alike in turn; which part of a tensor that is, and the numbers of the others, may differ::

    data ×2, tensor ×2      rank 0   x[0:4]  w[:, 0:8]   all_reduce y with 1   all_reduce d w with 2
                            rank 3   x[4:8]  w[:, 8:16]  all_reduce y with 2   all_reduce d w with 1

Such ranks, begun at the same time, are at the same place of their programs at any time: nothing that one of them can
see tells which it is. They are found by refining a partition of all ranks until it is equitable; of each of its classes
one rank stands for all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch_vtensor.compile.communication import Assemble, Buffer, Collective, Placed, StepFacts, Transfer
from torch_vtensor.compile.exchange import Exchange
from torch_vtensor.compile.plan import Plan
from torch_vtensor.compile.random_numbers import find_random
from torch_vtensor.compile.task_graph import Operator, Piece, Task
from torch_vtensor.compile.tensor_view import Mask
from torch_vtensor.compile.topology import Topology


class Meeting(NamedTuple):
    """A step of several ranks; ``numbers`` tells of each in how many of the tensor's it has taken part before."""

    ranks: tuple[int, ...]
    numbers: tuple[int, ...]
    is_transfer: bool


class Views(NamedTuple):
    """What each rank sees of the exchanges of a tensor: a number, equal where names and numbers are all that differs.

    Parts that a rank makes and reads in the same way are not told apart, whatever their order.
    """

    of_rank: Mapping[int, int]
    meetings: tuple[Meeting, ...]

    @classmethod
    def of(cls, exchanges: Sequence[Exchange], storage: Mapping[int, Mask] | None, topology: Topology) -> Views:
        """Look at a tensor's exchanges from each rank."""
        uses = _uses_of_parts(exchanges, storage)
        look = _Look(topology, {place: frozenset(counted.items()) for place, counted in uses.items()})
        for index, exchange in enumerate(exchanges):
            look.look_at(index, exchange)
        ranks = dict.fromkeys((*(part.rank for part in uses), *look.steps))
        seen = {rank: (look.parts_of(rank), tuple(look.steps[rank])) for rank in ranks}
        return cls(_numbered(seen), tuple(look.meetings))

    def shifted(self, by: int) -> Views:
        """The same on ranks of other numbers."""
        return Views(
            {rank + by: seen for rank, seen in self.of_rank.items()},
            tuple([one._replace(ranks=tuple([rank + by for rank in one.ranks])) for one in self.meetings]),
        )


def _uses_of_parts(
    exchanges: Sequence[Exchange], storage: Mapping[int, Mask] | None
) -> Mapping[Placed, Counter[Hashable]]:
    """What each rank does with each part of a tensor, and with its region where that is another part."""
    uses: defaultdict[Placed, Counter[Hashable]] = defaultdict(Counter)
    number_of: dict[Hashable, int] = {}  # of the uses that operators make of the tensor
    counts: dict[tuple[int, int], tuple[Counter[Hashable], Counter[Hashable] | None]] = {}

    def note(rank: int, mask: Mask, *what: Hashable) -> None:
        found = counts.get((rank, id(mask)))  # masks take long to hash
        if found is None:
            region = mask.region
            of_region = None if region == mask else uses[Placed(rank, region)]
            found = counts[rank, id(mask)] = uses[Placed(rank, mask)], of_region
        of_part, of_region = found
        of_part[what] += 1
        if of_region is not None:
            of_region["region", *what] += 1

    for rank, mask in (storage or {}).items():
        note(rank, mask, "stored")
    for index, exchange in enumerate(exchanges):
        for part, makers in exchange.makers.items():
            note(*part, "makes", index, len(makers))
        group_number = {id(group): number for number, group in enumerate(exchange.groups)}
        for reader, (source, group, _) in zip(exchange.readers, exchange.serves, strict=True):
            use = None if reader.task is None else (reader.task.operator, reader.position)
            note(
                reader.rank,
                reader.mask,
                *("reads", index, number_of.setdefault(use, len(number_of)), source is not None),
                None if group is None else group_number[id(group)],
            )
        for number, communication in enumerate(
            (exchange.communication, *(group.communication for group in exchange.groups))
        ):
            for name, buffers in (("has", communication.have), ("needs", communication.need)):
                for part, buffer in buffers.items():
                    note(*part, name, index, number, buffer.mask == part.mask, not buffer.tag)
        for number, group in enumerate(exchange.groups):
            for part, addends in group.addends.items():
                note(*part, "adds", index, number, len(addends))
    return uses


class _Look:
    """Takes down the steps that each rank takes, in order, with what else it does with the parts that move."""

    def __init__(self, topology: Topology, uses: Mapping[Placed, Hashable]) -> None:
        self.steps: defaultdict[int, list[Hashable]] = defaultdict(list)
        self.meetings: list[Meeting] = []
        self._topology = topology
        self._uses = uses
        self._parts: defaultdict[int, Counter[Hashable]] = defaultdict(Counter)
        for (rank, mask), of_part in uses.items():
            self._parts[rank][mask.shape, mask.chunk.of, of_part] += 1
        self._numbers: defaultdict[int, dict[Buffer, int]] = defaultdict(dict)
        self._num_met: Counter[int] = Counter()

    def parts_of(self, rank: int) -> Hashable:
        """How many parts a rank uses in which way."""
        return frozenset(self._parts[rank].items())

    def look_at(self, index: int, exchange: Exchange) -> None:
        """Take down the steps of an exchange, forward and backward."""
        itemsize = exchange.tensor.dtype.itemsize
        for number, communication in enumerate(
            (exchange.communication, *(group.communication for group in exchange.groups))
        ):
            for facts in communication.facts(itemsize, self._topology):
                self._step(index, number, facts)

    def _buffer(self, buffer: Buffer) -> Hashable:
        """A buffer as its rank sees it: one that is there by what it is, one that a step writes by its number."""
        there = self._uses.get(Placed(buffer.rank, buffer.mask))
        numbers = self._numbers[buffer.rank]
        number = numbers.setdefault(buffer, len(numbers)) if buffer.tag else None
        return buffer.mask.shape, buffer.mask.chunk.of, there, number

    def _step(self, index: int, number: int, facts: StepFacts) -> None:
        step = facts.step
        if isinstance(step, Assemble):
            parts = Counter((self._buffer(part.buffer), part.region.shape) for part in step.parts)
            seen = "assembles", index, number, frozenset(parts.items()), self._buffer(step.output), step.is_view
            self.steps[step.output.rank].append(seen)
            return
        what: Hashable = "sends"
        if isinstance(step, Collective):
            what = step.kind, step.gather_dim, step.scatter_dim
        for rank in step.ranks:
            given, got = (tuple(map(self._buffer, of.get(rank, ()))) for of in (facts.reads, facts.writes))
            self.steps[rank].append((what, index, number, facts[4:], given, got))
        self.meetings.append(
            Meeting(step.ranks, tuple([self._num_met[rank] for rank in step.ranks]), isinstance(step, Transfer))
        )
        self._num_met.update(step.ranks)


def find_like(plan: Plan, cuts: Mapping[Operator, Hashable], views: Iterable[Views]) -> Mapping[int, int]:
    """For each rank of a plan's mesh the one that stands for it, itself where no other can.

    ``cuts`` are equal for operators that are cut and placed in the same way, by microbatch; ``views`` are those of all
    tensors, equal ones in any number. Those that stand for others meet those alone that stand for the ranks that these
    meet.
    """
    itself = {rank: rank for rank in plan.mesh.ranks}
    if len(itself) == 1 or find_random(plan):
        return itself  # what ranks draw, their numbers decide
    views = tuple(views)
    seen = [*_views_of_tasks(plan, cuts), *(view.of_rank for view in views)]
    met: defaultdict[int, list[tuple[int, Meeting]]] = defaultdict(list)
    for number, view in enumerate(views):
        for meeting in view.meetings:
            for rank in meeting.ranks:
                met[rank].append((number, meeting))
    kinds = _numbered({rank: tuple([of_rank.get(rank) for of_rank in seen]) for rank in itself})
    num_kinds = 0
    while num_kinds < (num_kinds := len(set(kinds.values()))):
        kinds = _numbered({rank: (kinds[rank], tuple(_met_by(met[rank], kinds))) for rank in itself})
    stands_for: dict[int, int] = {}
    for first in itself:
        if kinds[first] in stands_for:
            continue
        stands_for[kinds[first]] = first
        ahead = [first]
        while ahead:
            for _, meeting in met[ahead.pop()]:
                for other in meeting.ranks:
                    if kinds[other] not in stands_for:
                        stands_for[kinds[other]] = other
                        ahead.append(other)
    for one in stands_for.values():
        for _, (ranks, _, is_transfer) in met[one]:
            there = [stands_for[kinds[rank]] for rank in ranks]
            if not set(there) <= set(ranks) or (is_transfer and tuple(there) != ranks):
                return itself
    return {rank: stands_for[kinds[rank]] for rank in itself}


def _numbered(colours: Mapping[int, Hashable]) -> dict[int, int]:
    """Equal numbers for equal values."""
    numbers: dict[Hashable, int] = {}
    return {rank: numbers.setdefault(colour, len(numbers)) for rank, colour in colours.items()}


def _met_by(met: Iterable[tuple[int, Meeting]], kinds: Mapping[int, int]) -> Iterator[Hashable]:
    for number, meeting in met:
        yield number, meeting.numbers, tuple([kinds[rank] for rank in meeting.ranks])


def _views_of_tasks(plan: Plan, cuts: Mapping[Operator, Hashable]) -> Iterator[Mapping[int, int]]:
    """What the tasks of each operator are to each rank; of operators cut and placed in the same way, those of one."""
    tasks: defaultdict[Operator, list[Task]] = defaultdict(list)
    for task in plan.tasks:
        tasks[task.operator].append(task)
    decided = [decisions for decisions in (plan.recomputed, plan.apart, plan.turn) if decisions]
    known: set[Hashable] = set()
    sizes: dict[Piece, Hashable] = {}
    for operator, some in tasks.items():
        decisions = tuple([tuple([one.get(task) for one in decided]) for task in some]) if decided else ()
        if (cuts[operator], decisions) in known:
            continue
        known.add((cuts[operator], decisions))
        of_rank: defaultdict[int, list[Hashable]] = defaultdict(list)
        for number, task in enumerate(some):
            if task.piece not in sizes:
                sizes[task.piece] = _sizes(task.piece)
            own = sizes[task.piece], plan.microbatch.get(task), decisions[number] if decided else None
            for rank in plan.ranks[task]:
                of_rank[rank].append(own)
        yield _numbered({rank: tuple(seen) for rank, seen in of_rank.items()})


def _sizes(piece: Piece) -> Hashable:
    """How large a piece is and what it reads and makes, wherever in the operator that is."""
    shapes = [None if mask is None else (mask.shape, mask.chunk.of) for mask in (*piece.inputs, *piece.outputs)]
    cuts = sorted((name, interval.size) for name, interval in piece.cuts.items())
    return tuple(shapes), tuple(cuts), piece.chunk.of
