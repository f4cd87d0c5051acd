"""Tensors of which each rank keeps a part: whole in shape, partial in bytes.

A parameter of shape [8, 4] that two ranks share::

    rank 0   [0:4, 0:4]   local [4, 4]        rank 1   [4:8, 0:4]   local [4, 4]

Elementwise operators, which is what optimizers are made of, run on the local parts. Whatever would need more than the
part is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_vtensor.compile import _torch_compat, checkpoint_items
from torch_vtensor.compile.tensor_view import Mask

REMEDY = (
    "Outside of the compiled function only elementwise operators work on it, which optimizers are made of. For whole "
    "tensors call torch_vtensor.compile.state_dict(model), which torch.save takes; torch.distributed.checkpoint takes "
    "parts as they are. For gradient norms torch_vtensor.compile.clip_grad_norm_; "
    "run the model through the function that torch.compile returned."
)

_ELEMENTWISE = {"alias", "clone", "copy_", "detach", "fill_", "_to_copy", "zero_"} | {
    f"{made}_like" for made in ("empty", "zeros", "ones", "full")
}
_UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"
_REDUCTIONS = {"_foreach_max", "_foreach_norm", "_foreach_powsum"}


@dataclass(frozen=True, eq=False)
class Layout:
    """Which part of a tensor each rank keeps; ranks that keep nothing are missing."""

    name: str
    shape: tuple[int, ...]
    rank: int
    parts: Mapping[int, Mask]

    @property
    def is_whole(self) -> bool:
        """Whether this rank keeps all of it."""
        return self.parts.get(self.rank) == Mask.of(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole's shape: a view."""
        part = self.parts.get(self.rank)
        if part is None:
            return whole.new_empty((0,) * max(whole.dim(), 1))
        return whole[part.within(Mask.of(self.shape))]

    def counted(self) -> Iterator[tuple[int, Mask]]:
        """Boxes that cover the tensor once, each with a rank that keeps it: replicas are left to the lowest rank."""
        before: list[Mask] = []
        for rank, part in sorted(self.parts.items()):
            boxes = [part]
            for other in before:
                boxes = [rest for box in boxes for rest in box.difference(other)]
            before.append(part)
            yield from ((rank, box) for box in boxes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self

    def __str__(self) -> str:
        """Name it and tell what of it is here: ``up.weight [8, 4], of which rank 0 keeps [0:4, 0:4]``."""
        part = self.parts.get(self.rank, "nothing")
        return f"{self.name} {list(self.shape)}, of which rank {self.rank} keeps {part}"


class ShardedTensor(_torch_compat.WrapperTensor):
    """A tensor with the shape of the whole and the bytes of this rank's part.

    ``local`` is the part; everything else is as of the whole: shape, stride, numel, requires_grad, grad.
    """

    _local: Tensor
    _layout: Layout

    @classmethod
    def of(cls, local: Tensor, layout: Layout, *, requires_grad: bool = False) -> ShardedTensor:
        """Present a part as the whole that it belongs to."""
        made = cls.wrap(layout.shape, local.dtype, local.device, requires_grad=requires_grad)
        made._local, made._layout = local, layout
        return made

    @property
    def local(self) -> Tensor:
        """This rank's part, which shares memory with the tensor; no elements where the rank keeps nothing."""
        return self._local

    @property
    def keeps(self) -> Layout:
        """Which part each rank keeps."""
        return self._layout

    @property
    def data(self) -> Tensor:
        """The same without autograd."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(f"the data of {self._layout} cannot be replaced; write to it with copy_(whole tensor).")

    def data_ptr(self) -> int:
        """Refuse: there is no address of the whole."""
        raise RuntimeError(f"no memory holds all of {self._layout}. {REMEDY}")

    def share_memory_(self) -> Any:
        """Refuse: there is no memory of the whole that other processes could map."""
        raise RuntimeError(f"no memory holds all of {self._layout}. {REMEDY}")

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError(f"only leaves can be copied deeply, and {self._layout} has a grad_fn; detach it first.")
        made = ShardedTensor.of(self._local.detach().clone(), self._layout, requires_grad=self.requires_grad)
        made.__dict__.update({key: value for key, value in self.__dict__.items() if key not in made.__dict__})
        if self.grad is not None:
            made.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"a part is no checkpoint: {self._layout}. {REMEDY}")

    # torch.distributed.checkpoint asks these of any tensor that has them.

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[Any]:
        return checkpoint_items.write_items(fqn, self._local, self._layout)

    def __create_chunk_list__(self) -> list[Any]:
        return checkpoint_items.chunks(self._layout)

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return checkpoint_items.shard(index.offset, self._local, self._layout)

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        """Tell which part is here, and its values."""
        kind = "Parameter" if isinstance(self, torch.nn.Parameter) else "ShardedTensor"
        return f"{kind}({self._layout}:\n{self._local.detach()})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_local"], (self._layout, self.requires_grad, self.__dict__.get("_is_param", False))

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> ShardedTensor:
        layout, requires_grad, is_parameter = context
        made = ShardedTensor.of(inner["_local"], layout, requires_grad=requires_grad)
        if is_parameter:
            made._is_param = True
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        given = _torch_compat.leaves((args, kwargs))
        sharded = next(value for value in given if isinstance(value, cls))
        # Dynamo looks at what operators would return with fake tensors: these have the whole's shape.
        if _torch_compat.is_fake(sharded._local) and name not in _ELEMENTWISE:
            return _torch_compat.call_on_fakes(func, args, kwargs)
        if name == _UNSCALE:
            return _unscale(func, *args)
        if name.startswith(("_foreach_", "_fused_")) and name not in _REDUCTIONS:
            return _run_on_lists(func, args, kwargs)
        if name not in _ELEMENTWISE and not _torch_compat.is_elementwise(func):
            raise RuntimeError(f"{func} needs more than what is here of {sharded._layout}. {REMEDY}")
        localize = _localizer(name, sharded._layout)
        made = func(*_map(localize, args), **_map(localize, kwargs))
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return _map(lambda value: ShardedTensor.of(value, sharded._layout), made)


def _unscale(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Unscale parts for `torch.amp.GradScaler`; what one rank finds not finite is found on all, so that all skip.

    Effects: an all-reduce of one number, which every rank takes part in: each has a part of each gradient, or none.
    """
    parts = (gradient._local if isinstance(gradient, ShardedTensor) else gradient for gradient in gradients)
    func([part for part in parts if part.numel()], found_inf, inverse_scale)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)


