"""A driver that refuses some calls at random, around a real one."""

from __future__ import annotations

import random
import threading
from typing import Any

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.errors import DriverError

_CALLS = ("reserve", "release", "create", "create_offloaded", "destroy", "map", "set_access", "unmap", "copy")


class Refusing:
    """Every call goes to ``inner``, but for those that are refused after ``arm``, on whatever thread they are made."""

    def __init__(self, inner: Driver) -> None:
        self.inner = inner
        self.num_refused = 0
        self._lock = threading.Lock()
        self._calls_until = self._num_left = 0
        self._code = ""

    def arm(self, choose: random.Random, *, is_shortage: bool | None = None) -> None:
        """Refuse one of the next calls, or a few in a row; as if memory were short, for no reason, or (None) either."""
        is_cuda = self.inner.device.type == "cuda"
        with self._lock:
            self._calls_until, self._num_left = choose.randrange(40), choose.choice([1, 1, 1, 2, 5])
            shortage, broken = ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_UNKNOWN") if is_cuda else ("ENOMEM", "EIO")
            is_shortage = choose.random() < 0.5 if is_shortage is None else is_shortage
            self._code = shortage if is_shortage else broken

    def disarm(self) -> None:
        """Refuse nothing from now on."""
        with self._lock:
            self._num_left = 0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.inner, name)
        if name not in _CALLS:
            return attribute

        def call(*arguments: Any) -> Any:
            with self._lock:
                is_refused = self._num_left > 0 and self._calls_until == 0
                if self._num_left > 0:
                    self._num_left, self._calls_until = self._num_left - is_refused, max(self._calls_until - 1, 0)
                self.num_refused += is_refused
            if is_refused:
                raise DriverError(name, self._code, self.inner.device, 0, "as the soak wants it")
            return attribute(*arguments)

        return call
