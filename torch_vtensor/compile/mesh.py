"""Where a plan can put work: the ranks of a mesh."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """The ranks that run a plan. A process on its own is a mesh of the one rank 0."""

    ranks: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        """Name the ranks."""
        return f"Mesh of {len(self.ranks)} rank{'s' if len(self.ranks) != 1 else ''}: {', '.join(map(str, self.ranks))}"
