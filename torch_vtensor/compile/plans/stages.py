"""What pipelines have in common: stages of about equal work, microbatches, and where stages run."""

from collections.abc import Collection, Sequence

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.layers import around_layers, few_lookups, find_layers
from torch_vtensor.compile.primitives import Graph, Microbatches, Tasks, balance, op_assign
from torch_vtensor.compile.task_graph import Operator


def cut_into_stages(
    graph: Graph,
    places: Sequence[Mesh],
    num_microbatches: int,
    layers: str | None,
    shared: Collection[Operator] = frozenset(),
) -> Microbatches:
    """Cut the model into one stage for each place and the batch into microbatches.

    Embeddings belong to the first layer, head and loss to the last; what is ``shared`` by all places belongs to no
    stage and is left to the plan. What no gradient flows through, masks and positions, runs wherever it is read.
    Tables are looked up in once for all microbatches: the gradient of a lookup, however short, is as large as a table.
    That takes memory for what all of them find; where that is more than the table, each has lookups of its own. So has
    each where ranks share its rows: of all rows they would share others.

    Raises:  ValueError for fewer layers than stages, or after a plan that has placed tasks.
    """
    if graph.ranks:
        raise ValueError("tasks are placed already: a pipeline comes first, what cuts its stages further after it.")
    units = around_layers(graph, find_layers(graph, layers))
    own = [Tasks(graph, [task for task in unit if task.operator not in shared]) for unit in units]
    op_assign(balance(own, len(places)), places)
    if num_microbatches == 1:
        return Microbatches((graph.tasks,))
    shares_rows = places[0].axes.get("dp", 1) > 1
    return graph.microbatch(num_microbatches, whole=frozenset() if shares_rows else few_lookups(graph))
