"""The head and the loss in pieces along the batch, to need less memory."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import after_layers, find_layers
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph, Tasks, op_order, op_trans
from torch_vtensor.compile.tensor_view import WHOLE_VALUE


def chunked_loss(graph: Graph, mesh: Mesh, *, num_pieces: int = 4, layers: str | None = None) -> None:
    """Cut what comes after the last layer along the batch, and run the pieces in turn.

    Logits, of a language model the largest tensor by far, are there for one piece at a time. Where the function returns
    a loss that is a sum over the pieces, each piece's backward pass follows its forward pass and nothing is computed
    twice; otherwise each is recomputed::

        rank 0 | F layers, F head and loss of rows 0:2, B of these, F of rows 2:4, B of these, …, B layers
        rank 0 | F layers, F head and loss of rows 0:2, 2:4, 4:6, 6:8   B of rows 6:8, 4:6 …, B layers

    Raises:  ValueError for a batch, or microbatch, of fewer rows than pieces.
    """
    place_everywhere(graph, mesh)
    tail = after_layers(graph, find_layers(graph, layers))
    pieces = op_trans(tail, "batch", num_pieces)
    if _add_up_to_the_loss(graph, pieces):
        op_order(*pieces, finish=True)
    else:
        op_order(*(group for piece in pieces for group in op_trans(piece, recompute=True)))


def _add_up_to_the_loss(graph: Graph, pieces: tuple[Tasks, ...]) -> bool:
    """Whether all that the function returns with a gradient is one number, and each piece makes an addend of it."""
    returned = {tensor for tensor in graph.operator_graph.outputs if tensor.differentiable}
    if len(returned) != 1 or any(tensor.shape for tensor in returned):
        return False
    (loss,) = returned
    made = [{view.mask.chunk for t in piece for view in t.outputs if view and view.tensor is loss} for piece in pieces]
    return len(pieces) == 1 or all(chunks and WHOLE_VALUE not in chunks for chunks in made)
