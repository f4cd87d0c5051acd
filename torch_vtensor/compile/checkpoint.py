"""Whole tensors from sharded parameters and back: what one plan saves any other loads, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from torch_vtensor.compile import worlds
from torch_vtensor.compile.parameters import shard_state
from torch_vtensor.compile.sharded_tensor import ShardedTensor
from torch_vtensor.compile.tensor_view import Mask


def state_dict(of: nn.Module | Optimizer, *, on_rank: int | None = None, whole: bool = True) -> dict[str, Any]:
    """What ``of.state_dict()`` is without a plan: whole tensors, on the CPU, which share no memory with the model.

    Every rank has to call it. Tensors are gathered one after the other, so that no device holds more than one of them
    whole. Names are those of the model that was given to torch.compile.

    on_rank: only this rank gets them, and every other an empty dict.

    whole: if False, what torch.distributed.checkpoint takes, without communication: each rank's parts, in the memory
    that the model and the optimizer use. ``save`` writes each element once, from a rank that keeps it; ``load`` reads
    what a rank keeps, whatever plan it was saved under, into that memory; give the dict to `load_state_dict` then. An
    optimizer that has not stepped yet makes its state for that, of zeros. ``async_save`` copies tensors in a way that
    parts do not have; it is not supported.

    Raises:  ValueError for a rank that does not exist, or for parts on one rank.
    """
    if not whole:
        if on_rank is not None:
            raise ValueError(
                f"on_rank is {on_rank} with whole=False; parts are those of every rank: leave one of them."
            )
        return _parts(of)
    world = worlds.num_ranks()
    if on_rank is not None and not 0 <= on_rank < world:
        raise ValueError(f"on_rank is {on_rank}; the ranks are 0 to {world - 1}, and None is all of them.")
    here = on_rank is None or on_rank == worlds.this_rank()
    # By identity: parameters that are tied stay one tensor.
    copied: dict[int, Tensor | None] = {}

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copied:
            if isinstance(value, ShardedTensor):
                copied[id(value)] = _gather(value, on_rank)
            else:
                copied[id(value)] = value.detach().to("cpu", copy=True) if here else None
        return copied[id(value)]

    state = of.state_dict() if isinstance(of, Optimizer) else _original(of).state_dict(keep_vars=True)
    made = _map_values(gathered, state)
    if not here:
        return {}
    if hasattr(state, "_metadata"):
        made._metadata = state._metadata  # the versions of modules, by which load_state_dict knows old formats
    assert isinstance(made, dict)
    return made


def load_state_dict(into: nn.Module | Optimizer, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load what `state_dict` gave under any plan, or ``state_dict()`` of a model that has none: whole tensors.

    Every rank gives the whole state and reads its parts; ``torch.load(path, mmap=True)`` reads nothing else from disk.
    The model may be sharded already or not yet. What torch.distributed.checkpoint loaded into parts is there already,
    but for numbers such as learning rates.

    strict: as for ``Module.load_state_dict``.

    Raises:  RuntimeError for names or shapes that do not match.
    """
    if isinstance(into, Optimizer):
        into.load_state_dict(dict(state))
        shard_state(into)
    else:
        _original(into).load_state_dict(state, strict=strict)


def _parts(of: nn.Module | Optimizer) -> dict[str, Any]:
    if isinstance(of, Optimizer):
        if not of.state:
            _make_state(of)
        shard_state(of)
        return of.state_dict()
    return _original(of).state_dict()


def _make_state(optimizer: Optimizer) -> None:
    """Have an optimizer make the state that its first step makes, in zeros, by a step that changes no parameter."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        optimizer.step()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            group.update(before)
    with torch.no_grad():
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, Tensor) else 0 if type(value) is int else value


def _original(model: nn.Module) -> nn.Module:
    """The model that was given to torch.compile, or the model itself."""
    found = getattr(model, "_orig_mod", model)
    assert isinstance(found, nn.Module)
    return found


def _map_values(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _map_values(function, one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_map_values(function, one) for one in value)
    return function(value)


@torch.no_grad()
def _gather(value: ShardedTensor, on_rank: int | None) -> Tensor | None:
    """The whole tensor, on every rank or on one."""
    layout, local = value.keeps, value.local.detach()
    wants = on_rank in (None, layout.rank)
    whole = torch.empty(layout.shape, dtype=local.dtype) if wants else None
    for owner, box in layout.counted():
        if on_rank is not None and layout.rank not in (owner, on_rank):
            continue
        if owner == layout.rank:
            part = local[box.within(layout.parts[owner])].contiguous()
        else:
            part = local.new_empty(box.shape)
        if on_rank is None:
            dist.broadcast(part, src=owner)
        elif owner != on_rank:
            if layout.rank == owner:
                dist.send(part, on_rank)
            else:
                dist.recv(part, owner)
        if whole is not None:
            whole[box.within(Mask.of(layout.shape))] = part.cpu()
    return whole
