"""The memory that is predicted for collectives is what a rank holds while it runs them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import grid
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from torch_vtensor.compile.communication import Collective, StepFacts
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.topology import Topology
from torch_vtensor.compile.transport import ProcessGroups
from torch_vtensor.compile.worlds import group_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

SHAPE, RANKS, RANK = (16, 24), (0, 1, 2, 3), 1
NOWHERE = torch.device("meta")  # as a GPU: no copy is for gloo
ITEMSIZE = torch.float32.itemsize


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """One rank of four, whose collectives move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=len(RANKS))
    yield
    dist.destroy_process_group()


class Groups(ProcessGroups):
    """Those of a program that is not asked for."""

    def __init__(self) -> None:
        self._groups = {RANKS: group_of(RANKS)}


class Held(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [tensor.untyped_storage() for tensor in tensors_in((args, kwargs))]
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_in(made):
            if not any(tensor.untyped_storage() is storage for storage in read):
                self._storages[tensor.untyped_storage()] = None
        self.num_bytes = max(self.num_bytes, sum(storage.nbytes() for storage in self._storages))
        return made


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("ranks", [RANKS, (2, 0, 3, 1)], ids=["ascending", "in another order"])
@pytest.mark.parametrize(
    ("kind", "have", "need"),
    [
        ("all_reduce", "V", "R"),
        ("reduce_scatter", "V", 0),
        ("reduce_scatter", "V", 1),
        ("all_gather", 0, "R"),
        ("all_gather", 1, "R"),
        ("all_to_all", 0, 1),
        ("all_to_all", 1, 0),
    ],
)
def test_a_collective_holds_what_is_predicted(
    kind: str, have: str | int, need: str | int, ranks: tuple[int, ...]
) -> None:
    parts = (grid(SHAPE, ranks, [(4, have)]), grid(SHAPE, ranks, [(4, need)]))
    step = find_communication(SHAPE, ITEMSIZE << 20, *parts, Topology()).steps[0]
    assert isinstance(step, Collective)
    assert (step.kind, set(step.ranks)) == (kind, set(RANKS))
    facts = StepFacts.of(step, ITEMSIZE, Topology())
    (given,) = (torch.empty(buffer.mask.shape, device=NOWHERE) for buffer in step.reads(RANK))
    with Held() as held:
        made = Groups().collective("one", [step], RANK, [given], given.dtype, NOWHERE).wait()
    brought = sum(buffer.mask.num_elements for buffer in step.writes(RANK)) * ITEMSIZE
    assert sum(tensor.nbytes for tensor in made) == brought
    assert held.num_bytes == brought + facts.workspace_bytes
