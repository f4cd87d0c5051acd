"""Runs communication as torch.distributed would: every rank has its own buffers, and collectives do what they are
documented to do, from tensors' shapes and the order of ranks alone."""

from collections.abc import Mapping

import torch

from torch_vtensor.compile.communication import Assemble, Buffer, Collective, Communication, Placed, Transfer


class WrongStepError(Exception):
    """A step that the ranks could not carry out."""


class _Rank(dict[Buffer, torch.Tensor]):
    """A rank's buffers, each written once."""

    def __setitem__(self, buffer: Buffer, value: torch.Tensor) -> None:
        if buffer in self:
            raise WrongStepError(f"{buffer} is written twice")
        if tuple(value.shape) != buffer.mask.shape:
            raise WrongStepError(f"{buffer} gets a value of shape {tuple(value.shape)}")
        super().__setitem__(buffer, value)

    def __missing__(self, buffer: Buffer) -> torch.Tensor:
        raise WrongStepError(f"{buffer} is read but does not exist")


def run(communication: Communication, values: Mapping[Placed, torch.Tensor]) -> dict[Placed, torch.Tensor]:
    """Values of all needs, from the values of all that exists."""
    ranks: dict[int, _Rank] = {}
    for placed in (*communication.have, *communication.need):
        ranks.setdefault(placed.rank, _Rank())
    for placed, buffer in communication.have.items():
        assert buffer.rank == placed.rank
        ranks[placed.rank][buffer] = values[placed]
    for step in communication.steps:
        match step:
            case Transfer(source, destination):
                if source.rank == destination.rank:
                    raise WrongStepError(f"{step} sends to itself")
                part = ranks[source.rank][source][destination.mask.within(source.mask)]
                ranks[destination.rank][destination] = part.clone()
            case Assemble(parts, output):
                total = torch.zeros(output.mask.shape, dtype=next(iter(values.values())).dtype)
                for part in parts:
                    if part.buffer.rank != output.rank:
                        raise WrongStepError(f"{step} reads another rank's buffer")
                    value = ranks[output.rank][part.buffer][part.region.within(part.buffer.mask)]
                    if value.shape != part.region.shape:
                        raise WrongStepError(f"{step} reads outside of {part.buffer}")
                    target = total[part.region.within(output.mask)]
                    if target.shape != part.region.shape:
                        raise WrongStepError(f"{step} writes outside of {output}")
                    target += value
                ranks[output.rank][output] = total
            case Collective():
                run_collective(step, ranks)
    return {placed: ranks[buffer.rank][buffer] for placed, buffer in communication.need.items()}


def run_collective(step: Collective, ranks: Mapping[int, _Rank]) -> None:
    if len(set(step.ranks)) != len(step.ranks) or len(step.ranks) < 2:
        raise WrongStepError(f"{step} is of no group")
    inputs = [ranks[buffer.rank][buffer] for buffer in step.inputs]
    if step.kind == "broadcast":
        assert len(inputs) == 1
        results = [inputs[0].clone() for _ in step.outputs]
    else:
        if [buffer.rank for buffer in step.inputs] != [buffer.rank for buffer in step.outputs]:
            raise WrongStepError(f"{step} has its ranks in two orders")
        if len({value.shape for value in inputs}) != 1:
            raise WrongStepError(f"{step} has uneven inputs")
        results = outputs_of(step, inputs)
    for buffer, value in zip(step.outputs, results, strict=True):
        ranks[buffer.rank][buffer] = value


def outputs_of(step: Collective, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    def shards(value: torch.Tensor) -> list[torch.Tensor]:
        assert step.scatter_dim is not None
        if value.shape[step.scatter_dim] % len(inputs):
            raise WrongStepError(f"{step} scatters {value.shape[step.scatter_dim]} indices")
        return list(value.chunk(len(inputs), step.scatter_dim))

    everyone = range(len(inputs))
    match step.kind:
        case "all_reduce":
            return [sum(inputs[1:], inputs[0]) for _ in everyone]
        case "all_gather":
            return [torch.cat(inputs, step.gather_dim) for _ in everyone]
        case "reduce_scatter":
            return shards(sum(inputs[1:], inputs[0]))
        case "all_to_all":
            sent = [shards(value) for value in inputs]
            return [torch.cat([shard[index] for shard in sent], step.gather_dim) for index in everyone]
    raise AssertionError(step.kind)
