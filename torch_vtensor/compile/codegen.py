"""Code for segments: what runs a segment forward, and backward from what forward saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.fx import GraphModule

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.emit import emit
from torch_vtensor.compile.random_numbers import draws_random_numbers
from torch_vtensor.compile.segment import Segment

Function = Callable[..., Sequence[Tensor]]


class Code:
    """Runs a segment: operator by operator, or by what `generate` makes of it."""

    def __init__(self, segment: Segment, function: Function) -> None:
        self._function = function
        self._wants = [arrival.group is not None for arrival in segment.arrivals]
        self._recomputes = segment.recomputes
        self._is_random = any(draws_random_numbers(task.operator) for task in segment.tasks)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        """Departures, and what backward needs: the inputs and what autograd recorded, or random numbers' state.

        What autograd recorded is kept by its edges, so that departures can be freed before.
        """
        leaves = [value.detach().requires_grad_(wants) for value, wants in zip(inputs, self._wants, strict=True)]
        if any(self._wants) and not self._recomputes:
            with torch.enable_grad():
                outputs = self._function(*leaves)
            edges = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]
            wanted = [leaf if leaf.requires_grad else None for leaf in leaves]
            return [output.detach() for output in outputs], (wanted, edges)
        random = _torch_compat.random_state(leaves) if self._is_random else None
        with torch.no_grad():
            outputs = self._function(*leaves)
        return outputs, (leaves, random) if any(self._wants) else None

    def backward(self, saved: Any, tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of the arrivals that want one; zeros for what the departures do not depend on."""
        leaves, recorded = saved
        if self._recomputes:
            with torch.enable_grad(), _torch_compat.from_random_state(recorded):
                outputs = self._function(*leaves)
            recorded = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]
            del outputs
        pairs = [
            (edge, tangent)
            for edge, tangent in zip(recorded, tangents, strict=True)
            if tangent is not None and edge is not None
        ]
        wanted = [leaf for leaf, wants in zip(leaves, self._wants, strict=True) if wants]
        found = iter(
            torch.autograd.grad([edge for edge, _ in pairs], wanted, [t for _, t in pairs], allow_unused=True)
            if pairs
            else [None] * len(wanted)
        )
        return [
            None if not wants else torch.zeros_like(leaf) if (gradient := next(found)) is None else gradient
            for leaf, wants in zip(leaves, self._wants, strict=True)
        ]


class CodeGenerator:
    """Makes the code of segments; equal segments, such as those of equal layers or microbatches, share it."""

    def __init__(self, codegen: str, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._generates = codegen == "inductor"
        self._functions: dict[tuple[object, ...], Function] = {}

    def __call__(self, segment: Segment) -> Code:
        """The code of a segment, generated when it first runs."""
        graph = emit(segment)
        if not self._generates:
            return Code(segment, graph)
        shapes = tuple(
            (arrival.mask.shape, arrival.exchange.tensor.dtype, arrival.group is not None)
            for arrival in segment.arrivals
        )
        key = (graph.code, shapes, segment.recomputes)
        if key not in self._functions:
            self._functions[key] = _Generated(graph, self._settings)
        return Code(segment, self._functions[key])

    def __len__(self) -> int:
        return len(self._functions)


class _Generated:
    """A graph that inductor compiles when it is first called, once with gradients and once without."""

    def __init__(self, graph: GraphModule, settings: Mapping[str, Any]) -> None:
        self._graph = graph
        self._settings = settings
        self._compiled: dict[bool, Function] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        with_gradients = torch.is_grad_enabled()
        if with_gradients not in self._compiled:
            self._compiled[with_gradients] = _torch_compat.compile_with_inductor(self._graph, inputs, self._settings)
        return self._compiled[with_gradients](*inputs)
