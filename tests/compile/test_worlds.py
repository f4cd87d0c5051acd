"""Process groups and communication of a world of one rank, in this process."""

import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.communication import Buffer, Collective, Transfer
from torch_vtensor.compile.program import Move
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask
from torch_vtensor.compile.transport import ProcessGroups
from torch_vtensor.compile.worlds import group_of

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture
def world() -> Iterator[None]:
    begin()
    yield
    dist.destroy_process_group()


def begin() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_a_world_has_one_group_for_a_set_of_ranks(backend: str | None, world: None) -> None:
    made = group_of((0,), backend)
    assert made is not dist.group.WORLD
    assert group_of(range(1), backend) is made
    assert _torch_compat.timeout_of(made) == timedelta(seconds=77), "as the world's"
    dist.destroy_process_group()
    begin()
    assert group_of((0,), backend) is not made, "the group ended with its world"


class Groups(ProcessGroups):
    """Those of a program that is not asked for."""

    def __init__(self) -> None:
        self._groups = {(0,): group_of((0,))}


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
def test_collectives_of_several_tensors_are_begun_as_one_and_hold_on_to_nothing(
    kind: str, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin_together = _torch_compat.begin_together

    def counted(begin: list, group: object, device: torch.device) -> list:
        works = begin_together(begin, group, device)
        begun.append(len(begin))
        assert len(works) == 1
        return works

    monkeypatch.setattr(_torch_compat, "begin_together", counted)
    dims = {"all_gather": {"gather_dim": 0}, "reduce_scatter": {"scatter_dim": 0}}.get(kind, {})
    shapes = [(4, 2), (6,), (2, 2, 2)]
    steps = [Collective(kind, (Buffer(0, Mask.of(s)),), (Buffer(0, Mask.of(s), 1),), **dims) for s in shapes]
    given = [torch.randn(shape) for shape in shapes]
    pending = Groups().collective("several", steps, 0, given, torch.float32, torch.device("cpu"))
    made = pending.wait()
    assert begun == [3]
    assert all(torch.equal(*pair) for pair in zip(made, given, strict=True))
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*given, *made)]
    del given, made
    until = time.monotonic() + 10
    while not all(storage.expired() for storage in storages):  # gloo's thread lets go a little after it has told so
        assert time.monotonic() < until, "they are held"
        time.sleep(0.01)


def test_what_the_world_is_used_for_meanwhile_is_not_taken_for_a_program_s(world: None) -> None:
    """What another thread begins in the world's own group while collectives of a program begin together."""
    given, others = [torch.ones(3), torch.ones(3)], torch.ones(3)
    group = group_of((0,))
    meanwhile: list[dist.Work | None] = []

    def first() -> dist.Work | None:
        meanwhile.append(dist.all_reduce(others, async_op=True))
        return dist.all_reduce(given[0], group=group, async_op=True)

    def second() -> dist.Work | None:
        return dist.all_reduce(given[1], group=group, async_op=True)

    works = _torch_compat.begin_together([first, second], group, torch.device("cpu"))
    assert len(works) == 1
    (work,) = meanwhile
    assert work is not None, "it was taken for one of those that begin together"
    work.wait()


def test_messages_go_by_a_group_of_their_own_too(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the user's, of the same tag, could be taken for them."""
    whole = Mask.of((3,))
    step = Transfer(Buffer(0, whole), Buffer(1, whole, 1))
    move = Move(LogicalTensor("x", (3,), torch.float32), step, {})
    used: list[object] = []
    for name in ("isend", "irecv"):
        monkeypatch.setattr(dist, name, lambda data, peer, group, tag: used.append(group))
    groups = ProcessGroups(SimpleNamespace(moves=[move], work={"move": move}))
    groups.send("move", step, torch.ones(3))
    groups.receive("move", step, torch.float32, torch.device("cpu"))
    assert used == [group_of((0,)), group_of((0,))]
    assert dist.group.WORLD not in used


def test_what_is_interrupted_leaves_the_group_as_it_was(world: None) -> None:
    group, device = group_of((0,)), torch.device("cpu")
    given = torch.ones(3)

    def interrupted() -> None:
        raise KeyboardInterrupt

    def begin() -> dist.Work | None:
        return dist.all_reduce(given, group=group, async_op=True)

    with pytest.raises(KeyboardInterrupt):
        _torch_compat.begin_together([begin, interrupted], group, device)
    work = begin()
    assert work is not None
    work.wait()
    assert torch.equal(given, torch.ones(3))
    assert len(_torch_compat.begin_together([begin, begin], group, device)) == 1


def test_a_backend_that_cannot_begin_several_begins_each(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gloo with tensors of a GPU."""
    assert group_of((0,))._get_backend(torch.device("cpu")).name() == "gloo", "what is asked below has moved"
    group = SimpleNamespace(_get_backend=lambda device: SimpleNamespace(name=lambda: "gloo"))
    assert _torch_compat.begin_together([lambda: 1, lambda: 2], group, torch.device("cuda", 0)) == [1, 2]
