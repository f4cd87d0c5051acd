"""What a program computes, before and after a plan has cut it: operators over logical tensors, tasks over their views.

An `Operator` is a call as its author wrote it. A `Task` is a piece of one, which a plan places and orders; an operator
that no plan cuts is one task.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, LogicalTensor, Mask, TensorView, ValueChunk


class Slot(NamedTuple):
    """Stands in a call's arguments for tensor number ``position`` of its inputs."""

    position: int


@dataclass(frozen=True, eq=False)
class Operator:
    """One call of the captured forward program.

    ``args`` and ``kwargs`` are the call's, nested lists and all, with a `Slot` for each tensor. ``inputs`` are those
    tensors, one for each slot, so a tensor that is passed twice is there twice. ``outputs`` are what it returns, in
    order; None for what is no tensor. ``module`` is the path of the innermost module that made the call, ``""`` outside
    any. ``found`` keeps what others find out about it.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[LogicalTensor, ...]
    outputs: tuple[LogicalTensor | None, ...]
    module: str = ""
    found: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def likeness(self) -> Hashable | None:
        """Equal for calls that differ in nothing but which tensors they are about; None for one like no other."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in self.inputs)
        made = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in self.outputs)
        likeness = self.target, _frozen(self.args), _frozen(self.kwargs), shapes, made
        try:
            hash(likeness)
        except TypeError:
            return None
        return likeness

    def __str__(self) -> str:
        """One line: what it makes, the call, what it reads."""
        made = ", ".join(str(tensor) for tensor in self.outputs if tensor is not None)
        return f"{made} = {self.target}({', '.join(tensor.name for tensor in self.inputs)})"


def _frozen(value: Any) -> Hashable:
    """The value with lists and dicts made hashable; equal only if the types are, too: 1 is not True."""
    if isinstance(value, Mapping):
        return dict, tuple((key, _frozen(one)) for key, one in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, Slot):
        return list, tuple(map(_frozen, value))
    frozen: Hashable = (type(value), value)
    return frozen


_NO_CUTS: Mapping[str, Interval] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Piece:
    """Which part of an operator a task is, without saying of which: operators that are alike share their pieces.

    ``inputs`` and ``outputs`` are the parts of its tensors, in the operator's order; ``cuts`` and ``chunk`` are those
    of `Task`. ``found`` keeps what others find out about a piece, for all the operators that share it.
    """

    inputs: tuple[Mask, ...]
    outputs: tuple[Mask | None, ...]
    cuts: Mapping[str, Interval] = field(default_factory=lambda: _NO_CUTS)
    chunk: ValueChunk = WHOLE_VALUE
    found: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def whole(cls, operator: Operator) -> Piece:
        """All of an operator."""
        outputs = tuple(None if tensor is None else Mask.of(tensor.shape) for tensor in operator.outputs)
        return cls(tuple(Mask.of(tensor.shape) for tensor in operator.inputs), outputs)


@dataclass(frozen=True, eq=False, init=False)
class Task:
    """A piece of an operator: the unit that a plan places.

    ``inputs`` and ``outputs`` are views of the operator's tensors, in its order. ``cuts`` tells which interval of which
    of the rule's identifiers this piece computes, all of an identifier that is not named. ``chunk`` tells which addend
    of a linear operator's value. Pieces with different ``replica`` and everything else equal compute the same.
    """

    operator: Operator
    piece: Piece
    replica: int

    def __init__(self, operator: Operator, piece: Piece, replica: int = 0) -> None:
        # Plans make hundreds of thousands, and a frozen dataclass takes twice as long to set its fields.
        fields = self.__dict__
        fields["operator"] = operator
        fields["piece"] = piece
        fields["replica"] = replica

    @classmethod
    def of(cls, operator: Operator) -> Task:
        """All of an operator."""
        return cls(operator, Piece.whole(operator))

    @cached_property
    def inputs(self) -> tuple[TensorView, ...]:
        """What it reads."""
        return tuple(map(TensorView, self.operator.inputs, self.piece.inputs))

    @cached_property
    def outputs(self) -> tuple[TensorView | None, ...]:
        """What it writes; None for what is no tensor."""
        pairs = zip(self.operator.outputs, self.piece.outputs, strict=True)
        return tuple(None if tensor is None or mask is None else TensorView(tensor, mask) for tensor, mask in pairs)

    @property
    def cuts(self) -> Mapping[str, Interval]:
        """Which interval of which identifiers it computes."""
        return self.piece.cuts

    @property
    def chunk(self) -> ValueChunk:
        """Which addend of the operator's value it computes."""
        return self.piece.chunk

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

    ``inputs`` are all tensors that no operator makes: parameters, buffers, inputs, constants, in the order in which
    operators first read them. ``outputs`` are what the program returns, ``mutations`` the new values of inputs that it
    overwrites, by the overwritten tensor.
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
