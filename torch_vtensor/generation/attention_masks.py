"""Attention masks as what they say instead of what they look like: which tokens of each sequence its rows see.

transformers describes a mask by a function of indices and the 2-D padding mask, and then fills a [B, 1, T, N] tensor.
Where the description is one that our operators have arguments for, the tensor is not filled: a `VisibleTokens` stands
for it, carries the description to the attention function, and becomes the very tensor as soon as anyone else looks in.

    padding mask of one sequence     . . 1 1 1 1 1     first = 2, stop = 7
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from torch_vtensor.generation._torch_compat import is_traced
from torch_vtensor.generation._transformers_compat import first_row_of, mask_device, mask_parts

__all__ = ["Pattern", "VisibleTokens", "describing"]


class Pattern(NamedTuple):
    """What every row of a mask sees, in positions of the keys that attention is given.

    ``first`` and ``stop`` [B], int32 on the device, bound each sequence's tokens; None: all are. Causal rows are the
    last ones. ``segments`` are the [start, stop) of each sequence's packed parts, which see nothing of each other.
    """

    causal: bool
    window: int | None
    first: torch.Tensor | None
    stop: torch.Tensor | None
    segments: tuple[tuple[tuple[int, int], ...], ...] | None


_SHAPE_QUESTIONS = {"__get__", "dim", "size", "numel", "is_floating_point", "__len__", "__repr__"}
"""What is asked of a tensor by these functions (attributes are gotten) does not need its numbers."""
_IN_PLACE = {"__setitem__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "pow")
}
"""Those of torch's functions that write to their first argument and whose names do not end with one underscore."""


