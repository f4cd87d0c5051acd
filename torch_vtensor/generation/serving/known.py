"""What requests begin with and leave behind: rows that the model's prefix tree lends and keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.cached_rows import StoreLayout
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.rows import RowsLayout, SequenceRows
from torch_vtensor.generation.tenant import prefix_salt

__all__ = ["Known", "Reuse"]

_WORTH_TOKENS = 64  # for a request to wait until another has computed so many of its tokens


class Reuse:
    """Whether requests begin with what is known, and leave what they know."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while something is left: once it was switched off nothing is any more
        self.is_on = False

    def switch(self, is_on: bool) -> None:
        """From now on do so, or not."""
        with self.lock:
            self.is_on = is_on


class Known:
    """What is known of requests' tokens, as long as it is to be reused.

    Args:
        stores: how sequences of this layout lie, as a prefix tree sees them.
    """

    def __init__(
        self, model: Any, reuse: Reuse, layout: RowsLayout, stores: Sequence[StoreLayout], pool: PagePool
    ) -> None:
        self._model = model
        self._reuse = reuse
        self._layout = layout
        self._stores = stores
        self._pool = pool

    @property
    def is_on(self) -> bool:
        """Whether anything is reused."""
        return self._reuse.is_on

    def begin(self, request: Request) -> SequenceRows | None:
        """Rows that begin with what is known of a request's tokens, if anything is."""
        request.mark = None
        if not self.is_on:
            return None
        mark, tokens = prefix_cache.mark_of(self._model), request.tokens
        if isinstance(mark, str):
            prefix_cache.counters[f"not reused: {mark}"] += 1
            return None
        request.mark = mark
        with prefix_salt(request.salt):
            lent = prefix_cache.lend(self._model, mark, tokens, self._layout.capacity)
        if lent is None:
            return None
        layouts, loan = lent
        if layouts != self._stores:
            for vtensor in loan.vtensors:
                vtensor.close()
            return None
        return SequenceRows(self._layout, len(tokens) + 1, loan.vtensors, loan.num_rows)

    def num_known(self, request: Request) -> int:
        """How many of a request's tokens are known, but for its last one."""
        if not self.is_on:
            return 0
        known = request.tokens[:-1]
        return max((tree.match(known, request.salt) for tree in prefix_cache.trees_of(self._model)), default=0)

    def knows_more_soon(self, request: Request, prompts: Iterable[Request]) -> bool:
        """Whether one of these prompts, which are being taken up, begins as a request does that has not begun."""
        if not self.is_on:
            return False
        others = [other.tokens for other in prompts if other.salt == request.salt]
        tokens = request.tokens if others else []
        alike = [other for other in others if _begin_alike(tokens, other, 0)]
        if not alike:
            return False
        num_known = self.num_known(request)
        return any(_begin_alike(tokens, other, num_known) for other in alike)

    def count(self, request: Request) -> None:
        """Count what a request that has begun was lent."""
        if request.mark is not None:
            prefix_cache.counters["tokens reused"] += request.num_lent
            prefix_cache.counters["tokens of prompts"] += request.num_tokens

    def record(self, request: Request) -> None:
        """Keep what the rows of a request hold of its tokens, unless they sleep."""
        rows = request.rows
        if rows is None or rows.is_asleep or any(each.is_asleep for each in self._pool.sleepers):
            return
        with self._reuse.lock:
            if not self.is_on or request.mark is None:
                return
            tokens = request.tokens[: rows.num_rows]
            found = rows.cached(len(tokens))
            if isinstance(found, str):
                prefix_cache.counters[f"not recorded: {found}"] += 1
                return
            with prefix_salt(request.salt):
                prefix_cache.record(self._model, request.mark, tokens, found)


def _begin_alike(tokens: Sequence[int], other: Sequence[int], num_known: int) -> bool:
    """Whether two prompts have enough tokens in common, beyond the first ``num_known``, to be run once for both."""
    num_common = num_known + _WORTH_TOKENS
    return min(len(tokens) - 1, len(other)) >= num_common and tokens[:num_common] == other[:num_common]
