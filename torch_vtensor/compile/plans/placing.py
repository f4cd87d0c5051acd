"""How ready plans compose: everything begins on all ranks, and each plan keeps of a piece's ranks those of its part.

mesh dp 2 × tp 2      data parallel: batch 0 → 0, 1        tensor parallel: heads 0 → 0, 2 and hence
ranks 0 1 / 2 3                      batch 1 → 2, 3        batch 0 heads 0 → 0, batch 1 heads 0 → 2 …
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import Cut
from torch_vtensor.compile.primitives import Graph, Tasks, op_assign, op_trans
from torch_vtensor.compile.task_graph import Task


def parts_of(mesh: Mesh, axis: str) -> tuple[Mesh, ...]:
    """The parts of a mesh along an axis; of a mesh without named axes, each rank.

    Raises:  ValueError for a mesh that names other axes.
    """
    if not mesh.axes:
        return tuple(Mesh((rank,)) for rank in mesh)
    return mesh.parts(axis) if axis in mesh.axes else (_refuse(mesh, axis),)


def place_everywhere(graph: Graph, mesh: Mesh) -> None:
    """Put every task on all ranks, unless a plan before this one has placed tasks."""
    if not graph.ranks:
        op_assign(graph.tasks, mesh.ranks)


def place_pieces(groups: Sequence[Tasks], parts: Sequence[Mesh]) -> None:
    """Keep of each group's ranks those of its part of the mesh; what has no place still follows its neighbours."""
    for group, part in zip(groups, parts, strict=True):
        graph, inside = group.graph, frozenset(part.ranks)
        on_ranks: defaultdict[tuple[int, ...], list[Task]] = defaultdict(list)
        ranks_of = graph.ranks
        for task in group:
            if task in ranks_of:
                on_ranks[ranks_of[task]].append(task)
        for ranks, tasks in on_ranks.items():
            op_assign(Tasks.uncut(graph, tasks), [rank for rank in ranks if rank in inside])


def cut_over(cut: Cut, parts: Sequence[Mesh], axis: str) -> None:
    """Cut a dimension over the parts of a mesh.

    Raises:  ValueError for one that is too short.
    """
    if cut.size < len(parts):
        raise ValueError(
            f"{cut.dim} can be cut into at most {cut.size} pieces, and the mesh's axis {axis!r} has {len(parts)} "
            f"parts. Make the axis {cut.size} or a smaller number."
        )
    place_pieces(op_trans(cut.tasks, cut.dim, len(parts)), parts)


def _refuse(mesh: Mesh, axis: str) -> Mesh:
    raise ValueError(
        f"the {mesh} has no axis {axis!r}. Name it in options={{'mesh': {{{axis!r}: size}}}}, or name no axes."
    )
