"""Pipelines that compute gradients of weights when they would have to wait."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.placing import parts_of
from torch_vtensor.compile.plans.stages import cut_into_stages
from torch_vtensor.compile.primitives import Graph


def zero_bubble(graph: Graph, mesh: Mesh, *, num_microbatches: int | None = None, layers: str | None = None) -> None:
    """Cut as `one_f_one_b` does, and backward in two: gradients of weights, on which nobody waits, fill the bubbles.

    Four stages, six microbatches; letters are gradients of inputs, W those of weights of the first one waiting::

        rank 0   0 1 2 3 . . . a W 4 b W 5 c W d W e W f W
        rank 1   . 0 1 2 . . a 3 b W 4 c W 5 d W e W f W W
        rank 2   . . 0 1 . a 2 b 3 c W 4 d W 5 e W f W W W
        rank 3   . . . 0 a 1 b 2 c 3 d W 4 e W 5 f W W W W

    Stage s lets s microbatches wait: of them it keeps what products with weights read, and the gradients of what these
    make. So no rank keeps more than p microbatches' worth, as many as stage 0 of 1F1B.

    Source:  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), ZB-H1.
    Raises:  ValueError for fewer layers than stages, or a batch smaller than the number of microbatches.
    """
    places = parts_of(mesh, "pp")
    order.zero_bubble(cut_into_stages(graph, places, num_microbatches or 4 * len(places), layers))


def zero_bubble_h2(graph: Graph, mesh: Mesh, *, num_microbatches: int | None = None, layers: str | None = None) -> None:
    """`zero_bubble` with more microbatches under way, which takes memory: no stage waits once it has begun.

    Three stages, eight microbatches::

        rank 0   0 1 2 3 4 a W 5 b W 6 c W 7 d W e W f W g W h W . .
        rank 1   . 0 1 2 a 3 b 4 c W 5 d W 6 e W 7 f W g W h W W W .
        rank 2   . . 0 a 1 b 2 c 3 d 4 e W 5 f W 6 g W 7 h W W W W W

    Stage 0 keeps 2p - 1 microbatches' worth; stage s lets 2s gradients of weights wait.

    Source:  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), ZB-H2.
    Raises:  ValueError as `zero_bubble`.
    """
    places = parts_of(mesh, "pp")
    order.zero_bubble_h2(cut_into_stages(graph, places, num_microbatches or 4 * len(places), layers))
