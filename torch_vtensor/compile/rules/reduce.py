"""Operators that reduce dimensions, and those that normalize over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_vtensor.compile.rules.builder import Arguments, Rules
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Call, Dims, Rule
from torch_vtensor.compile.task_graph import Operator, Slot, Task

aten = torch.ops.aten


def _reduced(arguments: Arguments, rank: int) -> set[int]:
    given = arguments.get("dim")
    if given is None or given == [] or rank == 0:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, list | tuple) else [given])}


def _reduction_dims(rules: Rules, arguments: Arguments, summed: bool) -> tuple[Dims, Dims]:
    """Identifiers of the input, and of a result in which reduced dimensions are gone or 1."""
    shape = rules.operator.inputs[0].shape
    reduced = _reduced(arguments, len(shape))
    make = rules.summed if summed else rules.whole
    dims = tuple(make(size) if dim in reduced else rules.plain(size) for dim, size in enumerate(shape))
    keep = bool(arguments.get("keepdim", False))
    made = tuple(
        () if dim in reduced else identifiers for dim, identifiers in enumerate(dims) if keep or dim not in reduced
    )
    return dims, made


@rule_for("sum", "nansum")
def sum_(operator: Operator) -> Rule | None:
    """``a k+ -> a``."""
    rules = Rules(operator)
    dims, made = _reduction_dims(rules, Arguments(operator), summed=True)
    rules.reads(0, dims)
    is_sum = str(operator.target).startswith("aten.sum.")
    return rules.rule(made, linear=[(0,)] if is_sum else ())


@rule_for("mean")
def mean(operator: Operator) -> Rule | None:
    """``a k+ -> a``: a piece's mean is its sum over the count of the whole."""
    arguments = Arguments(operator)
    rules = Rules(operator)
    dims, made = _reduction_dims(rules, arguments, summed=True)
    rules.reads(0, dims)
    shape = operator.inputs[0].shape
    reduced = sorted(_reduced(arguments, len(shape)))
    summed = {name for dim in reduced for name in dims[dim]}
    count = math.prod(shape[dim] for dim in reduced)
    keepdim, dtype = bool(arguments.get("keepdim", False)), arguments.get("dtype")

    def localize(task: Task) -> Call:
        if summed.isdisjoint(task.cuts):
            return Call(operator.target, operator.args, operator.kwargs)
        return Call(_sum_over_count, (Slot(0), reduced, keepdim, dtype, count), {})

    return rules.rule(made, linear=[(0,)], localize=localize)


def _sum_over_count(x: Tensor, dims: list[int], keepdim: bool, dtype: torch.dtype | None, count: int) -> Tensor:
    mean: Tensor = aten.div.Scalar(aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype), count)
    return mean


@rule_for("all", "amax", "amin", "any", "aminmax", "argmax", "argmin", "count_nonzero", "logsumexp", "max", "min")
@rule_for("median", "mode", "nanmedian", "norm", "linalg_vector_norm", "prod", "std", "std_mean", "var")
@rule_for("var_mean")
def reduction(operator: Operator) -> Rule | None:
    """``a k^ -> a``: no sum, so pieces of the reduced dimensions would not add up."""
    if len(operator.inputs) != 1:  # max(x, y)
        from torch_vtensor.compile.rules.elementwise import elementwise

        return elementwise(operator)
    rules = Rules(operator)
    dims, made = _reduction_dims(rules, Arguments(operator), summed=False)
    rules.reads(0, dims)
    return rules.rule(*(made for _ in operator.outputs))


