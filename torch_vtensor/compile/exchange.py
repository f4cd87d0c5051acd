"""One tensor that some ranks make and some read: who does, and what moves between them, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(eq=False)
class GradientGroup:
    """Readers of a tensor that hold the same addends of its gradient on the same ranks: added up before they move.

    ``addends`` has the readers that contribute to each part that a rank holds; ``communication`` takes these parts to
    the makers.
    """

    addends: Mapping[Placed, tuple[Reader, ...]]
    communication: Communication

    @cached_property
    def part_of(self) -> Mapping[Reader, Placed]:
        """The part to which a reader contributes."""
        return {reader: part for part, readers in self.addends.items() for reader in readers}


@dataclass(eq=False)
class Exchange:
    """One tensor, of one microbatch where it has any: makers, readers, and what moves between them.

    ``makers`` are the instances that write each part, empty for what is there from the start. ``groups`` is empty where
    no gradient flows.
    """

    tensor: LogicalTensor
    microbatch: int | None
    makers: Mapping[Placed, tuple[Instance, ...]]
    readers: tuple[Reader, ...]
    communication: Communication
    groups: tuple[GradientGroup, ...] = ()
    group_of: Mapping[Reader, GradientGroup] = field(default_factory=dict)

    def buffer(self, reader: Reader) -> Buffer:
        """The buffer that a reader reads."""
        return self.communication.need[Placed(reader.rank, reader.mask)]

    def direct_source(self, reader: Reader) -> Instance | None:
        """The task on the reader's rank whose output it reads as it is, if the gradient also comes back as it is."""
        part = Placed(reader.rank, reader.mask)
        makers = self.makers.get(part, ())
        if not makers or self.buffer(reader) != self.communication.have[part]:
            return None
        if self.groups:
            group = self.group_of.get(reader)
            if group is None:
                return None
            region = Placed(reader.rank, reader.mask.region)
            needed = group.communication.need[region]
            if needed != group.communication.have.get(region) or reader.mask != reader.mask.region:
                return None
            if needed in group.communication.sent:
                return None
        return makers[0]
