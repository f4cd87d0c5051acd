"""VTensor: what a caller can count on of one tensor, its views and its forks."""

import copy
import io
import sys
from collections.abc import Callable

import pytest
import torch
from scripted_drivers import PAGE
from vtensors import MakeScheduler, make, rows

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import CapacityError, ClosedError, DriverError, OutOfPagesError


@pytest.fixture
def scheduler(make_scheduler: MakeScheduler) -> GrowthScheduler:
    return make_scheduler()


def test_it_grows_in_place(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler, outer_shape=(2, 3))
    address, strides = vtensor.data_ptr, vtensor.strides()
    expected = torch.empty(2, 3, 0, 300)
    for num_rows in (1, 13, 0, 200, 1, 77):
        new = torch.randn(2, 3, num_rows, 300)
        result, expected = vtensor.append(new), torch.cat([expected, new], 2)
        assert torch.equal(result, expected)
        assert torch.equal(vtensor.tensor(), expected)
        assert (vtensor.data_ptr, vtensor.strides(), result.data_ptr()) == (address, strides, address)
        assert result.stride() == strides


def test_rows_inside_what_is_committed_cost_no_driver_call(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler)
    vtensor.commit(500)
    assert (vtensor.length, vtensor.committed >= 500) == (0, True)
    before = scheduler.stats().num_driver_calls
    for _ in range(5):
        vtensor.append(rows(100, 300))
    assert scheduler.stats().num_driver_calls == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128])
def test_every_dtype(scheduler: GrowthScheduler, dtype: torch.dtype) -> None:
    new = (torch.arange(90) % 5).to(dtype).reshape(30, 3)
    vtensor = VTensor((3,), capacity=40, dtype=dtype, scheduler=scheduler)
    result = vtensor.append(new)
    assert (result.dtype, result.shape, result.device.type) == (dtype, (30, 3), "cpu")
    assert torch.equal(result.view(torch.uint8), new.view(torch.uint8))


def test_a_view_is_an_ordinary_tensor_over_committed_bytes_only(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler, 50, capacity=10**9)
    view = vtensor.tensor()
    assert view.untyped_storage().nbytes() == vtensor.committed_bytes < scheduler.stats().reserved_bytes
    file = io.BytesIO()
    torch.save(view[:3], file)
    assert file.tell() < 2 * vtensor.committed_bytes
    file.seek(0)
    assert torch.equal(torch.load(file), rows(3, 300))
    assert torch.equal(copy.deepcopy(view), view)


@pytest.mark.parametrize("outer_shape", [(), (2,)])
def test_nothing_written_yet(scheduler: GrowthScheduler, outer_shape: tuple[int, ...]) -> None:
    vtensor = make(scheduler, outer_shape=outer_shape)
    empty = (*outer_shape, 0, 300)
    assert vtensor.tensor().shape == vtensor.append(torch.empty(empty)).shape == empty
    assert vtensor.fork().tensor().shape == empty
    vtensor.truncate(0)
    vtensor.drop_head(0)
    assert (vtensor.length, vtensor.committed_bytes, scheduler.stats().committed_bytes) == (0, 0, 0)