@rule_for("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "softmin", "special_softmax")
@rule_for("special_log_softmax")
def softmax(operator: Operator) -> Rule | None:
    """``a k^ -> a k^``."""
    shape = operator.inputs[0].shape
    along = Arguments(operator).dim("dim", len(shape))
    rules = Rules(operator)
    dims = tuple(rules.whole(size) if dim == along else rules.plain(size) for dim, size in enumerate(shape))
    rules.reads(0, dims)
    return rules.rule(dims)


@rule_for("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(operator: Operator) -> Rule | None:
    """``* k^, k^, k^ -> * k^``; the statistics of the native form are ``* 1``."""
    arguments = Arguments(operator)
    shape = operator.inputs[0].shape
    num_normalized = len(arguments["normalized_shape"])
    rules = Rules(operator)
    leading = rules.all_plain(shape[: len(shape) - num_normalized])
    normalized = rules.all_whole(shape[len(shape) - num_normalized :])
    rules.reads(0, (*leading, *normalized))
    for name in ("weight", "bias"):
        rules.reads(arguments.slot(name), normalized)
    statistics = (*leading, *(() for _ in range(num_normalized)))
    return rules.rule((*leading, *normalized), *(statistics for _ in operator.outputs[1:]))


@rule_for("group_norm")
def group_norm(operator: Operator) -> Rule | None:
    """``a (g c^) y^, (g c^), (g c^) -> a (g c^) y^``."""
    arguments = Arguments(operator)
    shape, groups = operator.inputs[0].shape, int(arguments["num_groups"])
    rules = Rules(operator)
    a = rules.plain(shape[0])
    channels = (*rules.plain(groups, "g"), *rules.whole(shape[1] // groups))
    dims = (a, channels, *rules.all_whole(shape[2:]))
    rules.reads(0, dims)
    for name in ("weight", "bias"):
        rules.reads(arguments.slot(name), (channels,))

    def localize(task: Task) -> Call:
        local = task.cuts["g"].size if "g" in task.cuts else groups
        named = {name: arguments[name] for name in ("weight", "bias", "eps", "cudnn_enabled")}
        return Call(operator.target, (arguments["input"], local), named)

    return rules.rule(dims, localize=localize)


@rule_for("batch_norm", "native_batch_norm", "_native_batch_norm_legit")
@rule_for("_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training")
def batch_norm(operator: Operator) -> Rule | None:
    """``n^ c y^, c, c, c, c -> n^ c y^``: channels are cut; rows and places too where statistics are given."""
    name = str(operator.target).split(".")[1]
    arguments = Arguments(operator)
    shape = operator.inputs[0].shape
    training = bool(arguments.get("training", name != "_native_batch_norm_legit_no_training"))
    if any(tensor is None or 0 in tensor.shape for tensor in operator.outputs):
        return None  # evaluation returns empty statistics, which follow nothing
    rules = Rules(operator)
    free = rules.whole if training else rules.plain
    channels = rules.plain(shape[1], "c")
    dims = (free(shape[0]), channels, *(free(size) for size in shape[2:]))
    rules.reads(0, dims)
    for slot in range(1, len(operator.inputs)):
        rules.reads(slot, (channels,))
    return rules.rule(dims, *((channels,) for _ in operator.outputs[1:]))


@rule_for("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d")
@rule_for("adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices", "upsample_nearest2d")
@rule_for("upsample_bilinear2d", "upsample_bicubic2d")
def pooling(operator: Operator) -> Rule | None:
    """``a c y^ -> a c z^``: batch and channels are independent, places are not."""
    read = operator.inputs[0].shape
    num_spatial = 1 if "1d" in str(operator.target) else 3 if "3d" in str(operator.target) else 2
    rules = Rules(operator)
    free = rules.all_plain(read[: len(read) - num_spatial])
    rules.reads(0, (*free, *rules.all_whole(read[len(free) :])))
    outputs = [
        (*free, *rules.all_whole(tensor.shape[len(free) :])) for tensor in operator.outputs if tensor is not None
    ]
    return rules.rule(*outputs)


@rule_for("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "soft_margin_loss")
@rule_for("binary_cross_entropy_with_logits", "poisson_nll_loss")
def elementwise_loss(operator: Operator) -> Rule | None:
    """``k+, k+ -> ()``: a sum over all elements; a mean is the sum over their count."""
    arguments = Arguments(operator)
    shape, reduction = operator.inputs[0].shape, arguments["reduction"]
    if any(tensor.shape != shape for tensor in operator.inputs[1:]):
        return None
    rules = Rules(operator)
    dims = tuple((rules.summed if reduction else rules.plain)(size) for size in shape)
    for slot in range(len(operator.inputs)):
        rules.reads(slot, dims)
    if reduction == 0:
        return rules.rule(dims)
    named: dict[str, Any] = {**arguments.named, "reduction": 2}
    count = math.prod(shape)

    def localize(task: Task) -> Call:
        if reduction == 2 or not task.cuts:
            return Call(operator.target, operator.args, operator.kwargs)
        slots: Sequence[str] = [name for name, value in named.items() if isinstance(value, Slot)]
        rest = {name: value for name, value in named.items() if name not in slots}
        return Call(_loss_over_count, (operator.target, count, list(slots), rest, *(named[n] for n in slots)), {})

    return rules.rule((), localize=localize)


def _loss_over_count(loss: Any, count: int, names: list[str], rest: dict[str, Any], *tensors: Tensor) -> Tensor:
    mean: Tensor = aten.div.Scalar(loss(**dict(zip(names, tensors, strict=True)), **rest), count)
    return mean
