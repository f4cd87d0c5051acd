"""What a rule says: which dimensions of an operator's tensors belong together, and what cutting them does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch_vtensor.compile.task_graph import Task

Dims = tuple[tuple[str, ...], ...]
"""For each dimension of a tensor its identifiers, outermost first."""


class Call(NamedTuple):
    """A call that computes one task on the local parts of its tensors; a `Slot` stands for each tensor.

    ``target`` is an operator or a Python function made of operators.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Localize = Callable[[Task], Call]
"""Gives the call for a piece whose arguments are not simply the operator's."""


class Place(NamedTuple):
    """Where an identifier occurs: dimension ``dim`` of tensor ``slot``; one of its indices is ``stride`` indices there.

    ``outer`` are the identifiers of the same dimension that lie outside it.
    """

    slot: int
    dim: int
    stride: int
    outer: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Rule:
    """How one operator, with the shapes of one call, may be cut.

    Every dimension of every tensor carries identifiers, outermost first: two for a composite ``(h d)``, none for a
    dimension that does not follow a cut, as one of size 1 that is broadcast. An identifier is

    - plain: every output has it; cutting it cuts the outputs,
    - ``summed``: no output has it; pieces write value chunks that add up to the outputs,
    - ``whole``: never cut.

    Under the summed identifiers in ``taken_once`` an input that does not have them is read in value chunks, so that
    the sum over pieces takes it once (the bias of a linear layer). ``linear`` lists sets of inputs in which the
    operator is jointly linear: those inputs may be read, and the outputs written, in value chunks. ``localize`` gives
    the call for a piece; without it, the operator's own call is right for every piece. ``multiplies`` has the
    identifiers of each product that it computes; without it, that is one over all if two inputs share what is summed.
    """

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims | None, ...]
    sizes: Mapping[str, int]
    summed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    taken_once: tuple[frozenset[str], ...] = ()
    linear: tuple[tuple[int, ...], ...] = ()
    localize: Localize | None = None
    multiplies: tuple[frozenset[str], ...] = ()

    def __post_init__(self) -> None:
        """Fill in that no input is taken once, and what is multiplied; check that the identifiers are what they say."""
        if not self.taken_once:
            object.__setattr__(self, "taken_once", (frozenset[str](),) * len(self.inputs))
        if not self.multiplies and any(
            sum(name in identifiers for identifiers in self.input_identifiers) > 1 for name in self.summed
        ):
            object.__setattr__(self, "multiplies", (frozenset(self.sizes),))
        for dims in self.outputs:
            written = {identifier for identifiers in dims or () for identifier in identifiers}
            plain = self.sizes.keys() - self.summed - self.whole
            if dims is not None and (plain - written or self.summed & written):
                wrong = ", ".join(sorted((plain - written) | (self.summed & written)))
                raise ValueError(
                    f"the rule {self} cannot be right for {wrong}: an identifier is in every output, or is summed (+)"
                    " and in none, or is never cut (^)."
                )

    @cached_property
    def input_identifiers(self) -> tuple[frozenset[str], ...]:
        """The identifiers that each input has."""
        return tuple(frozenset(name for identifiers in dims for name in identifiers) for dims in self.inputs)

    @cached_property
    def input_places(self) -> Mapping[str, tuple[Place, ...]]:
        """Where the inputs have each identifier."""
        return self._places(self.inputs)

    @cached_property
    def output_places(self) -> Mapping[str, tuple[Place, ...]]:
        """Where the outputs have each identifier."""
        return self._places(self.outputs)

    @cached_property
    def ties(self) -> tuple[tuple[tuple[int, int, str], ...], tuple[tuple[int, int, str], ...]]:
        """Dimensions that can be cut, of inputs and of outputs: tensor, dimension, and the identifier that cuts it."""
        return self._ties(self.inputs), self._ties(self.outputs)

    def _ties(self, tensors: tuple[Dims | None, ...]) -> tuple[tuple[int, int, str], ...]:
        found = []
        for slot, dims in enumerate(tensors):
            for dim, identifiers in enumerate(dims or ()):
                outermost = next((name for name in identifiers if self.sizes[name] > 1), None)
                if outermost is not None and self._is_outermost(outermost):
                    found.append((slot, dim, outermost))
        return tuple(found)

    def _is_outermost(self, identifier: str) -> bool:
        """Whether it can be cut wherever it occurs: a view of [b, s, m] as [(b s), m] keeps s whole."""
        return identifier not in self.whole and all(self.sizes[name] == 1 for name in self.outer(identifier))

    @cached_property
    def output_identifiers(self) -> frozenset[str]:
        """The identifiers that outputs have."""
        return frozenset(name for dims in self.outputs for identifiers in dims or () for name in identifiers)

    def outer(self, identifier: str) -> Iterator[str]:
        """The identifiers that have to be down to one index before this one can be cut."""
        for place in (*self.input_places[identifier], *self.output_places[identifier]):
            yield from place.outer

    def mismatch(self, shapes: tuple[tuple[int, ...], ...]) -> str | None:
        """What is wrong if tensors of these shapes, inputs then outputs, are not what the rule describes."""
        tensors = (*self.inputs, *(dims for dims in self.outputs if dims is not None))
        if len(tensors) != len(shapes):
            return f"it names {len(tensors)} tensors, the call has {len(shapes)}"
        for dims, shape in zip(tensors, shapes, strict=True):
            if len(dims) != len(shape):
                return f"{_text(dims, '')} has {len(dims)} dimensions, the tensor's shape is {list(shape)}"
            for identifiers, size in zip(dims, shape, strict=True):
                if identifiers and math.prod(self.sizes[name] for name in identifiers) != size:
                    return f"({' '.join(identifiers)}) does not make a dimension of {size}"
        return None

    def _places(self, tensors: tuple[Dims | None, ...]) -> dict[str, tuple[Place, ...]]:
        places: dict[str, tuple[Place, ...]] = dict.fromkeys(self.sizes, ())
        for slot, dims in enumerate(tensors):
            for dim, identifiers in enumerate(dims or ()):
                stride = 1
                for position in reversed(range(len(identifiers))):
                    name = identifiers[position]
                    places[name] = (*places[name], Place(slot, dim, stride, identifiers[:position]))
                    stride *= self.sizes[name]
        return places

    def __str__(self) -> str:
        """As an annotation: ``m k+, n k+, n/k -> m n``."""
        marks = dict.fromkeys(self.summed, "+") | dict.fromkeys(self.whole, "^")
        inputs = [
            _text(dims, "".join(f"/{name}" for name in sorted(once)), marks)
            for dims, once in zip(self.inputs, self.taken_once, strict=True)
        ]
        outputs = ["?" if dims is None else _text(dims, "", marks) for dims in self.outputs]
        return f"{', '.join(inputs)} -> {', '.join(outputs)}".strip()


def _text(dims: Dims, once: str, marks: Mapping[str, str] | None = None) -> str:
    def dim_text(identifiers: tuple[str, ...]) -> str:
        marked = [f"{name}{(marks or {}).get(name, '')}" for name in identifiers]
        return f"({' '.join(marked)})" if len(marked) > 1 else "".join(marked) or "1"

    return (" ".join(map(dim_text, dims)) or "()") + once
