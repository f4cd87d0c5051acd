"""What torch.distributed.checkpoint asks a sharded tensor: which boxes this rank writes and reads, and where.

Of a tensor that three ranks keep parts of, each element is written once and read wherever it is kept::

    rank 0   keeps rows 0 to 4   writes [0:4]   reads [0:4]
    rank 1   keeps rows 2 to 6   writes [4:6]   reads [4:6], [2:4]
    rank 2   keeps nothing       writes, reads nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_vtensor.compile.tensor_view import Mask

if TYPE_CHECKING:
    from torch_vtensor.compile.sharded_tensor import Layout


def write_items(name: str, local: Tensor, layout: Layout) -> list[Any]:
    """What this rank saves: `WriteItem` values of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    properties, size = TensorProperties.create_from_tensor(local), torch.Size(layout.shape)
    return [
        WriteItem(
            MetadataIndex(name, _offsets(box)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=_chunk(box), properties=properties, size=size),
        )
        for box in _written(layout)
    ]


def chunks(layout: Layout) -> list[Any]:
    """What this rank loads: `ChunkStorageMetadata` values of torch.distributed.checkpoint."""
    return [_chunk(box) for box in _read(layout)]


def shard(offsets: torch.Size, local: Tensor, layout: Layout) -> Tensor:
    """The memory of the box that begins there: boxes that are read do not overlap, and those written are among them."""
    for box in _read(layout):
        if _offsets(box) == offsets:
            return local.detach()[box.within(layout.parts[layout.rank])]
    raise ValueError(
        f"{layout} has no box that begins at {list(offsets)}; it has {', '.join(map(str, _read(layout)))}."
    )


def _written(layout: Layout) -> list[Mask]:
    return [box for rank, box in layout.counted() if rank == layout.rank]


def _read(layout: Layout) -> Iterator[Mask]:
    part = layout.parts.get(layout.rank)
    if part is None:
        return
    rest = [part]
    for written in _written(layout):
        yield written
        rest = [left for box in rest for left in box.difference(written)]
    yield from rest


def _chunk(box: Mask) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=_offsets(box), sizes=torch.Size(box.shape))


def _offsets(box: Mask) -> torch.Size:
    return torch.Size(interval.start for interval in box.intervals)
