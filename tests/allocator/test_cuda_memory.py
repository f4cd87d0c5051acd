"""VTensors on a GPU: kernels and captured graphs read what was there, whatever the host does meanwhile."""

import time
from collections.abc import Callable

import pytest
import torch
from vtensors import MakeScheduler

from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError

pytestmark = pytest.mark.gpu

ROW = 1024  # float32: 4 KiB a row, 512 rows a page of 2 MiB
_SLEEP = 400_000_000  # cycles, about a fifth of a second


@pytest.fixture
def scheduler(make_cuda_scheduler: MakeScheduler) -> GrowthScheduler:
    return make_cuda_scheduler()


def make(scheduler: GrowthScheduler, num_rows: int, value: float, **options: object) -> VTensor:
    vtensor = VTensor((ROW,), scheduler=scheduler, **({"capacity": 200_000} | options))
    vtensor.append(torch.full((num_rows, ROW), float(value), device="cuda"))
    return vtensor


def eventually(condition: Callable[[], bool]) -> bool:
    """The driver tells of a graph's end on a thread of its own."""
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_every_operation_in_bfloat16(scheduler: GrowthScheduler) -> None:
    def random_rows(num_rows: int) -> torch.Tensor:
        return torch.randn(2, 3, num_rows, 8, 128, device="cuda", dtype=torch.bfloat16)

    vtensor = VTensor((8, 128), capacity=100_000, dtype=torch.bfloat16, outer_shape=(2, 3), scheduler=scheduler)
    expected = random_rows(0)
    assert torch.equal(vtensor.tensor(), expected)
    address = vtensor.data_ptr
    for num_rows in (1, 1000, 1, 3000):
        new = random_rows(num_rows)
        expected = torch.cat([expected, new], 2)
        assert torch.equal(vtensor.append(new), expected)
    assert vtensor.data_ptr == address
    view, fork, beams = vtensor.tensor(), vtensor.fork(), vtensor.fork([1, 1, 0])
    new = random_rows(700)
    assert torch.equal(fork.append(new), torch.cat([expected, new], 2))
    assert torch.equal(beams.tensor(), expected[[1, 1, 0]])
    vtensor.truncate(500)
    assert torch.equal(vtensor.append(new), torch.cat([expected[:, :, :500], new], 2))
    assert torch.equal(view, expected)
    fork.drop_head(2500)
    assert fork.first_row > 0
    assert torch.equal(fork.tensor(), torch.cat([expected, new], 2)[:, :, fork.first_row :])
    vtensor.close()
    assert torch.equal(view, expected)
    assert vtensor.device == view.device


def test_memory_comes_and_goes(scheduler: GrowthScheduler) -> None:
    free_bytes = torch.cuda.mem_get_info()[0]
    vtensor = make(scheduler, 100_000, 1.0)  # 391 MiB
    assert free_bytes - torch.cuda.mem_get_info()[0] >= vtensor.committed_bytes
    fork = vtensor.fork()
    assert fork.committed_bytes - fork.shared_bytes <= 2 * scheduler.pool.page_bytes
    vtensor.close()
    fork.close()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    scheduler.trim()
    assert scheduler.stats().committed_bytes == 0
    assert free_bytes - torch.cuda.mem_get_info()[0] < 32 * 2**20


