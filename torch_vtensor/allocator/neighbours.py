"""What other processes keep idle on the same device: asked for before somebody is told that there is no memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch_vtensor.status import ask_to_trim

__all__ = ["idle_memory_of_others"]

_log = logging.getLogger(__name__)
_MOST_WAIT_S = 1.0
_PAUSE_S = 0.002


def idle_memory_of_others(folder: Path, identity: str, nbytes: int, heed: Callable[[], object]) -> Iterator[None]:
    """Ask the others on a device for ``nbytes``; an item whenever one of them has given what it can.

    Args:
        identity: the device's, in their status files.
        heed: what this process owes the others: of two that are short at once, neither waits for the other's end.

    Effects: waits for their answers, a second at most.
    """
    try:
        requests = ask_to_trim(folder, identity, nbytes)
    except OSError as error:
        _log.info("other processes cannot be asked for memory: %s", error)
        return
    deadline = time.monotonic() + _MOST_WAIT_S
    while requests and time.monotonic() < deadline:
        heed()
        time.sleep(_PAUSE_S)
        unanswered = [request for request in requests if not request.is_answered()]
        if len(unanswered) < len(requests):
            yield
        requests = unanswered
