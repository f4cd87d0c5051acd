"""A pipeline for models that go through their layers several times, and train through the last time."""

from torch_vtensor.compile import order
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import find_layers, find_rounds
from torch_vtensor.compile.plans.placing import parts_of
from torch_vtensor.compile.primitives import Graph, Microbatches, Tasks, balance, op_assign


def three_f_one_b(graph: Graph, mesh: Mesh, *, num_microbatches: int | None = None, layers: str | None = None) -> None:
    """Cut the layers into stages over the mesh's axis "pp", which every pass through them goes through anew.

    As AlphaFold 2 recycles: three passes forward, one backward, through the last. What earlier passes compute is not
    kept. A column is a unit of time, backward takes two::

        rank 0   0 1 0 1 0 1 2 3 a a . b b 2 3 2 3 . . c c . d d
        rank 1   . 0 1 0 1 0 a a 1 b b 2 3 . 2 3 2 c c 3 d d . .

    The number of passes is that of the model. What lies between two passes belongs to the first layer of the second.

    Source:  SuperScaler (arXiv 2301.08984) section 5, 3F1B.
    Raises:  ValueError for a model that goes through its layers once, fewer layers than stages, or a batch smaller than
             the number of microbatches; when the step is compiled, for gradients through an earlier pass.
    """
    if graph.ranks:
        raise ValueError("tasks are placed already: a pipeline comes first, what cuts its stages further after it.")
    places = parts_of(mesh, "pp")
    found = find_layers(graph, layers)
    rounds = find_rounds(graph, found)
    if len(rounds) == 1:
        raise ValueError(
            f"the model goes through its {len(found)} layers once, so that nothing is recycled. Use one_f_one_b."
        )
    layer_of = {task.operator: number for number, layer in enumerate(found) for task in layer}
    stage_of_layer = {
        layer_of[task.operator]: number for number, stage in enumerate(balance(found, len(places))) for task in stage
    }
    stages: list[Tasks] = []
    for units in rounds:
        for number, place in enumerate(places):
            tasks = [task for layer, unit in enumerate(units) if stage_of_layer[layer] == number for task in unit]
            stages.append(Tasks(graph, tasks))
            op_assign(stages[-1], place)
    count = num_microbatches or 4 * len(places)
    microbatches = graph.microbatch(count) if count > 1 else Microbatches((graph.tasks,))
    order.three_f_one_b(microbatches, stages)
