"""Each layer in pieces on the same device, to need less memory."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers, inner_cuts
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph, op_order, op_trans


def coshard(graph: Graph, mesh: Mesh, *, num_pieces: int = 4, layers: str | None = None) -> None:
    """Cut heads and hidden dimensions of every layer, run the pieces in turn where the layer is, recompute each.

    What a piece computes inside is there for one piece at a time, forward and backward; nothing is communicated::

        rank 0 | F norm, heads 0, heads 1, add, norm, hidden 0:24, hidden 24:48, add …  B …, F B hidden 24:48, …

    A dimension of fewer than `num_pieces` is cut into single indices.

    Source:  SuperScaler (arXiv 2301.08984) section 5, co-shard.
    """
    place_everywhere(graph, mesh)
    for layer in find_layers(graph, layers):
        for cut in inner_cuts(layer):
            op_order(*op_trans(cut.tasks, cut.dim, min(num_pieces, cut.size), recompute=True))