def test_a_full_device_refuses_and_goes_on(scheduler: GrowthScheduler) -> None:
    total_bytes = torch.cuda.mem_get_info()[1]
    vtensor = make(scheduler, 1000, 3.0, capacity=2 * total_bytes // (4 * ROW))
    with pytest.raises(OutOfPagesError, match="the device has no more") as caught:
        vtensor.commit(vtensor.capacity)
    assert caught.value.budget_bytes is None
    assert caught.value.asked_bytes > total_bytes
    scheduler.trim()
    assert vtensor.append(torch.full((1000, ROW), 3.0, device="cuda")).unique().tolist() == [3.0]


def test_a_graph_replays_over_memory_that_grew_later(scheduler: GrowthScheduler) -> None:
    vtensor, out = make(scheduler, 1000, 1.0), torch.zeros(ROW, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.sum(vtensor.tensor(), 0, out=out)
    with torch.cuda.graph(graph):
        torch.sum(vtensor.tensor(), 0, out=out)
    for _ in range(4):
        vtensor.append(torch.full((3000, ROW), 5.0, device="cuda"))
        out.zero_()
        graph.replay()
        assert out.unique().tolist() == [1000.0]
    assert vtensor.tensor().sum(0).unique().tolist() == [1000 + 4 * 3000 * 5.0]


def test_a_graph_reads_as_far_as_the_memory_has_grown(scheduler: GrowthScheduler) -> None:
    pytest.importorskip("triton")
    from triton_kernels import sum_rows_kernel

    vtensor, out = make(scheduler, 10, 1.0), torch.zeros(ROW, device="cuda")
    view, length = vtensor.tensor(), torch.tensor([10], device="cuda")
    sum_rows_kernel[(1,)](view, length, out, ROW=ROW)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_rows_kernel[(1,)](view, length, out, ROW=ROW)
    for _ in range(5):
        vtensor.append(torch.ones(700, ROW, device="cuda"))
        length.fill_(vtensor.length)
        graph.replay()
        assert out.unique().tolist() == [vtensor.length]


def test_a_graph_keeps_what_it_reads(scheduler: GrowthScheduler) -> None:
    vtensor, out = make(scheduler, 3000, 2.0), torch.zeros(ROW, device="cuda")
    torch.sum(torch.ones(3000, ROW, device="cuda"), 0, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.sum(vtensor.tensor(), 0, out=out)
    vtensor.close()
    assert scheduler.trim() == 0
    other = make(scheduler, 3000, 7.0)  # would take the pages
    graph.replay()
    assert out.unique().tolist() == [6000.0]
    other.close()
    graph.reset()
    del graph
    assert eventually(lambda: scheduler.trim() == 0 and scheduler.stats().committed_bytes == 0)


def test_work_under_another_streams_capture_stays_out_of_it(scheduler: GrowthScheduler) -> None:
    vtensor, closed = make(scheduler, 1000, 2.0), make(scheduler, 1000, 3.0)
    out, other, graph = torch.zeros(ROW, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.sum(vtensor.tensor(), 0, out=out)
    with torch.cuda.graph(graph):
        torch.sum(vtensor.tensor(), 0, out=out)
        with torch.cuda.stream(other):  # itself not captured
            closed.close()
            scheduler.stats()
    out.zero_()
    graph.replay()
    assert out.unique().tolist() == [2000.0]
    scheduler.reap()
    torch.cuda.synchronize()
    assert scheduler.trim() >= 1000 * 4 * ROW


def test_nothing_is_unmapped_under_a_running_kernel(scheduler: GrowthScheduler) -> None:
    side, vtensor = torch.cuda.Stream(), make(scheduler, 20_000, 2.0)
    result = torch.zeros(ROW, device="cuda")
    torch.sum(vtensor.tensor(), 0, out=result)  # what the kernel needs is loaded
    result.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        view = vtensor.tensor()
        torch.cuda._sleep(_SLEEP)
        torch.sum(view, 0, out=result)
    waits = scheduler.num_device_waits
    vtensor.drop_head(10_000)
    assert vtensor.first_row > 0
    fork = vtensor.fork()
    del view
    vtensor.close()
    fork.close()
    others = [make(scheduler, 1000, 9.0, adopt=False) for _ in range(10)]
    assert not side.query(), "an operation waited for the device"
    assert scheduler.num_device_waits == waits
    scheduler.trim()
    side.synchronize()
    assert result.unique().tolist() == [40_000.0]
    assert all(other.tensor().unique().tolist() == [9.0] for other in others)


def test_an_adopted_range_is_written_behind_its_last_reader(scheduler: GrowthScheduler) -> None:
    side, result = torch.cuda.Stream(), torch.zeros(ROW, device="cuda")
    vtensor = make(scheduler, 2000, 2.0)
    address = vtensor.data_ptr
    torch.sum(vtensor.tensor(), 0, out=result)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        view = vtensor.tensor()
        torch.cuda._sleep(_SLEEP)
        torch.sum(view, 0, out=result)
    del view
    vtensor.close()
    second = make(scheduler, 2000, 9.0, first_rows=2000)
    assert second.data_ptr == address
    torch.cuda.synchronize()
    assert result.unique().tolist() == [4000.0]
    assert second.tensor().unique().tolist() == [9.0]


def test_after_load_drops_a_fifth_of_what_is_live_stays_idle(make_cuda_scheduler: MakeScheduler) -> None:
    scheduler = make_cuda_scheduler(idle_bytes=2**40, idle_seconds=0.5)
    before = torch.cuda.mem_get_info()[0]
    live, out, graph = make(scheduler, 100_000, 2.0), torch.zeros(ROW, device="cuda"), torch.cuda.CUDAGraph()
    torch.sum(live.tensor(), 0, out=out)
    with torch.cuda.graph(graph):
        torch.sum(live.tensor(), 0, out=out)
    for vtensor in [make(scheduler, 100_000, 1.0, adopt=False) for _ in range(8)]:
        vtensor.close()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    scheduler.reap()

    others_bytes = before - torch.cuda.mem_get_info()[0] - scheduler.stats().committed_bytes  # kernels, the graph

    def used_bytes() -> int:
        return before - torch.cuda.mem_get_info()[0] - others_bytes

    assert used_bytes() > 8 * live.committed_bytes
    assert eventually(lambda: used_bytes() <= 1.2 * live.committed_bytes)
    assert scheduler.num_device_waits == 0
    out.zero_()
    graph.replay()
    assert out.unique().tolist() == [200_000.0]
    assert make(scheduler, 100_000, 3.0).tensor().unique().tolist() == [3.0]
    graph.reset()


def test_trim_returns_ten_gib(make_cuda_scheduler: MakeScheduler) -> None:
    """In large pages, and in the small ones of a tensor that grew; how long it takes, benchmarks tell."""
    scheduler = make_cuda_scheduler(idle_bytes=2**40)  # and nothing goes before
    large = VTensor((ROW,), capacity=2**22, scheduler=scheduler)
    large.commit(5 * 2**18)  # 5 GiB
    small = VTensor((ROW,), capacity=2**22, scheduler=scheduler)
    for num_rows in range(512, 5 * 2**18 + 1, 512):
        small.commit(num_rows)
    before = torch.cuda.mem_get_info()[0]
    for vtensor in (large, small):
        vtensor.close()
    assert scheduler.trim() >= 10 * 2**30
    assert torch.cuda.mem_get_info()[0] - before >= 10 * 2**30


def test_idle_memory_goes_neither_under_a_running_kernel_nor_into_a_capture(make_cuda_scheduler: MakeScheduler) -> None:
    scheduler = make_cuda_scheduler(idle_bytes=2**40, idle_seconds=0.01)
    side, vtensor, kept = torch.cuda.Stream(), make(scheduler, 20_000, 2.0), make(scheduler, 1000, 3.0)
    result, out = torch.zeros(ROW, device="cuda"), torch.zeros(ROW, device="cuda")
    torch.sum(vtensor.tensor(), 0, out=result)
    torch.sum(kept.tensor(), 0, out=out)
    result.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        view = vtensor.tensor()
        torch.cuda._sleep(3 * _SLEEP)
        torch.sum(view, 0, out=result)
    del view
    vtensor.close()
    while not side.query():
        scheduler.reap()  # it may look at any time
    side.synchronize()
    assert result.unique().tolist() == [40_000.0]
    view = kept.tensor()
    for _ in range(20):
        make(scheduler, 2000, 4.0).close()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            deadline = time.monotonic() + 0.03  # it looks meanwhile
            torch.sum(view, 0, out=out)
            while time.monotonic() < deadline:
                pass
        out.zero_()
        graph.replay()
        assert out.unique().tolist() == [3000.0]
    assert scheduler.stats().driver_calls["destroy"].count > 0
