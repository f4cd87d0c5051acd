"""PromptGraphs: what takes up parts of prompts, captured once for each size that they are cut to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from torch_vtensor.generation.decode.graphs import Captures, Graph
from torch_vtensor.generation.decode.step import Step

__all__ = ["PromptGraphs"]


class _Captured(NamedTuple):
    """A graph, and where it reads tokens and positions."""

    tokens: torch.Tensor
    positions: torch.Tensor
    graph: Graph


class PromptGraphs:
    """Captured parts of prompts.

    Args:
        forward: a traced model's: see `prompt_forward`.
        mask: [B, 1, 1, 1], which is not looked at.
    """

    def __init__(self, captures: Captures, forward: Callable[..., torch.Tensor], mask: torch.Tensor) -> None:
        self._captures = captures
        self._forward = forward
        self._mask = mask
        self._captured: dict[Hashable, _Captured] = {}

    def __contains__(self, size: Hashable) -> bool:
        return size in self._captured

    def capture(
        self,
        size: Hashable,
        shape: tuple[int, int],
        step: Step,
        last: torch.Tensor,
        leave: Callable[[torch.Tensor], None],
        behind: Callable[[], None] | None = None,
    ) -> None:
        """Capture the graph that takes up tokens of this shape.

        Args:
            size: by which it is found.
            step, last: as the forward takes them; a token is written behind each sequence, which must have memory.
            leave: takes the logits.
            behind: what else the graph does, at its end; it is not rehearsed.
        """
        tokens, positions = (torch.zeros(shape, dtype=torch.int64, device=self._captures.device) for _ in range(2))

        def run_forward() -> None:
            leave(self._forward(tokens, positions, self._mask, step, last))

        def run() -> None:
            run_forward()
            if behind is not None:
                behind()

        assert step.num_new is not None
        last.zero_()
        step.num_new.fill_(1)
        self._captured[size] = _Captured(tokens, positions, self._captures(run, run_forward))

    def run(self, size: Hashable, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Take up ``tokens`` at ``positions``, both [B, N] with N at most what the graph is for."""
        captured, num_tokens = self._captured[size], tokens.shape[1]
        captured.tokens[:, :num_tokens].copy_(tokens)
        captured.positions[:, :num_tokens].copy_(positions)
        captured.graph()
