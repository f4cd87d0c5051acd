"""Garbage that a test wants to be gone."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

__all__ = ["collect"]


def collect() -> None:
    """``gc.collect()`` that has collected: that one does nothing while another thread is at it.

    As ours may be, whenever something is allocated there; and while what it finalizes calls a driver, this one runs.
    """
    thread, has_collected = threading.get_ident(), threading.Event()

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop" and info["generation"] == 2 and threading.get_ident() == thread:
            has_collected.set()

    gc.callbacks.append(note)
    try:
        gc.collect()
        while not has_collected.is_set():
            time.sleep(0.001)
            gc.collect()
    finally:
        gc.callbacks.remove(note)
