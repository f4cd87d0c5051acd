"""Tensors and captured graphs on a GPU whose memory goes away and comes back."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import MIB
from vtensors import MakeScheduler

import torch_vtensor
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.pools import default_pool, default_scheduler
from torch_vtensor.allocator.prefix import Lane, PrefixTree
from torch_vtensor.allocator.torch_pool import torch_pool_stats
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import AsleepError

pytestmark = pytest.mark.gpu

ROW = 1024  # int32: 4 KiB a row, 512 rows a page of 2 MiB


@pytest.fixture
def scheduler(make_cuda_scheduler: MakeScheduler) -> GrowthScheduler:
    return make_cuda_scheduler()


def random_rows(num_rows: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (num_rows, ROW), dtype=torch.int32, device="cuda")


def make(scheduler: GrowthScheduler, rows: torch.Tensor) -> VTensor:
    vtensor = VTensor((ROW,), capacity=100_000, dtype=torch.int32, scheduler=scheduler)
    vtensor.append(rows)
    return vtensor


def free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_sleep_gives_memory_back_and_wake_restores_every_bit(scheduler: GrowthScheduler) -> None:
    expected = random_rows(50_000)  # 195 MiB, in pages of both sizes
    vtensor = make(scheduler, expected)
    for _ in range(5):
        vtensor.append(expected[:300])
    fork = vtensor.fork()
    fork.append(expected[:77])
    view, free_before = vtensor.tensor(), free_bytes()
    freed_bytes = scheduler.sleep()
    assert freed_bytes >= vtensor.reserved_bytes // 4
    assert free_bytes() - free_before >= freed_bytes - 2 * MIB
    with pytest.raises(AsleepError):
        vtensor.tensor()
    scheduler.wake()
    assert torch.equal(view[:50_000], expected)
    assert torch.equal(fork.tensor()[-77:], expected[:77])
    assert torch.equal(fork.tensor()[:51_500], vtensor.tensor())


def test_a_graph_replays_after_waking_and_over_offloaded_pages(scheduler: GrowthScheduler) -> None:
    expected = random_rows(20_000)
    vtensor, out = make(scheduler, expected), torch.zeros(ROW, dtype=torch.int64, device="cuda")
    torch.sum(vtensor.tensor(), 0, out=out)
    right, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.sum(vtensor.tensor(), 0, out=out)
    for moves in ((scheduler.sleep, scheduler.wake), (vtensor.offload,), (vtensor.prefetch,)):
        out.zero_()
        for move in moves:
            move()
        graph.replay()
        assert torch.equal(out, right)
    assert vtensor.offloaded_bytes == 0
    vtensor.append(random_rows(3000))
    graph.replay()
    assert torch.equal(out, right)
    graph.reset()
    del graph


def test_pages_are_copied_behind_the_work_that_writes_them(scheduler: GrowthScheduler) -> None:
    side, vtensor = torch.cuda.Stream(), make(scheduler, torch.zeros(2000, ROW, dtype=torch.int32, device="cuda"))
    view = vtensor.tensor()
    view.add_(0)  # loaded
    torch.cuda.synchronize()
    for move in (scheduler.sleep, scheduler.wake, vtensor.offload, vtensor.prefetch):
        if not vtensor.is_asleep:
            with torch.cuda.stream(side):
                torch.cuda._sleep(200_000_000)
                view.add_(1)
        move()
    assert view.unique().tolist() == [3]
    del view


def test_an_offloaded_tensor_is_read_and_written_in_place(scheduler: GrowthScheduler) -> None:
    expected = random_rows(10_000)
    vtensor = make(scheduler, expected)
    address, free_before = vtensor.data_ptr, free_bytes()
    left_bytes = vtensor.offload()
    scheduler.trim()
    assert free_bytes() - free_before >= left_bytes - 2 * MIB > 0
    view = vtensor.tensor()
    assert torch.equal(view, expected)
    assert torch.equal(view.clone(), expected)  # by the copy engine, too
    view[5] = 7
    half = torch.matmul(view[:512].float(), view[:512].float().T)
    assert vtensor.prefetch() == left_bytes
    assert vtensor.data_ptr == address
    assert view[5].unique().tolist() == [7]
    assert torch.equal(torch.matmul(view[:512].float(), view[:512].float().T), half)
    vtensor.offload()
    more = random_rows(100)
    assert torch.equal(vtensor.append(more)[10_000:], more)
    assert vtensor.offloaded_bytes == 0


def test_a_prefix_that_sleeps_in_memory_for_copies_alone_can_be_lent(scheduler: GrowthScheduler) -> None:
    tree = PrefixTree((Lane((ROW,), (), torch.int32),), scheduler=scheduler)
    expected, tokens = random_rows(3000), list(range(3000))
    source = make(scheduler, expected)
    tree.record(tokens, [source])
    source.close()
    scheduler.sleep()
    loan = tree.fork([tokens], capacity=4000)
    assert loan is not None
    assert torch.equal(loan.vtensors[0].tensor()[0], expected[: loan.num_rows])
    assert loan.vtensors[0].offloaded_bytes == 0
    scheduler.sleep()
    scheduler.wake()
    assert torch.equal(loan.vtensors[0].tensor()[0], expected[: loan.num_rows])
    loan.vtensors[0].close()
    tree.evict()


def test_what_grew_in_small_steps_comes_back_in_large_pages(scheduler: GrowthScheduler) -> None:
    expected = random_rows(20_000)
    vtensor = make(scheduler, expected[:1])
    for start in range(1, 20_000, 300):
        vtensor.append(expected[start : start + 300])
    assert vtensor.num_pages == 40
    view = vtensor.tensor()
    for leave, come_back in ((scheduler.sleep, scheduler.wake), (vtensor.offload, vtensor.prefetch)):
        leave()
        come_back()
        assert vtensor.num_pages == 10  # 2 of 32 MiB, 8 of 2
        assert torch.equal(view, expected)
    del view


def test_idle_tensors_make_room(make_cuda_scheduler: MakeScheduler) -> None:
    scheduler = make_cuda_scheduler(budget_bytes=400 * MIB)
    expected = [random_rows(40_000) for _ in range(4)]  # 156 MiB each
    vtensors = []
    for rows in expected:
        vtensors.append(make(scheduler, rows))
        vtensors[-1].offload(when_needed=True)
    assert [vtensor.offloaded_bytes > 0 for vtensor in vtensors] == [True, True, False, False]
    for vtensor, rows in zip(vtensors, expected, strict=True):
        assert torch.equal(vtensor.tensor(), rows)


def test_weights_in_the_memory_pool_sleep_by_tag() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    scheduler = default_scheduler(device)
    with torch_vtensor.memory_pool(device):
        layer = torch.nn.Linear(4096, 4096, device=device)
        small = [torch.full((100,), float(i), device=device) for i in range(50)]
    with torch_vtensor.memory_pool(device, tag="adapter"):
        adapter = torch.nn.Linear(4096, 512, device=device)
    cache = VTensor((ROW,), capacity=10_000, dtype=torch.int32, device=device)
    rows = random_rows(3000)
    cache.append(rows)
    x, graph = torch.randn(16, 4096, device=device), torch.cuda.CUDAGraph()
    with torch.no_grad():
        adapter(layer(x))  # what it needs is loaded before the capture
        with torch.cuda.graph(graph):
            replayed = adapter(layer(x))
    graph.replay()
    expected = replayed.clone()
    expected_weight = layer.weight.detach().clone()
    try:
        free_before = free_bytes()
        freed_bytes = torch_vtensor.sleep(["weights", "kv_cache"], discard="kv_cache")
        assert freed_bytes >= 64 * MIB
        assert free_bytes() - free_before >= freed_bytes - 2 * MIB
        assert torch_pool_stats(device).asleep_bytes >= 64 * MIB
        assert adapter.weight.isfinite().all()
        torch_vtensor.wake("weights")
        assert torch.equal(layer.weight, expected_weight)
        assert [tensor.unique().tolist() for tensor in small] == [[float(i)] for i in range(50)]
        graph.replay()
        assert torch.equal(replayed, expected)
        torch_vtensor.wake()
        assert not cache.tensor().any()
    finally:
        torch_vtensor.wake()
        cache.close()
        graph.reset()
        del graph, layer, small, adapter, replayed
        torch.cuda.synchronize()
        torch_vtensor.trim(device)
    assert default_pool(device).offloads.used_bytes == 0
    assert scheduler.stats().offload_pooled_bytes == 0


def test_a_hundred_cycles_lose_nothing(scheduler: GrowthScheduler) -> None:
    expected = random_rows(5000)
    vtensor = make(scheduler, expected)
    fork = vtensor.fork()
    scheduler.sleep()
    scheduler.wake()
    scheduler.settle()
    before, reserved_bytes = free_bytes(), scheduler.stats().reserved_bytes
    for _ in range(100):
        scheduler.sleep()
        scheduler.wake()
    scheduler.settle()
    scheduler.reap()
    assert before - free_bytes() < 2 * MIB  # one page a cycle would be 200
    assert scheduler.stats().reserved_bytes == reserved_bytes
    assert torch.equal(vtensor.tensor(), expected)
    assert torch.equal(fork.tensor(), expected)
