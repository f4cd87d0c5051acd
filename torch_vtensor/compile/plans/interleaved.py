"""A pipeline with several stages on each rank."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.placing import parts_of
from torch_vtensor.compile.plans.stages import cut_into_stages
from torch_vtensor.compile.primitives import Graph


def interleaved(
    graph: Graph,
    mesh: Mesh,
    *,
    stages_per_rank: int = 2,
    num_microbatches: int | None = None,
    layers: str | None = None,
) -> None:
    """Deal short stages to the parts of the mesh's axis "pp" round and round: bubbles shrink, messages multiply.

    Two stages on each of two ranks; a column is a unit of time, backward takes two::

        rank 0   0 1 0 1 2 . a a 3 b b 2 a a 3 b b . c c . d d c c d d
        rank 1   . 0 1 0 a a 1 b b 2 a a 3 b b 2 c c 3 d d c c d d . .

    Source:  Megatron-LM (arXiv 2104.04473).
    Raises:  ValueError for fewer layers than stages, or microbatches that are no multiple of the axis.
    """
    places = parts_of(mesh, "pp")
    if num_microbatches is not None and num_microbatches % len(places):
        raise ValueError(
            f"interleaved stages take microbatches in groups of {len(places)}, one for each part of the axis 'pp', and "
            f"{num_microbatches} are not whole groups. Use a multiple of {len(places)}, or one_f_one_b."
        )
    count = num_microbatches or 4 * len(places)
    order.one_f_one_b(cut_into_stages(graph, places * stages_per_rank, count, layers))
