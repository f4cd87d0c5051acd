"""Every private torch API of the partition rules, run on torch 2.13.0: `OpOverload._schema`, `CustomOpDef._opoverload`.

tests/compile/rules/test_registry.py fails by name when one of these moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket
from torch.library import CustomOpDef  # type: ignore[attr-defined]


def named_arguments(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operator by the names of its schema, defaults filled in."""
    assert isinstance(target, OpOverload), f"{target} has no schema"
    parameters = target._schema.arguments
    named = {parameter.name: parameter.default_value for parameter in parameters if parameter.has_default_value()}
    named.update(zip((parameter.name for parameter in parameters), args, strict=False))
    return named | dict(kwargs)


def overload_of(target: object) -> object:
    """The operator that calls of `target` are captured as: a custom operator's or a packet's overload, else itself."""
    if isinstance(target, CustomOpDef):
        return target._opoverload
    if isinstance(target, OpOverloadPacket):
        return target.default
    return target


def qualified_name(target: object) -> str | None:
    """``aten::sum`` for every overload of it; None for a Python function."""
    return target.name().partition(".")[0] if isinstance(target, OpOverload) else None
