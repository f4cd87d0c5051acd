"""The world that a plan runs in: torch.distributed's ranks, or this process alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from torch_vtensor.compile.executor import Transport
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.program import Program


def find_mesh(axes: Mapping[str, int] | None) -> Mesh:
    """The mesh of all ranks; started by torchrun, it begins torch.distributed if nobody has.

    Raises:  ValueError for axes that the ranks do not fill.
    """
    if dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched():
        dist.init_process_group()
    if not (dist.is_available() and dist.is_initialized()):
        return Mesh((0,), axes or {})
    return Mesh(tuple(range(dist.get_world_size())), axes or {})


def join(program: Program) -> tuple[Transport, int]:
    """What carries a program's communication, and this process's rank."""
    if len(program.flow.plan.mesh) == 1:
        from torch_vtensor.compile.virtual_world import Mailboxes

        return Mailboxes(), 0
    from torch_vtensor.compile.transport import ProcessGroups

    return ProcessGroups(program), dist.get_rank()
