"""A pipeline whose embeddings and head are cut along the vocabulary over all of its ranks."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers, vocabulary_cuts
from torch_vtensor.compile.plans.placing import cut_over, parts_of
from torch_vtensor.compile.plans.stages import cut_into_stages
from torch_vtensor.compile.primitives import Graph, op_assign


def interlaced(graph: Graph, mesh: Mesh, *, num_microbatches: int | None = None, layers: str | None = None) -> None:
    """Run `one_f_one_b` over the layers, and embeddings and head of every microbatch on all ranks of the pipeline.

    A huge vocabulary, which no balance of layers could share out, costs every rank the same. E is embedding, H head and
    loss of a part of the vocabulary::

        rank 0   E0 0 E1 1 . H0 ...
        rank 1   E0 . E1 0 . H0 ...

    Source:  SuperScaler (arXiv 2301.08984) section 5, interlaced pipeline.
    Raises:  ValueError as one_f_one_b, and for a model that has no vocabulary.
    """
    places = parts_of(mesh, "pp")
    found = find_layers(graph, layers)
    shared = frozenset(task.operator for cut in vocabulary_cuts(graph, found) for task in cut.tasks)
    if not shared:
        raise ValueError("the model looks up no embedding outside of its layers, so there is no vocabulary to cut.")
    microbatches = cut_into_stages(graph, places, num_microbatches or 4 * len(places), layers, shared)
    for cut in vocabulary_cuts(graph, found):
        op_assign(cut.tasks, mesh.ranks)
        cut_over(cut, places, "pp")
    order.one_f_one_b(microbatches)
