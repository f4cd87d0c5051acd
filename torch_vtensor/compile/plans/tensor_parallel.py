"""Heads, hidden dimensions and vocabulary over the ranks."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers, inner_cuts, vocabulary_cuts
from torch_vtensor.compile.plans.placing import cut_over, parts_of, place_everywhere
from torch_vtensor.compile.primitives import Graph


def tensor_parallel(graph: Graph, mesh: Mesh, *, layers: str | None = None, vocabulary: bool = True) -> None:
    """Cut the heads of every attention and the hidden dimension of every mlp over the mesh's axis "tp".

    Embeddings and head are cut along the vocabulary. What lies between, the residual stream, is whole on each rank::

        rank 0 | norm ─ heads 0, 1 ─┐ all-   ┌ add, norm ─ hidden 0:24  ─┐ all-
        rank 1 | norm ─ heads 2, 3 ─┘ reduce └ add, norm ─ hidden 24:48 ─┘ reduce  …

    Source:  Megatron-LM (arXiv 1909.08053).
    Raises:  ValueError for fewer heads, of keys and values where they are fewer, than the axis has parts, and for a
             model in which there is nothing to cut.
    """
    place_everywhere(graph, mesh)
    parts = parts_of(mesh, "tp")
    found = find_layers(graph, layers)
    cuts = [cut for layer in found for cut in inner_cuts(layer)]
    cuts += vocabulary_cuts(graph, found) if vocabulary else ()
    if not cuts:
        raise ValueError(
            f"none of the {len(found)} layers has heads or a hidden dimension, that weights make and weights sum up "
            f"again, and nothing looks up a vocabulary: every rank would compute everything. Leave out tensor and "
            f"sequence parallel, or cut what there is with op_trans."
        )
    for cut in cuts:
        cut_over(cut, parts, "tp")
