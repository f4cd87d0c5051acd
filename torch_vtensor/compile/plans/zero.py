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


def zero2(graph: Graph, mesh: Mesh) -> None:
    """As `zero1`, with gradients reduce-scattered after every microbatch, so that only a shard of them is kept.

    Source:  ZeRO (arXiv 1910.02054), stage 2.
    """
    data_parallel(graph, mesh)
    store(graph, mesh.ranks, reduces_each=True)


def zero3(graph: Graph, mesh: Mesh) -> None:
    """As `zero2`, with parameters gathered where they are read, forward and again backward, and dropped in between.

    Source:  ZeRO (arXiv 1910.02054), stage 3.
    """
    data_parallel(graph, mesh)
    store(graph, mesh.ranks, reduces_each=True, regathers=True)
