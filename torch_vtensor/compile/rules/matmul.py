"""Products that sum over a dimension: linear layers, matrix products, einsum, convolutions."""

from __future__ import annotations

import itertools

import torch

from torch_vtensor.compile.rules.builder import Arguments, Rules
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Call, Rule
from torch_vtensor.compile.task_graph import Operator, Task

aten = torch.ops.aten


@rule_for("linear")
def linear(operator: Operator) -> Rule | None:
    """``* k+, n k+, n/k -> * n``."""
    arguments = Arguments(operator)
    x, weight, bias = (arguments.slot(name) for name in ("input", "weight", "bias"))
    x_shape, weight_shape = arguments.shape("input"), arguments.shape("weight")
    rules = Rules(operator)
    leading = tuple(rules.plain(size) for size in x_shape[:-1])
    k = rules.summed(x_shape[-1], "k")
    n = rules.plain(weight_shape[0], "n") if len(weight_shape) == 2 else None
    rules.reads(x, (*leading, k))
    rules.reads(weight, (k,) if n is None else (n, k))
    rules.reads(bias, () if n is None else (n,))
    with_bias = () if bias is None else (bias,)
    return rules.rule(
        leading if n is None else (*leading, n),
        linear=[(x, *with_bias), (weight, *with_bias)],
        taken_once={} if bias is None else {bias: k},
    )


@rule_for("mm", "bmm", "mv", "dot", "vdot", "matmul")
def matmul(operator: Operator) -> Rule | None:
    """``* m k+, * k+ n -> * m n``; either side may be a vector, leading dimensions are broadcast."""
    x_shape, y_shape = operator.inputs[0].shape, operator.inputs[1].shape
    made = operator.outputs[0]
    assert made is not None
    rules = Rules(operator)
    num_leading = len(made.shape) - (len(x_shape) > 1) - (len(y_shape) > 1)
    leading = rules.all_plain(made.shape[:num_leading])
    m = (rules.plain(x_shape[-2], "m"),) if len(x_shape) > 1 else ()
    n = (rules.plain(y_shape[-1], "n"),) if len(y_shape) > 1 else ()
    k = rules.summed(x_shape[-1], "k")
    rules.reads(0, (*rules.broadcast(leading, x_shape[:-2]), *m, k))
    rules.reads(1, (*rules.broadcast(leading, y_shape[:-2]), k, *n))
    return rules.rule((*leading, *m, *n), linear=[(0,), (1,)])


@rule_for("addmm", "addmv", "baddbmm")
def add_matmul(operator: Operator) -> Rule | None:
    """``n/k, m k+, k+ n -> m n``: what is added is taken once under the sum."""
    arguments = Arguments(operator)
    left = next(name for name in ("mat1", "batch1", "mat") if name in arguments.named)
    right = {"mat1": "mat2", "batch1": "batch2", "mat": "vec"}[left]
    made, x_shape, y_shape = operator.outputs[0], arguments.shape(left), arguments.shape(right)
    assert made is not None
    rules = Rules(operator)
    leading = rules.all_plain(x_shape[:-2])
    m, k = rules.plain(x_shape[-2], "m"), rules.summed(x_shape[-1], "k")
    n = (rules.plain(y_shape[-1], "n"),) if len(y_shape) > 1 else ()
    out = (*leading, m, *n)
    x, y, added = arguments.slot(left), arguments.slot(right), arguments.slot("self")
    assert added is not None
    rules.reads(x, (*leading, m, k))
    rules.reads(y, (*leading, k, *n))
    rules.reads(added, rules.broadcast(out, arguments.shape("self")))
    return rules.rule(out, linear=[(added, x), (added, y)], taken_once={added: k})


