"""Pages change their memory while others are copied, and neighbours become one page on the way."""

from collections.abc import Sequence

import pytest
import torch
from scripted_drivers import PAGE, FailingDriver, LateDriver
from sequences import close
from vtensors import MakeScheduler

from torch_vtensor.allocator import page_copy
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.moves import _neighbours
from torch_vtensor.allocator.prefix import Lane, PrefixTree
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import DriverError


def grown(scheduler: GrowthScheduler, num_rows: int, num_slots: int = 1) -> tuple[VTensor, torch.Tensor]:
    """A tensor with rows of a page each, which has grown by a page at a time, and what it holds."""
    vtensor = VTensor(
        (PAGE,), capacity=200, dtype=torch.uint8, outer_shape=(num_slots,), scheduler=scheduler, adopt=False
    )
    for num in range(1, num_rows + 1):
        vtensor._range.commit(num * PAGE)
    assert vtensor.num_pages == num_rows * num_slots
    expected = torch.randint(256, (num_slots, num_rows, PAGE), dtype=torch.uint8)
    vtensor.append(expected)
    return vtensor, expected


def sizes(vtensor: VTensor) -> list[int]:
    return [nbytes // PAGE for nbytes in vtensor._range.run([0]).sizes]


@pytest.mark.parametrize("is_always_mapped", [False, True])
@pytest.mark.parametrize("way", ["sleep", "offload"])
def test_what_is_copied_late_is_not_unmapped_before(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch, way: str, is_always_mapped: bool
) -> None:
    monkeypatch.setattr(page_copy, "_CHUNK_BYTES", 20 * PAGE)
    monkeypatch.setattr(LateDriver, "keeps_offloaded_mapped", is_always_mapped)
    driver = LateDriver()
    scheduler = make_scheduler(driver)
    (vtensor, expected), view = grown(scheduler, 100, 2), None
    fork = vtensor.fork([1])
    view = vtensor.tensor()
    for _ in range(3):
        for move in [scheduler.sleep] if way == "sleep" else [vtensor.offload, fork.offload]:
            move()
        assert driver.num_unmapped_meanwhile > 0
        for move in [scheduler.wake] if way == "sleep" else [vtensor.prefetch, fork.prefetch]:
            move()
        assert torch.equal(view, expected)
        assert torch.equal(fork.tensor()[0], expected[1])
        assert (vtensor.offloaded_bytes, fork.offloaded_bytes, vtensor.shared_bytes) == (0, 0, 100 * PAGE)
        driver.num_unmapped_meanwhile = 0


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        ([1] * 3, "111", []),
        ([1] * 4, "1111", [(0, 4)]),
        ([1] * 6, "110111", []),
        ([1] * 16, "1" * 16, [(0, 16)]),
        ([1] * 23, "1" * 23, [(0, 16), (16, 20)]),
        ([16, 4, 4, 4, 4, 1], "111111", [(1, 5)]),
        ([4, 1, 1, 1, 1, 4, 4], "1111111", [(0, 7)]),
        ([4, 16, 1, 1, 1, 1], "111111", [(2, 6)]),
        ([1] * 9, "0" + "1" * 8, [(1, 5), (5, 9)]),
    ],
)
def test_which_neighbours_have_the_size_of_one_page(
    given: Sequence[int], own: str, expected: list[tuple[int, int]]
) -> None:
    assert list(_neighbours(given, [it == "1" for it in own], (1, 4, 16))) == expected


@pytest.mark.parametrize("way", ["sleep", "discard", "offload"])
def test_what_grew_in_small_steps_comes_back_in_large_pages(make_scheduler: MakeScheduler, way: str) -> None:
    scheduler = make_scheduler()
    vtensor, expected = grown(scheduler, 39, 2)
    address, view, committed_bytes = vtensor.data_ptr, vtensor.tensor(), vtensor.committed_bytes
    if way == "offload":
        assert vtensor.offload() == committed_bytes
        assert torch.equal(view, expected), "where it is"
        assert vtensor.prefetch() == committed_bytes
    else:
        assert scheduler.sleep(discard=None if way == "discard" else ()) >= committed_bytes
        assert scheduler.wake() == committed_bytes
    assert sizes(vtensor) == [16, 16, 4, 1, 1, 1]
    assert (vtensor.data_ptr, vtensor.committed_bytes) == (address, committed_bytes)
    expected = torch.zeros_like(expected) if way == "discard" else expected
    assert torch.equal(view, expected)
    fork = vtensor.fork()
    more = torch.full((2, 30, PAGE), 3, dtype=torch.uint8)
    assert torch.equal(vtensor.append(more), torch.cat([expected, more], 1))
    assert torch.equal(fork.tensor(), expected)
    fork.drop_head(20)
    assert fork.first_row == 16
    assert torch.equal(fork.tensor(), expected[:, 16:])
    del view


def test_shared_pages_stay_what_they_are(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    vtensor, expected = grown(scheduler, 40)
    fork = vtensor.fork(share_rows=10)
    scheduler.sleep()
    scheduler.wake()
    assert sizes(vtensor) == [1] * 10 + [16, 4, 4, 4, 1, 1]
    assert fork.shared_bytes == 10 * PAGE
    assert torch.equal(vtensor.tensor(), expected)
    assert torch.equal(fork.tensor(), expected)
    fork.close()
    scheduler.trim()
    scheduler.sleep()
    scheduler.wake()
    assert sizes(vtensor) == [4, 4, 1, 1, 16, 4, 4, 4, 1, 1]
    assert torch.equal(vtensor.tensor(), expected)


def test_pages_of_a_prefix_stay_what_they_are_as_long_as_it_is_there(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler()
    tree = PrefixTree((Lane((PAGE,), (), torch.uint8),), scheduler=scheduler)
    vtensor, expected = grown(scheduler, 20)
    tokens = list(range(20))
    tree.record(tokens, [vtensor])
    scheduler.sleep()
    scheduler.wake()
    assert sizes(vtensor) == [1] * 20
    tree.check_integrity()
    loan = tree.fork([tokens], capacity=200)
    assert loan is not None
    assert torch.equal(loan.vtensors[0].tensor(), expected)
    loan.vtensors[0].close()
    tree.evict()
    vtensor.offload()
    vtensor.prefetch()
    assert sizes(vtensor) == [16, 4]
    tree.record(tokens, [vtensor])
    tree.check_integrity()
    later = tree.fork([tokens], capacity=200)
    assert later is not None
    assert torch.equal(later.vtensors[0].tensor(), expected)
    close([vtensor, *later.vtensors])
    tree.evict()


def test_a_move_that_stops_halfway_loses_nothing(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages whose memory went back to the system get other memory; where there is none, the tensor sleeps."""
    monkeypatch.setattr(page_copy, "_CHUNK_BYTES", 16 * PAGE)
    for has_memory in (True, False):
        driver = FailingDriver(kind="copy")
        scheduler = make_scheduler(driver)
        vtensor, expected = grown(scheduler, 150)
        driver.fail_at = 7  # of ten copies
        if not has_memory:
            scheduler.pool.budget_bytes = PAGE
        with pytest.raises(DriverError):
            scheduler.sleep()
        assert vtensor.is_asleep == (not has_memory)
        scheduler.pool.budget_bytes = None
        scheduler.wake()
        assert torch.equal(vtensor.tensor(), expected)
        assert (vtensor.is_asleep, vtensor.offloaded_bytes) == (False, 0)
