"""What requests begin with and leave behind: rows that the model's prefix tree lends and keeps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch_vtensor.generation import prefix_cache
from torch_vtensor.generation.cached_rows import StoreLayout
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.rows import RowsLayout, SequenceRows

__all__ = ["Reuse", "begin", "count", "record"]


class Reuse:
    """Whether requests begin with what is known, and leave what they know."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while something is left: once it was switched off nothing is any more
        self.is_on = False

    def switch(self, is_on: bool) -> None:
        """From now on do so, or not."""
        with self.lock:
            self.is_on = is_on


def begin(model: Any, request: Request, layout: RowsLayout, stores: Sequence[StoreLayout]) -> SequenceRows | None:
    """Rows that begin with what is known of a request's tokens, if anything is.

    Args:
        stores: how sequences of this layout lie, as a prefix tree sees them.
    """
    mark, tokens = prefix_cache.mark_of(model), request.tokens
    request.mark = None if isinstance(mark, str) else mark
    if isinstance(mark, str):
        prefix_cache.counters[f"not reused: {mark}"] += 1
        return None
    lent = prefix_cache.lend(model, mark, tokens, layout.capacity)
    if lent is None:
        return None
    layouts, loan = lent
    if layouts != stores:
        for vtensor in loan.vtensors:
            vtensor.close()
        return None
    return SequenceRows(layout, len(tokens) + 1, loan.vtensors, loan.num_rows)


def count(request: Request, num_reused: int) -> None:
    """Count what a request that has begun was lent."""
    if request.mark is not None:
        prefix_cache.counters["tokens reused"] += num_reused
        prefix_cache.counters["tokens of prompts"] += len(request.tokens)


def record(model: Any, request: Request) -> None:
    """Keep what the rows of a request hold of its tokens."""
    rows = request.rows
    if rows is None or request.mark is None:
        return
    tokens = request.tokens[: rows.num_rows]
    found = rows.cached(len(tokens))
    if isinstance(found, str):
        prefix_cache.counters[f"not recorded: {found}"] += 1
    else:
        prefix_cache.record(model, request.mark, tokens, found)
