"""One request: transformers' own state of it, what of it is under way, and where its rows are."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch_vtensor.generation.serving.rows import SequenceRows

__all__ = ["Request"]


@dataclass(eq=False)
class Request:
    """A request from its arrival to its end.

        prompt                    generated, known here      launched
        [0, … tokens of the prompt)[ … what the host has read)[ … on the device only)

    Args:
        state: transformers' ``RequestState``, in which the tokens are that the host knows.
        arrival: numbers requests by when they came.
        salt: the tenant.
    """

    state: Any
    arrival: int
    salt: Hashable = None
    rows: SequenceRows | None = None
    num_launched: int = 0
    """New tokens that were asked of the device so far, those that the host knows included."""
    num_starts: int = 0
    """How often it was begun: what was launched for an earlier start does not count any more."""
    mark: Any = None
    """Of the model as it was at the last start, where prefixes are reused."""
    num_lent: int = 0
    """Rows that it has begun with at its last start."""
    waits_since: float | None = None
    """When it first found no memory, alone, since it last had any."""
    num_shortages: int = 0
    """How often what was run for it alone ran out of memory since its last token."""
    has_ended: bool = False

    @property
    def tokens(self) -> list[int]:
        """The prompt, and what is known of the answer."""
        known: list[int] = self.state.initial_tokens + self.state.generated_tokens
        return known

    @property
    def num_tokens(self) -> int:
        """How many ``tokens`` there are."""
        return len(self.state.initial_tokens) + self.num_known

    @property
    def limit(self) -> int:
        """How many new tokens it gets at most."""
        most: int = self.state._new_tokens_limit
        return most

    def cap(self, most: int) -> None:
        """Have it get no more new tokens than so many."""
        self.state._new_tokens_limit = min(self.state._new_tokens_limit, most)

    @property
    def num_known(self) -> int:
        """How many new tokens the host has read."""
        return len(self.state.generated_tokens)

    @property
    def wants_more(self) -> bool:
        """Whether the device is to be asked for another token."""
        return not self.has_ended and self.num_launched < self.limit
