"""The head and the loss in pieces along the batch, to need less memory."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import after_layers, find_layers
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph, op_order, op_trans


def chunked_loss(graph: Graph, mesh: Mesh, *, num_pieces: int = 4, layers: str | None = None) -> None:
    """Cut what comes after the last layer along the batch, run the pieces in turn, recompute each.

    Logits, of a language model the largest tensor by far, are there for one piece at a time::

        rank 0 | F layers, F head and loss of rows 0:2, 2:4, 4:6, 6:8   B of rows 6:8, 4:6 …, B layers

    Raises:  ValueError for a batch, or microbatch, of fewer rows than pieces.
    """
    place_everywhere(graph, mesh)
    tail = after_layers(graph, find_layers(graph, layers))
    op_order(*op_trans(tail, "batch", num_pieces, recompute=True))
