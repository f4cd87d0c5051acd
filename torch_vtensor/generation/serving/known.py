"""What requests begin with and leave behind: rows that the model's prefix tree lends and keeps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.cached_rows import StoreLayout
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.rows import RowsLayout, SequenceRows
from torch_vtensor.generation.tenant import prefix_salt

__all__ = ["WORTH_TOKENS", "Known", "Reuse"]

WORTH_TOKENS = 64  # for rows to be exchanged for others that have so many more


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

    def knows_more(self, request: Request) -> bool:
        """Whether more may be known of a request's tokens than it has begun with, and worth to begin once more."""
        if not self.is_on:
            return False
        known, least = request.tokens[:-1], request.num_lent + WORTH_TOKENS
        return len(known) >= least and any(
            tree.match(known, request.salt) >= least for tree in prefix_cache.trees_of(self._model)
        )

    def count(self, request: Request) -> None:
        """Count what a request that has begun was lent."""
        if request.mark is not None:
            prefix_cache.counters["tokens reused"] += request.num_lent
            prefix_cache.counters["tokens of prompts"] += len(request.tokens)

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
