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
    """Multiplications of matrix products, and what else computes counted by the elements of its largest tensor."""
    rule = find_rule(task.operator)
    known = task.piece.found
    if ("work", rule) not in known:
        cuts = task.cuts
        sizes = {name: cuts[name].size if name in cuts else size for name, size in rule.sizes.items()}
        views = (*task.inputs, *(view for view in task.outputs if view is not None))
        known["work", rule] = sum(math.prod(sizes[name] for name in names) for names in rule.multiplies) or max(
            (view.mask.num_elements for view in views), default=0
        )
    work: int = known["work", rule]
    return work


def task_seconds(task: Task) -> float:
    """Time on one GPU, by whichever of arithmetic and memory takes longer."""
    # Operators have one rule only if they are alike, so that their pieces take as long.
    asked, known = ("seconds", find_rule(task.operator)), task.piece.found
    if asked not in known:
        views = [*task.inputs, *(view for view in task.outputs if view is not None)]
        num_bytes = sum(view.num_bytes for view in views)
        known[asked] = max(2 * task_work(task) / _FLOPS_PER_SECOND, memory_seconds(num_bytes))
    seconds: float = known[asked]
    return seconds


def memory_seconds(num_bytes: int) -> float:
    """Time to read or write so many bytes."""
    return max(num_bytes / _BYTES_PER_SECOND, _LEAST_SECONDS)
