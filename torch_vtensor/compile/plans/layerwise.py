"""Code for each layer by itself, to compile fast."""

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers
from torch_vtensor.compile.plans.placing import place_everywhere
from torch_vtensor.compile.primitives import Graph, PlanFunction, Tasks, compile_apart


def layerwise(graph: Graph, mesh: Mesh, *, layers: str | None = None) -> None:
    """Generate code for one layer instead of all: equal layers share theirs.

    Runs as it would otherwise, but for what a code generator fuses over the border of two layers.
    """
    place_everywhere(graph, mesh)
    compile_apart(*find_layers(graph, layers))


def by_layers(plan: PlanFunction) -> PlanFunction:
    """The same plan with each layer's code by itself: equal layers are traced once.

    Tasks that the plan has put apart stay where they are; without layers it is the plan alone.
    """

    def with_layers_apart(graph: Graph, mesh: Mesh) -> None:
        plan(graph, mesh)
        try:
            layers = find_layers(graph)
        except ValueError:
            return
        left = (Tasks(graph, [task for task in layer if task not in graph.apart]) for layer in layers)
        compile_apart(*(layer for layer in left if len(layer)))

    return with_layers_apart
