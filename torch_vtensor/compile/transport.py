"""Communication by torch.distributed: steps of a program on process groups, begun at once and waited for when read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.communication import Collective, Transfer
from torch_vtensor.compile.executor import Transport
from torch_vtensor.compile.mesh import name_ranks
from torch_vtensor.compile.program import Move, Program
from torch_vtensor.compile.worlds import group_of

# Their names from torch 2.13 on, which warns of the older ones.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessGroups(Transport):
    """The process groups of a program's collectives.

    Effects: makes groups that the world does not have yet, on every rank in the same order, which waits for all ranks.
    """

    def __init__(self, program: Program) -> None:
        steps = [move.step for move in program.moves]
        sets = sorted({tuple(sorted(step.ranks)) for step in steps if isinstance(step, Collective)})
        self._groups = {ranks: group_of(ranks) for ranks in sets}
        transfers = sorted(
            name for name, work in program.work.items() if isinstance(work, Move) and isinstance(work.step, Transfer)
        )
        # Messages between two ranks are told apart by their job, whatever order they arrive in.
        self._tags = {name: tag for tag, name in enumerate(transfers)}
        self._everyone = group_of(range(dist.get_world_size())) if transfers else None

    def collective(
        self,
        name: str,
        steps: Sequence[Collective],
        rank: int,
        inputs: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Work:
        """Begin a rank's part of collectives, as one."""
        ranks = tuple(sorted(steps[0].ranks))
        group = self._groups[ranks]
        given = iter(inputs)
        calls = [
            _call(step, rank, [next(given) for _ in step.reads(rank)], dtype, device, ranks, group) for step in steps
        ]
        works = _torch_compat.begin_together([call.begin for call in calls], group, device)
        return _Work(
            f"{name!r} of {name_ranks(ranks)}",
            works,
            lambda: [tensor for call in calls for tensor in call.finish()],
            [tensor for call in calls for tensor in call.keeps],
        )

    def send(self, name: str, step: Transfer, tensor: Tensor) -> _Work:
        """Begin to send."""
        data = tensor.contiguous()
        what = f"{name!r} to rank {step.destination.rank}"
        begun = dist.isend(data, step.destination.rank, self._everyone, self._tags[name])
        return _Work(what, [begun], list, keeps=[data])

    def receive(self, name: str, step: Transfer, dtype: torch.dtype, device: torch.device) -> _Work:
        """Begin to receive."""
        data = torch.empty(step.destination.mask.shape, dtype=dtype, device=device)
        what = f"{name!r} from rank {step.source.rank}"
        begun = dist.irecv(data, step.source.rank, self._everyone, self._tags[name])
        return _Work(what, [begun], lambda: [data])


class _Call(NamedTuple):
    """A collective to begin; ``finish`` gives what it brought, ``keeps`` is what it reads until it is done."""

    begin: Callable[[], dist.Work | None]
    finish: Callable[[], Sequence[Tensor]]
    keeps: Sequence[Tensor] = ()


def _call(
    step: Collective,
    rank: int,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    ranks: Sequence[int],
    group: dist.ProcessGroup,
) -> _Call:
    if step.kind == "broadcast":
        source = step.ranks[0]
        shape = step.inputs[0].mask.shape
        data = inputs[0].contiguous() if rank == source else torch.empty(shape, dtype=dtype, device=device)
        return _Call(
            partial(dist.broadcast, data, src=source, group=group, async_op=True),
            lambda: [] if rank == source else [data],
            [data],
        )
    (given,) = inputs
    if step.kind == "all_reduce":
        total = given.clone(memory_format=torch.contiguous_format)
        return _Call(partial(dist.all_reduce, total, group=group, async_op=True), lambda: [total])
    if step.kind == "all_gather":
        mine = given.contiguous()
        parts = mine.new_empty(len(ranks), *mine.shape)
        return _Call(
            partial(_ALL_GATHER, parts.flatten(0, 1), mine, group=group, async_op=True),
            lambda: [_joined(step, parts)],
            [mine],
        )
    assert step.scatter_dim is not None
    if step.copies_what_it_takes:
        shards = dict(zip(step.ranks, given.chunk(len(ranks), step.scatter_dim), strict=True))
        stacked = torch.stack([shards[one] for one in ranks])
    else:
        stacked = given.contiguous().unflatten(0, (len(ranks), -1))
    if step.kind == "reduce_scatter":
        return _reduce_scatter(stacked, ranks.index(rank), group)
    got = torch.empty_like(stacked)
    return _Call(
        partial(dist.all_to_all_single, got, stacked, group=group, async_op=True),
        lambda: [_joined(step, got)],
        [stacked],
    )


def _reduce_scatter(shards: Tensor, index: int, group: dist.ProcessGroup) -> _Call:
    if shards.device.type == "cpu":  # gloo, under whatever name the group has; not every release scatters
        total = shards.clone(memory_format=torch.contiguous_format)
        return _Call(partial(dist.all_reduce, total, group=group, async_op=True), lambda: [total[index].clone()])
    mine = torch.empty_like(shards[0])
    return _Call(partial(_REDUCE_SCATTER, mine, shards, group=group, async_op=True), lambda: [mine], [shards])


def _joined(step: Collective, parts: Tensor) -> Tensor:
    """The shards ``parts`` [n, …] that a collective brought, by ascending ranks, as one tensor."""
    if not step.copies_what_it_brings:
        return parts.flatten(0, 1)
    assert step.gather_dim is not None
    of_rank = dict(zip(sorted(step.ranks), parts, strict=True))
    return torch.cat([of_rank[rank] for rank in step.ranks], step.gather_dim)


class _Work:
    """Communication that torch.distributed has begun; ``keeps`` what it reads until it is done."""

    def __init__(
        self,
        what: str,
        works: Sequence[dist.Work | None],
        finish: Callable[[], Sequence[Tensor]],
        keeps: Sequence[Tensor] = (),
    ) -> None:
        self._what = what
        self._works = works
        self._finish: Callable[[], Sequence[Tensor]] = finish
        self._keeps = keeps

    def is_done(self) -> bool:
        """Whether the device has done it."""
        return all(work is None or work.is_completed() for work in self._works)

    def wait(self) -> Sequence[Tensor]:
        """Wait, once: on a GPU the stream waits and not the host. Nothing is held on to from then on."""
        for work in self._works:
            if work is not None:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"{self._what} failed: {error}. Another rank has ended or is out of reach; what happened there "
                        f"is in its own output."
                    ) from error
        made = self._finish()
        self._works, self._keeps, self._finish = (), (), list
        return made
