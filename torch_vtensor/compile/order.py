"""Orders of a pipeline's passes, for a plan to choose from; `schedules.pipelines` draws their timelines."""

from __future__ import annotations

from torch_vtensor.compile.primitives import Microbatches, Pipeline


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


def _choose(microbatches: Microbatches, kind: str) -> None:
    graph = microbatches[0].graph
    if graph.pipeline is not None and graph.pipeline.kind != kind:
        raise ValueError(f"the plan orders its microbatches by {graph.pipeline.kind} already; choose one order.")
    graph.pipeline = Pipeline(kind)
