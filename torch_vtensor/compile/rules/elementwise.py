"""Operators that compute each element by itself: every dimension may be cut, broadcast ones are read by all pieces."""

from __future__ import annotations

import itertools

from torch_vtensor.compile.rules.builder import Arguments, Rules
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Rule
from torch_vtensor.compile.task_graph import Operator, Slot

_LINEAR = {
    "_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh_copy", "neg", "negative", "positive", "to",
    "type_as",
}  # fmt: skip
_LINEAR_IN_SOME = {
    "add", "div", "divide", "masked_fill", "mul", "multiply", "sub", "subtract", "true_divide", "where"
}  # fmt: skip

_WORDS = """
__and__ __lshift__ __or__ __rshift__ __xor__ _conj abs absolute acos acosh addcdiv addcmul arccos arcsin arctan
arctan2 asin asinh atan atan2 atanh bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor broadcast_tensors ceil
celu clamp clamp_max clamp_min clip copy copysign cos cosh deg2rad digamma dropout elu empty_like eq erf erfc erfinv
exp exp2 expm1 fill float_power floor floor_divide fmax fmin fmod frac full_like ge gelu greater greater_equal gt
hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan ldexp le leaky_relu lerp less less_equal lgamma log
log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt maximum
minimum mish nan_to_num native_dropout ne nextafter not_equal ones_like pow rad2deg rand_like randint_like randn_like
reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus
softshrink softsign special_erf special_expit special_expm1 special_xlogy sqrt square tan tanh tanhshrink threshold
trunc xlogy zeros_like
"""
_NONLINEAR = tuple(_WORDS.split())


@rule_for(*_LINEAR, *_NONLINEAR, *_LINEAR_IN_SOME)
def elementwise(operator: Operator) -> Rule | None:
    """``a b, b -> a b``: every input follows the output, as broadcasting aligns them."""
    first = operator.outputs[0]
    if first is None or any(tensor is not None and tensor.shape != first.shape for tensor in operator.outputs):
        return None
    rules = Rules(operator)
    dims = rules.all_plain(first.shape)
    followed: set[str] = set()
    for slot, tensor in enumerate(operator.inputs):
        if _broadcasts(tensor.shape, first.shape):
            follows = rules.broadcast(dims, tensor.shape)
            rules.reads(slot, follows)
            followed.update(itertools.chain(*follows))
    if not followed.issuperset(itertools.chain(*dims)):
        return None  # where(condition) alone lists indices: its shape is no input's
    return rules.rule(*(dims for _ in operator.outputs), linear=_linear_inputs(operator))


def _broadcasts(shape: tuple[int, ...], made: tuple[int, ...]) -> bool:
    """Whether a tensor takes part in the result; of one like type_as's second only the dtype does."""
    aligned = zip(reversed(shape), reversed(made), strict=False)
    return len(shape) <= len(made) and all(size in (1, result) for size, result in aligned)


def _linear_inputs(operator: Operator) -> list[tuple[int | None, ...]]:
    """Sets of inputs that may be read in addends that sum up to them."""
    name = str(operator.target).split(".")[1]
    if name in _LINEAR:
        return [(0,)]
    if name not in (
        "add",
        "sub",
        "subtract",
        "mul",
        "multiply",
        "div",
        "divide",
        "true_divide",
        "where",
        "masked_fill",
    ):
        return []
    arguments = Arguments(operator)
    one, other = arguments.slot("self"), arguments.slot("other")
    if name in ("mul", "multiply"):
        return [(slot,) for slot in (one, other) if slot is not None]
    if name in ("div", "divide", "true_divide"):
        return [(one,)] if arguments.get("rounding_mode") is None else []
    if name == "masked_fill":
        value = arguments["value"]
        return [(one,)] if not isinstance(value, Slot) and value == 0 else []
    return [(one, other)]
