"""Orders of a pipeline's passes, for a plan to choose from; `schedules.pipelines` draws their timelines."""

from __future__ import annotations

from collections.abc import Sequence

from torch_vtensor.compile.primitives import Microbatches, Pipeline, Tasks
from torch_vtensor.compile.task_graph import Operator


def gpipe(microbatches: Microbatches) -> None:
    """All microbatches forward, then all backward.

    Source:  GPipe (arXiv 1811.06965).
    """
    _choose(microbatches, "gpipe")


def one_f_one_b(microbatches: Microbatches) -> None:
    """One forward, one backward in turn; interleaved where a rank has several stages.

    Source:  PipeDream-Flush (arXiv 2006.09503), Megatron-LM (arXiv 2104.04473).
    """
    _choose(microbatches, "1f1b")


def zero_bubble(microbatches: Microbatches) -> None:
    """1F1B with backward in two: gradients of weights wait, and fill what were bubbles.

    Source:  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), ZB-H1.
    """
    _choose(microbatches, "zb")


def zero_bubble_h2(microbatches: Microbatches) -> None:
    """`zero_bubble` with twice as many microbatches under way, so that no rank waits once it has begun.

    Source:  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), ZB-H2.
    """
    _choose(microbatches, "zbh2")


def three_f_one_b(microbatches: Microbatches, stages: Sequence[Tasks]) -> None:
    """Recycling: each microbatch goes through the model several times, and backward through the last time only.

    ``stages`` has the tasks of each stage of the first pass, then those of the second, and so on.

    Source:  SuperScaler (arXiv 2301.08984) section 5, 3F1B.
    """
    _choose(microbatches, "3f1b", tuple(frozenset(task.operator for task in stage) for stage in stages))


def _choose(microbatches: Microbatches, kind: str, stages: tuple[frozenset[Operator], ...] = ()) -> None:
    graph = microbatches[0].graph
    if graph.pipeline is not None and graph.pipeline.kind != kind:
        raise ValueError(f"the plan orders its microbatches by {graph.pipeline.kind} already; choose one order.")
    graph.pipeline = Pipeline(kind, stages)
