"""PageRun: which pages back a stretch of some strips, whether or not any address range maps them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch_vtensor.allocator.page_pool import Page

__all__ = ["PageRun", "common_bound"]


class PageRun(NamedTuple):
    """Pages that back offsets [``bounds[0]``, ``bounds[-1]``) of each of some strips.

        offset   bounds[0]      bounds[1]      bounds[2]
        strip 0      |== page ======|== page ======|
        strip 1      |== page ======|== page ======|

    It counts no references: who keeps one keeps the pages as well (``PagePool.hold``, or a range that maps them).

    Units: bytes.
    """

    bounds: tuple[int, ...]
    strips: tuple[tuple[Page, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """The sizes of the pages of each strip."""
        return [end - start for start, end in pairwise(self.bounds)]

    def pages(self) -> Iterator[Page]:
        """Every page, strip by strip."""
        return (page for strip in self.strips for page in strip)

    def whole_until(self, nbytes: int) -> PageRun:
        """The pages that end at or before offset ``nbytes``."""
        return self._first(max(bisect_right(self.bounds, nbytes) - 1, 0))

    def covering(self, nbytes: int) -> PageRun:
        """The pages that begin before offset ``nbytes``."""
        return self._first(min(bisect_left(self.bounds, nbytes), len(self.bounds) - 1))

    def since(self, nbytes: int) -> PageRun:
        """The pages from the last one on that begins at or before offset ``nbytes``."""
        index = max(bisect_right(self.bounds, nbytes) - 1, 0)
        return PageRun(self.bounds[index:], tuple(strip[index:] for strip in self.strips))

    @classmethod
    def joined(cls, runs: Sequence[PageRun]) -> PageRun:
        """One run of several, each of which begins where the one before it ends."""
        assert all(run.bounds[-1] == later.bounds[0] for run, later in pairwise(runs)), "runs with a gap between them"
        bounds = runs[0].bounds + tuple(bound for run in runs[1:] for bound in run.bounds[1:])
        return cls(bounds, tuple(sum(parts, ()) for parts in zip(*(run.strips for run in runs), strict=True)))

    def _first(self, num_pages: int) -> PageRun:
        return PageRun(self.bounds[: num_pages + 1], tuple(strip[:num_pages] for strip in self.strips))


def common_bound(runs: Sequence[PageRun], nbytes: int) -> int:
    """The last offset, at most ``nbytes``, at which every one of the runs has an edge between pages, or begins."""
    common = set.intersection(*({bound for bound in run.bounds if bound <= nbytes} for run in runs))
    return max(common)
