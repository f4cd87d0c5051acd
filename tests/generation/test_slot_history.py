"""SlotHistory: the caches of a process begin with the same one, whatever threads they are on."""

from __future__ import annotations

from typing import Any

import torch

from torch_vtensor.generation.slot_history import SlotHistory


class Raced(SlotHistory):
    """A history in which another thread moves other slots behind every look at the last move."""

    interference: Any = None

    @property
    def _last_move(self) -> Any:
        move = self.__dict__["_last_move"]
        if self.interference is not None:
            self.__dict__["_last_move"] = self.interference
        return move

    @_last_move.setter
    def _last_move(self, move: Any) -> None:
        self.__dict__["_last_move"] = move


def test_a_move_on_another_thread_is_not_taken_for_ones_own() -> None:
    history = Raced(torch.zeros(2, 2, dtype=torch.int64), 0)
    others = history.moved((1, 0), 5)
    mine = history.moved((0, 0), 5)
    assert (mine.donors, others.donors) == ((0, 0), (0, 1))
    history.interference = ((1, 0), 5, lambda: others)
    assert history.moved((0, 0), 5) is mine
