"""Tokens that the device was asked for, on their way to the host, which makes the device wait for nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from torch_vtensor.generation.serving.request import Request

__all__ = ["Launches"]


class _Launch(NamedTuple):
    """Tokens, when they are there, and whose they are: of which of a request's starts."""

    tokens: torch.Tensor
    event: Any
    whose: list[tuple[Request, int]]


class Launches:
    """What was launched and has not been read, in order."""

    def __init__(self) -> None:
        self._pending: deque[_Launch] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def note(self, tokens: torch.Tensor, whose: Sequence[Request]) -> None:
        """Have these tokens brought to the host, one for each request."""
        event = torch.cuda.Event() if tokens.device.type == "cuda" else None
        copied = tokens.to("cpu", non_blocking=True, copy=True)
        if event is not None:
            event.record()
        self._pending.append(_Launch(copied, event, [(request, request.num_starts) for request in whose]))

    def read(self, num_pending: int) -> Iterator[tuple[Request, int]]:
        """The tokens that are there, waiting for all but the last ``num_pending`` launches.

        Those of requests that have ended or begun anew since they were launched are left out.
        """
        while self._pending:
            launch = self._pending[0]
            if launch.event is not None and not launch.event.query():
                if len(self._pending) <= num_pending:
                    break
                launch.event.synchronize()
            self._pending.popleft()
            for (request, start), token in zip(launch.whose, launch.tokens.tolist(), strict=True):
                if not request.has_ended and request.num_starts == start:
                    yield request, token

    def clear(self) -> None:
        """Forget all of it."""
        self._pending.clear()
