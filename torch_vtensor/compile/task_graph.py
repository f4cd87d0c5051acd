"""What a program computes, before and after a plan has cut it: operators over logical tensors, tasks over their views.

An `Operator` is a call as its author wrote it. A `Task` is a piece of one, which a plan places and orders; an operator
that no plan cuts is one task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, LogicalTensor, TensorView, ValueChunk


class Slot(NamedTuple):
    """Stands in a call's arguments for tensor number ``position`` of its inputs."""

    position: int


@dataclass(frozen=True, eq=False)
class Operator:
    """One call of the captured forward program.

    ``args`` and ``kwargs`` are the call's, nested lists and all, with a `Slot` for each tensor. ``inputs`` are those
    tensors, one for each slot, so a tensor that is passed twice is there twice. ``outputs`` are what it returns, in
    order; None for what is no tensor. ``module`` is the path of the innermost module that made the call, ``""`` outside
    any.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[LogicalTensor, ...]
    outputs: tuple[LogicalTensor | None, ...]
    module: str = ""

    def __str__(self) -> str:
        """One line: what it makes, the call, what it reads."""
        made = ", ".join(str(tensor) for tensor in self.outputs if tensor is not None)
        return f"{made} = {self.target}({', '.join(tensor.name for tensor in self.inputs)})"


_NO_CUTS: Mapping[str, Interval] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Task:
    """A piece of an operator: the unit that a plan places.

    ``inputs`` and ``outputs`` are views of the operator's tensors, in its order. ``cuts`` tells which interval of which
    of the rule's identifiers this piece computes, all of an identifier that is not named. ``chunk`` tells which addend
    of a linear operator's value. Pieces with different ``replica`` and everything else equal compute the same.
    """

    operator: Operator
    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView | None, ...]
    cuts: Mapping[str, Interval] = field(default_factory=lambda: _NO_CUTS)
    chunk: ValueChunk = WHOLE_VALUE
    replica: int = 0

    @classmethod
    def of(cls, operator: Operator) -> Task:
        """All of an operator."""
        outputs = tuple(None if tensor is None else tensor.whole for tensor in operator.outputs)
        return cls(operator, tuple(tensor.whole for tensor in operator.inputs), outputs)

    @property
    def name(self) -> str:
        """The operator's name and what of it this piece computes: ``mm[k 0:4]``, ``mm[m 2:4, k 0:4]#1``."""
        cuts = ", ".join(f"{identifier} {interval}" for identifier, interval in self.cuts.items())
        chunk = "" if self.chunk == WHOLE_VALUE else f"({self.chunk})"
        return f"{self.operator.name}{f'[{cuts}]' if cuts else ''}{chunk}{f'#{self.replica}' if self.replica else ''}"

    def __str__(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True, eq=False)
class OperatorGraph:
    """A captured forward program: operators in an order in which they can run, over tensors that nobody overwrites.

    ``inputs`` are all tensors that no operator makes: parameters, buffers, inputs, constants. ``outputs`` are what the
    program returns, ``mutations`` the new values of inputs that it overwrites, by the overwritten tensor.
    """

    inputs: tuple[LogicalTensor, ...]
    operators: tuple[Operator, ...]
    outputs: tuple[LogicalTensor, ...]
    mutations: Mapping[LogicalTensor, LogicalTensor] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        """One line for each tensor that flows in, each operator and each tensor that flows out, in order."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{len(self.operators)} operators, {len(self.inputs)} inputs, {len(self.outputs)} outputs"
        yield from (f"  {tensor.kind:10} {tensor}" for tensor in self.inputs)
        yield from (f"  {'operator':10} {operator}  {operator.module}".rstrip() for operator in self.operators)
        yield from (f"  {'output':10} {tensor}" for tensor in self.outputs)
        yield from (f"  {'mutation':10} {old.name} becomes {new.name}" for old, new in self.mutations.items())
