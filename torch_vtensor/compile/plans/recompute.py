"""Layers computed again for backward, to need less memory."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph, op_trans


def recompute(graph: Graph, mesh: Mesh, *, num_layers: int | None = None, layers: str | None = None) -> None:
    """Keep of a layer what enters it, and compute the rest again for its backward pass; all layers, or the first ones.

    The first layers hold what they keep the longest::

        rank 0 | F layer 0, F layer 1 … F head   B head, … F layer 1, B layer 1, F layer 0, B layer 0

    Source:  Chen et al., Training deep nets with sublinear memory cost (arXiv 1604.06174).
    Raises:  ValueError for more layers than there are.
    """
    place_everywhere(graph, mesh)
    found = find_layers(graph, layers)
    if num_layers is not None and not 0 <= num_layers <= len(found):
        raise ValueError(f"recompute got num_layers={num_layers}, and the model has {len(found)}; choose 0 to that.")
    for layer in found[:num_layers]:
        op_trans(layer, recompute=True)