class VisibleTokens(torch.Tensor):
    """A mask [B, 1, T, N] that is not filled before it is looked at."""

    make: Callable[..., torch.Tensor | None]
    _pattern: Pattern | None
    _num_writes: int  # that `filled` had seen when it was made

    @staticmethod
    def __new__(
        cls: type[VisibleTokens],
        pattern: Pattern,
        make: Callable[..., torch.Tensor | None],
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> VisibleTokens:
        """A mask of this shape.

        Args:
            make: transformers' own function, ready to be called.
        """
        self: VisibleTokens = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._pattern, self.make = pattern, make
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"VisibleTokens({list(self.shape)}, {self.pattern})"

    @property
    def pattern(self) -> Pattern | None:
        """What it says; None once somebody has changed it, be it through a view."""
        if self._pattern is not None and "filled" in vars(self) and self.filled._version != self._num_writes:
            self._pattern = None
        return self._pattern

    @functools.cached_property
    def filled(self) -> torch.Tensor:
        """The tensor that it stands for."""
        with torch.inference_mode(False), torch.no_grad():  # where torch counts writes, those to views included
            mask = self.make(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
            assert mask is not None
            mask = mask.clone() if mask.is_inference() else mask
        self._num_writes = mask._version
        return mask.expand(self.shape)

    @functools.cached_property
    def given(self) -> torch.Tensor | None:
        """What transformers' function would have given: None where its attention needs no mask."""
        return self.make()

    def as_stock(self) -> torch.Tensor | None:
        """What transformers' attention function takes in its place."""
        return self.given if self.pattern is not None else self.filled

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ in _SHAPE_QUESTIONS:
                return func(*args, **kwargs)
            # Filled here: masks made by vmap cannot be inside a dispatch, where views would not count writes either.
            changed = args[0] if args and isinstance(args[0], cls) and _is_in_place(func.__name__) else None
            if changed is not None:
                changed._make_writable()
            result = func(*tree_map_only(cls, _filled, args), **tree_map_only(cls, _filled, kwargs))
            return changed if changed is not None and result is changed.filled else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def look_in(mask: VisibleTokens) -> torch.Tensor:
            if any(each.alias_info is not None for each in func._schema.arguments):
                mask._make_writable()  # or makes a view that may be written to, which nobody would count
            return mask.filled

        return func(*tree_map_only(cls, look_in, args), **tree_map_only(cls, look_in, kwargs or {}))

    def _make_writable(self) -> None:
        """Be no longer what was described, and, as an expanded tensor has elements that are each other's, not that."""
        self._pattern = None
        if any(stride == 0 and size > 1 for stride, size in zip(self.filled.stride(), self.filled.shape, strict=True)):
            self.filled = self.filled.clone()


def _filled(mask: VisibleTokens) -> torch.Tensor:
    return mask.filled


def _is_in_place(name: str) -> bool:
    """Whether torch's function of this name writes to its first argument."""
    return name in _IN_PLACE or name[-1] == "_" != name[-2:-1]


def describing(stock: Callable[..., torch.Tensor | None], is_eager: bool) -> Callable[..., torch.Tensor | None]:
    """``stock``, a function of transformers' mask interface, giving `VisibleTokens` where it can."""

    @functools.wraps(stock)
    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        if args or torch.compiler.is_compiling() or torch.is_grad_enabled() or is_traced():
            return stock(*args, **kwargs)
        pattern = _pattern_of(kwargs)
        if pattern is None:
            return stock(**kwargs)
        is_plain = pattern == (pattern.causal, None, None, None, None)
        num_rows, num_tokens = _num_rows(kwargs), kwargs["kv_length"]
        skips = kwargs.get("allow_is_causal_skip" if pattern.causal else "allow_is_bidirectional_skip", pattern.causal)
        if is_plain and not is_eager and skips and (not pattern.causal or num_rows in (1, num_tokens)):
            return None  # as the stock function gives
        shape = kwargs["batch_size"], 1, num_rows, num_tokens
        dtype = kwargs.get("dtype", torch.float32) if is_eager else torch.bool
        return VisibleTokens(pattern, functools.partial(stock, **kwargs), shape, dtype, mask_device(kwargs))

    return mask


def _pattern_of(kwargs: dict[str, Any]) -> Pattern | None:
    """What the mask that these arguments make says; None if our operators have no arguments for it.

    Effects: with a padding mask or packed sequences, one read of the device; transformers' own functions read as much.
    """
    parts = mask_parts(kwargs["mask_function"])
    if parts is None:
        return None
    num_tokens, num_rows, offset = kwargs["kv_length"], _num_rows(kwargs), kwargs.get("kv_offset", 0)
    if parts.causal and first_row_of(kwargs) != offset + num_tokens - num_rows:
        return None  # a cache of fixed size, whose end is not written yet
    window = parts.window if parts.window is not None and parts.window < num_tokens else None
    segments = None
    if parts.packed is not None:
        if num_rows != num_tokens:
            return None
        segments = tuple(tuple(_runs(ids)) for ids in parts.packed.tolist())
    padding = kwargs.get("attention_mask")
    if padding is None:
        return Pattern(parts.causal, window, None, None, segments)
    stop = offset + num_tokens
    if (
        segments is not None
        or padding.dim() != 2
        or padding.shape[0] != kwargs["batch_size"]
        or padding.shape[1] < stop
    ):
        return None
    is_token = padding[:, offset:stop].to(torch.int32)
    firsts = is_token.argmax(1)  # the first of them
    stops = num_tokens - is_token.flip(1).argmax(1)
    is_run = is_token.sum(1) == stops - firsts
    all_run, all_end, all_begin = torch.stack([is_run, stops == num_tokens, firsts == 0]).all(1).tolist()
    if not all_run or (parts.causal and not all_end):
        return None
    if all_begin and all_end:
        return Pattern(parts.causal, window, None, None, None)
    return Pattern(parts.causal, window, firsts.to(torch.int32), stops.to(torch.int32), None)


def _runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of every run of equal numbers."""
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or ids[stop] != ids[start]:
            yield start, stop
            start = stop


def _num_rows(kwargs: dict[str, Any]) -> int:
    return int(kwargs["q_length"]) if "q_length" in kwargs else int(kwargs["cache_position"].shape[0])
