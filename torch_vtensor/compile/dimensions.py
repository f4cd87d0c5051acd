"""Dimensions of a program: which dimensions of its tensors are one and the same, as operators' rules tie them.

Cutting an mlp along its hidden dimension cuts rows of one weight, columns of another and everything between them. All
of these are one `Dimension`::

    up.weight[h, m]   x[b, s, m] → linear → u[b, s, h] → silu → linear(·, down.weight[m, h]) → y[b, s, m]
              h                                     h                                    h+
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Operator
from torch_vtensor.compile.tensor_view import LogicalTensor

_Tied = tuple[Operator | LogicalTensor, str | int]
"""An identifier of an operator's rule, or a dimension of a tensor."""


@dataclass(frozen=True, eq=False)
class Dimension:
    """What can be cut together.

    ``size`` is how many indices it can be cut between: of a dimension [32 heads × 128] and one of 32 heads, 32.
    ``identifiers`` names, for each operator that computes along it, the rule's identifiers; ``tensor_dims`` the
    dimensions of tensors that lie along it.
    """

    size: int
    identifiers: Mapping[Operator, tuple[str, ...]]
    tensor_dims: frozenset[tuple[LogicalTensor, int]]

    def __str__(self) -> str:
        """Name it after a parameter that lies along it, or any tensor: ``mlp.up_proj.weight:0 (size 96, …)``."""
        named = sorted(
            (tensor.kind != "parameter", tensor.kind != "input", tensor.name, dim) for tensor, dim in self.tensor_dims
        )
        where = f"{named[0][2]}:{named[0][3]}" if named else "-"
        return f"{where} (size {self.size}, {len(self.identifiers)} operators)"


def find_dimensions(operators: Sequence[Operator]) -> tuple[Dimension, ...]:
    """The dimensions along which these operators can be cut; a dimension that some operator keeps whole ends there."""
    parent: dict[_Tied, _Tied] = {}

    def root(node: _Tied) -> _Tied:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for operator in operators:
        for tensor, dim, identifier in _ties(operator):
            parent[root((tensor, dim))] = root((operator, identifier))

    members: defaultdict[_Tied, list[_Tied]] = defaultdict(list)
    for node in parent:
        members[root(node)].append(node)
    return tuple(_dimension(nodes) for nodes in members.values())


def _ties(operator: Operator) -> Iterator[tuple[LogicalTensor, int, str]]:
    """Each dimension of the operator's tensors that can be cut, with the identifier that cuts it."""
    for tensors, ties in zip((operator.inputs, operator.outputs), find_rule(operator).ties, strict=True):
        for slot, dim, identifier in ties:
            if (tensor := tensors[slot]) is not None:
                yield tensor, dim, identifier


def _dimension(nodes: Sequence[_Tied]) -> Dimension:
    identifiers: defaultdict[Operator, list[str]] = defaultdict(list)
    tensor_dims: set[tuple[LogicalTensor, int]] = set()
    size = 0
    for owner, which in nodes:
        if isinstance(owner, Operator):
            assert isinstance(which, str)
            identifiers[owner].append(which)
            size = math.gcd(size, find_rule(owner).sizes[which])
        else:
            assert isinstance(which, int)
            tensor_dims.add((owner, which))
    return Dimension(size, {owner: tuple(names) for owner, names in identifiers.items()}, frozenset(tensor_dims))


def identifier_to_cut(operator: Operator, dimension: Dimension) -> str | None:
    """The identifier by which the operator is cut along a dimension; None if it does not compute along it.

    Where several lie along it, as queries and keys of self-attention along the sequence, the one that cuts the output.
    """
    names = dimension.identifiers.get(operator, ())
    if len(names) < 2:
        return names[0] if names else None
    in_outputs = find_rule(operator).output_identifiers
    return next((name for name in names if name in in_outputs), names[0])
