"""Captures of CUDA graphs by this process, one at a time, which fences on any other thread would break.

A fence records the work of all streams of a context; one that is being captured does not allow that, and its capture
fails. torch tells a thread of its own captures alone, so whoever captures says so here.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch_vtensor.allocator.driver import Driver

__all__ = [
    "another_captures",
    "bar_captures",
    "between_captures",
    "captures_here",
    "capturing",
    "no_captures",
    "outlast_captures",
    "outside_captures",
]

_MOST_SECONDS = 10.0  # whoever captures may in the end wait for a lock that the caller has
_PAUSE_SECONDS = 0.001


class _Captures:
    """One thread's capture, or any number of threads that bar the others from beginning one."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.thread: int | None = None  # whose capture it is
        self.bars: Counter[int] = Counter()  # how often each thread bars

    def begin(self) -> int | None:
        """Have this thread capture once no other does or bars it; who captured before: nobody, or itself."""
        mine = threading.get_ident()
        with self.changed:
            self.changed.wait_for(lambda: self.thread in (None, mine) and self.bars.keys() <= {mine})
            before, self.thread = self.thread, mine
        return before

    def end(self, before: int | None) -> None:
        """End the capture that began when ``before`` had one."""
        with self.changed:
            self.thread = before
            self.changed.notify_all()

    def bar(self, seconds: float = 0.0) -> bool:
        """Bar other threads from beginning a capture; False if one captures, and does for so long."""
        mine = threading.get_ident()
        with self.changed:
            is_free = self.changed.wait_for(lambda: self.thread in (None, mine), seconds)
            if is_free:
                self.bars[mine] += 1
            return is_free

    def unbar(self) -> None:
        """Undo `bar`, on the same thread."""
        mine = threading.get_ident()
        with self.changed:
            self.bars[mine] -= 1
            self.bars += Counter()  # without those that bar no more
            self.changed.notify_all()


_captures = _Captures()


@contextmanager
def capturing() -> Iterator[None]:
    """A block in which this thread captures a graph; waits for those of other threads, and for who bars them."""
    captures = _captures
    before = captures.begin()
    try:
        yield
    finally:
        captures.end(before)


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
    if not _captured_elsewhere(driver):
        return False
    deadline = time.monotonic() + _MOST_SECONDS
    while driver.is_capturing():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def bar_captures(driver: Driver, held: ExitStack) -> bool:
    """Whether no other thread captures now; then none begins to until ``held`` ends. Waits for nothing.

    Several threads may bar captures at once, and who has a driver whose fences break none bars none.
    """
    if driver.fences_break_captures:
        captures = _captures
        if not captures.bar():
            return False
        held.callback(captures.unbar)
    return not _captured_elsewhere(driver)


def no_captures(driver: Driver, held: ExitStack) -> bool:
    """Whether nobody captures now, this thread included; then no other begins to until ``held`` ends.

    Waits for nothing. For who makes fences with a lock that captures may need: to look alone leaves others the time to
    begin one, for whose end a fence would wait.
    """
    return bar_captures(driver, held) and not driver.is_capturing()


@contextmanager
def outside_captures(driver: Driver, lock: AbstractContextManager[object]) -> Iterator[None]:
    """A block with ``lock``, a pool's, during which no other thread captures.

    Waits for those that do without the lock, which they may need; after ten seconds the block begins all the same.
    """
    deadline = time.monotonic() + _MOST_SECONDS
    while True:
        with ExitStack() as held:
            held.enter_context(lock)
            if bar_captures(driver, held) or time.monotonic() >= deadline:
                yield
                return
        if not outlast_captures(driver):
            time.sleep(_PAUSE_SECONDS)


def _captured_elsewhere(driver: Driver) -> bool:
    return driver.is_capturing() and not driver.is_capturing_here()


@contextmanager
def between_captures() -> Iterator[None]:
    """A block, a short one, in which no other thread begins a capture; waits, ten seconds at most, for one to end."""
    captures = _captures
    is_barred = captures.bar(_MOST_SECONDS)
    try:
        yield
    finally:
        if is_barred:
            captures.unbar()


def _start_afresh_in_child() -> None:
    global _captures
    _captures = _Captures()


os.register_at_fork(after_in_child=_start_afresh_in_child)