@rule_for("einsum")
def einsum(operator: Operator) -> Rule | None:
    """``bik,bkj->bij`` is its own annotation: a letter that the result lacks is summed."""
    equation = str(operator.args[0]).replace(" ", "")
    reads, arrow, writes = equation.partition("->")
    operands = reads.split(",")
    if len(operands) != len(operator.inputs) or any(
        len(set(letters.replace(".", ""))) < len(letters.replace(".", "")) for letters in operands
    ):
        return None  # a letter twice in one operand takes a diagonal
    if not arrow:
        letters = reads.replace(",", "").replace(".", "")
        dots = "..." if "..." in reads else ""
        writes = dots + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    shapes = [tensor.shape for tensor in operator.inputs]
    spelled = [_spell_out(letters, len(shape)) for letters, shape in zip(operands, shapes, strict=True)]
    made = operator.outputs[0]
    assert made is not None
    out = _spell_out(writes, len(made.shape))
    sizes: dict[str, int] = {}
    for name, size in itertools.chain(*(zip(*pair, strict=True) for pair in zip(spelled, shapes, strict=True))):
        sizes[name] = size if sizes.get(name, 1) == 1 else sizes[name]
    rules = Rules(operator)
    identifiers = {
        letter: rules.plain(size, letter) if letter in out else rules.summed(size, letter)
        for letter, size in sizes.items()
    }
    for slot, (names, shape) in enumerate(zip(spelled, shapes, strict=True)):
        rules.reads(slot, [() if size == 1 else identifiers[name] for name, size in zip(names, shape, strict=True)])
    return rules.rule([identifiers[letter] for letter in out], linear=[(slot,) for slot in range(len(shapes))])


def _spell_out(letters: str, rank: int) -> list[str]:
    """An operand's letters, with names counted from the right in place of dots."""
    before, dots, after = letters.partition("...")
    num_dots = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"x{index}" for index in reversed(range(num_dots))), *after]


@rule_for("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(operator: Operator) -> Rule | None:
    """``a i+ y^, o i+ k^, o/i -> a o z^``; groups are ``(g i)`` and ``(g o)``, patches that do not overlap are cut."""
    arguments = Arguments(operator)
    x_shape, weight_shape = arguments.shape("input"), arguments.shape("weight")
    made = operator.outputs[0]
    assert made is not None
    groups: int = arguments["groups"]
    transposed = bool(arguments.get("transposed")) or "transpose" in str(operator.target)
    num_spatial = len(weight_shape) - 2
    rules = Rules(operator)
    batch = rules.all_plain(x_shape[: len(x_shape) - num_spatial - 1])
    channels_in, channels_out = x_shape[-num_spatial - 1], made.shape[-num_spatial - 1]
    g = rules.plain(groups, "g")
    i = rules.summed(channels_in // groups, "i")
    o = rules.plain(channels_out // groups, "o")
    kernel = [rules.whole(size) for size in weight_shape[2:]]
    read_spatial, made_spatial = [], []
    for dim in range(num_spatial):
        size, taps, places = x_shape[dim - num_spatial], weight_shape[2 + dim], made.shape[dim - num_spatial]
        if not transposed and _is_patches(arguments, dim, size, taps):
            place = rules.plain(places)
            read_spatial.append((*place, *kernel[dim]))
            made_spatial.append(place)
        else:
            read_spatial.append(rules.whole(size))
            made_spatial.append(rules.whole(places))
    x, weight, bias = (arguments.slot(name) for name in ("input", "weight", "bias"))
    rules.reads(x, (*batch, (*g, *i), *read_spatial))
    rules.reads(weight, ((*g, *i), o, *kernel) if transposed else ((*g, *o), i, *kernel))
    rules.reads(bias, ((*g, *o),))
    with_bias = () if bias is None else (bias,)

    def localize(task: Task) -> Call:
        local = task.cuts["g"].size if "g" in task.cuts else groups
        return Call(operator.target, (), {**arguments.named, "groups": local})

    return rules.rule(
        (*batch, (*g, *o), *made_spatial),
        linear=[(x, *with_bias), (weight, *with_bias)],
        taken_once={} if bias is None else {bias: i},
        localize=localize if groups > 1 else None,
        multiplies=[itertools.chain(*batch, g, i, o, *kernel, *made_spatial)],
    )


def _is_patches(arguments: Arguments, dim: int, size: int, taps: int) -> bool:
    """Whether the kernel visits each index of a dimension once, so that output places own their inputs."""

    def at(name: str) -> object:
        value = arguments[name]
        return value[dim if len(value) > 1 else 0] if isinstance(value, list | tuple) else value

    padding = at("padding")
    return at("stride") == taps and padding in (0, "valid") and at("dilation") == 1 and size % taps == 0
