"""Which operators draw random numbers."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from torch_vtensor.compile.task_graph import Operator


def draws_random_numbers(operator: Operator) -> bool:
    """Whether a call draws random numbers: dropout does not with a probability of 0, nor outside of training."""
    name = str(operator.target)
    if "dropout" in name or "scaled_dot_product_attention" in name:
        given = _arguments(operator)
        probability = given.get("dropout_p", given.get("p", 0.0))
        return bool(given.get("train", True)) and probability != 0
    return torch.Tag.nondeterministic_seeded in getattr(operator.target, "tags", ())


def _arguments(operator: Operator) -> dict[str, Any]:
    """The arguments of a call by name."""
    schema = getattr(operator.target, "_schema", None)
    if schema is not None:
        names = [argument.name for argument in schema.arguments]
    else:
        names = list(inspect.signature(operator.target).parameters)
    return {**dict(zip(names, operator.args, strict=False)), **operator.kwargs}
