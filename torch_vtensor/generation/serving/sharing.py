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
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch_vtensor.allocator.page_run import PageRun
from torch_vtensor.generation.shared_reads import SharedPrefix

__all__ = ["Beginning", "shared_beginnings"]


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
    """Groups, how many tokens need not be read because of them, and of how many sequences they are."""

    num_saved: int
    num_members: int
    groups: list[SharedPrefix]


def shared_beginnings(beginnings: Sequence[Beginning]) -> list[SharedPrefix]:
    """Groups of these sequences, by their indices, which read fewest tokens if each group reads its own once."""
    order = sorted(range(len(beginnings)), key=lambda index: beginnings[index].pages)
    common = [_num_common(beginnings[one].pages, beginnings[other].pages) for one, other in pairwise(order)]
    return _best(beginnings, order, common).groups if order else []


def _best(beginnings: Sequence[Beginning], order: list[int], common: list[int]) -> _Choice:
    """The best groups of sequences in the order of their pages, of which neighbours have so many in common."""
    if not common:
        return _Choice(0, 1, [])
    fewest = min(common)
    num_tokens = beginnings[order[0]].ends[fewest - 1] if fewest else 0
    parts = [(part, _best(beginnings, *part)) for part in _split(order, common, fewest)]
    # Each part stays as it is, or joins the others in what all of them have in common.
    joins = [best.num_members * num_tokens > best.num_saved for _, best in parts]
    together = [index for (part, _), is_in in zip(parts, joins, strict=True) if is_in for index in part[0]]
    apart = [best for (_, best), is_in in zip(parts, joins, strict=True) if not is_in]
    num_saved = (len(together) - 1) * num_tokens + sum(best.num_saved for best in apart)
    if len(together) > 1 and num_saved > sum(best.num_saved for _, best in parts):
        group = SharedPrefix(tuple(sorted(together)), num_tokens)
        return _Choice(num_saved, len(order), [group, *(group for best in apart for group in best.groups)])
    return _Choice(
        sum(best.num_saved for _, best in parts), len(order), [group for _, best in parts for group in best.groups]
    )


def _split(order: list[int], common: list[int], fewest: int) -> Iterator[tuple[list[int], list[int]]]:
    """The parts between neighbours that have no more in common than all have."""
    start = 0
    for index, num_common in enumerate([*common, fewest]):
        if num_common == fewest:
            yield order[start : index + 1], common[start:index]
            start = index + 1


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
