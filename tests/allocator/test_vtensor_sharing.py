"""VTensors that share pages, with forks and with views: copies on write, and no more than what must be copied."""

import pytest
import torch
from scripted_drivers import PAGE
from vtensors import MakeScheduler, make, rows

from torch_vtensor.allocator.growth import GrowthScheduler


@pytest.fixture
def scheduler(make_scheduler: MakeScheduler) -> GrowthScheduler:
    return make_scheduler()


def test_writing_again_what_a_view_shows_moves_the_tensor(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler, 100)
    view, address = vtensor.tensor(), vtensor.data_ptr
    vtensor.truncate(40)
    assert torch.equal(vtensor.append(rows(2, 300, start=900)), torch.cat([rows(40, 300), rows(2, 300, start=900)]))
    assert vtensor.data_ptr != address
    assert torch.equal(view, rows(100, 300))


def test_writing_again_what_a_view_from_before_growing_shows(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler, 20)
    view = vtensor.tensor()
    vtensor.append(rows(500, 300))  # later views are of another, longer storage
    vtensor.truncate(10)
    vtensor.append(rows(5, 300, start=700))
    assert torch.equal(view, rows(20, 300))


@pytest.mark.parametrize("writer", ["source", "fork"])
def test_writing_again_what_another_tensor_shares(scheduler: GrowthScheduler, writer: str) -> None:
    source = make(scheduler, 100)
    fork = source.fork()
    writing, other = (fork, source) if writer == "fork" else (source, fork)
    for length in (50, 7):
        writing.truncate(length)
        writing.append(rows(40, 300, start=500))
        assert torch.equal(writing.tensor()[:7], rows(7, 300))
        assert torch.equal(other.tensor(), rows(100, 300))
    other.close()
    scheduler.settle()
    address = writing.data_ptr
    writing.truncate(3)  # nobody else sees them any more
    writing.append(rows(40, 300))
    assert writing.data_ptr == address


def test_writing_again_what_nobody_sees_stays_in_place(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler, 100)
    address, calls = vtensor.data_ptr, scheduler.stats().num_driver_calls
    for length in (40, 10, 0):
        vtensor.tensor()
        vtensor.truncate(length)
        vtensor.append(rows(50, 300))
    assert (vtensor.data_ptr, scheduler.stats().num_driver_calls) == (address, calls)


def test_a_fork_shares_whole_pages_and_copies_the_rest(scheduler: GrowthScheduler) -> None:
    source = make(scheduler, 100)
    used, before = 100 * source.row_bytes, scheduler.stats()
    fork = source.fork()
    after = scheduler.stats()
    assert after.shared_bytes == fork.shared_bytes == used // PAGE * PAGE
    assert after.live_bytes - before.live_bytes == PAGE  # the written part of the last page
    source.append(rows(5, 300, start=200))
    fork.append(rows(5, 300, start=300))
    assert torch.equal(source.tensor(), torch.cat([rows(100, 300), rows(5, 300, start=200)]))
    assert torch.equal(fork.tensor(), torch.cat([rows(100, 300), rows(5, 300, start=300)]))


def test_many_forks_of_a_long_prefix_cost_their_tails(scheduler: GrowthScheduler) -> None:
    source = make(scheduler, 2000, capacity=4000)
    prefix_bytes = scheduler.stats().live_bytes
    forks = [source.fork() for _ in range(64)]
    for index, fork in enumerate(forks):
        fork.append(rows(1, 300, start=index))
    assert scheduler.stats().live_bytes <= prefix_bytes + 64 * 2 * PAGE
    assert [fork.tensor()[-1, 0].item() for fork in forks] == list(range(64))


def test_selected_slots_repeat_and_reorder(scheduler: GrowthScheduler) -> None:
    source, values = make(scheduler, outer_shape=(3, 2)), torch.randn(3, 2, 60, 300)
    source.append(values)
    beams = source.fork([2, 0, 2, 2], capacity=2000)
    assert (beams.outer_shape, beams.capacity) == ((4, 2), 2000)
    assert torch.equal(beams.tensor(), values[[2, 0, 2, 2]])
    new = torch.randn(4, 2, 1, 300)
    assert torch.equal(beams.append(new)[:, :, -1:], new)
    assert torch.equal(source.tensor(), values)
