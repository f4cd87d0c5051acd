"""Runs a planned function: one rank's part of every call, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_vtensor.compile.capture import Captured
from torch_vtensor.compile.executor import Code, Executor, Transport
from torch_vtensor.compile.parameters import gradient_like, part_of
from torch_vtensor.compile.passes import Passes
from torch_vtensor.compile.program import Program
from torch_vtensor.compile.random_numbers import apart_from_the_caller
from torch_vtensor.compile.segment import Segment
from torch_vtensor.compile.tensor_view import LogicalTensor

Given = Mapping[LogicalTensor, Tensor]


class Runtime:
    """One rank of a program, called with the arguments of the captured function.

    Where the function returns one number that gradients flow through, a call runs the whole step: backward passes of
    one microbatch come before forward passes of the next, and the gradients wait for ``loss.backward()`` to hand them
    over. Otherwise backward runs when autograd asks for it.
    """

    def __init__(
        self,
        captured: Captured,
        program: Program,
        passes: Passes,
        rank: int,
        code: Callable[[Segment], Code],
        transport: Transport,
        seeds: Callable[[], int] | None = None,
    ) -> None:
        self._captured = captured
        self._program = program
        self._rank = rank
        self._seeds = seeds
        codes = {segment: code(segment) for segment in program.segments if segment.rank == rank}
        self._forward = Executor(program, passes.forward, rank, codes, transport)
        self._backward = None if passes.backward is None else Executor(program, passes.backward, rank, codes, transport)
        graph = program.flow.plan.graph
        self._outputs = tuple(dict.fromkeys(graph.outputs))
        # What the program says of all ranks, of this one.
        self._parts = {key: view for (owner, key), view in program.arguments.items() if owner == rank}
        self._returned = {tensor: key for (owner, tensor), key in program.outputs.items() if owner == rank}
        self._gradients = {tensor: key for (owner, tensor), (key, _) in program.gradients.items() if owner == rank}
        self._sharing = {tensor for _, tensor in program.gradients}
        self._seed_of = {tensor: key for (owner, key), tensor in program.seeds.items() if owner == rank}
        self.wanting = tuple(tensor for tensor in graph.inputs if tensor in program.flow.active)
        self.flowing = tuple(tensor in program.flow.active for tensor in self._outputs)
        # Gradients in float16 vanish unless they are scaled on their way, not after: as the last backward asked.
        self._keeps_scale = any(tensor.dtype == torch.float16 for tensor in program.flow.active)
        self.scale: Tensor | None = None

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Run the function on this rank; what it returns is what one process would."""
        pairs = zip(self._captured.arguments, arguments, strict=True)
        given = {tensor: value for tensor, value in pairs if tensor is not None}
        if self.wanting:
            step = _Partition if self._backward is not None else _WholeStep
            made = step.apply(self, given, *(given[tensor] for tensor in self.wanting))  # type: ignore[no-untyped-call]
        else:
            made = self.run_forward(given)[0]
        outputs = dict(zip(self._outputs, made, strict=True))
        return tuple(outputs[value] if isinstance(value, LogicalTensor) else value for value in self._captured.results)

    @torch.no_grad()
    def run_forward(self, given: Given) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Run the forward pass, or the whole step with gradients for gradients of one, or of ``scale``.

        Returns the outputs, and every value that is left.
        """
        values: dict[str, Any] = {}
        there = {**self._captured.constants, **given}
        for key, view in self._parts.items():
            values[key] = part_of(there[view.tensor], view.mask)
        if self._backward is None:
            device = _device(given)
            seeds = {tensor: torch.ones((), dtype=tensor.dtype, device=device) for tensor in self._seed_of}
            if self.scale is not None:
                seeds = {tensor: self.scale.to(seed) for tensor, seed in seeds.items()}
            self._put_seeds(values, seeds, given)
        if self._seeds is None:
            self._run(self._forward, values, given)
        else:
            seed = self._seeds()
            with apart_from_the_caller(_device(given)):
                self._run(self._forward, values, given, seed)
        returned = {tensor: values[key] for tensor, key in self._returned.items()}
        for overwritten, new in self._program.flow.plan.graph.mutations.items():
            given[overwritten].copy_(returned[new])
        return tuple(returned[tensor] for tensor in self._outputs), values

    @torch.no_grad()
    def run_backward(
        self, values: dict[str, Any], tangents: Sequence[Tensor | None], given: Given
    ) -> list[Tensor | None]:
        """Run the backward pass over what forward left."""
        assert self._backward is not None
        pairs = zip(self._outputs, tangents, strict=True)
        of_output = {tensor: tangent for tensor, tangent in pairs if tangent is not None}
        self._put_seeds(values, of_output, given)
        self._run(self._backward, values, given)
        return self.gradients(values)

    def hand_over(self, gradients: Sequence[Tensor | None], wanting: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients as autograd takes them: those of sharded parameters on every rank, of the part that it keeps."""
        return [
            gradient_like(argument, gradient) if tensor in self._sharing else None
            for tensor, argument, gradient in zip(self.wanting, wanting, gradients, strict=True)
        ]

    def remember(self, scale: Tensor) -> None:
        """Have later steps compute float16 gradients at a scale that backward was asked for, if it is one.

        It lags by a step: after an overflow, the next step is still computed at the scale that was too large. Whether a
        gradient is infinite one rank alone may know, and all have to compute at one scale.
        """
        if self._keeps_scale:
            before = torch.ones_like(scale) if self.scale is None else self.scale
            self.scale = torch.where(scale.isfinite() & (scale != 0), scale, before)

    def gradients(self, values: Mapping[str, Any]) -> list[Tensor | None]:
        """The gradient of each argument that wants one, of the part that is here."""
        found = self._gradients
        return [values[found[tensor]] if tensor in found else None for tensor in self.wanting]

    def _put_seeds(self, values: dict[str, Any], of_output: Given, given: Given) -> None:
        device = _device(given)
        for tensor, key in self._seed_of.items():
            seed = of_output.get(tensor)
            zeros = seed is None
            values[key] = (
                torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if zeros else of_output[tensor].to(device)
            )

    def _run(self, executor: Executor, values: dict[str, Any], given: Given, seed: int | None = None) -> None:
        for _ in executor.run(values, _device(given), seed):
            pass  # it waits for what it yields


