"""Rules as users write them: ``m k+, n k+, n/k -> m n``.

| written | means |
| --- | --- |
| ``m`` | a dimension; the same name elsewhere is cut with it |
| ``k+`` | summed: in no output, whose pieces are value chunks |
| ``d^`` | never cut |
| ``(h d)`` | one dimension made of two, the outer first |
| ``1``, ``_`` | a dimension that no cut follows |
| ``*`` | any number of leading dimensions, broadcast as torch does |
| ``n/k`` | a tensor that a sum over ``k`` takes once |
| ``()`` | a tensor without dimensions; as an output ``?`` is what is no tensor |

A mark counts wherever the identifier occurs, written once or each time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from torch_vtensor.compile.rules.rule import Dims, Localize, Rule
from torch_vtensor.compile.task_graph import Operator

_TOKEN = re.compile(r"\s*([()]|\*|\?|/\s*[A-Za-z]\w*|[A-Za-z]\w*[+^]?|[1_])")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of an annotation; ``leading`` says that any number of dimensions comes before ``dims``."""

    dims: Dims
    leading: bool
    taken_once: frozenset[str]
    is_tensor: bool = True


@dataclass(frozen=True)
class Annotation:
    """A parsed annotation, which a call's shapes turn into a `Rule`."""

    text: str
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]
    summed: frozenset[str]
    whole: frozenset[str]

    def matches(self, operator: Operator) -> bool:
        """Whether the call has as many tensors, with as many dimensions."""
        pairs = [(self.inputs, operator.inputs), (self.outputs, operator.outputs)]
        return all(len(written) == len(tensors) for written, tensors in pairs) and all(
            tensor is None
            if not spec.is_tensor
            else tensor is not None
            and (len(tensor.shape) >= len(spec.dims) if spec.leading else len(tensor.shape) == len(spec.dims))
            for written, tensors in pairs
            for spec, tensor in zip(written, tensors, strict=True)
        )

    def bind(
        self,
        operator: Operator,
        sizes: dict[str, int] | None = None,
        linear: tuple[tuple[int, ...], ...] = (),
        localize: Localize | None = None,
    ) -> Rule:
        """The rule for one call; `sizes` gives what the shapes leave open, as the parts of a composite.

        Raises:  ValueError if the shapes do not fit, or leave a size open.
        """
        inputs = [tensor.shape for tensor in operator.inputs]
        outputs = [None if tensor is None else tensor.shape for tensor in operator.outputs]
        written = [self._dims(spec, shape) for spec, shape in zip(self.inputs, inputs, strict=True)]
        made = [self._dims(spec, shape or ()) for spec, shape in zip(self.outputs, outputs, strict=True)]
        found = self._sizes([*written, *made], [*inputs, *(shape or () for shape in outputs)], dict(sizes or {}))
        rule = Rule(
            tuple(_following(dims, shape, found) for dims, shape in zip(written, inputs, strict=True)),
            tuple(
                None if shape is None else _following(dims, shape, found)
                for dims, shape in zip(made, outputs, strict=True)
            ),
            found,
            self.summed,
            self.whole,
            tuple(spec.taken_once for spec in self.inputs),
            linear,
            localize,
        )
        wrong = rule.mismatch((*inputs, *(shape for shape in outputs if shape is not None)))
        if wrong:
            raise ValueError(f"the rule {self.text!r} does not fit {operator}: {wrong}.")
        return rule

    def _dims(self, spec: _Tensor, shape: tuple[int, ...]) -> Dims:
        if not spec.leading:
            return spec.dims
        # Counted from the right, as broadcasting aligns: *0 is the dimension just before the written ones.
        num_leading = len(shape) - len(spec.dims)
        return (*((f"x{index}",) for index in reversed(range(num_leading))), *spec.dims)

    def _sizes(self, tensors: list[Dims], shapes: list[tuple[int, ...]], sizes: dict[str, int]) -> dict[str, int]:
        pairs = [pair for dims, shape in zip(tensors, shapes, strict=True) for pair in zip(dims, shape, strict=True)]
        for identifiers, size in pairs:
            if len(identifiers) == 1:
                # A dimension of one may be broadcast: the largest occurrence counts.
                sizes[identifiers[0]] = size if sizes.get(identifiers[0], 1) == 1 else sizes[identifiers[0]]
        open_dims = [(identifiers, size) for identifiers, size in pairs if len(identifiers) > 1]
        while open_dims:
            solved = [pair for pair in open_dims if sum(name not in sizes for name in pair[0]) <= 1]
            if not solved:
                names = sorted({name for identifiers, _ in open_dims for name in identifiers if name not in sizes})
                raise ValueError(
                    f"the shapes leave the sizes of {', '.join(names)} open in the rule {self.text!r};"
                    " give them with sizes=, a function of the operator."
                )
            for identifiers, size in solved:
                known = math.prod(sizes[name] for name in identifiers if name in sizes)
                sizes.update({name: size // known for name in identifiers if name not in sizes})
            open_dims = [pair for pair in open_dims if pair not in solved]
        return sizes


def _following(dims: Dims, shape: tuple[int, ...], sizes: dict[str, int]) -> Dims:
    """The dims, without identifiers where the tensor has one index that is broadcast."""
    return tuple(
        () if size == 1 and any(sizes[name] > 1 for name in identifiers) else identifiers
        for identifiers, size in zip(dims, shape, strict=True)
    )


@cache
def parse(text: str) -> Annotation:
    """Read an annotation.

    Raises:  ValueError showing where it cannot be read.
    """
    reads, arrow, writes = text.partition("->")
    if not arrow:
        raise ValueError(f"the rule {text!r} has no '->'; write inputs -> outputs, as in 'm k+, k+ n -> m n'.")
    marks: dict[str, str] = {}
    inputs = tuple(_parse_tensor(part, text, marks) for part in reads.split(",")) if reads.strip() else ()
    outputs = tuple(_parse_tensor(part, text, marks) for part in writes.split(","))
    summed, whole = (frozenset(name for name, mark in marks.items() if mark == sign) for sign in "+^")
    return Annotation(text, inputs, outputs, summed, whole)


def _parse_tensor(part: str, text: str, marks: dict[str, str]) -> _Tensor:
    dims: list[tuple[str, ...]] = []
    composite: list[str] | None = None
    leading, once, is_tensor, is_scalar = False, set[str](), True, False
    position = 0
    part = part.strip()
    while position < len(part):
        match = _TOKEN.match(part, position)
        if match is None:
            raise ValueError(f"the rule {text!r} cannot be read at {part[position:].strip()!r}.")
        token, position = match[1], match.end()
        if token == "(":
            composite = []
        elif token == ")" and composite is not None:
            is_scalar = not composite
            dims += [tuple(composite)] if composite else []
            composite = None
        elif token == "*" and not dims and composite is None:
            leading = True
        elif token == "?":
            is_tensor = False
        elif token[0] == "/":
            once.add(token[1:].strip())
        elif token in ("1", "_") and composite is None:
            dims.append(())
        elif token[0].isalpha():
            name = token.rstrip("+^")
            if token != name and marks.setdefault(name, token[-1]) != token[-1]:
                raise ValueError(f"the rule {text!r} marks {name} both + and ^; choose one.")
            if composite is None:
                dims.append((name,))
            else:
                composite.append(name)
        else:
            raise ValueError(f"the rule {text!r} cannot be read: {token!r} in {part!r} is out of place.")
    if composite is not None or (is_scalar and dims):
        raise ValueError(f"the rule {text!r} cannot be read: {part!r} has parentheses without identifiers or end.")
    return _Tensor(tuple(dims), leading, frozenset(once), is_tensor)
