"""Segments and communication → Program: jobs for the schedule, and what each of them does.

Every value has a key, the same on each rank that has it; a job reads and writes values by key. Keys are for people,
too: ``x[0:4]`` is a part of x, ``d x[0:4]`` its gradient.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from torch_vtensor.compile.buckets import Bucket, fill_buckets
from torch_vtensor.compile.communication import Assemble, Buffer, Communication, Placed, Step, StepFacts, Transfer
from torch_vtensor.compile.contributions import Contributions
from torch_vtensor.compile.cost import memory_seconds
from torch_vtensor.compile.dataflow import Dataflow
from torch_vtensor.compile.exchange import Exchange, GradientGroup
from torch_vtensor.compile.footprint import Measure, estimate
from torch_vtensor.compile.pass_costs import pass_seconds
from torch_vtensor.compile.random_numbers import find_streams
from torch_vtensor.compile.schedules.job import Job, JobKind, Result, Value, ValueKind
from torch_vtensor.compile.segment import Arrival, Segment
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask, TensorView
from torch_vtensor.compile.topology import Topology


class Forward(NamedTuple):
    """Run a segment: values in the order of its arrivals to values in the order of its departures.

    ``saved`` are what its backward passes read, one for each of them.
    """

    segment: Segment
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: tuple[str, ...]


class Backward(NamedTuple):
    """Run a segment backward, or the part of that which is for its inputs (dI) or for its weights (dW).

    ``inputs`` has the key of each arrival that is read again, None for those that are saved. ``tangents`` has the
    gradient of each departure, None for those that have none; ``gradients`` the key of the gradient of each arrival,
    None where none is wanted or another part computes it. dW reads what dI kept instead of tangents, among what is
    ``saved``; ``kept`` is where dI leaves that.
    """

    segment: Segment
    part: JobKind
    saved: tuple[str, ...]
    inputs: tuple[str | None, ...]
    tangents: tuple[str | None, ...]
    gradients: tuple[str | None, ...]
    kept: str | None


class Move(NamedTuple):
    """Take a step of a communication of one tensor."""

    tensor: LogicalTensor
    step: Step
    keys: Mapping[Buffer, str]


class Add(NamedTuple):
    """Add values up on one rank; in place of the first, where that is a sum that nobody else reads."""

    rank: int
    inputs: tuple[str, ...]
    output: str
    in_place: bool = False


def _in_order(given: Sequence[tuple[int | None, str]]) -> list[str]:
    """The keys in the order in which backward passes give them: by microbatch, and what is in none before or after.

    Args:
        given: microbatch and key, later segments' before earlier ones'.
    """
    first = next((number for number, (microbatch, _) in enumerate(given) if microbatch is not None), 0)

    def turn(item: tuple[int, tuple[int | None, str]]) -> float:
        number, (microbatch, _) = item
        return microbatch if microbatch is not None else -1 if number < first else math.inf

    return [key for _, (_, key) in sorted(enumerate(given), key=turn)]


Work = Forward | Backward | Move | Add | Bucket


def moves_of(work: Work | None) -> tuple[Move, ...]:
    """The steps of communication that a job takes: several in a bucket, none if it computes."""
    return work.moves if isinstance(work, Bucket) else (work,) if isinstance(work, Move) else ()


@dataclass(frozen=True, eq=False)
class Program:
    """All jobs of all ranks and what they do, by name.

    ``arguments`` has the key of each part that a rank has at the start, ``seeds`` those that the caller's gradients
    enter by; ``outputs`` and ``gradients`` are what is there at the end. ``again`` are the jobs that bring to backward
    passes what forward passes did not keep.
    """

    flow: Dataflow
    segments: tuple[Segment, ...]
    jobs: tuple[Job, ...]
    values: tuple[Value, ...]
    work: Mapping[str, Work]
    arguments: Mapping[tuple[int, str], TensorView]
    seeds: Mapping[tuple[int, str], LogicalTensor]
    outputs: Mapping[tuple[int, LogicalTensor], str]
    gradients: Mapping[tuple[int, LogicalTensor], tuple[str, Mask]]
    results: tuple[Result, ...]
    again: frozenset[str]

    @property
    def moves(self) -> Iterator[Move]:
        """Every step of every communication, also of those that move in buckets."""
        for work in self.work.values():
            yield from moves_of(work)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Parameters and gradients that move together."""
        return tuple(work for work in self.work.values() if isinstance(work, Bucket))

    @cached_property
    def streams(self) -> Mapping[Segment, int]:
        """The stream of random numbers of each segment that draws some; none where there is one rank."""
        return find_streams(self.flow.plan, self.segments)

    @cached_property
    def sent_bytes(self) -> Mapping[str, Counter[int]]:
        """Bytes that each rank sends in a step, by the kind of communication."""
        sent: defaultdict[str, Counter[int]] = defaultdict(Counter)
        planned = frozenset(self.flow.plan.mesh.ranks)
        for move in self.moves:
            if not isinstance(move.step, Assemble):
                for rank in planned.intersection(move.step.ranks):
                    sent[_kind_of(move.step)][rank] += move.step.bytes_sent(rank, move.tensor.dtype.itemsize)
        like = self.flow.like.items()
        return {kind: Counter({rank: of[one] for rank, one in like if one in of}) for kind, of in sent.items()}

    def __str__(self) -> str:
        """Count the jobs by kind, and list the communication by what it moves."""
        kinds = Counter(job.kind for job in self.jobs)
        rows = [", ".join(f"{count} {kind}" for kind, count in kinds.items())]
        rows += [f"  {kind}: {by_rank.total():,} bytes" for kind, by_rank in self.sent_bytes.items()]
        return "\n".join(rows)


