"""Parameters sharded in place: the same objects, of which each rank keeps the part that a plan stores there.

A parameter that every rank keeps whole stays as it is. Any other becomes a `ShardedTensor` after the first compilation:
optimizers, modules and the user go on holding the same object, its memory shrinks to the part, and so do its gradient
and what optimizers keep for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.sharded_tensor import Layout, ShardedTensor
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask

Parts = Mapping[int, Mask]
"""The part that each rank keeps."""


def find_kept(arguments: Sequence[LogicalTensor | None], examples: Sequence[Any]) -> dict[LogicalTensor, Parts]:
    """What ranks keep of those arguments that an earlier compilation has sharded."""
    return {
        tensor: example.keeps.parts
        for tensor, example in zip(arguments, examples, strict=True)
        if tensor is not None and isinstance(example, ShardedTensor)
    }


def shard_parameters(
    arguments: Sequence[LogicalTensor | None],
    examples: Sequence[Any],
    storage: Mapping[LogicalTensor, Parts],
    ranks: Sequence[int],
    rank: int,
) -> None:
    """Keep of each parameter what is stored on this rank, where other ranks keep something else.

    Gradients that are there are cut, too; the state of optimizers is when they step next.

    Raises:  TypeError or RuntimeError for a parameter that cannot be sharded; nothing is changed then.
    """
    chosen = find_layouts(arguments, examples, storage, ranks, rank)
    for parameter, layout in chosen:
        _refuse_unfit(layout.name, parameter)
    with torch.inference_mode(False), torch.no_grad():
        for parameter, layout in chosen:
            _shard(parameter, layout)
    if chosen:
        _watch_optimizers()


def find_layouts(
    arguments: Sequence[LogicalTensor | None],
    examples: Sequence[Any],
    storage: Mapping[LogicalTensor, Parts],
    ranks: Sequence[int],
    rank: int,
) -> list[tuple[nn.Parameter, Layout]]:
    """The parameters that are whole here and that some rank will keep less of, with which part each rank keeps."""
    found: list[tuple[nn.Parameter, Layout]] = []
    for tensor, example in zip(arguments, examples, strict=True):
        if tensor in storage and not isinstance(example, ShardedTensor):
            assert tensor is not None
            layout = Layout(tensor.name, tensor.shape, rank, storage[tensor])
            if set(ranks) != set(layout.parts) or any(part != tensor.whole.mask for part in layout.parts.values()):
                found.append((example, layout))
    return found


def _refuse_unfit(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter:
        raise TypeError(
            f"{name} is a {type(parameter).__name__}, and a plan keeps parts of plain parameters only. Give it a model "
            f"that nothing else has sharded or wrapped."
        )
    if _torch_compat.has_hooks(parameter):
        raise RuntimeError(
            f"{name} has hooks on its gradient, and a plan is about to keep parts of it. Remove them and register them "
            f"after the first call of the compiled function: they then get this rank's part."
        )


def keep_part(parameter: nn.Parameter, whole: Tensor, layout: Layout) -> None:
    """Have a parameter keep this rank's part of a value."""
    part = _keep(whole.detach(), layout)
    _torch_compat.become(parameter, ShardedTensor.of(part, layout, requires_grad=parameter.requires_grad))


def _shard(parameter: nn.Parameter, layout: Layout) -> None:
    gradient, parameter.grad = parameter.grad, None
    keep_part(parameter, parameter, layout)
    if gradient is not None:
        parameter.grad = ShardedTensor.of(_keep(gradient, layout), layout)


def _keep(whole: Tensor, layout: Layout) -> Tensor:
    """A copy of this rank's part, so that the whole can be freed."""
    return layout.cut(whole).clone(memory_format=torch.contiguous_format)


@functools.cache
def _watch_optimizers() -> None:
    """Have every optimizer cut, before it steps, what it made or loaded while parameters were whole."""
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: shard_state(optimizer))


def shard_state(optimizer: Optimizer) -> None:
    """Keep this rank's part of an optimizer's state."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, ShardedTensor):
            for key, value in state.items():
                if type(value) is Tensor and value.shape == parameter.shape:
                    state[key] = ShardedTensor.of(_keep(value, parameter.keeps), parameter.keeps)


def part_of(value: Tensor, mask: Mask) -> Tensor:
    """The part of an argument that a mask names, which this rank keeps."""
    if isinstance(value, ShardedTensor):
        kept = value.keeps.parts[value.keeps.rank]
        return value.local.detach()[mask.within(kept)]
    return value.detach()[mask.within(Mask.of(value.shape))]


def gradient_like(argument: Tensor, gradient: Tensor | None) -> Tensor | None:
    """A gradient as autograd wants it for an argument: of a sharded one it is this rank's part, if any."""
    if not isinstance(argument, ShardedTensor):
        return gradient
    local = torch.zeros_like(argument.local) if gradient is None else gradient.contiguous()
    return ShardedTensor.of(local, argument.keeps)
