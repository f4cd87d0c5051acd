"""Runs an operator whole and in pieces, and compares: outputs, gradients, and that pieces tile what they should."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_vtensor.compile.pieces import gradient_chunk, local_call
from torch_vtensor.compile.rules import Call
from torch_vtensor.compile.task_graph import Operator, Slot, Task
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask, ValueChunk, covers


@dataclass(frozen=True, eq=False)
class Case:
    """A call with its tensors, and the operator that it is."""

    operator: Operator
    tensors: tuple[Tensor, ...]

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in self.tensors)
        return f"{getattr(self.operator.target, '__name__', self.operator.target)}_{shapes}"

    @cached_property
    def cotangents(self) -> tuple[Tensor | None, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(made.shape, generator=generator, dtype=made.dtype)
            if made is not None and made.dtype.is_floating_point
            else None
            for made in self.operator.outputs
        )

    @cached_property
    def expected(self) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
        """Outputs and gradients of the whole call."""
        whole = Call(self.operator.target, self.operator.args, self.operator.kwargs)
        return run(whole, self.operator, self.tensors, self.cotangents)


def case(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Case:
    """The case of calling `target` so; gradients are compared for tensors that require them."""
    tensors: list[Tensor] = []
    differentiable: list[bool] = []

    def slotted(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value.detach())
            differentiable.append(value.requires_grad)
            return Slot(len(tensors) - 1)
        if isinstance(value, list | tuple):
            return type(value)(slotted(item) for item in value)
        return value

    slotted_args, slotted_kwargs = slotted(args), {name: slotted(value) for name, value in kwargs.items()}
    with torch.no_grad():
        made = flat(target(*args, **kwargs))
    inputs = tuple(
        LogicalTensor(f"x{index}", tuple(tensor.shape), tensor.dtype, differentiable=differentiable[index])
        for index, tensor in enumerate(tensors)
    )
    outputs = tuple(
        LogicalTensor(f"y{index}", tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else None
        for index, tensor in enumerate(made)
    )
    return Case(Operator("op", target, slotted_args, slotted_kwargs, inputs, outputs), tuple(tensors))


def flat(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """An argument with tensors in place of their slots."""
    if isinstance(value, Slot):
        return tensors[value.position]
    if isinstance(value, list | tuple):
        return type(value)(filled(item, tensors) for item in value)
    if isinstance(value, Mapping):
        return {name: filled(item, tensors) for name, item in value.items()}
    return value


def run(
    call: Call, operator: Operator, tensors: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """Outputs of a call of this operator, or of a part of it, and the gradients of its differentiable tensors."""
    leaves = [x.clone().requires_grad_(of.differentiable) for x, of in zip(tensors, operator.inputs, strict=True)]
    outputs = flat(call.target(*filled(call.args, leaves), **filled(call.kwargs, leaves)))
    pairs = [
        (made, cotangent)
        for made, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and made.requires_grad
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return outputs, (None,) * len(leaves)
    made, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(made, wanted, given, allow_unused=True, materialize_grads=True))
    return outputs, tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def check(example: Case, tasks: Sequence[Task]) -> None:
    """Compare the tasks, which together are the operator, with the whole call."""
    outputs, gradients = example.expected
    made = [
        None if tensor is None else torch.zeros_like(outputs[i]) for i, tensor in enumerate(example.operator.outputs)
    ]
    gradients_of: list[list[tuple[Task, Tensor]]] = [[] for _ in example.tensors]
    readings = [_Addends(tensor, [task.inputs[i].mask for task in tasks]) for i, tensor in enumerate(example.tensors)]
    for task in tasks:
        local = [reading.read(view.mask) for reading, view in zip(readings, task.inputs, strict=True)]
        given = [
            cotangent if cotangent is None else cotangent[_box(view.mask)]
            for cotangent, view in zip(example.cotangents, task.outputs, strict=True)
        ]
        parts, part_gradients = run(local_call(task), example.operator, local, given)
        for whole, part, view in zip(made, parts, task.outputs, strict=True):
            if whole is not None:
                assert part.shape == view.mask.shape, f"{task} makes {list(part.shape)}, its view is {view}"
                assert part.dtype == whole.dtype, f"{task} makes {part.dtype} instead of {whole.dtype}"
                whole[_box(view.mask)] += part.detach()
        for slot, gradient in enumerate(part_gradients):
            if gradient is not None:
                gradients_of[slot].append((task, gradient))
    for index, (whole, expected) in enumerate(zip(made, outputs, strict=True)):
        if whole is not None:
            torch.testing.assert_close(whole, expected.detach(), msg=lambda m, index=index: f"output {index}: {m}")
            masks = [task.outputs[index].mask for task in tasks]
            assert whole.numel() == 0 or covers(masks, Mask.of(whole.shape)), f"pieces leave out some of output {index}"
            parts = sum(mask.num_elements * (math.lcm(*(m.chunk.of for m in masks)) // mask.chunk.of) for mask in masks)
            assert parts == whole.numel() * math.lcm(*(m.chunk.of for m in masks)), "pieces overlap"
    for slot, expected in enumerate(gradients):
        if expected is not None:
            _check_gradient(slot, gradients_of[slot], expected)


def _check_gradient(slot: int, parts: Sequence[tuple[Task, Tensor]], expected: Tensor) -> None:
    """Of each addend of an input's value, its readers' gradients with different keys add up to the whole gradient."""
    count = math.lcm(*(task.inputs[slot].mask.chunk.of for task, _ in parts))
    for number in range(count):
        # What is known of each addend of the gradient, NaN where nothing is.
        addends: dict[Any, Tensor] = {}
        for task, gradient in parts:
            mask = task.inputs[slot].mask
            if mask.chunk.contains(ValueChunk(number, count)):
                key = gradient_chunk(task, slot)
                known = addends.setdefault(key, torch.full_like(expected, torch.nan))[_box(mask)]
                again = known.isfinite()
                torch.testing.assert_close(gradient[again], known[again], msg=lambda m, key=key: f"copies {key}: {m}")
                known.copy_(gradient)
        total = sum((addend.nan_to_num() for addend in addends.values()), torch.zeros_like(expected))
        torch.testing.assert_close(total, expected, msg=lambda m: f"gradient of input {slot}: {m}")


class _Addends:
    """A tensor as the sum of random tensors, so that every reader of chunk 1 of 2 reads the same addend."""

    def __init__(self, tensor: Tensor, masks: Sequence[Mask]) -> None:
        self.count = math.lcm(*(mask.chunk.of for mask in masks))
        generator = torch.Generator().manual_seed(2)
        rest = [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for _ in range(self.count - 1)]
        self.addends = [tensor - sum(rest) if rest else tensor, *rest]

    def read(self, mask: Mask) -> Tensor:
        width = self.count // mask.chunk.of
        mine = self.addends[mask.chunk.number * width :][:width]
        total = mine[0].clone()
        for addend in itertools.islice(mine, 1, None):
            total += addend
        return total[_box(mask)]


def _box(mask: Mask) -> tuple[slice, ...]:
    return tuple(slice(interval.start, interval.stop) for interval in mask.intervals)
