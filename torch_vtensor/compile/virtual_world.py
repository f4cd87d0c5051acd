"""All ranks of a program in one process: the same executors, with mailboxes for communication."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_vtensor.compile.communication import Collective, Transfer
from torch_vtensor.compile.executor import Code, Executor, Pending, Transport
from torch_vtensor.compile.program import Program
from torch_vtensor.compile.random_numbers import apart_from_the_caller, draw_seed
from torch_vtensor.compile.schedules.action import Schedule
from torch_vtensor.compile.segment import Segment


def run_all(
    program: Program,
    schedule: Schedule,
    values: Mapping[int, dict[str, Any]],
    code: Callable[[Segment], Code],
    device: torch.device,
) -> None:
    """Run every rank's actions, each until it waits for another, over its values.

    Raises:  RuntimeError if all ranks wait for each other, or one got what nobody waits for.
    """
    world = Mailboxes()
    made = {segment: code(segment) for segment in program.segments}
    seed = draw_seed() if program.streams else None
    running = {
        rank: Executor(program, schedule, rank, made, world).run(values[rank], device, seed)
        for rank in schedule.actions
    }
    with apart_from_the_caller(device) if program.streams else contextlib.nullcontext():
        _run(running)
    left = [str(box) for box in world.boxes.values() if not box.is_full]
    if left:
        raise RuntimeError(f"sent and never received: {', '.join(left)}")


def _run(running: dict[int, Generator[Pending, None, None]]) -> None:
    waits_for: dict[int, _Box | None] = dict.fromkeys(running)
    while running:
        moved = False
        for rank in list(running):
            box = waits_for[rank]
            if box is not None and not box.is_full:
                continue
            moved = True
            try:
                waits_for[rank] = next(running[rank])  # type: ignore[assignment]
            except StopIteration:
                del running[rank]
        if not moved:
            stuck = ", ".join(f"rank {rank} for {waits_for[rank]}" for rank in running)
            raise RuntimeError(f"every rank waits: {stuck}")


class Mailboxes(Transport):
    """Where ranks leave what others wait for, by job."""

    def __init__(self) -> None:
        self.boxes: dict[str, _Box] = {}

    def collective(
        self,
        name: str,
        steps: Sequence[Collective],
        rank: int,
        inputs: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Part:
        """Leave a rank's inputs; full once every rank has."""
        box = self.boxes.setdefault(name, _Box(name, steps))
        box.put(rank, inputs)
        return _Part(box, rank)

    def send(self, name: str, step: Transfer, tensor: Tensor) -> _Part:
        """Leave a copy: what is sent may be changed once it is on its way."""
        box = self.boxes.setdefault(name, _Box(name, [step]))
        box.put(step.source.rank, [tensor.clone()])
        return _Part(box, step.source.rank)

    def receive(self, name: str, step: Transfer, dtype: torch.dtype, device: torch.device) -> _Part:
        """Ask for what the sender leaves."""
        box = self.boxes.setdefault(name, _Box(name, [step]))
        box.put(step.destination.rank, [])
        return _Part(box, step.destination.rank)


class _Box:
    def __init__(self, name: str, steps: Sequence[Collective | Transfer]) -> None:
        self.name = name
        self.steps = steps
        self.inputs: dict[int, Sequence[Tensor]] = {}

    def put(self, rank: int, inputs: Sequence[Tensor]) -> None:
        if rank in self.inputs:
            raise RuntimeError(f"rank {rank} takes part in {self.name!r} twice")
        self.inputs[rank] = [tensor.clone() for tensor in inputs]

    @property
    def is_full(self) -> bool:
        return set(self.inputs) == set(self.steps[0].ranks)

    def __str__(self) -> str:
        return self.name


class _Part:
    """A rank's view of a box."""

    def __init__(self, box: _Box, rank: int) -> None:
        self._box = box
        self._rank = rank

    @property
    def is_full(self) -> bool:
        return self._box.is_full

    def __str__(self) -> str:
        return str(self._box)

    def is_done(self) -> bool:
        return self.is_full

    def wait(self) -> Sequence[Tensor]:
        if not self.is_full:
            raise RuntimeError(f"rank {self._rank} reads {self._box.name!r}, which is not there yet")
        made: list[Tensor] = []
        given = {rank: iter(tensors) for rank, tensors in self._box.inputs.items()}
        for step in self._box.steps:
            if isinstance(step, Transfer):
                return [next(given[step.source.rank])] if self._rank == step.destination.rank else []
            inputs = [next(given[buffer.rank]) for buffer in step.inputs]
            outputs = enumerate(step.outputs)
            made += [_collect(step, inputs, index) for index, output in outputs if output.rank == self._rank]
        return made


def _collect(step: Collective, inputs: Sequence[Tensor], index: int) -> Tensor:
    """Output number `index` of a collective."""
    if step.kind == "broadcast":
        return inputs[0].clone()
    if step.kind == "all_reduce":
        return torch.stack(list(inputs)).sum(0)
    if step.kind == "reduce_scatter":
        assert step.scatter_dim is not None
        return torch.stack(list(inputs)).sum(0).chunk(len(inputs), step.scatter_dim)[index].contiguous()
    assert step.gather_dim is not None
    if step.kind == "all_to_all":
        assert step.scatter_dim is not None
        inputs = [tensor.chunk(len(inputs), step.scatter_dim)[index] for tensor in inputs]
    return torch.cat(list(inputs), step.gather_dim)
