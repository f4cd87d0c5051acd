"""Runs one rank's action list: passes over values by key, and communication that is waited for when it is read."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_vtensor.compile.communication import Assemble, Buffer, Collective, Transfer
from torch_vtensor.compile.program import Add, Backward, Forward, Move, Program
from torch_vtensor.compile.schedules.action import Schedule
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.segment import Segment


class Pending(Protocol):
    """Communication under way."""

    def wait(self) -> Sequence[Tensor]:
        """What the rank gets, in the order of the step's buffers."""


class Transport(Protocol):
    """Moves tensors between ranks."""

    def collective(
        self, name: str, step: Collective, rank: int, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Pending:
        """Begin a rank's part of a collective; the inputs may not be changed until that is waited for."""

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

    def run(self, values: dict[str, Any], device: torch.device) -> Generator[Pending, None, None]:
        """Run all actions over these values, which hold the arguments before and the results after.

        Yields what it is about to wait for: whoever runs several ranks in one process lets the others go on until that
        is there.
        """
        sent: list[Pending] = []
        for action in self._actions:
            if action.kind == "FREE":
                del values[action.name]
                continue
            work = self._work[action.name]
            for key in self._jobs[action.name].reads.get(self._rank, ()):
                if isinstance(values[key], _Arriving):
                    yield values[key].pending
                    values[key].settle(values)
            # In functions of their own, so that nothing outlives its FREE in a variable here.
            if isinstance(work, Forward):
                self._run_forward(work, values)
            elif isinstance(work, Backward):
                self._run_backward(work, values)
            elif isinstance(work, Add):
                self._run_add(work, values)
            elif isinstance(work.step, Assemble):
                values[work.keys[work.step.output]] = assemble(work.step, work.keys, values, work.tensor.dtype, device)
            else:
                self._communicate(action.name, work, values, sent, device)
        for pending in sent:
            yield pending
            pending.wait()
        for value in list(values.values()):
            if isinstance(value, _Arriving):
                yield value.pending
                value.settle(values)

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

    def _run_add(self, work: Add, values: dict[str, Any]) -> None:
        total, *rest = (values[key] for key in work.inputs)
        for addend in rest:
            total = total.add_(addend) if work.in_place else total + addend
        values[work.output] = total

    def _communicate(
        self, name: str, work: Move, values: dict[str, Any], sent: list[Pending], device: torch.device
    ) -> None:
        step = work.step
        if isinstance(step, Collective):
            inputs = [values[work.keys[buffer]] for buffer in step.reads(self._rank)]
            pending = self._transport.collective(name, step, self._rank, inputs, work.tensor.dtype, device)
        elif isinstance(step, Transfer) and step.source.rank == self._rank:
            source = values[work.keys[step.source]]
            part = source[step.destination.mask.within(step.source.mask)]
            sent.append(self._transport.send(name, step, part))
            return
        else:
            assert isinstance(step, Transfer)
            pending = self._transport.receive(name, step, work.tensor.dtype, device)
        keys = [work.keys[buffer] for buffer in step.writes(self._rank)]
        if not keys:
            sent.append(pending)
        for key in keys:
            values[key] = _Arriving(pending, keys)


class _Arriving:
    """Stands for a value that communication will bring."""

    def __init__(self, pending: Pending, keys: Sequence[str]) -> None:
        self.pending = pending
        self._keys = keys

    def settle(self, values: dict[str, Any]) -> None:
        for key, tensor in zip(self._keys, self.pending.wait(), strict=True):
            values[key] = tensor


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
