"""Plans that bench_parallel_plans.py compares ready ones with."""

from torch_vtensor.compile import Graph, Mesh, Tasks, op_assign, order
from torch_vtensor.compile.plans.layers import around_layers, find_layers

NUM_MICROBATCHES = 8


def equal_layers(graph: Graph, mesh: Mesh) -> None:
    """1F1B over stages of as many layers each, whatever else they have: the last one has head and loss as well."""
    units = around_layers(graph, find_layers(graph))
    size = len(units) // len(mesh)
    for stage, rank in enumerate(mesh):
        last = stage == len(mesh) - 1
        own = units[stage * size :] if last else units[stage * size : (stage + 1) * size]
        op_assign(Tasks(graph, [task for unit in own for task in unit]), rank)
    order.one_f_one_b(graph.microbatch(NUM_MICROBATCHES))
