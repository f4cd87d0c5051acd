"""Code for each layer by itself, to compile fast."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph, compile_apart


def layerwise(graph: Graph, mesh: Mesh, *, layers: str | None = None) -> None:
    """Generate code for one layer instead of all: equal layers share theirs.

    Runs as it would otherwise, but for what a code generator fuses over the border of two layers.
    """
    place_everywhere(graph, mesh)
    compile_apart(*find_layers(graph, layers))