def test_less_than_a_page(scheduler: GrowthScheduler) -> None:
    vtensor = VTensor((), capacity=3, dtype=torch.uint8, scheduler=scheduler)
    assert vtensor.append(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [1, 2, 3]
    assert (vtensor.committed, vtensor.committed_bytes) == (3, PAGE)
    with pytest.raises(CapacityError):
        vtensor.append(torch.tensor([4], dtype=torch.uint8))


def test_views_outlive_everything(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler, 100)
    view, slice_ = vtensor.tensor(), vtensor.tensor()[10:20].flatten()
    vtensor.append(rows(500, 300, start=100))
    vtensor.drop_head(90)
    vtensor.close()
    del vtensor
    scheduler.trim()
    for _ in range(3):  # others use the memory that is free
        make(scheduler, 300).close()
    assert torch.equal(view, rows(100, 300))
    assert torch.equal(slice_, rows(10, 300, start=10).flatten())
    del view
    assert scheduler.stats().live_bytes > 0
    del slice_
    assert scheduler.stats().live_bytes == 0


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_makes_no_difference(scheduler: GrowthScheduler, first: bool) -> None:
    vtensor = make(scheduler, row=10)
    for inference in (first, not first, first):
        with torch.inference_mode(inference):
            vtensor.append(rows(10, 10))
    vtensor.tensor().add_(1)
    with torch.inference_mode(), vtensor.fork() as fork:
        inside, storage = fork.tensor(), fork.storage()
    fork = vtensor.fork()
    fork.append(rows(10, 10))
    assert torch.equal(inside, vtensor.tensor())
    assert not inside.is_inference()
    assert not storage.is_inference()


def test_the_front_goes_back_and_views_of_it_stay(scheduler: GrowthScheduler) -> None:
    vtensor = make(scheduler)
    for start in range(0, 200, 20):
        vtensor.append(rows(20, 300, start=start))
    view, before = vtensor.tensor(), scheduler.stats().live_bytes
    vtensor.drop_head(150)
    assert 0 < vtensor.first_row <= 150
    assert torch.equal(vtensor.tensor(), rows(200, 300)[vtensor.first_row :])
    assert scheduler.stats().live_bytes == before
    del view
    assert scheduler.stats().live_bytes == vtensor.committed_bytes < before // 2
    scheduler.settle()
    assert vtensor.num_storages() == 1
    with pytest.raises(ValueError, match=rf"truncate to 0 rows: it must lie in \[{vtensor.first_row}, 200\]"):
        vtensor.truncate(0)


def test_without_memory_the_tensor_is_as_it_was(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=70 * PAGE)
    vtensor = make(scheduler, 200)
    view, address = vtensor.tensor(), vtensor.data_ptr
    attempts: list[Callable[[], object]] = [
        lambda: vtensor.append(rows(800, 300)),
        lambda: vtensor.commit(1000),
        lambda: vtensor.fork(share_rows=0),
        lambda: (vtensor.truncate(10), vtensor.append(rows(400, 300))),  # would move first, for the view
    ]
    for attempt in attempts:
        with pytest.raises(OutOfPagesError):
            attempt()
        assert vtensor.data_ptr == address
        assert torch.equal(vtensor.tensor(), rows(200, 300)[: vtensor.length])
    assert torch.equal(view, rows(200, 300))
    assert scheduler.stats().live_bytes == vtensor.committed_bytes


def test_memory_ahead_of_need_never_costs_what_is_asked_for(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(budget_bytes=100 * PAGE)
    vtensor = VTensor((PAGE,), capacity=1000, dtype=torch.uint8, scheduler=scheduler)
    for _ in range(100):
        vtensor.append(torch.ones(1, PAGE, dtype=torch.uint8))
    assert vtensor.tensor().sum() == 100 * PAGE


@pytest.mark.parametrize(
    ("new", "parts"),
    [
        (torch.zeros(2, 4), ("(2, 4)", "(3,)")),
        (torch.zeros(3), ("(3,)",)),
        (torch.zeros(1, 2, 3), ("(1, 2, 3)",)),
        (torch.zeros(2, 3, dtype=torch.float64), ("torch.float64", "torch.float32")),
        (torch.zeros(2, 3, device="meta"), ("meta", "cpu")),
    ],
)
def test_rows_that_do_not_fit_are_refused(scheduler: GrowthScheduler, new: torch.Tensor, parts: tuple[str]) -> None:
    vtensor = make(scheduler, 5, row=3)
    with pytest.raises(ValueError, match="convert the rows first") as caught:
        vtensor.append(new)
    assert all(part in str(caught.value) for part in parts)
    assert torch.equal(vtensor.tensor(), rows(5, 3))


def test_rows_that_require_gradients_are_refused_where_they_would_be_recorded(scheduler: GrowthScheduler) -> None:
    vtensor, weights = make(scheduler, 5, row=3), torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"append rows\.detach\(\), or under torch\.no_grad\(\)"):
        vtensor.append(2 * weights)
    assert torch.equal(vtensor.tensor(), rows(5, 3))
    with torch.no_grad():
        vtensor.append(weights)
    assert vtensor.length == 7
    assert not vtensor.tensor().requires_grad


def test_what_cannot_be_is_refused(scheduler: GrowthScheduler) -> None:
    for options in ({"capacity": 0}, {"outer_shape": (2, 0)}, {"row": 0}):
        with pytest.raises(ValueError, match="must all be at least 1"):
            make(scheduler, **options)
    vtensor, batch = make(scheduler, 5, capacity=9), make(scheduler, outer_shape=(2,))
    with pytest.raises(CapacityError, match="10 rows do not fit the reserved capacity of 9") as caught:
        vtensor.append(rows(5, 300))
    assert isinstance(caught.value, ValueError)
    for too_many in (2**60, sys.maxsize):
        with pytest.raises(DriverError, match=r"reserve.* failed with ENOMEM"):
            make(scheduler, capacity=too_many)
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"truncate to {length} rows"):
            vtensor.truncate(length)
    with pytest.raises(CapacityError, match="5 rows do not fit the reserved capacity of 4"):
        vtensor.fork(capacity=4)
    with pytest.raises(ValueError, match="no outer dimension"):
        vtensor.fork([0])
    for select in ([], [2], [-1]):
        with pytest.raises(ValueError, match=r"at least one index, each in \[0, 2\)"):
            batch.fork(select)
    assert torch.equal(vtensor.tensor(), rows(5, 300))


