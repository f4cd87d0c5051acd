"""A pipeline that runs all microbatches forward, then all backward."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.placing import parts_of
from torch_vtensor.compile.plans.stages import cut_into_stages
from torch_vtensor.compile.primitives import Graph


def gpipe(graph: Graph, mesh: Mesh, *, num_microbatches: int | None = None, layers: str | None = None) -> None:
    """Cut the layers into stages over the mesh's axis "pp", and the batch into microbatches: four for each stage.

    Digits are forward of that microbatch, letters backward of it::

        rank 0   0 1 2 3 . . . . . a a b b c c d d
        rank 1   . 0 1 2 3 a a b b c c d d . . . .

    Every rank keeps the activations of all microbatches at the end of forward.

    Source:  GPipe (arXiv 1811.06965).
    Raises:  ValueError for fewer layers than stages, or a batch smaller than the number of microbatches.
    """
    places = parts_of(mesh, "pp")
    order.gpipe(cut_into_stages(graph, places, num_microbatches or 4 * len(places), layers))
