"""kv_append: the new tokens are where they belong, and nothing else has changed."""

import pytest
import torch
from attention_cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_vtensor.ops import kv_append
from torch_vtensor.ops.kv_append.reference import kv_append as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CAPACITY = 40


def caches(dtype: torch.dtype, batch: int, dims: tuple[int, int], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, 3, C, D] full of NaN, one inside the other's strides where interleaved."""
    if layout == "interleaved":
        both = torch.full((batch, CAPACITY, 3, sum(dims)), float("nan"), dtype=dtype).transpose(1, 2)
        return both[..., : dims[0]], both[..., dims[0] :]
    keys, values = (torch.full((batch, 3, CAPACITY, dim), float("nan"), dtype=dtype) for dim in dims)
    return keys, values


def check_append(
    dtype: torch.dtype,
    dims: tuple[int, int],
    layout: str,
    num_tokens: int,
    starts: list[int],
    counts: list[int] | None,
    device: str,
) -> None:
    batch = len(starts)
    key, value = (torch.randn(batch, num_tokens, 3, dim).to(dtype).transpose(1, 2) for dim in dims)
    lengths = torch.tensor(starts)
    num_new = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    expected = caches(dtype, batch, dims, layout)
    reference(*expected, key, value, lengths, num_new)
    got = tuple(cache.to(device) for cache in caches(dtype, batch, dims, layout))
    if layout == "interleaved":  # .to() would make them two
        both = torch.full((batch, CAPACITY, 3, sum(dims)), float("nan"), dtype=dtype, device=device).transpose(1, 2)
        got = both[..., : dims[0]], both[..., dims[0] :]
    on_device = [None if tensor is None else tensor.to(device) for tensor in (key, value, lengths, num_new)]
    kv_append(*got, *on_device[:3], num_new=on_device[3])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)
    assert lengths.tolist() == starts


APPENDS = {
    "dtype": st.sampled_from(DTYPES),
    "dims": st.sampled_from([(16, 16), (64, 32), (5, 7)]),
    "layout": st.sampled_from(["head_major", "interleaved"]),
    "num_tokens": st.sampled_from([1, 1, 2, 9, 20]),
    "data": st.data(),
}


def draw_and_check(data: st.DataObject, num_tokens: int, device: str, **options: object) -> None:
    starts = data.draw(st.lists(st.integers(0, CAPACITY - num_tokens), min_size=1, max_size=5))
    if data.draw(st.booleans()):
        starts = starts[:1] * len(starts)
    a_count = st.integers(0, num_tokens)
    counts = data.draw(st.none() | st.lists(a_count, min_size=len(starts), max_size=len(starts)))
    check_append(num_tokens=num_tokens, starts=starts, counts=counts, device=device, **options)  # type: ignore[arg-type]


@given(**APPENDS)
@settings(max_examples=100)
def test_append(data: st.DataObject, num_tokens: int, **options: object) -> None:
    draw_and_check(data, num_tokens, "cpu", **options)


@pytest.mark.gpu
@given(**(APPENDS | {"dtype": st.sampled_from(DTYPES[:3])}))
@settings(max_examples=50)
def test_append_on_cuda(data: st.DataObject, num_tokens: int, **options: object) -> None:
    draw_and_check(data, num_tokens, "cuda", **options)


@pytest.mark.parametrize("device", DEVICES)
def test_append_to_the_last_token_of_room(device: str) -> None:
    check_append(torch.bfloat16, (64, 64), "head_major", 3, [CAPACITY - 3, 0], None, device)


@pytest.mark.parametrize(
    ("starts", "counts", "message"),
    [
        ([39, 0], None, "sequence 0 has 39 tokens and gets 2 more; keys and values have room for 40"),
        ([0, -1], None, "sequence 1 has -1 tokens"),
        ([0, 0], [2, 3], r"num_new\[1\] is 3; key and value hold 2 tokens"),
        ([0, 0], [-1, 2], r"num_new\[0\] is -1"),
    ],
)
def test_no_room_is_an_error_that_writes_nothing(starts: list[int], counts: list[int] | None, message: str) -> None:
    keys, values = caches(torch.float32, 2, (8, 8), "head_major")
    key = torch.ones(2, 3, 2, 8)
    num_new = None if counts is None else torch.tensor(counts)
    with pytest.raises(ValueError, match=message):
        kv_append(keys, values, key, key, torch.tensor(starts), num_new=num_new)
    assert keys.isnan().all()
    assert values.isnan().all()


@pytest.mark.gpu
def test_tokens_without_room_are_dropped_on_cuda() -> None:
    keys, values = (cache.cuda() for cache in caches(torch.float32, 2, (16, 16), "head_major"))
    key = torch.ones(2, 3, 4, 16, device="cuda")
    kv_append(keys, values, key, key, torch.tensor([CAPACITY - 1, 0], device="cuda"))
    for cache in (keys, values):
        assert (~cache.isnan()).sum().item() == 3 * 16 * (1 + 4)
