"""What makes a prompt fast: inductor's code for all that stands between its matrix products and its attention.

All layers as one graph of symbolic sizes would save a few launches more, but took 80 seconds to compile for the 32 of a
Llama-3-8B, where the parts take five.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["compile_parts"]

_ROTATION = "apply_rotary_pos_emb"
"""What transformers' attention calls to turn queries and keys: ten kernels where one will do."""


def compile_parts(twin: Any) -> None:
    """Have inductor make norms, gates and rotary embeddings of a traced model, once for all layers and sizes."""
    copies: dict[Any, Any] = {}
    for layers in [module for module in twin.modules() if isinstance(module, torch.nn.ModuleList)]:
        for layer in filter(_attends, layers):
            for part in _parts_beside_attention(layer):
                stock = type(part).forward
                if isinstance(stock, types.FunctionType) and "forward" not in vars(part):
                    forward = copies.setdefault(stock, _copied(stock))
                    part.forward = torch.compile(types.MethodType(forward, part), dynamic=True)
            for attention in layer.modules():
                stock = type(attention).forward
                if _rotates(stock) and "forward" not in vars(attention):
                    forward = copies.get(stock) or copies.setdefault(stock, _with_compiled_rotation(stock))
                    attention.forward = types.MethodType(forward, attention)


def _rotates(function: Any) -> bool:
    """Whether it calls a rotation that it finds by its name."""
    return (
        isinstance(function, types.FunctionType)
        and _ROTATION in function.__code__.co_names
        and isinstance(function.__globals__.get(_ROTATION), types.FunctionType)
    )


def _with_compiled_rotation(function: Any) -> types.FunctionType:
    stock = function.__globals__[_ROTATION]
    compiled = torch.compile(_copied(stock), dynamic=True)
    rotation = _by_kernel(compiled) if _turns_halves(stock) else compiled
    return _copied(function, {**function.__globals__, _ROTATION: rotation})


def _turns_halves(rotation: Any) -> bool:
    """Whether a function turns each half of a head against the other, as most models do, and does nothing else."""
    sizes = (2, 4, 3, 8), (2, 1, 3, 8), (2, 3, 8), (2, 3, 8)
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.rand(size, generator=generator, dtype=torch.float64, device="cpu") for size in sizes)
    expected = [x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None] for x in (query, key)]
    try:
        return all(
            torch.allclose(one, other) for one, other in zip(rotation(query, key, cos, sin), expected, strict=True)
        )
    except Exception:  # it takes, or returns, something else
        return False


def _by_kernel(compiled: Any) -> Any:
    """Our kernel where it can, else what inductor makes of the model's function."""

    def turn(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.is_cuda and len(args) == 2 and not kwargs and _can_rotate(query, key, *args):
            from torch_vtensor.ops.rotary_triton import rotate

            return rotate(query, key, *args)
        return compiled(query, key, *args, **kwargs)

    return turn


def _can_rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if not query.dim() == key.dim() == 4:
        return False
    batch, _, num_tokens, dim = query.shape
    return (
        dim % 2 == 0
        and query.dtype.itemsize <= 4
        and cos.shape == sin.shape
        and cos.shape[0] in (1, batch)
        and cos.shape[1:] == (num_tokens, dim)
        and query.dtype == key.dtype == cos.dtype == sin.dtype
        and all(x.stride(-1) == 1 for x in (query, key, cos, sin))
    )


def _copied(function: types.FunctionType, names: dict[str, Any] | None = None) -> types.FunctionType:
    """The function with a code object of its own, which others have not used up dynamo's count of recompilations of.

    Args:
        names: what it finds by their names; default: what it found before.
    """
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__ if names is None else names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _parts_beside_attention(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        if _attends(child):
            yield from _parts_beside_attention(child)
        elif not isinstance(child, (torch.nn.Linear, torch.nn.Dropout, torch.nn.Identity)):
            yield child


def _attends(module: torch.nn.Module) -> bool:
    return any(hasattr(each, "layer_idx") for each in module.modules())
