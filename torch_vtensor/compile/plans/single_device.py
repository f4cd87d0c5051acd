"""Everything on one device."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.primitives import Graph, op_assign


def single_device(graph: Graph, mesh: Mesh) -> None:
    """Run everything, uncut, on the first rank: ``rank 0 | F B``."""
    op_assign(graph.tasks, mesh.ranks[0])
