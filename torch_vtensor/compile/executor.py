"""Runs one rank's action list: passes over values by key, and communication that is waited for when it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_vtensor.compile.buckets import Bucket
from torch_vtensor.compile.communication import Assemble, Buffer, Collective, Transfer
from torch_vtensor.compile.program import Add, Backward, Forward, Move, Program, moves_of
from torch_vtensor.compile.random_numbers import begin_stream
from torch_vtensor.compile.schedules.action import Schedule
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.segment import Segment


class Pending(Protocol):
    """Communication under way."""

    def is_done(self) -> bool:
        """Whether waiting would take no time."""

    def wait(self) -> Sequence[Tensor]:
        """What the rank gets, in the order of the steps' buffers; to be called once."""


class Transport(Protocol):
    """Moves tensors between ranks."""

    def collective(
        self,
        name: str,
        steps: Sequence[Collective],
        rank: int,
        inputs: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pending:
        """Begin a rank's part of collectives of one kind among the same ranks, as one.

        The inputs may not be changed until that is waited for.
        """

    def send(self, name: str, step: Transfer, tensor: Tensor) -> Pending:
        """Begin to send; the tensor may not be changed until that is waited for."""

    def receive(self, name: str, step: Transfer, dtype: torch.dtype, device: torch.device) -> Pending:
        """Begin to receive."""


class Code(Protocol):
    """What runs a segment."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """Departures, and what backward needs, one value for each of `Forward.saved`."""

    def backward(
        self,
        part: JobKind,
        saved: Sequence[Any],
        inputs: Sequence[Tensor | None],
        tangents: Sequence[Tensor | None],
    ) -> tuple[Sequence[Tensor | None], Any]:
        """Gradients of those arrivals that this part is for, and what it keeps for the next part.

        ``inputs`` are those arrivals that forward did not save, None for all others.
        """


class Executor:
    """One rank of a program, by one schedule of it.

    ``code`` has what runs each segment. Communication begins where its action stands and is waited for by the first
    action that reads what it brings.
    """

    def __init__(
        self, program: Program, schedule: Schedule, rank: int, code: Mapping[Segment, Code], transport: Transport
    ) -> None:
        self._work = program.work
        self._jobs = schedule.jobs
        self._actions = schedule.actions.get(rank, ())
        self._rank = rank
        self._transport = transport
        self._code = code
        self._streams = {segment: stream for segment, stream in program.streams.items() if segment.rank == rank}

    def run(
        self, values: dict[str, Any], device: torch.device, seed: int | None = None
    ) -> Generator[Pending, None, None]:
        """Run all actions over these values, which hold the arguments before and the results after.

        With a seed, segments that draw random numbers seed torch's generators first.

        Yields what it is about to wait for: whoever runs several ranks in one process lets the others go on until that
        is there.
        """
        sent: deque[_Arriving] = deque()
        given: dict[str, _Arriving] = {}  # what collectives read, and the collectives
        sums = _Sums()
        for action in self._actions:
            if action.kind == "FREE":
                # Memory may not be used for anything else while communication reads it, or writes it.
                for arriving in (given.pop(action.name, None), values[action.name]):
                    if isinstance(arriving, _Arriving) and arriving.pending is not None:
                        yield arriving.pending
                        arriving.settle(values)
                arriving = None
                del values[action.name]
                continue
            work = self._work[action.name]
            reads = self._jobs[action.name].reads.get(self._rank, ())
            for key in reads:
                if isinstance(values[key], _Arriving):
                    yield values[key].pending
                    values[key].settle(values)
            if isinstance(work, Add):
                values[work.output] = sums.of([values[key] for key in work.inputs], work.in_place)
                continue
            sums.finish()
            # In functions of their own, so that nothing outlives its FREE in a variable here.
            if isinstance(work, Forward):
                if seed is not None and (stream := self._streams.get(work.segment)) is not None:
                    begin_stream(seed, stream, device)
                self._run_forward(work, values)
            elif isinstance(work, Backward):
                self._run_backward(work, values)
            elif isinstance(work, Bucket) or isinstance(work.step, Collective):
                given.update(dict.fromkeys(reads, self._communicate(action.name, moves_of(work), values, device)))
            elif isinstance(work.step, Assemble):
                values[work.keys[work.step.output]] = assemble(work.step, work.keys, values, work.tensor.dtype, device)
            elif work.step.source.rank == self._rank:
                # What is on its way keeps its memory: that of earlier messages goes once these have arrived.
                while sent and sent[0].is_done():
                    sent.popleft().settle(values)
                sent.append(self._send(action.name, work, work.step, values))
            else:
                self._receive(action.name, work, work.step, values, device)
        sums.finish()
        for arriving in (*sent, *given.values(), *list(values.values())):
            if isinstance(arriving, _Arriving) and arriving.pending is not None:
                yield arriving.pending
                arriving.settle(values)

    def _run_forward(self, work: Forward, values: dict[str, Any]) -> None:
        outputs, saved = self._code[work.segment].forward([values[key] for key in work.inputs])
        values.update(zip(work.outputs, outputs, strict=True))
        if work.saved:
            values.update(zip(work.saved, saved, strict=True))

    def _run_backward(self, work: Backward, values: dict[str, Any]) -> None:
        saved, inputs, tangents = (
            [None if key is None else values[key] for key in keys] for keys in (work.saved, work.inputs, work.tangents)
        )
        gradients, kept = self._code[work.segment].backward(work.part, saved, inputs, tangents)
        for wanted, gradient in zip(work.gradients, gradients, strict=True):
            if wanted is not None:
                values[wanted] = gradient
        if work.kept is not None:
            values[work.kept] = kept

    def _communicate(self, name: str, moves: Sequence[Move], values: dict[str, Any], device: torch.device) -> _Arriving:
        steps = [move.step for move in moves if isinstance(move.step, Collective)]
        inputs = [move.keys[buffer] for move in moves for buffer in move.step.reads(self._rank)]
        keys = [move.keys[buffer] for move in moves for buffer in move.step.writes(self._rank)]
        given = [values[key] for key in inputs]
        pending = self._transport.collective(name, steps, self._rank, given, moves[0].tensor.dtype, device)
        return _Arriving.put(values, pending, keys)

    def _send(self, name: str, work: Move, step: Transfer, values: dict[str, Any]) -> _Arriving:
        source = values[work.keys[step.source]]
        part = source[step.destination.mask.within(step.source.mask)]
        return _Arriving(self._transport.send(name, step, part), ())

    def _receive(self, name: str, work: Move, step: Transfer, values: dict[str, Any], device: torch.device) -> None:
        pending = self._transport.receive(name, step, work.tensor.dtype, device)
        _Arriving.put(values, pending, [work.keys[step.destination]])


class _Sums:
    """Gradients added up. In place it is done for all of a pass in one call, before anything else runs.

    One by one they take the host longer than the device: a layer's pass leaves ten and more.
    """

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._addends: list[Tensor] = []
        self._taking_part: set[int] = set()

    def of(self, values: Sequence[Tensor], in_place: bool) -> Tensor:
        """The sum of values; ``in_place`` of the first, which has it after `finish`."""
        total, *rest = values
        for addend in rest:
            if not in_place:
                self.finish()
                total = total + addend
                continue
            memory = total.untyped_storage().data_ptr(), addend.untyped_storage().data_ptr()
            if not self._taking_part.isdisjoint(memory):
                self.finish()
            self._totals.append(total)
            self._addends.append(addend)
            self._taking_part.update(memory)
        return total

    def finish(self) -> None:
        """Add up what is in place."""
        if self._totals:
            torch._foreach_add_(self._totals, self._addends)
            self._totals, self._addends, self._taking_part = [], [], set()


class _Arriving:
    """Stands for values that communication will bring; ``pending`` is None once it has."""

    def __init__(self, pending: Pending, keys: Sequence[str]) -> None:
        self.pending: Pending | None = pending
        self._keys = keys

    @classmethod
    def put(cls, values: dict[str, Any], pending: Pending, keys: Sequence[str]) -> _Arriving:
        """Have it stand for these keys."""
        made = cls(pending, keys)
        values.update(dict.fromkeys(keys, made))
        return made

    def is_done(self) -> bool:
        """Whether it can be settled without waiting."""
        return self.pending is None or self.pending.is_done()

    def settle(self, values: dict[str, Any]) -> None:
        """Wait for what is there now, and put it into its place."""
        assert self.pending is not None
        for key, tensor in zip(self._keys, self.pending.wait(), strict=True):
            if values.get(key) is self:  # not what nobody reads and has been freed
                values[key] = tensor
        self.pending = None


def assemble(
    step: Assemble, keys: Mapping[Buffer, str], values: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Put parts side by side, adding up where they overlap."""
    if step.is_view:
        (part,) = step.parts
        whole: Tensor = values[keys[part.buffer]]
        return whole[part.region.within(part.buffer.mask)]
    made = torch.zeros(step.output.mask.shape, dtype=dtype, device=device)
    for part in step.parts:
        source = values[keys[part.buffer]]
        made[part.region.within(step.output.mask)] += source[part.region.within(part.buffer.mask)]
    return made
