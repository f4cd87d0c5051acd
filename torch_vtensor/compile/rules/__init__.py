"""Partition rules: for every operator, which dimensions of its tensors may be cut, and what a cut does.

rule.py says what a rule is, annotation.py reads one, registry.py finds an operator's; each of the other files is a
family of operators. `torch_vtensor.compile.pieces` cuts by them.
"""

from torch_vtensor.compile.rules import attention, create, elementwise, index, matmul, reduce, shape
from torch_vtensor.compile.rules.decompositions import DECOMPOSITIONS, cross_entropy_over_cut_classes
from torch_vtensor.compile.rules.registry import find_rule, has_rule, register_rule
from torch_vtensor.compile.rules.rule import Call, Localize, Rule

__all__ = [
    "DECOMPOSITIONS",
    "Call",
    "Localize",
    "Rule",
    "attention",
    "create",
    "cross_entropy_over_cut_classes",
    "elementwise",
    "find_rule",
    "has_rule",
    "index",
    "matmul",
    "reduce",
    "register_rule",
    "shape",
]
