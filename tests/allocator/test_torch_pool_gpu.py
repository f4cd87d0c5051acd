"""memory_pool() and release_idle() on a GPU."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from fake_cuda import LARGE_PAGE, MIB, PAGE

from torch_vtensor.allocator.pools import default_pool, default_scheduler
from torch_vtensor.allocator.torch_pool import memory_pool, release_idle, torch_pool_stats
from torch_vtensor.errors import OutOfPagesError, VTensorError

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The current GPU, with nothing of ours on it before and after the test."""
    device = torch.device("cuda", torch.cuda.current_device())
    with memory_pool(device):
        pass
    settle(device)
    yield device
    default_pool(device).budget_bytes = None
    settle(device)
    stats = torch_pool_stats(device)
    assert (stats.live_bytes, stats.pending_bytes, default_pool(device).ledger.torch_bytes) == (0, 0, 0)
    default_pool(device).check_integrity()


def settle(device: torch.device) -> None:
    """Return what dead tensors hold to the system."""
    gc.collect()
    torch.cuda.synchronize(device)
    release_idle(device)
    default_scheduler(device).trim()
    torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def is_ours(make: Callable[[], torch.Tensor]) -> bool:
    """Whether a tensor too large for any cached segment comes from our pages."""
    before = torch_pool_stats().live_bytes
    tensor = make()
    grown = torch_pool_stats().live_bytes - before
    assert grown in (0, -(-tensor.nbytes // PAGE) * PAGE)
    return grown > 0


def big(megabytes: int, value: float = 0.0, device: torch.device | str = "cuda") -> torch.Tensor:
    return torch.full((megabytes * MIB // 4,), value, device=device)


def test_tensors_compute_as_elsewhere(device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    expected = (a @ b).relu().sum(dim=1)
    with memory_pool():
        ours_a, ours_b = a.clone(), b.clone()
        found = (ours_a @ ours_b).relu().sum(dim=1)
        assert is_ours(lambda: big(64))
    assert torch.equal(found, expected)
    assert torch.equal(ours_a, a)
    assert not is_ours(lambda: big(64))


def test_memory_returns_to_the_system(device: torch.device) -> None:
    with memory_pool():
        big(16).sum().item()  # what the first kernels load stays loaded
    settle(device)
    before = free_bytes(device)
    with memory_pool():
        tensors = [big(100), big(3), big(1), torch.ones(10, device=device)]
    assert before - free_bytes(device) >= 104 * MIB
    del tensors
    assert release_idle(device) >= 104 * MIB
    assert default_pool(device).ledger.torch_bytes == 0
    assert default_pool(device).trim() >= 104 * MIB
    assert before - free_bytes(device) <= 2 * MIB


def test_live_tensors_outlive_their_pool(device: torch.device) -> None:
    with memory_pool():
        alive, dead = big(40, 7.0), big(60)
    del dead
    assert release_idle(device) == 60 * MIB
    torch.cuda.empty_cache()
    assert torch.equal(alive, big(40, 7.0))
    del alive
    assert release_idle(device) == 40 * MIB


def test_empty_cache_is_harmless_at_any_time(device: torch.device) -> None:
    torch.cuda.empty_cache()
    with memory_pool():
        alive = big(40, 3.0)
        torch.cuda.empty_cache()
        big(50)
        torch.cuda.empty_cache()
        with memory_pool():
            torch.cuda.empty_cache()
            inner = big(30, 5.0)
        torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    release_idle(device)
    torch.cuda.empty_cache()
    assert (alive == 3).all()
    assert (inner == 5).all()


def test_nested_blocks(device: torch.device) -> None:
    # Pools are made while others are routed, which is where torch's own destructor of a MemPool would abort.
    with memory_pool():
        assert is_ours(lambda: big(30))
        with memory_pool(), memory_pool(device):
            assert is_ours(lambda: big(40))
        assert is_ours(lambda: big(50))
        release_idle(device)
        with torch.cuda.use_mem_pool(torch_own := torch.cuda.MemPool()):
            assert not is_ours(lambda: big(60))
            with memory_pool():
                assert is_ours(lambda: big(70))
        assert is_ours(lambda: big(80))
    assert not is_ours(lambda: big(90))
    del torch_own


def test_threads(device: torch.device) -> None:
    wrong: list[str] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            for step in range(30):
                with memory_pool(device):
                    tensors = [big(1 + (index + step + i) % 9, float(index * 100 + i), device) for i in range(4)]
                    if index == 0:
                        release_idle(device, wait=bool(step % 2))
                if any(not (tensor == index * 100 + i).all() for i, tensor in enumerate(tensors)):
                    wrong.append(f"thread {index}, step {step}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_budget_is_kept_and_everything_still_works(device: torch.device) -> None:
    pool = default_pool(device)
    with memory_pool(budget_bytes=64 * MIB):
        kept = big(40, 2.0)
    with pytest.raises(OutOfPagesError) as caught, memory_pool():
        big(100)
    assert (caught.value.asked_bytes, caught.value.budget_bytes) == (100 * MIB, 64 * MIB)
    with memory_pool():
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            big(30)
        small = big(20, 1.0)
    assert pool.ledger.committed_bytes <= 64 * MIB
    assert (kept == 2).all()
    assert (small == 1).all()
    assert not is_ours(lambda: big(100))


def test_page_pool_and_torch_share_the_budget(device: torch.device) -> None:
    pool = default_pool(device)
    pool.budget_bytes = 8 * LARGE_PAGE
    with memory_pool():
        big(7 * 32)
    pages = pool.acquire([LARGE_PAGE] * 6)
    with pytest.raises(OutOfPagesError), memory_pool():
        big(3 * 32)
    pool.drop(pages)
    with memory_pool():
        assert is_ours(lambda: big(7 * 32))


def test_running_kernel_keeps_its_memory(device: torch.device) -> None:
    with memory_pool():
        source = big(256, 9.0)
    found = torch.zeros_like(source)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # so that releasing our pool frees nothing of torch's own, which would wait
    torch.cuda._sleep(2_000_000_000)
    found.copy_(source)
    done = torch.cuda.Event()
    done.record()
    del source
    release_idle(device, wait=False)
    stats = torch_pool_stats(device)
    assert not done.query(), "the kernel was over too soon for this test to say anything"
    assert (stats.live_bytes, stats.pending_bytes) == (0, 256 * MIB)
    assert release_idle(device, wait=True) == 256 * MIB
    assert done.query()
    assert (found == 9).all()


def test_other_streams_keep_their_memory(device: torch.device) -> None:
    side = torch.cuda.Stream(device)
    found = torch.zeros(64 * MIB // 4, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for value in range(20):
            with memory_pool():
                source = big(64, float(value))
            torch.cuda._sleep(20_000_000)
            found.copy_(source)
            del source
            release_idle(device, wait=False)
    side.synchronize()
    assert (found == 19).all()


def test_thousand_cycles_leak_nothing(device: torch.device) -> None:
    def cycle(step: int) -> None:
        with memory_pool():
            tensors = [big(1 + (step * 7 + i * 13) % 90) for i in range(3)]
            tensors[0].add_(1)
        if step % 3 == 0:
            tensors.clear()
            release_idle(device, wait=False)

    cycle(0)
    settle(device)
    before = free_bytes(device)
    for step in range(1000):
        cycle(step)
    settle(device)
    assert before - free_bytes(device) <= 2 * MIB
    stats = torch_pool_stats(device)
    assert stats.num_allocs == stats.num_frees + stats.num_failures


def test_exception_ends_the_block(device: torch.device) -> None:
    alive = []

    def fail() -> None:
        alive.append(big(40, 4.0))
        raise KeyError

    with pytest.raises(KeyError), memory_pool():
        fail()
    assert not is_ours(lambda: big(50))
    assert (alive[0] == 4).all()
    with memory_pool():
        assert is_ours(lambda: big(60))


def test_graph_is_captured_inside_a_block(device: torch.device) -> None:
    with memory_pool():
        static = big(32, 1.0)
        warm_up = torch.cuda.Stream(device)
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            (static * 2 + 1).sum()
        torch.cuda.current_stream().wait_stream(warm_up)
        before = torch_pool_stats().live_bytes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = static * 2
            with pytest.raises(VTensorError, match="Open it before the capture"), memory_pool():
                pass
            result = doubled + 1
        # What the graph computes in is the graph's own; the state of its random generator is not.
        assert torch_pool_stats().live_bytes - before <= PAGE
        after = big(48, 6.0)
    for value in (3.0, 5.0):
        static.fill_(value)
        release_idle(device, wait=False)
        graph.replay()
        assert (result == 2 * value + 1).all()
    assert (after == 6).all()


def test_memory_is_released_and_made_during_a_capture(device: torch.device) -> None:
    static = big(8, 1.0)
    side = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with memory_pool():
        with memory_pool():
            dead = big(32)
        del dead
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = static + 1
            released = release_idle(device, wait=False)
            with torch.cuda.stream(side):  # not captured, so the memory is made at once
                made = torch.empty(128 * MIB, dtype=torch.uint8, device=device)
            result = result * 2
    graph.replay()
    assert (result == 4).all()
    assert released == 32 * MIB
    made.fill_(1)
    assert int(made[-1]) == 1


def test_process_ends_cleanly_whatever_is_alive(device: torch.device, run_python: Callable[..., str]) -> None:
    printed = run_python(
        "import threading, torch\n"
        "from torch_vtensor.allocator.torch_pool import memory_pool, release_idle\n"
        "open_block = memory_pool()\n"
        "open_block.__enter__()\n"
        "alive = torch.ones(50 * 2**20, device='cuda')\n"
        "def work():\n"
        "    with memory_pool('cuda:0'):\n"
        "        global in_thread\n"
        "        in_thread = torch.ones(30 * 2**20, device='cuda')\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()\n"
        "torch.cuda._sleep(200_000_000)\n"
        "pending = alive * 2\n"
        "del alive\n"
        "release_idle('cuda:0', wait=False)\n"
        "print(float(pending[-1] + in_thread[0]))\n"
        "class AtExit:\n"
        "    def __del__(self):\n"
        "        torch.cuda.empty_cache()\n"
        "kept = AtExit()\n"
    )
    assert printed.split() == ["3.0"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices(device: torch.device) -> None:
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    with memory_pool(other):
        there = big(64, 5.0, other)
        assert not is_ours(lambda: big(64))
        with memory_pool(device):
            here = there.to(device)
            assert (there.to("cpu") == here.to("cpu")).all()
            back = here.add(1).to(other)
    assert torch_pool_stats(other).live_bytes >= 128 * MIB
    assert (back == 6).all()
    del there, here, back
    assert release_idle() >= 192 * MIB
    assert default_pool(other).ledger.torch_bytes == 0
