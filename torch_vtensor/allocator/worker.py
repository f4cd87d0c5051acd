"""Worker: a thread of a scheduler's own, for what need not be done on anybody else's."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from torch_vtensor.errors import VTensorError

__all__ = ["Worker", "is_ahead_of_need", "run"]

_log = logging.getLogger(__name__)
_THREAD_NAME = "torch_vtensor growth"


def is_ahead_of_need() -> bool:
    """Whether this is a worker's thread, whose work somebody may need later: nobody else has to suffer for it."""
    return threading.current_thread().name == _THREAD_NAME


class Worker:
    """A daemon thread that runs jobs in order, one of them at a given time, and sleeps in between.

    Args:
        prepare: called on the thread first.
        clock: what time it is, in seconds.

    Raises: RuntimeError where no thread can be started.
    """

    def __init__(self, prepare: Callable[[], None], clock: Callable[[], float]) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        """None ends the thread. A SimpleQueue may be put to from a finalizer."""
        self._prepare = prepare
        self._clock = clock
        self._timed: tuple[float, Callable[[], object]] | None = None
        self._thread = threading.Thread(target=self._work, name=_THREAD_NAME, daemon=True)
        self._thread.start()
        atexit.register(_stop, weakref.ref(self))

    def is_alive(self) -> bool:
        """Whether jobs are still run."""
        return self._thread.is_alive()

    def run_at(self, time_s: float, job: Callable[[], object]) -> None:
        """Run a job once it is ``time_s``, before those that wait then; it takes the place of one set before."""
        self._timed = time_s, job
        self.jobs.put(_notice)

    def stop(self) -> None:
        """End the thread behind the jobs that it was given, and wait for that five seconds at most."""
        self.jobs.put(None)
        self._thread.join(timeout=5)

    def _work(self) -> None:
        job: Callable[[], object] | None = self._prepare
        while job is not None:
            run(job)
            del job  # it may hold the scheduler, whose end ends this thread
            job = self._next()

    def _next(self) -> Callable[[], object] | None:
        while True:
            timed, wait_s = self._timed, None
            if timed is not None:
                wait_s = min(timed[0] - self._clock(), threading.TIMEOUT_MAX)
                if wait_s <= 0:
                    self._timed = None
                    return timed[1]
            with suppress(queue.Empty):
                return self.jobs.get(timeout=wait_s)


def _notice() -> None:
    """Nothing: the thread looks at its time anew."""


def run(job: Callable[[], object]) -> None:
    """Run a job whose failure nobody waits for: it is logged."""
    try:
        job()
    except VTensorError as error:
        _log.debug("work ahead was not possible: %s", error)
    except Exception:
        _log.exception("a job of the growth thread failed; later jobs still run")


def _stop(worker: weakref.ref[Worker]) -> None:
    alive = worker()
    if alive is not None:
        alive.stop()
