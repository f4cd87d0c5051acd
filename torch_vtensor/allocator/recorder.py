"""Recorder: what a pool held over time, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["Recorder", "Sample"]


class Sample(NamedTuple):
    """A pool's bytes from ``time_s`` on, in seconds since the epoch; the names are those of ``PoolStats``."""

    time_s: float
    reserved_bytes: int
    committed_bytes: int
    pooled_bytes: int
    torch_bytes: int
    shared_bytes: int
    offloaded_bytes: int
    budget_bytes: int | None


class Recorder:
    """Keeps up to ``most_samples`` samples, at least ``every_s`` apart, over all of the time since it was made.

    Once there are so many, every second one goes, and those to come are twice as far apart. What changes within that
    time shows as it was at its end.

    Args:
        look: the sample of this moment.
    """

    def __init__(self, look: Callable[[float], Sample], every_s: float, most_samples: int) -> None:
        self._look = look
        self._every_s = every_s
        self._most_samples = most_samples
        self._samples = [look(time.time())]
        self._next_s = 0.0
        self._missed: Sample | None = None

    def note(self) -> None:
        """Something has changed. Who calls it holds the pool's lock."""
        now = time.time()
        if now < self._next_s:
            self._missed = self._look(now)
            return
        if self._missed is not None:
            self._add(self._missed)
        self._add(self._look(now))
        self._missed = None
        self._next_s = now + self._every_s

    def samples(self) -> Sequence[Sample]:
        """What there was, the oldest first; the last one is of now. Who calls it holds the pool's lock."""
        missed = [] if self._missed is None else [self._missed]
        return [*self._samples, *missed, self._look(time.time())]

    def _add(self, sample: Sample) -> None:
        if self._samples[-1][1:] == sample[1:]:
            return
        if len(self._samples) >= self._most_samples:
            del self._samples[1::2]
            self._every_s *= 2
        self._samples.append(sample)
