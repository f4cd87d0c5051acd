"""Which sequences of a running batch begin in the same pages, so that attention reads those once for all of them.

Sequences lie in tensors of their own, and pages that several have mapped say what they share: what one has begun with
that another has left, or both have from the prefix tree. Sequences share in the manner of a tree:

    system prompt ──┬── document 1 ──┬── question a        pages  [1 2 3 4 . .
                    │                └── question b               [1 2 3 4 . .
                    └── document 2 ───── question c               [1 2 5 6 . .

A kernel takes each sequence in one group at most, so a group of few with much in common stands against one of many
with little; those that save most are chosen.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from torch_vtensor.allocator.page_run import PageRun
from torch_vtensor.generation.shared_reads import SharedPrefix

__all__ = ["Beginning", "shared_beginnings"]

_MOST_LEVELS = 8  # more different numbers of common pages are taken for lower ones: choosing takes time


class Beginning(NamedTuple):
    """The whole pages that a sequence begins with.

    Args:
        pages: which they are, eight bytes each: bytes are compared a thousand times as fast as pages.
        ends: how many whole tokens lie before the end of each.
    """

    pages: bytes
    ends: Sequence[int]

    @classmethod
    def of(cls, run: PageRun, token_bytes: int) -> Beginning:
        """That of a sequence in one strip of pages that stay its own as long as it runs."""
        (pages,) = run.strips
        return cls(array("Q", map(id, pages)).tobytes(), [end // token_bytes for end in run.bounds[1:]])


class _Choice(NamedTuple):
    """Groups, who joins a group of more than these sequences, and how many tokens need not be read for all that."""

    num_saved: int
    joined: tuple[int, ...]
    groups: tuple[SharedPrefix, ...]


def shared_beginnings(beginnings: Sequence[Beginning]) -> list[SharedPrefix]:
    """Groups of these sequences, by their indices, which read fewest tokens if each group reads its own once."""
    if len(beginnings) < 2:
        return []
    order = sorted(range(len(beginnings)), key=lambda index: beginnings[index].pages)
    ordered = [beginnings[index].pages for index in order]
    common = _at_few_levels([_num_common(one, other) for one, other in pairwise(ordered)])

    @cache
    def best(start: int, stop: int, offered: int) -> _Choice:
        """For sequences [start, stop) in order, who may join a group of more that has so many tokens in common."""
        if stop - start == 1:
            return _Choice(offered, (order[start],) if offered else (), ())
        fewest = min(common[start : stop - 1])
        own = beginnings[order[start]].ends[fewest - 1] if fewest else 0
        parts = _split(start, stop, common, fewest)
        without = _joined([best(*part, offered) for part in parts])
        if own <= offered:
            return without
        inside = _joined([best(*part, own) for part in parts])  # a group of these alone, from which nobody joins others
        if inside.num_saved - own <= without.num_saved:
            return without
        group = SharedPrefix(tuple(sorted(inside.joined)), own)
        return _Choice(inside.num_saved - own, (), (group, *inside.groups))

    return list(best(0, len(order), 0).groups)


def _at_few_levels(common: list[int]) -> list[int]:
    """The same numbers, or where they are many different ones somewhat lower, so that there are few ways to choose."""
    levels = sorted(set(common))
    levels = levels[:: -(-len(levels) // _MOST_LEVELS)]
    return [levels[bisect_right(levels, num_common) - 1] for num_common in common]


def _joined(choices: Sequence[_Choice]) -> _Choice:
    return _Choice(
        sum(choice.num_saved for choice in choices),
        tuple(index for choice in choices for index in choice.joined),
        tuple(group for choice in choices for group in choice.groups),
    )


def _split(start: int, stop: int, common: Sequence[int], fewest: int) -> list[tuple[int, int]]:
    """The parts of [start, stop) between neighbours that have no more in common than all have."""
    edges = [index + 1 for index in range(start, stop - 1) if common[index] == fewest]
    return list(pairwise([start, *edges, stop]))


def _num_common(one: bytes, other: bytes) -> int:
    """How many pages two sequences begin with in common."""
    low, high = 0, min(len(one), len(other)) // 8
    while low < high:
        middle = (low + high + 1) // 2
        if one[8 * low : 8 * middle] == other[8 * low : 8 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
