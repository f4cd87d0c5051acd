"""SlotHistory: how many leading tokens the slots of a layer have in common.

Beam search moves slots about at every step, but two beams differ only since they parted. Moving the tokens behind
that point is enough, and the whole pages before it can be the same pages for both.

    slot 0   a b c d e f          slots = (1, 1, 2): slot 0 takes over slot 1's tokens,
    slot 1   a b c d x y          of which it has the first 4 already;
    slot 2   p q r s t u          afterwards slots 0 and 1 have all 6 in common
"""

from __future__ import annotations

import weakref
from functools import lru_cache

import torch

__all__ = ["SlotHistory"]

_ITSELF = torch.iinfo(torch.int64).max


class SlotHistory:
    """For any two slots, a number of leading tokens that are surely equal. Moving slots makes a new history.

    Args:
        common: [slots, slots] tokens.
        stop: how many tokens every slot has.
        differs_from: the token before which no slot changed in the move that led here.

    Units: tokens.
    """

    def __init__(self, common: torch.Tensor, stop: int, differs_from: int = 0) -> None:
        self.differs_from = differs_from
        donors = (2 * common >= stop).int().argmax(1)
        self.donors: tuple[int, ...] = tuple(donors.tolist())
        """For each slot the first one that begins with the same half of the tokens, or itself."""
        self.num_donated = int(common.gather(1, donors[:, None]).min())
        """The tokens that every slot has in common with its donor."""
        self._common = common.fill_diagonal_(_ITSELF)
        self._last_move: tuple[tuple[int, ...], int, weakref.ref[SlotHistory]] | None = None

    @staticmethod
    @lru_cache(maxsize=16)
    def unknown(num_slots: int) -> SlotHistory:
        """Slots of which nothing is known to be equal."""
        with torch.inference_mode(False):
            return SlotHistory(torch.zeros(num_slots, num_slots, dtype=torch.int64, device="cpu"), 0)

    def moved(self, slots: tuple[int, ...], stop: int) -> SlotHistory:
        """The history once slot i holds the tokens [0, ``stop``) that slot ``slots[i]`` holds now.

        The layers of a cache move one by one and alike, so they come to share the new history and its computation.
        """
        last_move = self._last_move  # once: other threads' caches begin with the same unknown() history
        if last_move is not None and last_move[:2] == (slots, stop):
            known = last_move[2]()
            if known is not None:
                return known
        with torch.inference_mode(False):
            sources = torch.tensor(slots, device="cpu")
            num_kept = min(len(slots), len(self._common))
            already = self._common[torch.arange(num_kept, device="cpu"), sources[:num_kept]]
            common = self._common[sources][:, sources].clamp_(max=stop)
            moved = SlotHistory(common, stop, min(int(already.min()), stop))
        self._last_move = (slots, stop, weakref.ref(moved))
        return moved

    def shortened(self, stop: int) -> SlotHistory:
        """The history once tokens from ``stop`` on are other ones."""
        with torch.inference_mode(False):
            return SlotHistory(self._common.clamp(max=stop), stop)
