"""Which of the prompts that wait are taken up by one forward.

A step reads all weights, however few tokens it takes up, and up to about 256 tokens cost no more than one: reading is
what takes the time. A prompt with more left fills a device by itself (1,024 tokens of a model with 8 billion weights
keep an H100's matrix units busy for 27 ms, five times as long as reading the weights takes), so it goes alone, in parts
of a few sizes. Short ones go together, side by side in one row of tokens, each in a place of the same size:

    place     0                1                2                3
    tokens   [a a a a . . . .][b b b b b b . .][c . . . . . . .][scratch . . . .]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch_vtensor.generation.decode.prompt import FREE_ROWS, parts_of, sizes_up_to

__all__ = ["MOST_PLACES", "PromptShape", "place_size", "shape_alone", "shapes_alone", "shapes_up_to", "together"]

_PLACE_SIZES = (32, 128)
_MOST_ROWS = 2048  # of several together: the first of them waits for the others' tokens as well
MOST_PLACES = _MOST_ROWS // _PLACE_SIZES[0]


class PromptShape(NamedTuple):
    """``num_places`` places for ``size`` tokens each."""

    num_places: int
    size: int

    @property
    def num_rows(self) -> int:
        """Tokens in all."""
        return self.num_places * self.size


def place_size(num_tokens: int) -> int | None:
    """How large the places are where a prompt with so many tokens left goes together with others; None: it does not."""
    return next((size for size in _PLACE_SIZES if num_tokens <= size), None)


def together(num_prompts: int, size: int, budget: int) -> tuple[int, PromptShape] | None:
    """How many of so many prompts, each of which fits into a place, go together, and in which shape.

    None if the first had better go alone: that costs no more, or they are more than ``budget`` tokens.
    """
    best: tuple[int, int, PromptShape] | None = None
    for shape in _shapes(size):
        if shape.num_rows <= budget:
            num_taken = min(shape.num_places, num_prompts)
            cost = max(shape.num_rows, FREE_ROWS) + FREE_ROWS * (num_prompts - num_taken)
            if best is None or cost < best[0]:
                best = cost, num_taken, shape
    return None if best is None or best[0] >= FREE_ROWS * num_prompts else best[1:]


def shape_alone(num_tokens: int, max_tokens: int, is_captured: bool) -> PromptShape:
    """What the first part of a prompt that goes alone is taken up by, ``max_tokens`` at most."""
    if is_captured:
        return PromptShape(1, parts_of(num_tokens, 1, max_tokens)[0].size)
    return PromptShape(1, min(num_tokens, max_tokens))


def shapes_alone(num_tokens: int) -> list[PromptShape]:
    """What a prompt of so many tokens that goes alone is taken up by; none if it may go together with others."""
    if place_size(num_tokens) is not None:
        return []
    return [PromptShape(1, size) for size in sorted({part.size for part in parts_of(num_tokens, 1)})]


def shapes_up_to(num_tokens: int, num_prompts: int) -> list[PromptShape]:
    """All shapes that are captured for prompts of up to so many tokens, of which so many may come at once."""
    shapes = [PromptShape(1, size) for size in sizes_up_to(num_tokens)]
    if num_prompts > 1:
        shapes += [shape for size in _PLACE_SIZES for shape in _shapes(size)]
    return shapes


def _shapes(size: int) -> Iterator[PromptShape]:
    num_places = max(FREE_ROWS // size, 2)
    while num_places * size <= _MOST_ROWS:
        yield PromptShape(num_places, size)
        num_places *= 2
