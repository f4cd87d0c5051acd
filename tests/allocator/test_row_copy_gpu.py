"""RowCopier on a GPU: the compiled kernels put every byte where copy_ does, on every stream and in every graph."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_vtensor
from torch_vtensor.allocator import row_copy
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.row_copy import CAPTURED, NOT_COPIED, RowCopier, row_copier

pytestmark = pytest.mark.gpu

DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64)
ORDERS = ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2), (2, 1, 0))
_SLEEP = 400_000_000  # cycles, about a fifth of a second


def copier_of(device: torch.device) -> RowCopier:
    """The device's copier, compiled."""
    copier = row_copier(device)
    default_scheduler(device).settle()
    assert copier.why_not is None
    return copier


@pytest.fixture(scope="module")
def copier() -> RowCopier:
    return copier_of(torch.device("cuda", torch.cuda.current_device()))


def rows(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    order: tuple[int, ...] = (0, 1, 2),
    start: int = 0,
    gap: int = 0,
    device: torch.device | str = "cuda",
) -> torch.Tensor:
    """Random rows [B, H, T, D] whose dimensions lie in memory in ``order``, D last, with gaps between them."""
    laid_out = [sizes[dim] for dim in order]
    count = start + laid_out[0] * laid_out[1] * laid_out[2] * (sizes[3] + gap)
    most = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, most, (count * dtype.itemsize,), dtype=torch.uint8, device=device).view(dtype)
    whole = raw[start:].view(*laid_out, sizes[3] + gap)[..., : sizes[3]]
    return whole.permute(*(order.index(dim) for dim in range(3)), 3)


def all_bytes(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def check(
    copier: RowCopier, keys: torch.Tensor, values: torch.Tensor, position: int, key: torch.Tensor, value: torch.Tensor
) -> None:
    expected = []
    for whole, new in ((keys, key), (values, value)):
        other = all_bytes(whole).clone()
        typed = torch.empty(0, dtype=whole.dtype, device=whole.device)
        typed.set_(other.untyped_storage(), whole.storage_offset(), whole.shape, whole.stride())
        typed.narrow(2, position, new.shape[2]).copy_(new)
        expected.append(other)
    assert copier.write(keys, values, position, key, value) == key.shape[2]
    assert torch.equal(all_bytes(keys), expected[0])
    assert torch.equal(all_bytes(values), expected[1])


@given(data=st.data())
def test_bytes_arrive_as_by_copy(copier: RowCopier, data: st.DataObject) -> None:
    draw = data.draw
    batch, heads, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 40))
    position, room, dtype = draw(st.integers(0, 9)), draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))
    dims = draw(st.tuples(*[st.sampled_from((3, 4, 12, 16, 64, 80, 128, 192, 576))] * 2))

    def some(num_tokens: int, dim: int) -> torch.Tensor:
        start, gap = (draw(st.sampled_from((0, 0, 0, 1, 2, 4, 8, 16))) for _ in range(2))
        return rows((batch, heads, num_tokens, dim), dtype, draw(st.sampled_from(ORDERS)), start, gap)

    keys, values = (some(position + tokens + room, dim) for dim in dims)
    key, value = (some(tokens, dim) for dim in dims)
    if draw(st.booleans()):
        key = key[:1].expand(batch, -1, -1, -1)
    check(copier, keys, values, position, key, value)


def test_a_long_prompt_arrives(copier: RowCopier) -> None:
    order = (0, 2, 1)
    wholes = (rows((2, 8, 20_000, dim), order=order) for dim in (128, 100))
    check(copier, *wholes, 5, *(rows((2, 8, 19_990, dim), order=order) for dim in (128, 100)))


def test_strides_beyond_32_bits(copier: RowCopier) -> None:
    raw = torch.zeros(5 * 2**30, dtype=torch.uint8, device="cuda")
    keys = raw.as_strided((2, 1, 4, 16), (4 * 2**30 + 64, 16, 16, 1))
    key = rows((2, 1, 1, 16), torch.uint8)
    assert copier.write(keys, keys.narrow(2, 2, 2), 1, key, key) == key.shape[2]
    assert torch.equal(keys[:, :, 1:2], key)
    assert torch.equal(keys[:, :, 3:4], key)
    assert not keys[:, :, 0::2].any()


