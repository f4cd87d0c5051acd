"""Captures of CUDA graphs by this process, one at a time, which fences on any other thread would break.

A fence records the work of all streams of a context; one that is being captured does not allow that, and its capture
fails. torch tells a thread of its own captures alone, so whoever captures says so here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["another_captures", "between_captures", "capturing"]

_lock = threading.RLock()
_MOST_SECONDS = 10.0  # whoever captures may in the end wait for a lock that the caller has


@contextmanager
def capturing() -> Iterator[None]:
    """A block in which this thread captures a graph; waits for those of other threads."""
    with _lock:
        yield


def another_captures() -> bool:
    """Whether another thread is inside `capturing`."""
    if not _lock.acquire(blocking=False):
        return True
    _lock.release()
    return False


@contextmanager
def between_captures() -> Iterator[None]:
    """A block, a short one, in which no other thread begins a capture."""
    is_held = _lock.acquire(timeout=_MOST_SECONDS)
    try:
        yield
    finally:
        if is_held:
            _lock.release()
