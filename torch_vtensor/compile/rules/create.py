"""Operators that make a tensor from nothing: every dimension may be cut, at no cost."""

from __future__ import annotations

import torch

from torch_vtensor.compile.rules.builder import Arguments, Rules, interval_of, output_shape
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Call, Rule
from torch_vtensor.compile.task_graph import Operator, Task

aten = torch.ops.aten


@rule_for("empty", "full", "ones", "rand", "randint", "randn", "zeros")
@rule_for("new_empty", "new_full", "new_ones", "new_zeros")
def filled(operator: Operator) -> Rule | None:
    """``-> a b``: the same everywhere."""
    made = operator.outputs[0]
    assert made is not None
    rules = Rules(operator)
    dims = rules.all_plain(made.shape)

    def localize(task: Task) -> Call:
        return Call(operator.target, (), {**Arguments(operator).named, "size": list(output_shape(task))})

    return rules.rule(dims, localize=localize)


@rule_for("arange")
def arange(operator: Operator) -> Rule | None:
    """``-> a``: a piece starts where the ones before it end."""
    made = operator.outputs[0]
    assert made is not None
    (size,) = made.shape
    arguments = Arguments(operator)
    start, step = arguments.get("start", 0), arguments.get("step", 1)
    rules = Rules(operator)
    a = rules.plain(size)
    # Not the operator's end: counted in steps, a piece has as many elements as it should.
    options = {name: arguments[name] for name in ("layout", "device", "pin_memory")} | {"dtype": made.dtype}

    def localize(task: Task) -> Call:
        part = interval_of(task, a, size)
        bounds = (start + part.start * step, start + part.stop * step, step)
        return Call(aten.arange.start_step, bounds, options)

    exact = all(isinstance(value, int) for value in (start, step))
    if not exact and a:
        return None  # a float end may round to one element more or less
    return rules.rule((a,), localize=localize)


@rule_for("eye", "linspace", "logspace", "randperm", "scalar_tensor")
def whole(operator: Operator) -> Rule | None:
    """``-> a^``: small, and different at every place."""
    return Rules(operator).rule()
