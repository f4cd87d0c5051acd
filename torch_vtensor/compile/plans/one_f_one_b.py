"""A pipeline that runs one microbatch forward and one backward in turn."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.placing import parts_of
from torch_vtensor.compile.plans.stages import cut_into_stages
from torch_vtensor.compile.primitives import Graph


def one_f_one_b(graph: Graph, mesh: Mesh, *, num_microbatches: int | None = None, layers: str | None = None) -> None:
    """Cut the layers into stages over the mesh's axis "pp", and the batch into microbatches: four for each stage.

    As long as GPipe, but of p stages stage s keeps the activations of p - s microbatches only::

        rank 0   0 1 . . a a 2 b b 3 c c . d d
        rank 1   . 0 a a 1 b b 2 c c 3 d d . .

    Source:  PipeDream-Flush (arXiv 2006.09503).
    Raises:  ValueError for fewer layers than stages, or a batch smaller than the number of microbatches.
    """
    places = parts_of(mesh, "pp")
    order.one_f_one_b(cut_into_stages(graph, places, num_microbatches or 4 * len(places), layers))
