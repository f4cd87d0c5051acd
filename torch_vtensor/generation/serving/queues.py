"""Where every request is, from its arrival to its end.

waiting ──begin──> prompts ──first token──> seated ──last token──> ended
   └──────────────────<──begins anew when memory is short──┘
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch_vtensor.generation.serving.request import Request

__all__ = ["Queues"]


class Queues:
    """Requests that wait, those whose prompts are taken up, those that have a seat.

    ``active`` are all that have rows: those of ``prompts``, of ``seated``, and those that only wait for their last
    token to be read.
    """

    def __init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.prompts: deque[Request] = deque()
        self.seated: list[Request] = []
        self.active: list[Request] = []
        self.holds_back = False
        """Nobody begins until somebody has ended: memory was short."""
        self._num_arrived = 0

    def add(self, state: Any, salt: Any) -> None:
        """Take in a request."""
        self.waiting.append(Request(state, self._num_arrived, salt))
        self._num_arrived += 1

    def begin(self, request: Request) -> None:
        """A request that has waited has rows now."""
        self.waiting.remove(request)
        self.active.append(request)
        self.prompts.append(request)

    def begin_anew(self, request: Request) -> None:
        """A request loses its rows, and waits to be run again from its tokens, before those that came later."""
        self._take_away(request)
        request.num_starts += 1
        request.num_launched = request.num_known
        self.waiting.appendleft(request)

    def begin_all_anew(self) -> None:
        """All requests lose their rows."""
        for request in sorted(self.active, key=lambda each: each.arrival, reverse=True):
            self.begin_anew(request)

    def leave(self, request: Request) -> None:
        """A request has ended, well or not; its memory is free at once."""
        request.has_ended = True
        self.holds_back = False
        self._take_away(request)
        if request in self.waiting:
            self.waiting.remove(request)

    def of(self, request_id: str) -> list[Request]:
        """The requests with this id."""
        return [each for each in self.everybody() if each.state.request_id == request_id]

    def everybody(self) -> list[Request]:
        """All requests that have not ended."""
        return [*self.active, *self.waiting]

    def newest(self) -> Request:
        """Who came last of those with rows."""
        return max(self.active, key=lambda each: each.arrival)

    def hand_over(self, other: Queues) -> None:
        """Let all requests, which wait, wait there."""
        other.waiting, other._num_arrived = self.waiting, self._num_arrived
        self.waiting = deque()

    def _take_away(self, request: Request) -> None:
        for several in (self.active, self.prompts):
            if request in several:
                several.remove(request)
        if request.rows is not None:
            request.rows.close()
            request.rows = None
