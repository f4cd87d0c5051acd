"""Operators that move elements without computing: one dimension of the result is made of dimensions of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch

from torch_vtensor.compile.rules.builder import Arguments, Rules, interval_of, output_shape
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Call, Dims, Rule
from torch_vtensor.compile.task_graph import Operator, Slot, Task

aten = torch.ops.aten


@rule_for("_reshape_alias", "_unsafe_view", "flatten", "ravel", "reshape", "reshape_as", "squeeze", "unflatten")
@rule_for("unsqueeze", "view", "view_as")
def reshape(operator: Operator) -> Rule | None:
    """``(a b) -> a b`` and back: identifiers are the digits that both shapes share, the most significant first."""
    (read, *shape_of), (made,) = operator.inputs, operator.outputs
    if made is None or read.dtype != made.dtype:
        return None  # view(dtype) reinterprets bytes
    rules = Rules(operator)
    read_dims, made_dims = _shared_digits(rules, read.shape, made.shape)
    rules.reads(0, read_dims)
    for slot in range(1, 1 + len(shape_of)):
        rules.reads(slot, made_dims)
    return rules.rule(made_dims, linear=[(0,)], localize=_reshape_piece)


def _reshape_piece(task: Task) -> Call:
    # Never a view: a part of a tensor may not have the strides that its whole has.
    return Call(aten.reshape.default, (Slot(0), list(output_shape(task))), {})


def _shared_digits(rules: Rules, read: Sequence[int], made: Sequence[int]) -> tuple[Dims, Dims]:
    """Identifiers for two shapes of the same elements in the same order.

    An index's most significant digit in base ``size`` is the same in both if both dimensions divide by that size, so
    the greatest common divisor of what is left of both is the next identifier. Where it is 1, no cut of one is a cut of
    the other, until dimensions of both have equal products again.
    """
    if math.prod(read) == 0:
        return rules.all_whole(read), rules.all_whole(made)
    dims: list[list[tuple[str, ...]]] = [[], []]
    shapes, positions, left = (read, made), [0, 0], [1, 1]
    parts: list[tuple[str, ...]] = [(), ()]

    def finish(side: int) -> None:
        """Close dimensions of this side until one has something left; those of size 1 have nothing."""
        while left[side] == 1 and positions[side] < len(shapes[side]):
            left[side] = shapes[side][positions[side]]
            positions[side] += 1
            if left[side] > 1:
                break
            dims[side].append(())

    while True:
        finish(0)
        finish(1)
        if left[0] == 1:
            break
        common = math.gcd(left[0], left[1])
        if common == 1:
            # Coprime: everything up to the next equal product stays whole.
            for side in (0, 1):
                parts[side] = (*parts[side], *rules.whole(left[side]))
            products = list(left)
            while products[0] != products[1]:
                side = int(products[1] < products[0])
                dims[side].append(parts[side])
                size = shapes[side][positions[side]]
                positions[side] += 1
                products[side] *= size
                parts[side] = rules.whole(size)
            left = [1, 1]
        else:
            name = rules.plain(common)
            for side in (0, 1):
                parts[side] = (*parts[side], *name)
                left[side] //= common
        for side in (0, 1):
            if left[side] == 1:
                dims[side].append(parts[side])
                parts[side] = ()
    return tuple(dims[0]), tuple(dims[1])


@rule_for("expand", "expand_as", "broadcast_to")
def expand(operator: Operator) -> Rule | None:
    """``a 1 -> a b``: pieces of a broadcast dimension read the same."""
    made = operator.outputs[0]
    assert made is not None
    rules = Rules(operator)
    dims = rules.all_plain(made.shape)
    for slot, tensor in enumerate(operator.inputs):
        rules.reads(slot, rules.broadcast(dims, tensor.shape))
    return rules.rule(dims, linear=[(0,)], localize=_expand_piece)


def _expand_piece(task: Task) -> Call:
    return Call(aten.expand.default, (Slot(0), list(output_shape(task))), {})


@rule_for("permute", "transpose", "t", "numpy_T", "mT", "mH", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims")
def permute(operator: Operator) -> Rule | None:
    """``a b c -> b a c``."""
    shape = operator.inputs[0].shape
    args = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in operator.args)
    order = _order(operator.target, args, tuple(operator.kwargs.items()), len(shape))
    rules = Rules(operator)
    dims = rules.all_plain(shape)
    rules.reads(0, dims)
    return rules.rule([dims[index] for index in order], linear=[(0,)])


@cache
def _order(
    target: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], rank: int
) -> list[int]:
    """Which dimension of the input each dimension of the result is, asked of the operator itself."""
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    result = target(*(probe if isinstance(arg, Slot) else arg for arg in args), **dict(kwargs))
    return [size - 2 for size in result.shape]


@rule_for("slice", "narrow")
def slice_(operator: Operator) -> Rule | None:
    """``a i^ -> a o^``: the sliced dimension is whole, unless the slice is all of it."""
    return _one_dim_whole(operator)


@rule_for("cumprod", "cumsum", "diff", "flip", "logcumsumexp", "select", "unfold")
@rule_for("argsort", "cummax", "cummin", "kthvalue", "sort", "topk", "unbind", "split", "split_with_sizes", "chunk")
@rule_for("tensor_split", "unsafe_split", "unsafe_chunk", "glu")
def along_one_dim(operator: Operator) -> Rule | None:
    """``a i^ -> a o^``: an operator along one dimension, which stays whole."""
    return _one_dim_whole(operator)


_LINEAR_ALONG_DIM = {
    "chunk", "cumsum", "flip", "narrow", "select", "slice", "split", "split_with_sizes", "tensor_split", "unbind",
    "unfold", "unsafe_chunk", "unsafe_split",
}  # fmt: skip


def _one_dim_whole(operator: Operator) -> Rule | None:
    arguments = Arguments(operator)
    name = str(operator.target).split(".")[1]
    read = operator.inputs[0].shape
    given = arguments.get("dims", arguments.get("dim", arguments.get("dimension", -1)))
    along = {index % max(len(read), 1) for index in (given if isinstance(given, list | tuple) else [given])}
    made = [tensor.shape for tensor in operator.outputs if tensor is not None]
    if not made or len(made) != len(operator.outputs):
        return None
    rules = Rules(operator)
    if name in ("slice", "narrow") and made[0] == read:
        along = set()
    dims = tuple(rules.whole(size) if dim in along else rules.plain(size) for dim, size in enumerate(read))
    rules.reads(0, dims)
    for slot, tensor in enumerate(operator.inputs[1:], 1):
        if len(tensor.shape) == len(read):  # what diff puts before and after; other tensors are numbers
            rules.reads(slot, [rules.whole(n) if dim in along else dims[dim] for dim, n in enumerate(tensor.shape)])
    # select, unbind and the like drop the dimension; unfold adds a last one; the rest change its size.
    kept = [identifiers for dim, identifiers in enumerate(dims) if dim not in along]
    outputs: list[Dims] = []
    for shape in made:
        if len(shape) == len(kept):
            outputs.append(tuple(kept))
            continue
        out = [dims[dim] if dim not in along else rules.whole(shape[dim]) for dim in range(len(read))]
        outputs.append((*out, *rules.all_whole(shape[len(read) :])))
    localize = _whole_slice_piece if name == "narrow" and not along else None
    return rules.rule(*outputs, linear=[(0,)] if name in _LINEAR_ALONG_DIM else (), localize=localize)


def _whole_slice_piece(task: Task) -> Call:
    return Call(aten.alias.default, (Slot(0),), {})


@rule_for("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
def join(operator: Operator) -> Rule | None:
    """``a i^, a j^ -> a o^``: the dimension along which tensors are joined is whole."""
    name = str(operator.target).split(".")[1]
    made = operator.outputs[0]
    assert made is not None
    if name not in ("cat", "concat", "concatenate", "stack"):
        return None
    along = Arguments(operator).dim("dim", len(made.shape))
    rules = Rules(operator)
    out = tuple(rules.whole(size) if dim == along else rules.plain(size) for dim, size in enumerate(made.shape))
    others = (*out[:along], *out[along + 1 :])
    for slot, tensor in enumerate(operator.inputs):
        if name == "stack":
            rules.reads(slot, others)
        elif len(tensor.shape) == len(out):  # torch lets an empty tensor of any rank join
            rules.reads(slot, (*out[:along], rules.whole(tensor.shape[along]), *out[along + 1 :]))
    return rules.rule(out, linear=[range(len(operator.inputs))])


@rule_for("slice_scatter", "select_scatter")
def scatter(operator: Operator) -> Rule | None:
    """``a o^, a i^ -> a o^``: the dimension in which a part is overwritten is whole."""
    shape, part = operator.inputs[0].shape, operator.inputs[1].shape
    along = Arguments(operator).dim("dim", len(shape))
    rules = Rules(operator)
    dims = tuple(rules.whole(size) if dim == along else rules.plain(size) for dim, size in enumerate(shape))
    middle = (rules.whole(part[along]),) if len(part) == len(shape) else ()
    rules.reads(0, dims)
    rules.reads(1, (*dims[:along], *middle, *dims[along + 1 :]))
    return rules.rule(dims, linear=[(0, 1)])


@rule_for("roll", "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d")
@rule_for("replication_pad2d", "replication_pad3d", "reflection_pad3d")
def shifted(operator: Operator) -> Rule | None:
    """``a i^ -> a o^``: dimensions that are padded or rolled are whole, the others are not touched."""
    arguments = Arguments(operator)
    read, made = operator.inputs[0].shape, operator.outputs[0]
    assert made is not None
    moved: Iterable[int]
    if "shifts" in arguments.named:
        moved = [dim % len(read) for dim in arguments["dims"]] or range(len(read))
    else:
        pad: Sequence[Any] = arguments["padding"] if "padding" in arguments.named else arguments["pad"]
        moved = [len(read) - 1 - index // 2 for index, amount in enumerate(pad) if amount != 0]
    rules = Rules(operator)
    dims = tuple(rules.whole(size) if dim in moved else rules.plain(size) for dim, size in enumerate(read))
    rules.reads(0, dims)
    out = [rules.whole(size) if dim in moved else dims[dim] for dim, size in enumerate(made.shape)]
    fills = arguments.get("value") if "shifts" not in arguments.named else None
    return rules.rule(out, linear=() if fills else [(0,)])


@rule_for("repeat", "tile")
def repeat(operator: Operator) -> Rule | None:
    """``a -> (r a)``: a repeated dimension is cut by repetition, a dimension that is not by its indices."""
    arguments = Arguments(operator)
    read, made = operator.inputs[0].shape, operator.outputs[0]
    assert made is not None
    counts = list(arguments["repeats"] if "repeats" in arguments.named else arguments["dims"])
    counts = [1] * (len(made.shape) - len(counts)) + counts
    if 0 in made.shape:
        return None
    rules = Rules(operator)
    dims = rules.all_plain(read)
    rules.reads(0, dims)
    padded = ((),) * (len(made.shape) - len(read)) + dims
    repeated = [rules.plain(count) for count in counts]
    out = [(*times, *identifiers) for times, identifiers in zip(repeated, padded, strict=True)]

    def localize(task: Task) -> Call:
        local = [interval_of(task, times, count).size for times, count in zip(repeated, counts, strict=True)]
        return Call(aten.repeat.default, (Slot(0), local), {})

    return rules.rule(out, linear=[(0,)], localize=localize)


@rule_for("repeat_interleave")
def repeat_interleave(operator: Operator) -> Rule | None:
    """``a -> (a r)``: an index and its repetitions are neighbours."""
    arguments = Arguments(operator)
    count, along = arguments.get("repeats"), arguments.get("dim")
    if not isinstance(count, int) or not isinstance(along, int) or len(operator.inputs) != 1 or count == 0:
        return None
    read = operator.inputs[0].shape
    along %= len(read)
    rules = Rules(operator)
    dims = rules.all_plain(read)
    rules.reads(0, dims)
    times = rules.plain(count)
    out = [(*identifiers, *times) if dim == along else identifiers for dim, identifiers in enumerate(dims)]

    def localize(task: Task) -> Call:
        return Call(aten.repeat_interleave.self_int, (Slot(0), interval_of(task, times, count).size, along), {})

    return rules.rule(out, linear=[(0,)], localize=localize)


@rule_for("tril", "triu")
def triangle(operator: Operator) -> Rule | None:
    """``a r c -> a r c``: the diagonal moves with the piece's first row and column."""
    shape = operator.inputs[0].shape
    diagonal = Arguments(operator)["diagonal"]
    rules = Rules(operator)
    dims = rules.all_plain(shape)
    rules.reads(0, dims)

    def localize(task: Task) -> Call:
        rows, columns = task.inputs[0].mask.intervals[-2:]
        return Call(operator.target, (Slot(0), diagonal + rows.start - columns.start), {})

    return rules.rule(dims, linear=[(0,)], localize=localize)
