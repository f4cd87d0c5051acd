"""Where a plan can put work: the ranks of a mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Mesh:
    """Ranks in a grid with named axes, the last axis running fastest, as torch's DeviceMesh.

    A process on its own is a mesh of the one rank 0. ``mesh["pp", 1]`` is the part at index 1 of an axis,
    ``mesh["tp"]`` are the parts at every index of one.
    """

    ranks: tuple[int, ...] = (0,)
    axes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Refuse axes that the ranks do not fill."""
        if self.axes and math.prod(self.axes.values()) != len(self.ranks):
            shape = " × ".join(f"{name} {size}" for name, size in self.axes.items())
            raise ValueError(f"a mesh of {shape} needs {math.prod(self.axes.values())} ranks, got {len(self.ranks)}.")

    @property
    def all(self) -> tuple[int, ...]:
        """Every rank."""
        return self.ranks

    def size(self, axis: str) -> int:
        """How many parts an axis has; 1 for an axis that the mesh lacks, so that a plan need not ask."""
        return self.axes.get(axis, 1)

    def parts(self, axis: str) -> tuple[Mesh, ...]:
        """The parts at every index of an axis; the mesh itself where it lacks the axis."""
        if axis not in self.axes:
            return (self,)
        names = list(self.axes)
        position = names.index(axis)
        inner = math.prod([self.axes[name] for name in names[position + 1 :]])
        rest = {name: size for name, size in self.axes.items() if name != axis}
        found: list[list[int]] = [[] for _ in range(self.axes[axis])]
        for index, rank in enumerate(self.ranks):
            found[index // inner % self.axes[axis]].append(rank)
        return tuple(Mesh(tuple(ranks), MappingProxyType(rest)) for ranks in found)

    def __getitem__(self, key: str | tuple[str, int]) -> tuple[Mesh, ...] | Mesh:
        """``mesh["tp"]``: the parts along an axis; ``mesh["pp", 0]``: one of them.

        Raises:  ValueError for an axis that the mesh does not have, or an index past its end.
        """
        axis, index = (key, None) if isinstance(key, str) else key
        if axis not in self.axes:
            raise ValueError(f"the {self} has no axis {axis!r}. Name axes in options={{'mesh': {{{axis!r}: size}}}}.")
        parts = self.parts(axis)
        if index is None:
            return parts
        if not 0 <= index < len(parts):
            raise ValueError(f"axis {axis!r} of the {self} has indices 0 to {len(parts) - 1}, got {index}.")
        return parts[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __str__(self) -> str:
        """Name the axes and the ranks."""
        shape = " × ".join(f"{name} {size}" for name, size in self.axes.items())
        many = f"{len(self.ranks)} rank{'s' if len(self.ranks) != 1 else ''}"
        return f"Mesh {shape}, {many}" if shape else f"Mesh of {many}: {', '.join(map(str, self.ranks))}"


Place = int | Mesh | Sequence[int]
"""A rank, or several that each run all of it."""


def ranks_of(place: Place) -> tuple[int, ...]:
    """The ranks of a place."""
    return (place,) if isinstance(place, int) else tuple(place)


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 1``, ``ranks 0, 4 … 60``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks)) if len(ranks) < 5 else f'{ranks[0]}, {ranks[1]} … {ranks[-1]}'}"
