"""Captures of one thread, and fences of another: neither begins during the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from torch_vtensor.allocator.captures import another_captures, between_captures, capturing


class Capturing:
    """Another thread, inside `capturing` until ``end`` is set."""

    def __init__(self) -> None:
        self.end, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self._thread.start()
        assert self._begun.wait(10)

    def _capture(self) -> None:
        with capturing():
            self._begun.set()
            self.end.wait(10)

    def join(self) -> None:
        self.end.set()
        self._thread.join(10)


@pytest.fixture
def other() -> Iterator[Capturing]:
    made = Capturing()
    yield made
    made.join()


def test_whose_capture_it_is(other: Capturing) -> None:
    assert another_captures()
    other.join()
    assert not another_captures()
    with capturing():
        assert not another_captures(), "its own"


def test_a_fence_waits_for_a_capture_to_end(other: Capturing) -> None:
    made = threading.Event()

    def fence() -> None:
        with between_captures():
            made.set()

    thread = threading.Thread(target=fence, daemon=True)
    thread.start()
    assert not made.wait(0.1)
    other.join()
    assert made.wait(10)
    thread.join(10)


def test_a_capture_waits_for_a_fence() -> None:
    with between_captures():
        thread = threading.Thread(target=lambda: Capturing().join(), daemon=True)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert not another_captures()
    thread.join(10)
    assert not thread.is_alive()
