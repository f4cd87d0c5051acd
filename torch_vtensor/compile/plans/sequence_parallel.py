"""Tensor parallel with the residual stream cut along the sequence."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers, flows, inner_cuts
from torch_vtensor.compile.plans.placing import parts_of, place_pieces
from torch_vtensor.compile.plans.tensor_parallel import tensor_parallel
from torch_vtensor.compile.primitives import Graph, Tasks, op_trans


def sequence_parallel(graph: Graph, mesh: Mesh, *, layers: str | None = None, vocabulary: bool = True) -> None:
    """Cut as `tensor_parallel` does, and norms, dropout and residual additions of every layer along the sequence.

    Each all-reduce becomes a reduce-scatter and an all-gather, as many bytes in all, and between blocks each rank keeps
    its part of the sequence only::

        rank 0 | norm 0:4 ─┐ all-   ┌ heads 0, 1 ─┐ reduce-  ┌ add, norm 0:4 ─┐ all-   ┌ hidden 0:24 …
        rank 1 | norm 4:8 ─┘ gather └ heads 2, 3 ─┘ scatter  └ add, norm 4:8 ─┘ gather └ hidden 24:48 …

    Source:  Korthikanti et al. (arXiv 2205.05198).
    Raises:  ValueError as tensor_parallel, and for a sequence shorter than the axis has parts.
    """
    found = find_layers(graph, layers)
    inside = {task.operator for layer in found for cut in inner_cuts(layer) for task in cut.tasks}
    tensor_parallel(graph, mesh, layers=layers, vocabulary=vocabulary)
    parts = parts_of(mesh, "tp")
    for layer in found:
        between = Tasks(graph, [task for task in layer if task.operator not in inside and flows(task)])
        place_pieces(op_trans(between, "sequence", len(parts)), parts)
