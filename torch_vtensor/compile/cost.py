"""What tasks cost, estimated from their shapes."""

from __future__ import annotations

import math

from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Task

_FLOPS_PER_SECOND = 400e12
_BYTES_PER_SECOND = 3e12
_LEAST_SECONDS = 2e-6
"""The shortest kernel: what a piece takes however small it is."""


def task_work(task: Task) -> int:
    """Points of the space that a task runs over: the multiplications of a matrix product."""
    sizes = find_rule(task.operator).sizes
    return math.prod(task.cuts[name].size if name in task.cuts else size for name, size in sizes.items())


def task_seconds(task: Task) -> float:
    """Time on one GPU, by whichever of arithmetic and memory takes longer."""
    views = [*task.inputs, *(view for view in task.outputs if view is not None)]
    num_bytes = sum(view.num_bytes for view in views)
    return max(2 * task_work(task) / _FLOPS_PER_SECOND, memory_seconds(num_bytes))


def memory_seconds(num_bytes: int) -> float:
    """Time to read or write so many bytes."""
    return max(num_bytes / _BYTES_PER_SECOND, _LEAST_SECONDS)
