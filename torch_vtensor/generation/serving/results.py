"""Results: what the device has said, brought to those who asked."""

from __future__ import annotations

from typing import Any

from torch_vtensor.generation.serving._transformers_compat import RequestStatus
from torch_vtensor.generation.serving.known import Known
from torch_vtensor.generation.serving.launches import Launches
from torch_vtensor.generation.serving.queues import Queues
from torch_vtensor.generation.serving.request import Request
from torch_vtensor.generation.serving.support import counters

__all__ = ["Results"]


class Results:
    """Reads what was launched, a few steps behind the device, and delivers it.

    Args:
        router: transformers' ``OutputRouter``, which brings what was said to who asked.
    """

    def __init__(self, queues: Queues, known: Known, router: Any) -> None:
        self.launched = Launches()
        self._queues = queues
        self._known = known
        self._router = router
        self._outputs: list[Any] = []

    def read(self, num_pending: int) -> None:
        """Take up what the device has finished, and wait for all but the last ``num_pending`` launches."""
        for request, token in self.launched.read(num_pending):
            self._say(request, token)

    def deliver(self) -> None:
        """Bring what was taken up to those who asked."""
        if self._outputs:
            self._router.deliver_batch(self._outputs)
            self._outputs = []

    def fail(self, request: Request, error: Exception) -> None:
        """End a request by an error, if it has not ended; what it has said before comes first."""
        if not request.has_ended:
            counters[f"failed: {type(error).__name__}"] += 1
            self._queues.leave(request)
            self.deliver()
            self._router.fail_and_deliver(request.state, error)

    def _say(self, request: Request, token: int) -> None:
        state, request.num_shortages = request.state, 0
        state.status = RequestStatus.DECODING
        is_last = state.update_and_check_completion(token, None)
        counters["tokens generated"] += 1
        if is_last:
            counters["finished"] += 1
            self._known.record(request)
            self._queues.leave(request)
        if is_last or state.streaming:
            self._outputs.append(state.to_generation_output())