class _WholeStep(torch.autograd.Function):
    """A training step: gradients are there when forward is done, backward hands them over."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, given: Given, *wanting: Tensor) -> tuple[Any, ...]:
        ctx.scale = runtime.scale
        outputs, values = runtime.run_forward(given)
        ctx.gradients = runtime.gradients(values)
        ctx.runtime, ctx.wanting = runtime, wanting
        ctx.mark_non_differentiable(*(o for o, flows in zip(outputs, runtime.flowing, strict=True) if not flows))
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        _refuse_create_graph()
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran through this step before: its gradients were computed with it and handed over. Call the "
                "compiled function again for each backward pass; retain_graph has nothing to keep."
            )
        gradients, ctx.gradients = ctx.gradients, None
        asked = next(tangent for tangent in tangents if tangent is not None)
        scale = asked if ctx.scale is None else asked / ctx.scale
        ctx.runtime.remember(asked)
        for position, gradient in enumerate(gradients):
            # One after the other: each takes the memory of the one before. They may share memory: not in place.
            gradients[position] = None if gradient is None else gradient * scale
            del gradient
        return (None, None, *ctx.runtime.hand_over(gradients, ctx.wanting))


class _Partition(torch.autograd.Function):
    """A forward pass, and the backward pass when autograd asks for it."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, given: Given, *wanting: Tensor) -> tuple[Any, ...]:
        outputs, ctx.values = runtime.run_forward(given)
        ctx.runtime, ctx.given, ctx.wanting = runtime, given, wanting
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o, flows in zip(outputs, runtime.flowing, strict=True) if not flows))
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        _refuse_create_graph()
        if ctx.values is None:
            raise RuntimeError(
                "backward ran through this call before, and what it had saved is gone. Call the compiled function "
                "again for each backward pass; a plan does not keep a graph for retain_graph=True."
            )
        values, ctx.values = ctx.values, None
        gradients = ctx.runtime.run_backward(values, tangents, ctx.given)
        return (None, None, *ctx.runtime.hand_over(gradients, ctx.wanting))


def _refuse_create_graph() -> None:
    """Raise where backward is asked to be differentiable: gradients would be taken for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True asks for gradients of gradients, and a plan has forward and backward passes only. "
            "Compute a penalty on gradients in a function that is compiled without a plan."
        )


def _device(given: Given) -> torch.device:
    """Where the function computes: where its largest argument is."""
    largest = max(given.values(), key=lambda value: value.numel(), default=None)
    return torch.device("cpu") if largest is None else largest.device
