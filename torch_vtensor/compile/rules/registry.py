"""Which rule an operator has: ours by the operator's name, users' by what they registered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from torch_vtensor.compile.rules._torch_compat import overload_of, qualified_name
from torch_vtensor.compile.rules.annotation import Annotation, parse
from torch_vtensor.compile.rules.builder import Rules
from torch_vtensor.compile.rules.rule import Localize, Rule
from torch_vtensor.compile.task_graph import Operator

MakeRule = Callable[[Operator], Rule | None]
"""Makes the rule for one call; None if it has none for these arguments."""

_ours: dict[str, MakeRule] = {}
_registered: dict[object, MakeRule] = {}


@dataclass(frozen=True, eq=False)
class _Found:
    """The rule of an operator, and of all that are like it; ``is_given`` if it is somebody's and not the default."""

    rule: Rule
    is_given: bool


# By what operators that are alike have in common. An operator keeps what it found here, and until which dictionary.
_alike: list[WeakValueDictionary[Hashable, _Found]] = [WeakValueDictionary()]

T = TypeVar("T", bound=Callable[..., Any])


def rule_for(*names: str) -> Callable[[MakeRule], MakeRule]:
    """Give the operators ``aten::name``, every overload of them, this rule."""

    def register(make: MakeRule) -> MakeRule:
        for name in names:
            assert f"aten::{name}" not in _ours, f"two rules for aten::{name}"
            _ours[f"aten::{name}"] = make
        return make

    return register


def register_rule(
    *annotations: str,
    operator: Callable[..., Any] | None = None,
    sizes: Callable[[Operator], Mapping[str, int]] | None = None,
    linear: tuple[tuple[int, ...], ...] = (),
) -> Callable[[T], T]:
    """Tell how a custom operator may be cut, as a decorator over it.

    ::

        @register_rule("m k+, k+ n -> m n")
        @torch.library.custom_op("mine::mm", mutates_args=())
        def mm(x: Tensor, y: Tensor) -> Tensor: ...

    Of several annotations the first that has the call's number of tensors and dimensions counts. With `operator`, the
    decorated function is not the operator: it gets a `Task` and returns the `Call` that computes it, for operators
    whose other arguments change with the piece. `sizes` tells the sizes that shapes leave open, `linear` the sets of
    inputs in which the operator is jointly linear.

    Raises:  ValueError for an annotation that cannot be read.
    """
    parsed = [parse(annotation) for annotation in annotations]

    def register(function: T) -> T:
        target = overload_of(function if operator is None else operator)
        localize = None if operator is None else function
        _registered[target] = lambda call: _bind(parsed, call, sizes, linear, localize)
        _alike[0] = WeakValueDictionary()
        return function

    return register


def find_rule(operator: Operator) -> Rule:
    """How this call may be cut. One that nobody has a rule for may only be replicated."""
    return _find(operator).rule


def has_rule(operator: Operator) -> bool:
    """Whether somebody has a rule for this call."""
    return _find(operator).is_given


def _find(operator: Operator) -> _Found:
    (alike,) = _alike
    known: tuple[object, _Found] | None = operator.found.get("rule")
    if known is not None and known[0] is alike:
        return known[1]
    likeness = operator.likeness
    found = None if likeness is None else alike.get(likeness)
    if found is None:
        make = _registered.get(operator.target) or _ours.get(qualified_name(operator.target) or "")
        rule = make(operator) if make else None
        found = _Found(Rules(operator).rule() if rule is None else rule, rule is not None)
        if likeness is not None:
            alike[likeness] = found
    operator.found["rule"] = alike, found
    return found


def _bind(
    annotations: list[Annotation],
    operator: Operator,
    sizes: Callable[[Operator], Mapping[str, int]] | None,
    linear: tuple[tuple[int, ...], ...],
    localize: Localize | None,
) -> Rule:
    for annotation in annotations:
        if annotation.matches(operator):
            return annotation.bind(operator, dict(sizes(operator)) if sizes else None, linear, localize)
    shapes = ", ".join(str(list(tensor.shape)) for tensor in operator.inputs)
    raise ValueError(
        f"no rule of {operator.target} fits a call with {shapes}: {'; '.join(a.text for a in annotations)}."
        " Register an annotation with as many tensors and dimensions."
    )