def build_program(
    flow: Dataflow, segments: Sequence[Segment], topology: Topology, measure: Measure = estimate
) -> Program:
    """Write down what there is to do, on all ranks, in no order yet; `measure` tells what memory segments take."""
    return _Builder(flow, segments, topology, measure).build()


class _Builder:
    def __init__(self, flow: Dataflow, segments: Sequence[Segment], topology: Topology, measure: Measure) -> None:
        self._flow = flow
        self._footprint = {segment: measure(segment) for segment in segments}
        self._segments = tuple(segments)
        self._topology = topology
        self._jobs: list[Job] = []
        self._values: dict[tuple[int, str], Value] = {}
        self._work: dict[str, Work] = {}
        self._arguments: dict[tuple[int, str], TensorView] = {}
        self._seeds: dict[tuple[int, str], LogicalTensor] = {}
        self._label = _labels(flow.exchanges)
        self._number = {exchange: index for index, exchange in enumerate(flow.exchanges)}
        # What readers outside of the makers' segments give back, by group and part.
        self._given: defaultdict[tuple[GradientGroup, Placed], list[tuple[int | None, str]]] = defaultdict(list)
        self._tangents: defaultdict[tuple[LogicalTensor, Placed], list[str]] = defaultdict(list)
        self._forward_of: dict[Segment, Forward] = {}
        self._contributions = Contributions()
        self._gives: dict[str, str] = {}  # the backward pass that gives a gradient
        self._read_again: dict[Exchange, None] = {}

    def build(self) -> Program:
        for exchange in self._flow.exchanges:
            self._add_parts(exchange)
        for segment in self._segments:
            self._add_forward(segment)
        for exchange in self._flow.exchanges:
            self._add_exchange(exchange)
        outputs = {
            (reader.rank, exchange.tensor): self._key(exchange, exchange.buffer(reader))
            for exchange, reader in self._flow.returns
        }
        self._pin(outputs.items())
        gradients = self._add_backward() if self._flow.active else {}
        before_again = len(self._jobs)
        for exchange in self._read_again:
            self._add_exchange(exchange, again=True)
        gathered_again = {place for job in self._jobs[before_again:] for place in job.written_places()}
        results = [Result(self._label[tensor], rank, key) for (rank, tensor), key in outputs.items()]
        filled, work = fill_buckets(self._jobs, self._work, self._topology)
        again = frozenset(job.name for job in filled if not gathered_again.isdisjoint(job.written_places()))
        of_gradients, jobs = self._contributions.results(gradients, self._label, filled)
        return Program(
            self._flow,
            self._segments,
            tuple(jobs),
            tuple(self._values.values()),
            MappingProxyType(work),
            self._arguments,
            self._seeds,
            outputs,
            gradients,
            tuple(dict.fromkeys((*results, *of_gradients))),
            again,
        )

    # ------------------------------------------------------------------ values

    def _key(self, exchange: Exchange, buffer: Buffer, *, again: bool = False) -> str:
        label = self._label[exchange.tensor]
        key = f"{label}{buffer.mask}"
        return f"{key}'{self._number[exchange]}.{buffer.tag}{' again' * again}" if buffer.tag else key

    def _add_value(self, key: str, rank: int, num_bytes: int, kind: ValueKind, *, pinned: bool = False) -> None:
        if (rank, key) not in self._values:
            self._values[rank, key] = Value(key, rank, num_bytes, kind, pinned)

    def _pin(self, places: Iterable[tuple[tuple[int, LogicalTensor], str]]) -> None:
        for (rank, _), key in places:
            value = self._values[rank, key]
            self._values[rank, key] = Value(key, rank, value.num_bytes, value.kind, pinned=True)

    def _add_parts(self, exchange: Exchange) -> None:
        """Declare what is there from the start; what segments and steps write is declared with them."""
        tensor = exchange.tensor
        for part, makers in exchange.makers.items():
            if not makers:
                key = self._key(exchange, exchange.communication.have[part])
                view = TensorView(tensor, part.mask)
                kind: ValueKind = "parameter" if tensor.kind in ("parameter", "buffer", "constant") else "input"
                self._add_value(key, part.rank, view.num_bytes, kind, pinned=True)
                self._arguments[part.rank, key] = view

    # ------------------------------------------------------------------ forward

    def _add_forward(self, segment: Segment) -> None:
        label = self._label
        inputs = tuple(
            self._key(arrival.exchange, arrival.exchange.communication.need[Placed(segment.rank, arrival.mask)])
            for arrival in segment.arrivals
        )
        outputs = tuple(f"{label[view.tensor]}{view.mask}" for view in segment.departures)
        for key, view in zip(outputs, segment.departures, strict=True):
            self._add_value(key, segment.rank, view.num_bytes, "activation")
        # Of replicas on one rank only one has a gradient, so that what several read may be wanted by none of these.
        wants = any(arrival.group is not None for arrival in segment.arrivals)
        trains = wants and any(view.tensor in self._flow.active for view in segment.departures)
        names = (f"saved {segment.name}", *(f"saved {segment.name} for {part}" for part in [*segment.parts][1:]))
        saved = names if trains else ()
        for key, num_bytes in zip(saved, self._footprint[segment].saved_bytes, strict=False):
            self._add_value(key, segment.rank, num_bytes, "saved")
        forward = Forward(segment, inputs, outputs, saved)
        self._forward_of[segment] = forward
        self._add_job(f"F {segment.name}", "F", forward, inputs, (*outputs, *saved), segment)

    def _add_exchange(self, exchange: Exchange, *, again: bool = False) -> None:
        communication = exchange.communication
        if not communication.steps:
            return
        keys = {buffer: self._key(exchange, buffer, again=again) for buffer in communication.buffers}
        kind: ValueKind = "parameter" if exchange.tensor.kind == "parameter" else "activation"
        steps = communication.facts(exchange.tensor.dtype.itemsize, self._topology)
        self._add_steps(exchange.tensor, steps, keys, exchange.microbatch, kind)

    def _add_steps(
        self,
        tensor: LogicalTensor,
        steps: Iterable[StepFacts],
        keys: Mapping[Buffer, str],
        microbatch: int | None,
        kind: ValueKind,
    ) -> None:
        itemsize, stage = tensor.dtype.itemsize, self._label[tensor]
        for step, ranks, read, written, seconds, wire_bytes, workspace_bytes in steps:
            reads = {rank: tuple(dict.fromkeys([keys[b] for b in buffers])) for rank, buffers in read.items()}
            writes = {rank: tuple([keys[buffer] for buffer in buffers]) for rank, buffers in written.items()}
            for rank, buffers in written.items():
                for buffer in buffers:
                    self._add_value(keys[buffer], rank, buffer.mask.num_elements * itemsize, kind)
            first = next(iter(writes.values()))[0]
            name = f"{_kind_of(step)} {first} {'-'.join(map(str, step.ranks))}"
            job_kind: JobKind = (
                "move" if isinstance(step, Assemble) else "transfer" if isinstance(step, Transfer) else "collective"
            )
            self._work[name] = Move(tensor, step, keys)
            self._jobs.append(
                Job(
                    name,
                    job_kind,
                    ranks,
                    reads=reads,
                    writes=writes,
                    stage=stage,
                    microbatch=microbatch,
                    seconds=seconds,
                    wire_bytes=wire_bytes,
                    workspace_bytes=workspace_bytes,
                )
            )

    # ------------------------------------------------------------------ backward

    def _add_backward(self) -> dict[tuple[int, LogicalTensor], tuple[str, Mask]]:
        """Add backward passes from the last segments to the first, each after all that gives it gradients."""
        self._add_seeds()
        ready = sorted(self._segments, key=lambda segment: -segment.level)
        departs = {
            (view.tensor, Placed(segment.rank, view.mask)): segment
            for segment in self._segments
            for view in segment.departures
        }
        waiting: dict[Exchange, set[Segment]] = {
            exchange: set() for exchange in self._flow.exchanges if exchange.groups
        }
        for segment in self._segments:
            for arrival in segment.arrivals:
                if arrival.group is not None:
                    waiting[arrival.exchange].add(segment)
        finished: set[Exchange] = set()
        by_maker: defaultdict[Segment, list[Exchange]] = defaultdict(list)
        by_reader: defaultdict[Segment, list[Exchange]] = defaultdict(list)
        for exchange, givers in waiting.items():
            for part in exchange.makers:
                if (maker := departs.get((exchange.tensor, part))) is not None:
                    by_maker[maker].append(exchange)
            for giver in givers:
                by_reader[giver].append(exchange)

        left = {exchange: len(givers) for exchange, givers in waiting.items()}

        def finish(exchange: Exchange) -> None:
            if exchange not in finished and not left[exchange]:
                finished.add(exchange)
                self._add_gradient_steps(exchange)

        for exchange in waiting:
            finish(exchange)
        for segment in ready:
            for exchange in by_maker[segment]:
                assert exchange in finished, f"{segment} would run backward before the gradient of {exchange.tensor}"
            self._add_backward_of(segment)
            for exchange in by_reader[segment]:
                left[exchange] -= 1
                finish(exchange)
        return self._collect_gradients()

    def _add_seeds(self) -> None:
        """The caller's gradients of what is returned, one for each rank and output."""
        for exchange, reader in self._flow.returns:
            if reader not in exchange.contributes or exchange.tensor not in self._flow.plan.graph.outputs:
                continue
            group, part = exchange.contributes[reader]
            key = f"seed {self._label[exchange.tensor]}"
            if (reader.rank, key) not in self._seeds:
                self._add_value(key, reader.rank, exchange.tensor.num_bytes, "input", pinned=True)
                self._seeds[reader.rank, key] = exchange.tensor
            self._given[group, part].append((None, key))

    def _add_backward_of(self, segment: Segment) -> None:
        forward = self._forward_of[segment]
        if not forward.saved:
            return
        tangents: list[str | None] = []
        for key, view in zip(forward.outputs, segment.departures, strict=True):
            given = self._tangents.get((view.tensor, Placed(segment.rank, view.mask)), [])
            tangents.append(self._sum(given, f"d {key}", segment.rank, view, segment.microbatch))
        if not any(tangents):
            return
        arrivals = tuple(segment.arrivals)
        gradients = [self._add_gradient_of(segment, number, arrival) for number, arrival in enumerate(arrivals)]
        self._read_again.update((arrivals[index].exchange, None) for index in segment.reads_again)
        inputs = tuple(
            self._key(
                arrival.exchange, arrival.exchange.communication.need[Placed(segment.rank, arrival.mask)], again=True
            )
            if number in segment.reads_again
            else None
            for number, arrival in enumerate(arrivals)
        )
        if len(segment.parts) == 1:
            self._add_part(Backward(segment, "B", forward.saved, inputs, tuple(tangents), tuple(gradients), None))
            return
        kept = f"kept {segment.name}"
        self._add_value(kept, segment.rank, self._footprint[segment].kept_bytes, "saved")
        for part, positions in segment.parts.items():
            mine = tuple(key if number in positions else None for number, key in enumerate(gradients))
            self._add_part(
                Backward(segment, part, forward.saved, inputs, tuple(tangents), mine, kept)
                if part == "dI"
                else Backward(segment, part, (forward.saved[-1], kept), (), (), mine, None)
            )

    def _add_gradient_of(self, segment: Segment, number: int, arrival: Arrival) -> str | None:
        """Declare the gradient that a segment gives of an arrival, None if that has none."""
        if arrival.group is None:
            return None
        tensor, region = arrival.exchange.tensor, arrival.mask.region
        key = f"d {self._label[tensor]}{region}@{segment.name}.{number}"
        num_bytes = region.num_elements * tensor.dtype.itemsize
        self._add_value(key, segment.rank, num_bytes, _gradient_kind(tensor))
        assert arrival.part is not None
        self._given[arrival.group, arrival.part].append((segment.microbatch, key))
        return key

    def _add_part(self, backward: Backward) -> None:
        segment, name = backward.segment, f"{backward.part} {backward.segment.name}"
        self._gives.update((key, name) for key in backward.gradients if key is not None)
        read = (*backward.inputs, *self._there_for(backward), *backward.tangents, *backward.saved)
        written = (*backward.gradients, backward.kept)
        self._add_job(
            name,
            backward.part,
            backward,
            tuple(dict.fromkeys(key for key in read if key is not None)),
            tuple(key for key in written if key is not None),
            segment,
        )

    def _there_for(self, backward: Backward) -> Iterable[str]:
        """What forward read or made, and is there for as long as a backward pass needs it."""
        forward, footprint = self._forward_of[backward.segment], self._footprint[backward.segment]
        yield from (forward.inputs[number] for number in footprint.arrivals.get(backward.part, ()))
        yield from (forward.outputs[number] for number in footprint.departures.get(backward.part, ()))

    def _add_gradient_steps(self, exchange: Exchange) -> None:
        """Add up what each rank has of the gradient, and take it to the makers."""
        tensor, label = exchange.tensor, self._label[exchange.tensor]
        kind = _gradient_kind(tensor)
        makers: defaultdict[Placed, list[Placed]] = defaultdict(list)
        for maker in exchange.makers:
            makers[Placed(maker.rank, maker.mask.region)].append(maker)
        for number, group in enumerate(exchange.groups):
            communication = group.communication
            of = f"{self._number[exchange]}.{number}"
            keys: dict[Buffer, str] = {}
            for part, buffer in communication.have.items():
                given = self._given.get((group, part))
                if not given:
                    continue
                if tensor.kind == "parameter":
                    passes = [self._gives[key] for _, key in given if key in self._gives]
                    self._contributions.add(tensor, of, part.mask, part.rank, passes)
                if len(given) == 1:
                    ((_, keys[buffer]),) = given
                    continue
                total = self._sum(
                    _in_order(given),
                    f"d {label}{part.mask}~{of}",
                    part.rank,
                    TensorView(tensor, part.mask.region),
                    exchange.microbatch,
                )
                assert total is not None
                keys[buffer] = total
            for buffer in communication.buffers:
                if buffer.tag:
                    keys[buffer] = f"d {label}{buffer.mask}'{of}.{buffer.tag}"
            self._fill_with_zeros(tensor, communication, keys, kind)
            steps = communication.facts(tensor.dtype.itemsize, self._topology)
            self._add_steps(tensor, steps, keys, exchange.microbatch, kind)
            for part, buffer in communication.need.items():
                if buffer in keys:
                    for maker in makers[part]:
                        self._tangents[tensor, maker].append(keys[buffer])

    def _fill_with_zeros(
        self, tensor: LogicalTensor, communication: Communication, keys: dict[Buffer, str], kind: ValueKind
    ) -> None:
        """Parts that steps read and no segment gives a gradient of are zeros."""
        if communication.sent <= keys.keys():
            return
        itemsize = tensor.dtype.itemsize
        for facts in communication.facts(itemsize, self._topology):
            for rank, buffers in facts.reads.items():
                for buffer in buffers:
                    if buffer not in keys:
                        keys[buffer] = f"zeros {self._label[tensor]}{buffer.mask}"
                        zeros = StepFacts.of(Assemble((), buffer), itemsize, self._topology)
                        if (rank, keys[buffer]) not in self._values:
                            self._add_steps(tensor, (zeros,), keys, None, kind)

    def _sum(self, given: Sequence[str], key: str, rank: int, view: TensorView, microbatch: int | None) -> str | None:
        """The key of the sum of some values, added one after the other so that no more than two are there at a time."""
        if not given:
            return None
        total, *rest = dict.fromkeys(given)
        kind = _gradient_kind(view.tensor)
        for number, addend in enumerate(rest):
            output = f"{key}+{number + 1}"
            self._add_value(output, rank, view.num_bytes, kind)
            self._work[f"add {output} {rank}"] = Add(rank, (total, addend), output, in_place=number > 0)
            self._jobs.append(
                Job(
                    f"add {output} {rank}",
                    "move",
                    (rank,),
                    reads={rank: (total, addend)},
                    writes={rank: (output,)},
                    stage=self._label[view.tensor],
                    microbatch=microbatch,
                    seconds=memory_seconds(3 * view.num_bytes),
                    workspace_bytes=-view.num_bytes if number > 0 else 0,  # in place
                )
            )
            total = output
        return total

    def _collect_gradients(self) -> dict[tuple[int, LogicalTensor], tuple[str, Mask]]:
        found: dict[tuple[int, LogicalTensor], tuple[str, Mask]] = {}
        for exchange in self._flow.exchanges:
            for part, makers in exchange.makers.items():
                given = self._tangents.get((exchange.tensor, part), [])
                if makers or not given or (part.rank, exchange.tensor) in found:
                    continue
                view = TensorView(exchange.tensor, part.mask)
                total = self._sum(given, f"d {self._label[exchange.tensor]}{part.mask}", part.rank, view, None)
                assert total is not None
                found[part.rank, exchange.tensor] = total, part.mask
        self._pin((place, key) for place, (key, _) in found.items())
        return found

    def _add_job(
        self,
        name: str,
        kind: JobKind,
        work: Work,
        reads: Sequence[str],
        writes: Sequence[str],
        segment: Segment,
    ) -> None:
        rank = segment.rank
        self._work[name] = work
        self._jobs.append(
            Job(
                name,
                kind,
                (rank,),
                reads={rank: tuple(dict.fromkeys(reads))} if reads else {},
                writes={rank: tuple(writes)} if writes else {},
                stage=str(segment.stage),
                microbatch=segment.microbatch,
                seconds=pass_seconds(segment, kind),
                workspace_bytes=self._footprint[segment].workspace_bytes.get(kind, 0),
            )
        )


def _labels(exchanges: Sequence[Exchange]) -> dict[LogicalTensor, str]:
    """A name of its own for each tensor."""
    taken: Counter[str] = Counter()
    labels: dict[LogicalTensor, str] = {}
    for exchange in exchanges:
        tensor = exchange.tensor
        if tensor not in labels:
            taken[tensor.name] += 1
            labels[tensor] = tensor.name if taken[tensor.name] == 1 else f"{tensor.name}~{taken[tensor.name]}"
    return labels


def _gradient_kind(tensor: LogicalTensor) -> ValueKind:
    return "gradient" if tensor.kind == "parameter" else "activation"


def _kind_of(step: Step) -> str:
    return "assemble" if isinstance(step, Assemble) else "transfer" if isinstance(step, Transfer) else step.kind
