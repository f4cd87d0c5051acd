"""Program → Segments: the graph of each action, ready for a code generator."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule

from torch_vtensor.compile._torch_compat import CutInTwo
from torch_vtensor.compile.materialize import Program
from torch_vtensor.compile.schedule import Action


@dataclass(frozen=True)
class Segment:
    """The graph that one action runs.

    ``recomputed`` names the forward tasks that a backward segment runs again rather than have their values saved.
    ``module`` is consumed by the code generator; the rest stays as it is.
    """

    action: Action
    num_operators: int
    recomputed: tuple[str, ...]
    module: GraphModule = field(repr=False, compare=False)

    def __str__(self) -> str:
        """One line."""
        recomputed = f", {len(self.recomputed)} of them recomputed" if self.recomputed else ""
        return f"{self.action} of rank {self.action.rank}: {self.num_operators} operators{recomputed}"


@dataclass(frozen=True)
class Segments:
    """What one process compiles: the forward segment and, in training, the backward one."""

    forward: Segment
    backward: Segment | None

    def __str__(self) -> str:
        """One line for each segment."""
        return "\n".join(str(segment) for segment in (self.forward, self.backward) if segment is not None)


def segment(program: Program, min_cut: CutInTwo | None) -> Segments:
    """Give each action its graph; `min_cut`, for a joint graph, cuts it in two where the least has to be saved.

    Effects: consumes the captured graph.
    """
    (actions,) = program.schedule.actions.values()
    module = program.schedule.plan.graph.module
    if min_cut is None:
        return Segments(Segment(actions[0], len(_operators(module)), (), module), None)
    forward, backward = min_cut(module)
    ran, runs = _operators(forward), _operators(backward)
    return Segments(
        Segment(actions[0], len(ran), (), forward),
        Segment(actions[1], len(runs), tuple(name for name in runs if name in ran), backward),
    )


def _operators(module: GraphModule) -> dict[str, None]:
    """Names of what a graph computes, in order."""
    return {node.name: None for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")}
