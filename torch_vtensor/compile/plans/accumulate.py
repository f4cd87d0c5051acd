"""The batch in pieces, each forward and backward before the next begins, to need less memory."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph


def accumulate(graph: Graph, mesh: Mesh, *, num_microbatches: int = 4) -> None:
    """Cut the batch into microbatches, and run each forward and backward in turn where the tasks are.

    Activations are there for one microbatch at a time, nothing is computed twice, and the gradients are exactly those
    of the whole batch, also where rows count differently in a mean::

        rank 0 | F0 B0 F1 B1 F2 B2 F3 B3

    Gradients add up in the dtype of the parameters, as they do over several calls of ``backward()``.

    Raises:  ValueError for a batch smaller than the number of microbatches.
    """
    place_everywhere(graph, mesh)
    if num_microbatches > 1:
        order.one_f_one_b(graph.microbatch(num_microbatches))
