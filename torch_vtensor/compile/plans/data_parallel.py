"""The batch over the ranks."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.placing import parts_of, place_everywhere, place_pieces
from torch_vtensor.compile.primitives import Graph, op_trans


def data_parallel(graph: Graph, mesh: Mesh) -> None:
    """Cut the batch over the mesh's axis "dp"; gradients of parameters are all-reduced, each as soon as it is there.

    ::

        rank 0 | F rows 0 to 3   B  ─┐ all-reduce of
        rank 1 | F rows 4 to 7   B  ─┘ each gradient

    Raises:  ValueError for a batch smaller than the axis, or none.
    """
    place_everywhere(graph, mesh)
    parts = parts_of(mesh, "dp")
    place_pieces(op_trans(graph.tasks, "batch", len(parts)), parts)
