"""Operators that look elements up: a cut of the dimension that is looked in gives zeros where another piece has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_vtensor.compile.rules.builder import Arguments, Rules, interval_of
from torch_vtensor.compile.rules.registry import rule_for
from torch_vtensor.compile.rules.rule import Call, Rule
from torch_vtensor.compile.task_graph import Operator, Slot, Task
from torch_vtensor.compile.tensor_view import Interval

aten = torch.ops.aten


@rule_for("embedding")
def embedding(operator: Operator) -> Rule | None:
    """``v+ d, a b -> a b d``: of a part of the table, a piece looks up the rows that it has."""
    arguments = Arguments(operator)
    vocabulary, features = arguments.shape("weight")
    index_shape = arguments.shape("indices")
    rules = Rules(operator)
    # Gradients scaled by how often a row occurs need all occurrences, and those of no other row.
    scaled = bool(arguments["scale_grad_by_freq"])
    v, d = (rules.whole if scaled else rules.summed)(vocabulary, "v"), rules.plain(features, "d")
    index = rules.all_whole(index_shape) if scaled else rules.all_plain(index_shape)
    rules.reads(arguments.slot("weight"), (v, d))
    rules.reads(arguments.slot("indices"), index)
    padding = int(arguments["padding_idx"])

    def localize(task: Task) -> Call:
        rows = interval_of(task, v, vocabulary)
        if rows == Interval(0, vocabulary):
            return Call(operator.target, operator.args, operator.kwargs)
        local_padding = padding - rows.start if rows.start <= padding < rows.stop else -1
        slots = Slot(arguments["weight"].position), Slot(arguments["indices"].position)
        return Call(_embedding_part, (*slots, rows.start, local_padding), {})

    return rules.rule((*index, d), linear=[(arguments.slot("weight"),)], localize=localize)


def _embedding_part(weight: Tensor, indices: Tensor, first: int, padding: int) -> Tensor:
    local, inside = _local_index(indices, first, weight.shape[0])
    found = aten.embedding.default(weight, local, padding)
    part: Tensor = aten.where.ScalarOther(aten.unsqueeze.default(inside, -1), found, 0)
    return part


def _local_index(index: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """An index into rows ``[first, first + size)`` counted from the first, 0 where it is outside; and whether it is in.

    The result differentiates right: what is looked up outside is dropped, so its gradient is zero.
    """
    shifted = aten.sub.Scalar(index, first)
    inside = aten.logical_and.default(aten.ge.Scalar(shifted, 0), aten.lt.Scalar(shifted, size))
    return aten.where.ScalarOther(inside, shifted, 0), inside


@rule_for("index_select")
def index_select(operator: Operator) -> Rule | None:
    """``a v+ b, i -> a i b``."""
    arguments = Arguments(operator)
    shape = arguments.shape("self")
    if not shape or not arguments.shape("index"):
        return None
    along = arguments.dim("dim", len(shape))
    rules = Rules(operator)
    dims = [rules.summed(size, "v") if dim == along else rules.plain(size) for dim, size in enumerate(shape)]
    i = rules.plain(arguments.shape("index")[0])
    rules.reads(arguments.slot("self"), dims)
    rules.reads(arguments.slot("index"), (i,))

    def localize(task: Task) -> Call:
        rows = interval_of(task, dims[along], shape[along])
        if rows == Interval(0, shape[along]):
            return Call(operator.target, operator.args, operator.kwargs)
        return Call(_index_select_part, (arguments["self"], arguments["index"], along, rows.start), {})

    out = (*dims[:along], i, *dims[along + 1 :])
    return rules.rule(out, linear=[(arguments.slot("self"),)], localize=localize)


def _index_select_part(x: Tensor, index: Tensor, dim: int, first: int) -> Tensor:
    local, inside = _local_index(index, first, x.shape[dim])
    shown = aten.reshape.default(inside, [-1, *(1 for _ in range(x.dim() - dim - 1))])
    part: Tensor = aten.where.ScalarOther(shown, aten.index_select.default(x, dim, local), 0)
    return part


@rule_for("gather")
def gather(operator: Operator) -> Rule | None:
    """``a v+, a i -> a i``; a dimension in which the index is shorter than the input is whole."""
    arguments = Arguments(operator)
    shape, index_shape = arguments.shape("self"), arguments.shape("index")
    if not shape or len(shape) != len(index_shape):
        return None
    along = arguments.dim("dim", len(shape))
    rules = Rules(operator)
    x_dims: list[tuple[str, ...]] = []
    index_dims: list[tuple[str, ...]] = []
    for dim, (size, index_size) in enumerate(zip(shape, index_shape, strict=True)):
        if dim == along:
            x_dims.append(rules.summed(size, "v"))
            index_dims.append(rules.plain(index_size))
        elif size == index_size:
            x_dims.append(rules.plain(size))
            index_dims.append(x_dims[-1])
        else:
            x_dims.append(rules.whole(size))
            index_dims.append(rules.whole(index_size))
    rules.reads(arguments.slot("self"), x_dims)
    rules.reads(arguments.slot("index"), index_dims)

    def localize(task: Task) -> Call:
        rows = interval_of(task, x_dims[along], shape[along])
        if rows == Interval(0, shape[along]):
            return Call(operator.target, operator.args, operator.kwargs)
        return Call(_gather_part, (arguments["self"], arguments["index"], along, rows.start), {})

    return rules.rule(index_dims, linear=[(arguments.slot("self"),)], localize=localize)


def _gather_part(x: Tensor, index: Tensor, dim: int, first: int) -> Tensor:
    if index.shape == (*x.shape[:dim], 1, *x.shape[dim + 1 :]):
        return _OneOfEach.apply(x, index, dim, first)  # type: ignore[no-any-return, no-untyped-call]
    local, inside = _local_index(index, first, x.shape[dim])
    part: Tensor = aten.where.ScalarOther(inside, aten.gather.default(x, dim, local), 0)
    return part


class _OneOfEach(torch.autograd.Function):
    """A part's `gather` of one element along a dimension, with a gradient that compilers make with others in one loop.

    PyTorch's own fills a tensor with zeros and scatters into it: as large as the logits of which a loss picks some.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        """Keep what backward reads."""
        x, index, ctx.dim, ctx.first = inputs
        ctx.save_for_backward(index)
        ctx.size, ctx.num_dims = x.shape[ctx.dim], x.dim()

    @staticmethod
    def forward(x: Tensor, index: Tensor, dim: int, first: int) -> Tensor:
        """`x` where the index lies in this part, which begins at ``first``; 0 elsewhere."""
        local, inside = _local_index(index, first, x.shape[dim])
        part: Tensor = aten.where.ScalarOther(inside, aten.gather.default(x, dim, local), 0)
        return part

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient where the index points to, 0 elsewhere."""
        (index,) = ctx.saved_tensors
        places = aten.arange.start(ctx.first, ctx.first + ctx.size, device=index.device)
        places = aten.reshape.default(places, [-1, *(1 for _ in range(ctx.num_dims - ctx.dim - 1))])
        return aten.where.ScalarOther(aten.eq.Tensor(index, places), gradient, 0), None, None, None


@rule_for("index")
def index(operator: Operator) -> Rule | None:
    """``a v+ w^, i j, i j -> a i j``: indices are broadcast together; with a single one its dimension may be cut."""
    indices: Sequence[Slot | None] = operator.args[1]
    tensors = {dim: operator.inputs[slot.position] for dim, slot in enumerate(indices) if slot is not None}
    made, shape = operator.outputs[0], operator.inputs[0].shape
    if made is None or any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors.values()):
        return None
    looked = sorted(tensors)
    together = torch.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))
    neighbours = looked == list(range(looked[0], looked[-1] + 1))
    at = looked[0] if neighbours else 0
    rules = Rules(operator)
    single = looked[0] if len(looked) == 1 else None
    dims = [
        rules.plain(size) if dim not in tensors else rules.summed(size, "v") if dim == single else rules.whole(size)
        for dim, size in enumerate(shape)
    ]
    index_dims = rules.all_plain(together)
    rules.reads(0, dims)
    for dim, tensor in tensors.items():
        slot = indices[dim]
        assert slot is not None
        rules.reads(slot.position, rules.broadcast(index_dims, tensor.shape))
    kept = [identifiers for dim, identifiers in enumerate(dims) if dim not in tensors]
    out = (*kept[:at], *index_dims, *kept[at:])

    def localize(task: Task) -> Call:
        rows = Interval(0, 0) if single is None else interval_of(task, dims[single], shape[single])
        if single is None or rows == Interval(0, shape[single]):
            return Call(operator.target, operator.args, operator.kwargs)
        return Call(_index_part, (Slot(0), indices[single], single, rows.start, shape[single]), {})

    return rules.rule(out, linear=[(0,)], localize=localize)


def _index_part(x: Tensor, index: Tensor, dim: int, first: int, size: int) -> Tensor:
    # Negative indices count from the end of the whole dimension.
    index = aten.where.self(aten.lt.Scalar(index, 0), aten.add.Scalar(index, size), index)
    local, inside = _local_index(index, first, x.shape[dim])
    found = aten.index.Tensor(x, [*(None for _ in range(dim)), local])
    shown = aten.reshape.default(inside, [*inside.shape, *(1 for _ in range(x.dim() - dim - 1))])
    part: Tensor = aten.where.ScalarOther(shown, found, 0)
    return part


@rule_for("one_hot")
def one_hot(operator: Operator) -> Rule | None:
    """``a -> a c``: a piece of the classes marks those that it has."""
    made = operator.outputs[0]
    assert made is not None
    rules = Rules(operator)
    dims, classes = rules.all_plain(made.shape[:-1]), rules.plain(made.shape[-1], "c")
    rules.reads(0, dims)

    def localize(task: Task) -> Call:
        return Call(_one_hot_part, (Slot(0), *interval_of(task, classes, made.shape[-1])), {})

    return rules.rule((*dims, classes), localize=localize)


def _one_hot_part(x: Tensor, first: int, stop: int) -> Tensor:
    classes = aten.arange.start(first, stop, device=x.device)
    marks: Tensor = aten._to_copy.default(aten.eq.Tensor(aten.unsqueeze.default(x, -1), classes), dtype=x.dtype)
    return marks


@rule_for("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
def nll_loss(operator: Operator) -> Rule | None:
    """``a+ c^ b+, a+ b+, c^ -> ()``: rows add up if the loss is their sum; a mean divides by a count of its own."""
    arguments = Arguments(operator)
    shape, target_shape = arguments.shape("self"), arguments.shape("target")
    if len(shape) < 2:
        return None
    reduction = arguments["reduction"]
    rules = Rules(operator)
    make: Any = (rules.plain, rules.whole, rules.summed)[reduction]
    classes = rules.whole(shape[1], "c")
    dims = (make(shape[0]), classes, *(make(size) for size in shape[2:]))
    rows = (dims[0], *dims[2:])
    rules.reads(arguments.slot("self"), dims)
    rules.reads(arguments.slot("target"), dims if target_shape == shape else rows)
    rules.reads(arguments.slot("weight"), (classes,))
    return rules.rule(rows if reduction == 0 else ())
