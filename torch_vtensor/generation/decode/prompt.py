"""How a prompt is cut into parts, each of a size that there is a graph for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

__all__ = ["FREE_ROWS", "Part", "parts_of", "sizes_up_to"]

_MAX_ROWS = 4096  # tokens of all sequences at once: enough to keep a GPU busy, few enough to need little memory
_MIN_TOKENS = 16
FREE_ROWS = 256  # so many cost no more than one: what takes the time is reading the weights


class Part(NamedTuple):
    """Tokens [start, stop) of every sequence, taken up by the graph for ``size`` tokens, at least as many."""

    start: int
    stop: int
    size: int


def parts_of(num_tokens: int, batch: int, max_size: int | None = None) -> list[Part]:
    """The cheapest way to take up ``num_tokens`` of ``batch`` sequences each.

    Args:
        max_size: at most so many tokens of a sequence at once; by default as many as keep a device busy.
    """
    sizes = _sizes(max(_MIN_TOKENS, _MAX_ROWS // batch // _MIN_TOKENS * _MIN_TOKENS))
    if max_size is not None:
        sizes = tuple(size for size in sizes if size <= max_size) or (max_size,)
    parts, start = [], 0
    while num_tokens - start > sizes[-1]:
        parts.append(Part(start, start + sizes[-1], sizes[-1]))
        start += sizes[-1]
    for size in _cheapest(num_tokens - start, batch, sizes):
        stop = min(start + size, num_tokens)
        parts.append(Part(start, stop, size))
        start = stop
    return parts


def sizes_up_to(num_tokens: int) -> list[int]:
    """All sizes of the parts that a single prompt of so many tokens at most is cut into."""
    sizes = _sizes(_MAX_ROWS)
    return [size for smaller, size in zip((0, *sizes), sizes, strict=False) if smaller < num_tokens]


@cache
def _sizes(largest: int) -> tuple[int, ...]:
    """``largest``, and below it powers of two and one size between each and the next: few, as each needs a graph."""
    sizes, power = {largest}, _MIN_TOKENS
    while power < largest:
        sizes |= {power, power * 3 // 2}
        power *= 2
    return tuple(sorted(size for size in sizes if size <= largest))


def _cheapest(num_tokens: int, batch: int, sizes: Sequence[int]) -> list[int]:
    """One size that fits all tokens, or the next smaller one and what is then left, whichever computes less."""
    size = next(size for size in sizes if size >= num_tokens)
    smaller = [smaller for smaller in sizes if smaller < num_tokens]
    if not smaller:
        return [size]
    several = [smaller[-1], *_cheapest(num_tokens - smaller[-1], batch, sizes)]
    return min([size], several, key=lambda ways: sum(max(batch * way, FREE_ROWS) for way in ways))
