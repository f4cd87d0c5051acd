"""Runs a rank's actions: answers AOTAutograd, which calls one pass at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from torch_vtensor.compile._torch_compat import BoxedCallable, CutInTwo, Generate, boxed
from torch_vtensor.compile.segment import Segments

Phases = Callable[[GraphModule, CutInTwo | None], Segments]
"""From a captured graph to the segments that run it; the graph is joint where there is a way to cut it in two."""


class Runtime:
    """Compiles the segments that the phases make of each captured graph, and runs them.

    A pass is one action here, and that action's compiled code is handed to AOTAutograd as it is: nothing is added to a
    call, and inductor still recognizes its own object, which its CUDA graphs depend on.
    """

    def __init__(self, phases: Phases, *, eager: bool, cache_key: str | None) -> None:
        self._phases = phases
        self._eager = eager
        self.cache_key = cache_key

    def split(self, joint: GraphModule, min_cut: CutInTwo) -> tuple[GraphModule, GraphModule]:
        """Run the phases on a joint graph."""
        segments = self._phases(joint, min_cut)
        assert segments.backward is not None, "a joint graph has a backward pass"
        return segments.forward.module, segments.backward.module

    def emit(self, graph: GraphModule, generate: Generate, *, inference: bool) -> BoxedCallable:
        """Compile one pass; an inference graph, which was never split, goes through the phases first."""
        if inference:
            graph = self._phases(graph, None).forward.module
        return boxed(graph) if self._eager else generate(graph)
