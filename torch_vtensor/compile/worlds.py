"""The world that a plan runs in: torch.distributed's ranks, or this process alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.executor import Transport
from torch_vtensor.compile.program import Program
from torch_vtensor.compile.random_numbers import draw_seed

_groups: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], str | None], Any]] = weakref.WeakKeyDictionary()
"""The process groups of each world, which end with it: making one takes connections and memory on every rank."""


def group_of(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """The process group of these ranks, in ascending order: one for all programs of a world, and for nothing else.

    It waits for as long as the world does. That of all ranks is not the world's own: what other threads begin in that
    while collectives of a program begin together would be taken for one of these.

    Effects: the first time, makes it, on every rank of the world in the same order, which waits for all of them.
    """
    world = dist.group.WORLD
    assert world is not None
    made = _groups.setdefault(world, {})
    asked = tuple(ranks), backend
    if asked not in made:
        made[asked] = dist.new_group(list(ranks), timeout=_torch_compat.timeout_of(world), backend=backend)
    group: dist.ProcessGroup = made[asked]
    return group


def num_ranks() -> int:
    """How many processes there are; started by torchrun, this begins torch.distributed if nobody has."""
    if dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched():
        dist.init_process_group()
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """This process's rank; 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def from_rank_0(value: Any) -> Any:
    """What rank 0 gave, on every rank, each of which has to call it."""
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def join(program: Program) -> tuple[Transport, int]:
    """What carries a program's communication, and this process's rank."""
    if len(program.flow.plan.mesh) == 1:
        from torch_vtensor.compile.virtual_world import Mailboxes

        return Mailboxes(), 0
    from torch_vtensor.compile.transport import ProcessGroups

    return ProcessGroups(program), dist.get_rank()


def find_seeds(program: Program, device: torch.device) -> Callable[[], int] | None:
    """What draws a seed for each call, that of rank 0 on every rank; None for a program that needs none.

    Every rank has to call this, and what it returns, in the same order.
    """
    if not program.streams:
        return None
    by_nccl = dist.get_backend() == "nccl"
    # A seed that came by NCCL would have to be waited for on the device.
    backend = "gloo" if by_nccl and dist.is_gloo_available() else None
    group = group_of(range(dist.get_world_size()), backend)
    where = device if by_nccl and backend is None else torch.device("cpu")

    def draw() -> int:
        seed = torch.tensor(draw_seed(), device=where)
        dist.broadcast(seed, src=0, group=group)
        return int(seed)

    return draw
