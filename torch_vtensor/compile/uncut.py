"""Graphs that no plan cuts: inductor's own driver compiles them, so they cannot run slower than with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from torch_vtensor.compile._torch_compat import BoxedCallable, CutInTwo, Generate, boxed
from torch_vtensor.compile.budget import Choice


@dataclass(frozen=True)
class Uncut:
    """A graph that is compiled whole.

    ``is_joint``: forward and backward, for training. ``recomputed`` names what backward computes again rather than have
    saved. ``choice`` tells why nothing is cut, where a memory budget was given.
    """

    num_operators: int
    is_joint: bool
    recomputed: tuple[str, ...]
    choice: Choice | None = None

    def __str__(self) -> str:
        """One line."""
        passes = "forward and backward" if self.is_joint else "forward"
        return f"{passes} of {self.num_operators} operators, uncut, {len(self.recomputed)} of them recomputed"


class Whole:
    """Hands graphs to inductor as they are, and tells what they were."""

    def __init__(
        self,
        inspect: Callable[[Uncut], None] | None,
        *,
        eager: bool,
        cache_key: str | None,
        choice: Choice | None = None,
    ) -> None:
        self._inspect = inspect
        self._eager = eager
        self.cache_key = cache_key
        self._choice = choice

    def split(self, joint: GraphModule, min_cut: CutInTwo) -> tuple[GraphModule, GraphModule]:
        """Cut a joint graph where the least has to be saved."""
        forward, backward = min_cut(joint)
        ran, runs = _operators(forward), _operators(backward)
        self._tell(Uncut(len({**ran, **runs}), True, tuple(name for name in runs if name in ran), self._choice))
        return forward, backward

    def emit(self, graph: GraphModule, generate: Generate, *, inference: bool) -> BoxedCallable:
        """Generate code for one pass."""
        if inference:
            self._tell(Uncut(len(_operators(graph)), False, (), self._choice))
        return boxed(graph) if self._eager else generate(graph)

    def _tell(self, uncut: Uncut) -> None:
        if self._inspect is not None:
            self._inspect(uncut)


def _operators(module: GraphModule) -> dict[str, None]:
    """Names of what a graph computes, in order."""
    return {node.name: None for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")}