def test_a_closed_tensor_says_so(scheduler: GrowthScheduler) -> None:
    with make(scheduler, 5) as vtensor:
        view = vtensor.tensor()
    vtensor.close()
    for use in (
        vtensor.tensor,
        vtensor.fork,
        vtensor.storage,
        vtensor.num_storages,
        vtensor.strides,
        lambda: vtensor.append(rows(1, 300)),
        lambda: vtensor.truncate(0),
        lambda: vtensor.drop_head(1),
        lambda: vtensor.commit(10),
        lambda: vtensor.commit_ahead(10),
        lambda: vtensor.committed,
        lambda: vtensor.data_ptr,
    ):
        with pytest.raises(ClosedError, match="this VTensor is closed: make a new one"):
            use()
    assert repr(vtensor) == "VTensor(closed)"
    assert torch.equal(view, rows(5, 300))
    assert scheduler.stats().reserved_bytes == 1000 * 1200 // PAGE * PAGE + PAGE  # no trace of the refused ones


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"device is 'cuda', but torch .*: use device 'cpu'"):
        VTensor((4,), capacity=4, device="cuda")


def test_whole_pages_are_those_of_the_first_rows_alone(scheduler: GrowthScheduler) -> None:
    """And the same ones in a fork, as far as the two share them."""
    vtensor = VTensor((PAGE // 8,), capacity=100, scheduler=scheduler)  # two rows a page of the smallest size
    for _ in range(7):
        vtensor.append(rows(3, PAGE // 8))
    fork, ends = vtensor.fork(), vtensor.whole_pages(100).bounds
    assert len(ends) > 3
    for num_rows in (0, 1, 2, 13, 21):
        run, theirs = vtensor.whole_pages(num_rows), fork.whole_pages(num_rows)
        assert run.bounds == tuple(end for end in ends if end <= num_rows * PAGE // 2)
        assert run.bounds == theirs.bounds
        assert all(one is other for one, other in zip(run.pages(), theirs.pages(), strict=True))
    vtensor.drop_head(4)
    assert list(vtensor.whole_pages(21).pages()) == []
