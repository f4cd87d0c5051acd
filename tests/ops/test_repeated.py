"""decode_attention once more for tensors that look the same: the result of a call of its own, or None."""

import importlib.util
from typing import Any

import pytest
import torch

from torch_vtensor.ops import decode_attention
from torch_vtensor.ops.decode_attention import repeated

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed here"
)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(
    tokens: int = 70, batch: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensors:
    """query [B, Hq, 1, D], and keys and values as a cache keeps them: with other rows between two tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def rows(heads: int, num_tokens: int, pitch: int) -> torch.Tensor:
        made = torch.randn(batch, num_tokens, pitch, 16, generator=generator, device=device, dtype=dtype)
        return made[:, :, :heads].transpose(1, 2)

    return rows(4, 1, 4), rows(2, tokens, 6), rows(2, tokens, 6)


OPTIONS: list[dict[str, Any]] = [{}, {"window": 9}, {"softcap": 5.0, "scale": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("counts", [False, True])
def test_again_is_a_call_of_its_own(options: dict[str, Any], counts: bool) -> None:
    check(options, counts, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_again_is_a_call_of_its_own_on_a_gpu(options: dict[str, Any], counts: bool, dtype: torch.dtype) -> None:
    check(options, counts, "cuda", dtype)


def check(options: dict[str, Any], counts: bool, device: str, dtype: torch.dtype) -> None:
    lengths, firsts = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([70, 31], [0, 4]))
    lengths, first = (lengths, firsts) if counts else (None, None)
    given = tensors(device=device, dtype=dtype)
    result, again = repeated.start(*given, lengths, first=first, **options)
    assert again is not None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for seed, got in (
        (0, result),
        *((seed, again(*tensors(device=device, dtype=dtype, seed=seed))) for seed in (1, 2)),
    ):
        forced = None if device == "cpu" else "triton"
        own = decode_attention(
            *tensors(device=device, dtype=dtype, seed=seed), lengths, first=first, implementation=forced, **options
        )
        assert got is not None
        torch.testing.assert_close(got.transpose(1, 2), own, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_what_needs_another_launch_is_refused_on_a_gpu() -> None:
    given = tensors(device="cuda")
    _, again = repeated.start(*given)
    assert again is not None
    query, keys, values = tensors(device="cuda", seed=1)
    assert again(query, keys.contiguous(), values) is None, "other strides"
    shifted = torch.zeros(query.numel() + 1, device="cuda")[1:].view(query.transpose(1, 2).shape).transpose(1, 2)
    assert again(shifted, keys, values) is None, "an address that is not aligned"
    with torch.cuda.stream(torch.cuda.Stream()):
        assert again(query, keys, values) is None, "a stream that the workspace is not of"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert again(query, keys, values) is None, "a capture, whose replays would use memory that is gone"
        _, captured = repeated.start(query, keys, values)
    assert captured is None
    assert again(query, keys, values) is not None


@pytest.mark.gpu
def test_memory_is_that_of_the_result_on_a_gpu() -> None:
    given = tensors(4000, device="cuda", dtype=torch.bfloat16)
    _, again = repeated.start(*given)
    assert again is not None
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept = again(*given)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
    del kept


class Recorder:
    """Stands for the kernel, and for what Triton compiles it to: notes the arguments of every launch."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names
        self.launches: list[list[Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3

        def launch(*arguments: Any, **options: Any) -> Recorder:
            named = [options.pop(name) for name in self.arg_names[len(arguments) :]]
            self.launches.append([*arguments, *named])
            return self

        return launch


@needs_triton
@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernel_is_told_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_vtensor.ops.decode_attention import triton

    recorder = Recorder(triton._decode)
    for name, stand_in in {
        "_decode": recorder, "_num_sms": lambda index: 132, "current_raw_stream": lambda index: 7,
        "current_device": lambda: -1, "is_capturing": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(triton, name, stand_in)
    lengths = torch.full((2,), 70, dtype=torch.int32)
    query, keys, values = tensors()
    _, again = triton.start(query, keys, values, lengths, **options)
    assert again is not None
    again._device_index = -1
    others = tensors(seed=1)
    out = again(*others)
    assert out is not None
    first, second = recorder.launches
    own = {id(query): others[0], id(keys): others[1], id(values): others[2]}
    names = dict(zip(recorder.arg_names, zip(first, second, strict=True), strict=True))
    assert names.pop("out")[1] == out.data_ptr()
    for name, (told, told_again) in names.items():
        if isinstance(told, torch.Tensor):
            told = own.get(id(told), told).data_ptr()
        assert told == told_again, name
    assert not any(kept is mine for kept in again._kept for mine in (query, keys, values)), "a view of a cache"
