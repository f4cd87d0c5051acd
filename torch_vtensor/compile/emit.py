"""Segment → fx graph: the local calls of its tasks, wired up."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torch_vtensor.compile.pieces import local_call
from torch_vtensor.compile.segment import Segment
from torch_vtensor.compile.task_graph import Slot, Task
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask

# A part of a tensor may be laid out otherwise than the whole: what cannot be viewed there is copied.
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


def emit(segment: Segment) -> fx.GraphModule:
    """The function of a segment: its arrivals, in order, to the tuple of its departures."""
    graph = fx.Graph()
    made: dict[tuple[LogicalTensor, Mask], fx.Node] = {}
    arrived: dict[tuple[Task, int], fx.Node] = {}
    for number, readers in enumerate(segment.arrivals.values()):
        node = graph.placeholder(f"arrival_{number}")
        for reader in readers:
            assert reader.task is not None
            arrived[reader.task, reader.position] = node
    for task in segment.tasks:
        _add_call(graph, segment, task, arrived, made)
    graph.output(tuple(made[view.tensor, view.mask] for view in segment.departures))
    return fx.GraphModule(torch.nn.Module(), graph)


def _add_call(
    graph: fx.Graph,
    segment: Segment,
    task: Task,
    arrived: dict[tuple[Task, int], fx.Node],
    made: dict[tuple[LogicalTensor, Mask], fx.Node],
) -> None:
    def value(argument: Any) -> Any:
        if not isinstance(argument, Slot):
            return argument
        if (task, argument.position) in segment.internal:
            view = task.inputs[argument.position]
            return made[view.tensor, view.mask]
        return arrived[task, argument.position]

    call = local_call(task)
    args, kwargs = pytree.tree_map(
        value, (tuple(call.args), dict(call.kwargs)), is_leaf=lambda argument: isinstance(argument, Slot)
    )
    target = torch.ops.aten.reshape.default if call.target in _VIEWS else call.target
    node = graph.call_function(target, args, kwargs)
    several = len(task.outputs) > 1 or task.operator.outputs[0] is None
    for number, view in enumerate(task.outputs):
        if view is not None:
            made[view.tensor, view.mask] = graph.call_function(operator.getitem, (node, number)) if several else node
