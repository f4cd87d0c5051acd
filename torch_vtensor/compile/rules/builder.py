"""What the families of rules are written with: a call's arguments by name, and identifiers handed out in order."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch_vtensor.compile.rules._torch_compat import named_arguments
from torch_vtensor.compile.rules.rule import Dims, Localize, Rule
from torch_vtensor.compile.task_graph import Operator, Slot, Task
from torch_vtensor.compile.tensor_view import Interval


class Arguments:
    """The arguments of an operator's call by the names of its schema, defaults filled in; a `Slot` for each tensor."""

    def __init__(self, operator: Operator) -> None:
        """Read a call."""
        self.operator = operator
        self.named = named_arguments(operator.target, operator.args, operator.kwargs)

    def __getitem__(self, name: str) -> Any:
        """An argument as it was passed."""
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default if the schema has none of this name."""
        return self.named.get(name, default)

    def slot(self, name: str) -> int | None:
        """Which input an argument is; None if it is no tensor."""
        value = self.named.get(name)
        return value.position if isinstance(value, Slot) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument."""
        slot: Slot = self.named[name]
        return self.operator.inputs[slot.position].shape

    def dim(self, name: str, rank: int) -> int:
        """A dimension argument, counted from the front."""
        return int(self.named[name]) % max(rank, 1)


class Rules:
    """Collects the identifiers of one rule; `rule` makes it.

    `plain`, `summed` and `whole` give a new dimension's identifiers: none for a size of 1, which has nothing to cut.
    """

    def __init__(self, operator: Operator) -> None:
        """Start a rule for a call, all of whose inputs are whole until `reads` says otherwise."""
        self.operator = operator
        self._sizes: dict[str, int] = {}
        self._summed: set[str] = set()
        self._whole: set[str] = set()
        self._reads: dict[int, Dims] = {}
        self._letters = _letters()

    def plain(self, size: int, name: str | None = None) -> tuple[str, ...]:
        """A dimension that the outputs have."""
        if size == 1:
            return ()
        if name is None:
            name = next(letter for letter in self._letters if letter not in self._sizes)
        self._sizes[name] = size
        if size == 0:
            self._whole.add(name)
        return (name,)

    def summed(self, size: int, name: str | None = None) -> tuple[str, ...]:
        """A dimension that the operator sums over."""
        identifiers = self.plain(size, name)
        self._summed.update(set(identifiers) - self._whole)
        return identifiers

    def whole(self, size: int, name: str | None = None) -> tuple[str, ...]:
        """A dimension that is never cut."""
        identifiers = self.plain(size, name)
        self._whole.update(identifiers)
        return identifiers

    def all_plain(self, shape: Sequence[int]) -> Dims:
        """A tensor all of whose dimensions may be cut."""
        return tuple(self.plain(size) for size in shape)

    def all_whole(self, shape: Sequence[int]) -> Dims:
        """A tensor that is never cut."""
        return tuple(self.whole(size) for size in shape)

    def broadcast(self, dims: Dims, shape: Sequence[int]) -> Dims:
        """How a tensor of this shape follows a result that has `dims`: aligned on the right, not where it has 1."""
        shown = dims[len(dims) - len(shape) :]
        return tuple(
            () if size == 1 and identifiers and self.size(identifiers) != 1 else identifiers
            for identifiers, size in zip(shown, shape, strict=True)
        )

    def size(self, identifiers: Iterable[str]) -> int:
        """Indices of a dimension with these identifiers."""
        return math.prod(self._sizes[name] for name in identifiers)

    def reads(self, slot: int | None, dims: Sequence[tuple[str, ...]]) -> None:
        """Say what the dimensions of an input are; nothing where the argument is no tensor."""
        if slot is not None:
            self._reads[slot] = tuple(dims)

    def rule(
        self,
        *outputs: Sequence[tuple[str, ...]] | None,
        linear: Iterable[Iterable[int | None]] = (),
        taken_once: Mapping[int, Iterable[str]] | None = None,
        localize: Localize | None = None,
        multiplies: Iterable[Iterable[str]] = (),
    ) -> Rule:
        """The rule; an output that is not given, or given as None, is whole, and so are inputs never spoken of.

        Sets of `linear` that name something else than a floating point tensor are left out.
        """
        tensors = self.operator.inputs
        inputs = tuple(
            self._reads[slot] if slot in self._reads else self.all_whole(tensor.shape)
            for slot, tensor in enumerate(tensors)
        )
        given = (*outputs, *((None,) * (len(self.operator.outputs) - len(outputs))))
        made: list[Dims | None] = []
        for dims, tensor in zip(given, self.operator.outputs, strict=True):
            if tensor is None:
                made.append(None)
            else:
                made.append(self.all_whole(tensor.shape) if dims is None else tuple(dims))
        floating = all(tensor.dtype.is_floating_point for tensor in self.operator.outputs if tensor is not None)
        sets = tuple(
            tuple(slot for slot in slots if slot is not None)
            for slots in linear
            if floating and all(slot is not None and tensors[slot].dtype.is_floating_point for slot in slots)
        )
        once = tuple(frozenset((taken_once or {}).get(slot, ())) for slot in range(len(tensors)))
        rule = Rule(
            inputs,
            tuple(made),
            self._sizes,
            frozenset(self._summed),
            frozenset(self._whole),
            once,
            tuple(slots for slots in sets if slots),
            localize,
            tuple(map(frozenset, multiplies)),
        )
        shapes = tuple(tensor.shape for tensor in (*tensors, *self.operator.outputs) if tensor is not None)
        wrong = rule.mismatch(shapes)
        assert wrong is None, f"the rule {rule} does not fit {self.operator}: {wrong}"
        return rule


def interval_of(task: Task, identifiers: Sequence[str], size: int) -> Interval:
    """What of a dimension of one identifier, of `size` indices, a task computes; all of one that has none."""
    return task.cuts.get(identifiers[0], Interval(0, size)) if identifiers else Interval(0, size)


def output_shape(task: Task, output: int = 0) -> tuple[int, ...]:
    """The shape of the part that a task writes."""
    view = task.outputs[output]
    assert view is not None
    return view.mask.shape


def _letters() -> Iterator[str]:
    for length in itertools.count(1):
        yield from ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=length))
