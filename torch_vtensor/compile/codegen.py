"""Code for segments: what runs a segment forward, and backward from what forward saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.fx import GraphModule

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.emit import emit
from torch_vtensor.compile.executor import Code
from torch_vtensor.compile.joint import JointPasses, Pass, find_passes, is_primal
from torch_vtensor.compile.random_numbers import draws_random_numbers
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.segment import Segment

Function = Callable[..., Sequence[Tensor]]


class Recorded(Code):
    """Runs a segment, operator by operator or compiled, while autograd records what backward needs."""

    def __init__(self, segment: Segment, function: Function) -> None:
        self._function = function
        self._wants = [arrival.group is not None for arrival in segment.arrivals]
        self._recomputes = segment.recomputes
        self._is_random = any(draws_random_numbers(task.operator) for task in segment.tasks)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """Departures, and what backward needs: the inputs and what autograd recorded, or random numbers' state.

        What autograd recorded is kept by its edges, so that departures can be freed before.
        """
        leaves = [value.detach().requires_grad_(wants) for value, wants in zip(inputs, self._wants, strict=True)]
        if any(self._wants) and not self._recomputes:
            with torch.enable_grad():
                outputs = self._function(*leaves)
            edges = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]
            wanted = [leaf if leaf.requires_grad else None for leaf in leaves]
            return [output.detach() for output in outputs], [(wanted, edges)]
        random = _torch_compat.random_state(leaves) if self._is_random else None
        with torch.no_grad():
            outputs = self._function(*leaves)
        return outputs, [(leaves, random)] if any(self._wants) else []

    def backward(
        self,
        part: JobKind,
        saved: Sequence[Any],
        inputs: Sequence[Tensor | None],
        tangents: Sequence[Tensor | None],
    ) -> tuple[Sequence[Tensor | None], Any]:
        """Gradients of the arrivals that want one; zeros for what the departures do not depend on."""
        ((leaves, recorded),) = saved
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
        gradients = [
            None if not wants else torch.zeros_like(leaf) if (gradient := next(found)) is None else gradient
            for leaf, wants in zip(leaves, self._wants, strict=True)
        ]
        return gradients, None


class _Saved(NamedTuple):
    """What one pass leaves for another: values by name, and the random numbers' state before those that are redrawn.

    The pass that uses values of no one else takes them out, so that their memory is its own.
    """

    values: dict[str, Tensor]
    random: tuple[Tensor, Tensor | None] | None
    device: torch.device


class InPasses(Code):
    """Runs a segment by the passes of its joint graph: nothing is saved but what these read from each other."""

    def __init__(self, segment: Segment, function: _Joint) -> None:
        self._joint = function
        self._parts = segment.parts
        self._again = {f"primals_{index}" for index in segment.reads_again}
        self._is_random = segment.recomputes and any(draws_random_numbers(task.operator) for task in segment.tasks)
        self._shapes = [(arrival.mask.shape, arrival.exchange.tensor.dtype) for arrival in segment.arrivals]
        self._departures = [(view.mask.shape, view.tensor.dtype) for view in segment.departures]

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """Departures, and by backward pass what it reads, but for inputs that it gets again."""
        passes = self._joint.passes(inputs)
        values = {f"primals_{index}": value for index, value in enumerate(inputs)}
        random = _torch_compat.random_state(inputs) if self._is_random else None
        made = self._joint.run(passes.forward, values)
        names = passes.forward.makes[passes.num_outputs :]
        own = {name: value for name, value in zip(names, made[passes.num_outputs :], strict=True) if name}
        self._joint.note_own(own, [*inputs, *made[: passes.num_outputs]])
        values.update(own)
        *first, last = ([name for name in passes.saved[part] if name not in self._again] for part in self._parts)
        # What both passes read stays for the second.
        saved = [[name for name in names if name not in last] for names in first] + [last]
        device = inputs[0].device
        return made[: passes.num_outputs], [
            _Saved({name: values[name] for name in names}, random, device) for names in saved
        ]

    @torch.no_grad()
    def backward(
        self,
        part: JobKind,
        saved: Sequence[Any],
        inputs: Sequence[Tensor | None],
        tangents: Sequence[Tensor | None],
    ) -> tuple[Sequence[Tensor | None], Any]:
        """The gradients that a pass computes, and after the first of two what it keeps for the second."""
        passes = self._joint.made
        values: dict[str, Tensor] = {}
        for some in saved:
            values.update(some.values)
        # Those for the first pass alone, those that the last has left, and nothing of what one leaves for the other.
        own = self._joint.own.intersection(saved[0].values if part == "dI" else passes.saved[part])
        for name in own:
            del saved[0].values[name]
        device = saved[0].device
        values.update((f"primals_{index}", value) for index, value in enumerate(inputs) if value is not None)
        for index, tangent in enumerate(tangents):
            if index in passes.flowing:
                shape, dtype = self._departures[index]
                given = torch.zeros(shape, dtype=dtype, device=device) if tangent is None else tangent
                values[f"tangents_{index}"] = given
        one, positions = passes.backward[part], self._parts[part]
        with _torch_compat.from_random_state(saved[0].random):
            made = self._joint.run(one, values, own)
        gradients: list[Tensor | None] = [None] * len(self._shapes)
        for position, gradient in zip(positions, made, strict=False):
            shape, dtype = self._shapes[position]
            gradients[position] = torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
        if part != "dI":
            return gradients, None
        names = one.makes[len(positions) :]
        values.update((name, value) for name, value in zip(names, made[len(positions) :], strict=True) if name)
        return gradients, _Saved({name: values[name] for name in passes.kept}, None, device)


class CodeGenerator:
    """Makes the code of segments; equal segments, such as those of equal layers or microbatches, share it."""

    def __init__(self, codegen: str, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._generates = codegen == "inductor"
        self._functions: dict[tuple[object, ...], Any] = {}

    def __call__(self, segment: Segment) -> Code:
        """The code of a segment, generated when it first runs."""
        graph = emit(segment)
        in_passes = segment.in_passes
        if not self._generates and not in_passes:
            return Recorded(segment, graph)
        shapes = tuple(
            (arrival.mask.shape, arrival.exchange.tensor.dtype, arrival.group is not None)
            for arrival in segment.arrivals
        )
        key = (graph.code, shapes, segment.recomputes, tuple(segment.parts.items()) if in_passes else None)
        if key not in self._functions:
            self._functions[key] = (
                _Joint(segment, graph, self._settings, generates=self._generates)
                if in_passes
                else _Generated(graph, self._settings)
            )
        return (InPasses if in_passes else Recorded)(segment, self._functions[key])

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


class _Joint:
    """The passes of a function, found when it is first called, each compiled when it first runs."""

    def __init__(self, segment: Segment, graph: GraphModule, settings: Mapping[str, Any], *, generates: bool) -> None:
        self._graph = graph
        self._settings = settings
        self._generates = generates
        self._wants = [arrival.group is not None for arrival in segment.arrivals]
        self._parts, self._recomputes = segment.parts, segment.recomputes
        self._made: JointPasses | None = None
        self._own: frozenset[str] | None = None
        self._compiled: dict[Pass, _torch_compat.BoxedCallable] = {}

    @property
    def made(self) -> JointPasses:
        """The passes, once forward has run."""
        assert self._made is not None, "backward before any forward"
        return self._made

    def passes(self, inputs: Sequence[Tensor]) -> JointPasses:
        """The passes for inputs of these sizes, which are always the same."""
        if self._made is None:
            self._made = find_passes(
                self._graph,
                inputs,
                self._wants,
                self._parts,
                self._settings,
                recomputes=self._recomputes,
                generates=self._generates,
            )
        return self._made

    def note_own(self, saved: Mapping[str, Tensor], others: Sequence[Tensor]) -> None:
        """Find out, once, which saved values have memory that nothing else has: what backward may write over."""
        if self._own is None:
            storages = {name: value.untyped_storage() for name, value in saved.items()}
            uses = Counter(one.data_ptr() for one in (*storages.values(), *(t.untyped_storage() for t in others)))
            # What is expanded has fewer bytes than elements to write.
            self._own = frozenset(
                name
                for name, storage in storages.items()
                if uses[storage.data_ptr()] == 1 and saved[name].nbytes <= storage.nbytes()
            )

    @property
    def own(self) -> frozenset[str]:
        """Those values."""
        assert self._own is not None, "backward before any forward"
        return self._own

    def run(self, one: Pass, values: dict[str, Tensor], own: Collection[str] = ()) -> Sequence[Any]:
        """Run a pass over values by name; ``own`` are its own to free and to write over, and are taken out."""
        # The graph is for one layout of what comes from elsewhere; what passes hand on has the layout they made.
        inputs = [
            values.pop(name) if name in own else values[name].contiguous() if _is_from_outside(name) else values[name]
            for name in one.reads
        ]
        if one not in self._compiled:
            donated = [index for index, name in enumerate(one.reads) if name in own]
            self._compiled[one] = (
                _torch_compat.generate_with_inductor(one.graph, inputs, self._settings, donated)
                if self._generates
                else _torch_compat.boxed(one.graph)
            )
        made: Sequence[Any] = self._compiled[one](inputs)
        return made


def _is_from_outside(name: str) -> bool:
    return is_primal(name) or name.startswith("tangents_")
