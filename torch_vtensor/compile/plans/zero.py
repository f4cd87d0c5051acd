"""Data parallel with parameters, gradients and optimizer state in shards."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.data_parallel import data_parallel
from torch_vtensor.compile.plans.layers import find_layers, find_units
from torch_vtensor.compile.primitives import Graph, Microbatches, store


def zero1(graph: Graph, mesh: Mesh, *, num_microbatches: int = 1) -> None:
    """Cut the batch over the mesh's axis "dp"; keep a shard of each parameter and of its optimizer state on each rank.

    ::

        rank 0 | gather parameters   F B  F B  F B   reduce-scatter gradients
        rank 1 | gather parameters   F B  F B  F B   reduce-scatter gradients

    Whole parameters, and whole gradients, are there for all of a step. Where other plans cut parameters over further
    axes, ranks that read the same part share it out.

    num_microbatches: the batch runs in so many pieces one after the other, unless a pipeline has cut it already.

    Source:  ZeRO (arXiv 1910.02054), stage 1.
    """
    _cut(graph, mesh, num_microbatches)
    store(graph)


def zero2(graph: Graph, mesh: Mesh, *, num_microbatches: int = 1, layers: str | None = None) -> None:
    """Do as `zero1` does, but add gradients up over ranks as soon as a layer has run backward; keep shards of them (R).

    ::

        rank 0 | gather parameters   F0 F1 F2 B2 B1 B0   F0 F1 F2 B2 B1 B0
               |                                 R2 R1   R0          R2 R1 R0
        rank 1 | as rank 0, with other rows

    Source:  ZeRO (arXiv 1910.02054), stage 2.
    Raises:  ValueError for a model without layers.
    """
    _cut(graph, mesh, num_microbatches)
    store(graph, each_microbatch=True, units=find_units(graph, find_layers(graph, layers)))


def zero3(graph: Graph, mesh: Mesh, *, num_microbatches: int = 1, layers: str | None = None) -> None:
    """Do as `zero2` does, but gather the parameters of a layer for each of its passes, and free them after it.

    Backward gathers them again, but for the last layer's, which are there still. While a layer runs, the next one's
    parameters are on their way (G), and the gradients of the one before (R), which go once they have arrived::

        rank 0 |     F0 F1 F2 B2 B1 B0
               |  G0 G1 G2    G1 G0
               |                 R2 R1 R0
        rank 1 | as rank 0, with other rows

    Embeddings, and head with loss, count as layers of their own.

    Source:  ZeRO (arXiv 1910.02054), stage 3; FSDP (arXiv 2304.11277) for gathering one layer ahead.
    Raises:  ValueError for a model without layers.
    """
    _cut(graph, mesh, num_microbatches, always_in_order=True)
    store(graph, units=find_units(graph, find_layers(graph, layers)), anew=True)


def _cut(graph: Graph, mesh: Mesh, num_microbatches: int, *, always_in_order: bool = False) -> None:
    if graph.pipeline is not None and num_microbatches > 1:
        raise ValueError(
            f"the pipeline has cut the batch into {graph.num_microbatches} microbatches already; leave out "
            f"num_microbatches={num_microbatches}, or '/{num_microbatches}' of the name."
        )
    if graph.pipeline is None and (num_microbatches > 1 or always_in_order):
        microbatches = graph.microbatch(num_microbatches) if num_microbatches > 1 else Microbatches((graph.tasks,))
        order.one_f_one_b(microbatches)
    data_parallel(graph, mesh)
