"""Communication by torch.distributed: steps of a program on process groups, begun at once and waited for when read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torch_vtensor.compile.communication import Collective, Transfer
from torch_vtensor.compile.executor import Transport
from torch_vtensor.compile.mesh import name_ranks
from torch_vtensor.compile.program import Move, Program


class ProcessGroups(Transport):
    """The process groups of a program's collectives.

    Effects: makes a group for each set of ranks, on every rank in the same order, which waits for all ranks.
    """

    def __init__(self, program: Program) -> None:
        steps = [work.step for work in program.work.values() if isinstance(work, Move)]
        sets = sorted({tuple(sorted(step.ranks)) for step in steps if isinstance(step, Collective)})
        everyone = tuple(range(dist.get_world_size()))
        self._groups = {ranks: _group(None if ranks == everyone else ranks) for ranks in sets}
        transfers = sorted(name for name, work in program.work.items() if isinstance(work, Move))
        # Messages between two ranks are told apart by their job, whatever order they arrive in.
        self._tags = {name: tag for tag, name in enumerate(transfers)}

    def collective(
        self, name: str, step: Collective, rank: int, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device
    ) -> _Work:
        """Begin a rank's part of a collective."""
        ranks = tuple(sorted(step.ranks))
        what = f"{name!r} of {name_ranks(ranks)}"
        group = self._groups[ranks]
        # Shards are in the order of the step's ranks, torch's in the order of the group's.
        place = [ranks.index(one) for one in step.ranks]
        if step.kind == "broadcast":
            source = step.ranks[0]
            shape = step.inputs[0].mask.shape
            data = inputs[0].contiguous() if rank == source else torch.empty(shape, dtype=dtype, device=device)
            work = dist.broadcast(data, src=source, group=group, async_op=True)
            return _Work(what, [work], lambda: [] if rank == source else [data], keeps=[data])
        (given,) = inputs
        if step.kind == "all_reduce":
            total = given.clone(memory_format=torch.contiguous_format)
            return _Work(what, [dist.all_reduce(total, group=group, async_op=True)], lambda: [total])
        if step.kind == "all_gather":
            assert step.gather_dim is not None
            return self._all_gather(what, given.contiguous(), place, step.gather_dim, group)
        assert step.scatter_dim is not None
        if step.scatter_dim == 0 and place == list(range(len(ranks))):
            stacked = given.contiguous().unflatten(0, (len(ranks), -1))  # as it lies
        else:
            shards = given.chunk(len(ranks), step.scatter_dim)
            stacked = torch.stack([shards[step.ranks.index(one)] for one in ranks])
        if step.kind == "reduce_scatter":
            return self._reduce_scatter(what, stacked, ranks.index(rank), group)
        assert step.gather_dim is not None
        got = torch.empty_like(stacked)
        work = dist.all_to_all_single(got, stacked, group=group, async_op=True)
        gather_dim = step.gather_dim
        return _Work(what, [work], lambda: [_joined(got, place, gather_dim)], keeps=[stacked])

    def _all_gather(self, what: str, mine: Tensor, place: Sequence[int], dim: int, group: dist.ProcessGroup) -> _Work:
        parts = mine.new_empty(len(place), *mine.shape)
        work = dist.all_gather_into_tensor(parts.flatten(0, 1), mine, group=group, async_op=True)
        return _Work(what, [work], lambda: [_joined(parts, place, dim)], keeps=[mine])

    def _reduce_scatter(self, what: str, shards: Tensor, index: int, group: dist.ProcessGroup) -> _Work:
        if shards.device.type == "cpu":  # gloo, under whatever name the group has; not every release scatters
            total = shards.clone(memory_format=torch.contiguous_format)
            work = dist.all_reduce(total, group=group, async_op=True)
            return _Work(what, [work], lambda: [total[index]])
        mine = torch.empty_like(shards[0])
        work = dist.reduce_scatter_tensor(mine, shards, group=group, async_op=True)
        return _Work(what, [work], lambda: [mine], keeps=[shards])

    def send(self, name: str, step: Transfer, tensor: Tensor) -> _Work:
        """Begin to send."""
        data = tensor.contiguous()
        what = f"{name!r} to rank {step.destination.rank}"
        return _Work(what, [dist.isend(data, step.destination.rank, tag=self._tags[name])], list, keeps=[data])

    def receive(self, name: str, step: Transfer, dtype: torch.dtype, device: torch.device) -> _Work:
        """Begin to receive."""
        data = torch.empty(step.destination.mask.shape, dtype=dtype, device=device)
        what = f"{name!r} from rank {step.source.rank}"
        return _Work(what, [dist.irecv(data, step.source.rank, tag=self._tags[name])], lambda: [data])


def _joined(parts: Tensor, place: Sequence[int], dim: int) -> Tensor:
    """The shards ``parts`` [n, …], in the order ``place``, as one tensor: without a copy where they lie as they do."""
    if dim == 0 and list(place) == list(range(len(parts))):
        return parts.flatten(0, 1)
    return torch.cat([parts[index] for index in place], dim)


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
        self._works: Sequence[dist.Work | None] | None = works
        self._finish = finish
        self._keeps = keeps

    def wait(self) -> Sequence[Tensor]:
        """Wait, the first time: on a GPU the stream waits and not the host."""
        for work in self._works or ():
            if work is not None:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"{self._what} failed: {error}. Another rank has ended or is out of reach; what happened there "
                        f"is in its own output."
                    ) from error
        self._works, self._keeps = None, ()
        return self._finish()


def _group(ranks: Sequence[int] | None) -> dist.ProcessGroup:
    """A group of these ranks; that of all ranks for None."""
    group: dist.ProcessGroup | None = dist.group.WORLD if ranks is None else dist.new_group(list(ranks))
    assert group is not None
    return group