def _run_on_lists(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on lists of tensors, those at one position belonging together."""
    lists = [value for value in args if isinstance(value, list | tuple)]
    layouts: dict[int, Layout] = {}
    for tensors in lists:
        layouts.update(
            (index, value._layout) for index, value in enumerate(tensors) if isinstance(value, ShardedTensor)
        )
    localizers = {index: _localizer(func._schema.name, layout) for index, layout in layouts.items()}

    def local(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [localizers[index](one) if index in localizers else one for index, one in enumerate(value)]

    made = func(*map(local, args), **{key: local(value) for key, value in kwargs.items()})
    if made is None or func._schema.is_mutable:
        return None
    return [ShardedTensor.of(one, layouts[index]) if index in layouts else one for index, one in enumerate(made)]


def _localizer(name: str, layout: Layout) -> Callable[[Any], Any]:
    """What takes this rank's part of an operand: of a sharded tensor, or of one that is whole here."""

    def localize(value: Any) -> Any:
        if isinstance(value, ShardedTensor):
            if value._layout is not layout:
                raise RuntimeError(f"{name} got parts that do not match: {value._layout}, and {layout}. {REMEDY}")
            return value._local
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if tuple(value.shape) != layout.shape:
            shape = list(value.shape)
            raise RuntimeError(f"{name} got a tensor of shape {shape} with a part of {layout}. {REMEDY}")
        return layout.cut(value)

    return localize


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(function, one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | torch.Size):
        return type(value)(_map(function, one) for one in value)  # type: ignore[call-arg]
    return function(value)