def test_a_copy_runs_behind_its_streams_work(copier: RowCopier) -> None:
    keys, values, key = torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 1, 64)
    keys, values, key = keys.cuda(), values.cuda(), key.cuda()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(_SLEEP)
        key.fill_(3.0)
        assert copier.write(keys, values, 4, key, key) == key.shape[2]
        assert not side.query(), "the call waited for the device"
    assert torch.cuda.current_stream().query()
    side.synchronize()
    for tensor in (keys, values):
        assert tensor.sum((0, 1, 3)).tolist() == [0, 0, 0, 0, 2 * 64 * 3.0, 0, 0, 0]


def test_a_captured_copy_is_replayed(copier: RowCopier) -> None:
    keys, values = (torch.zeros(1, 2, 8, 64, device="cuda") for _ in range(2))
    key, value = (torch.zeros(1, 2, 1, 64, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert copier.write(keys, values, 4, key, value) == key.shape[2] | CAPTURED
    assert not keys.any()
    for number in (1.0, 2.0):
        key.fill_(number)
        value.fill_(-number)
        graph.replay()
        assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 0, number, 0, 0, 0]
        assert values[0, 1, :, 63].tolist() == [0, 0, 0, 0, -number, 0, 0, 0]


def test_the_kernel_may_be_loaded_while_another_thread_captures() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ready = copier_of(device)  # and with it everything that compiling needs
    keys, key = torch.zeros(1, 2, 8, 64, device="cuda"), torch.ones(1, 2, 1, 64, device="cuda")
    graph, failures = torch.cuda.CUDAGraph(), []

    def load() -> None:
        try:
            row_copy._prepare(late)
        except Exception as error:
            failures.append(error)

    late = RowCopier(device, ready._library)
    with torch.cuda.graph(graph):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
        assert late.write(keys, keys, 1, key, key) == 1 | CAPTURED
    assert failures == []
    graph.replay()
    assert keys[0, 0, :, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_threads_new_to_cuda_copy(copier: RowCopier) -> None:
    keys, key = torch.zeros(1, 2, 8, 64, device="cuda"), torch.ones(1, 2, 1, 64, device="cuda")
    torch.cuda.synchronize()
    results = []
    thread = threading.Thread(target=lambda: results.append(copier.write(keys, keys, 6, key, key)))
    thread.start()
    thread.join()
    assert results == [1]
    torch.cuda.synchronize()
    assert keys[0, 1, :, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    with torch.cuda.device(0):
        copiers = [copier_of(torch.device("cuda", index)) for index in range(2)]
        for copier in (*copiers, *copiers):
            device = copier.device
            wholes = (rows((2, 3, 9, 64), device=device) for _ in range(2))
            check(copier, *wholes, 4, *(rows((2, 3, 1, 64), device=device) for _ in range(2)))
            assert torch.cuda.current_device() == 0
        keys, key = rows((2, 3, 9, 64), device="cuda:1"), rows((2, 3, 1, 64), device="cuda:0")
        assert copiers[1].write(keys, keys, 4, key, key) == NOT_COPIED


def updates(cache: torch_vtensor.VTensorCache, num_steps: int, dims: tuple[int, int]) -> list[torch.Tensor]:
    """What each layer shows after a prompt and some steps of the same numbers every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    shown = []
    for tokens in (300, *[1] * num_steps):
        for layer in range(4):
            new = [torch.randn(2, tokens, 4, dim, device="cuda", generator=generator).transpose(1, 2) for dim in dims]
            shown.append(torch.cat(cache.update(*new, layer), -1).clone())
    return shown


@pytest.mark.parametrize("dims", [(64, 64), (72, 40), (5, 3)])
@pytest.mark.parametrize("left_to_torch", [False, True])
def test_a_cache_shows_what_dynamic_cache_shows(
    dims: tuple[int, int], left_to_torch: bool, monkeypatch: pytest.MonkeyPatch, copier: RowCopier
) -> None:
    transformers = pytest.importorskip("transformers")
    counts: dict[int, int] = {}
    write: Callable[..., int] = copier.write

    def counted(*arguments: torch.Tensor) -> int:
        result = NOT_COPIED if left_to_torch else write(*arguments)
        counts[result] = counts.get(result, 0) + 1
        return result

    monkeypatch.setattr(copier, "write", counted)
    with torch.inference_mode():
        expected = updates(transformers.DynamicCache(), 40, dims)
        shown = updates(torch_vtensor.VTensorCache(), 40, dims)
    assert all(map(torch.equal, shown, expected))
    if left_to_torch:
        assert counts.keys() == {NOT_COPIED}
    else:
        assert counts == {300: 4, 1: 40 * 4}
