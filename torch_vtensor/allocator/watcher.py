"""Watcher: a thread that sleeps until another process writes to this one's status file."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch_vtensor.errors import VTensorError

__all__ = ["Watcher", "is_watching"]

_log = logging.getLogger(__name__)
_THREAD_NAME = "torch_vtensor watcher"
_IN_MODIFY = 0x2
_POLL_MS = 500  # where the system has no inotify to spare
_EVENTS_BYTES = 4096


def is_watching() -> bool:
    """Whether this is a watcher's thread, which cannot know what others are capturing into a graph."""
    return threading.current_thread().name == _THREAD_NAME


class Watcher:
    """Calls ``heed`` whenever others have written to a file; ends with ``stop``, with the interpreter, and by a fork.

    Stores to a mapping of the file are no writes to it: what the process itself does there wakes nobody.

    Raises: OSError or RuntimeError where no thread, or nothing to wake it by, can be had.
    """

    def __init__(self, path: Path, heed: Callable[[], object]) -> None:
        self._heed = heed
        self._stops = os.eventfd(0, os.EFD_CLOEXEC)
        self._events = _events_of(path)
        self._thread = threading.Thread(target=self._run, name=_THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.forsake()
            raise
        atexit.register(_stop, weakref.ref(self))

    def stop(self) -> None:
        """End the thread, once it is done with what it is doing. Stopping twice is stopping once."""
        if self._thread.is_alive():  # and with it what it is woken by: the numbers may be others' by now
            os.eventfd_write(self._stops, 1)
            self._thread.join(timeout=5)

    def forsake(self) -> None:
        """Let go of what the thread, which does not run in this process, was woken by."""
        for fd in (self._stops, self._events):
            if fd is not None:
                os.close(fd)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stops, select.POLLIN)
        if self._events is not None:
            poll.register(self._events, select.POLLIN)
        timeout_ms = _POLL_MS if self._events is None else None
        self._heed_now()  # what was asked before
        while self._stops not in (ready := [fd for fd, _ in poll.poll(timeout_ms)]):
            if ready:
                with suppress(BlockingIOError):
                    os.read(ready[0], _EVENTS_BYTES)
            self._heed_now()
        self.forsake()

    def _heed_now(self) -> None:
        try:
            self._heed()
        except VTensorError as error:
            _log.info("what another process has asked for was not possible: %s", error)
        except Exception:
            _log.exception("what another process has asked for has failed")


def _events_of(path: Path) -> int | None:
    """A descriptor that can be read when the file is written to; None where the system has none to spare."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        return None
    if libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(_IN_MODIFY)) < 0:
        os.close(fd)
        return None
    return fd


def _stop(watcher: weakref.ref[Watcher]) -> None:
    alive = watcher()
    if alive is not None:
        alive.stop()
