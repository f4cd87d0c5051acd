"""Captures of CUDA graphs by this process, one at a time, which fences on any other thread would break.

A fence records the work of all streams of a context; one that is being captured does not allow that, and its capture
fails. torch tells a thread of its own captures alone, so whoever captures says so here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch_vtensor.allocator.driver import Driver

__all__ = [
    "another_captures",
    "bar_captures",
    "between_captures",
    "captures_here",
    "capturing",
    "outlast_captures",
    "outside_captures",
]

_MOST_SECONDS = 10.0  # whoever captures may in the end wait for a lock that the caller has
_PAUSE_SECONDS = 0.001


class _Captures:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread: int | None = None  # whose capture it is


_captures = _Captures()


@contextmanager
def capturing() -> Iterator[None]:
    """A block in which this thread captures a graph; waits for those of other threads."""
    captures = _captures
    with captures.lock:
        before, captures.thread = captures.thread, threading.get_ident()
        try:
            yield
        finally:
            captures.thread = before


def another_captures() -> bool:
    """Whether another thread is inside `capturing`."""
    return _captures.thread not in (None, threading.get_ident())


def captures_here() -> bool:
    """Whether this thread is inside `capturing`."""
    return _captures.thread == threading.get_ident()


def outlast_captures(driver: Driver) -> bool:
    """Wait, ten seconds at most, for captures of other threads to end; whether there were any, and none is left.

    The caller holds no lock that who captures may need, a pool's for one.
    """
    if not driver.is_capturing() or driver.is_capturing_here():
        return False
    deadline = time.monotonic() + _MOST_SECONDS
    while driver.is_capturing():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def bar_captures(driver: Driver, held: ExitStack) -> bool:
    """Whether no other thread captures now; then none begins to until ``held`` ends. Waits for nothing."""
    lock = _captures.lock
    is_free = lock.acquire(blocking=False)
    if is_free:
        held.callback(lock.release)
    return (is_free or not driver.fences_break_captures) and not _captured_elsewhere(driver)


@contextmanager
def outside_captures(driver: Driver, lock: AbstractContextManager[object]) -> Iterator[None]:
    """A block with ``lock``, a pool's, during which no other thread captures.

    Waits for those that do without the lock, which they may need; after ten seconds the block begins all the same.
    """
    may_wait = True
    while True:
        with ExitStack() as held:
            held.enter_context(lock)
            if bar_captures(driver, held) or not may_wait:
                yield
                return
        may_wait = outlast_captures(driver) or not _captured_elsewhere(driver)


def _captured_elsewhere(driver: Driver) -> bool:
    return driver.is_capturing() and not driver.is_capturing_here()


@contextmanager
def between_captures() -> Iterator[None]:
    """A block, a short one, in which no other thread begins a capture."""
    lock = _captures.lock
    is_held = lock.acquire(timeout=_MOST_SECONDS)
    try:
        yield
    finally:
        if is_held:
            lock.release()


def _start_afresh_in_child() -> None:
    global _captures
    _captures = _Captures()


os.register_at_fork(after_in_child=_start_afresh_in_child)
