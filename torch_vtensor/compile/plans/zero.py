"""Data parallel with parameters sharded between steps."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.data_parallel import data_parallel
from torch_vtensor.compile.primitives import Graph, store


def zero1(graph: Graph, mesh: Mesh) -> None:
    """Cut the batch over the ranks; keep a shard of each parameter, of its gradient and its optimizer state on each.

    ::

        rank 0 | all-gather parameters   F B of all microbatches   reduce-scatter gradients
        rank 1 | all-gather parameters   F B of all microbatches   reduce-scatter gradients

    Source:  ZeRO (arXiv 1910.02054), stage 1.
    """
    data_parallel(graph, mesh)
    store(graph, mesh.ranks)
