"""One tensor that some ranks make and some read: who does, and what moves between them, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch_vtensor.compile.addends import Reader
from torch_vtensor.compile.communication import Buffer, Communication, Placed
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import LogicalTensor


class Instance(NamedTuple):
    """A task on one of the ranks that run it."""

    task: Task
    rank: int


class Input(NamedTuple):
    """What an instance reads at one position.

    ``source`` is the instance whose output it is as it is, forward and backward, if there is one. ``group`` and
    ``part`` tell where its gradient goes, None where it gives none.
    """

    exchange: Exchange
    reader: Reader
    source: Instance | None
    group: GradientGroup | None
    part: Placed | None


@dataclass(eq=False)
class GradientGroup:
    """Readers of a tensor that hold the same addends of its gradient on the same ranks: added up before they move.

    ``addends`` has the readers that contribute to each part that a rank holds; ``communication`` takes these parts to
    the makers.
    """

    addends: Mapping[Placed, tuple[Reader, ...]]
    communication: Communication


@dataclass(eq=False)
class Exchange:
    """One tensor, of one microbatch where it has any: makers, readers, and what moves between them.

    ``makers`` are the instances that write each part, empty for what is there from the start. ``groups`` is empty where
    no gradient flows. What is read ``anew`` moves for forward passes, and again for backward ones that need it.
    """

    tensor: LogicalTensor
    microbatch: int | None
    makers: Mapping[Placed, tuple[Instance, ...]]
    readers: tuple[Reader, ...]
    communication: Communication
    groups: tuple[GradientGroup, ...] = ()
    anew: bool = False

    @cached_property
    def contributes(self) -> Mapping[Reader, tuple[GradientGroup, Placed]]:
        """The group and the part of the gradient to which a reader contributes; nothing for those that give none."""
        return {
            reader: (group, part)
            for group in self.groups
            for part, readers in group.addends.items()
            for reader in readers
        }

    def buffer(self, reader: Reader) -> Buffer:
        """The buffer that a reader reads."""
        return self.communication.need[Placed(reader.rank, reader.mask)]

    @cached_property
    def serves(self) -> tuple[tuple[Instance | None, GradientGroup | None, Placed | None], ...]:
        """What an `Input` tells of each reader: its source, and the group and the part of its gradient."""
        # By identity: what readers and masks hold takes long to hash.
        contributes = {
            id(reader): (group, part)
            for group in self.groups
            for part, readers in group.addends.items()
            for reader in readers
        }
        sources: dict[tuple[int, int, int], Instance | None] = {}
        found: list[tuple[Instance | None, GradientGroup | None, Placed | None]] = []
        for reader in self.readers:
            group, part = contributes.get(id(reader), (None, None))
            asked = reader.rank, id(reader.mask), id(group)
            if asked not in sources:
                sources[asked] = self._direct_source(Placed(reader.rank, reader.mask), group)
            found.append((sources[asked], group, part))
        return tuple(found)

    def _direct_source(self, part: Placed, group: GradientGroup | None) -> Instance | None:
        """The task on a reader's rank whose output it reads as it is, if the gradient also comes back as it is."""
        makers = self.makers.get(part, ())
        if not makers or self.communication.need[part] != self.communication.have[part]:
            return None
        if self.groups:
            if group is None:
                return None
            region = Placed(part.rank, part.mask.region)
            needed = group.communication.need[region]
            if needed != group.communication.have.get(region) or part != region:
                return None
            if needed in group.communication.sent:
                return None
        return makers[0]
