"""Gradients of prefill_attention, where the rows are all that there is."""

import pytest
import torch
from torch.autograd import gradcheck

from torch_vtensor.ops import decode_attention, kv_append, prefill_attention
from torch_vtensor.ops.prefill_attention import autograd
from torch_vtensor.ops.prefill_attention.reference import prefill_attention as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def leaves(batch: int = 2, heads: int = 2, group: int = 3, num_rows: int = 6, dims: tuple[int, int] = (5, 5)) -> list:
    shapes = [
        (batch, heads * group, num_rows, dims[0]),
        (batch, heads, num_rows, dims[0]),
        (batch, heads, num_rows, dims[1]),
        (heads * group,),
    ]
    random = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("rows_at_once", [2, 100])
@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((5, 5), {}),
        ((5, 3), {"window": 3, "scale": 0.7}),
        ((5, 5), {"softcap": 1.5, "first": torch.tensor([2, 0])}),
        ((5, 5), {"causal": False}),
        ((4, 6), {"softcap": 2.0, "window": 2, "lengths": torch.tensor([6, 4])}),
    ],
    ids=["plain", "window", "padded", "bidirectional", "short"],
)
def test_gradients_are_those_of_the_function(
    dims: tuple[int, int], options: dict, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys, values, sinks = leaves(dims=dims)
    monkeypatch.setattr(autograd, "_SCORE_ELEMENTS", rows_at_once * 2 * 6 * 6)
    options = {"lengths": torch.tensor([6, 6])} | options

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return prefill_attention(query, keys, values, sinks=sinks, **options)

    assert gradcheck(attend, (query, keys, values, sinks), fast_mode=True)
    assert gradcheck(lambda *qkv: prefill_attention(*qkv, **options), (query, keys, values), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_training_dtypes(dtype: torch.dtype, device: str) -> None:
    exact = leaves(num_rows=40, dims=(64, 64))
    exact = [leaf.detach().to(dtype).double().requires_grad_() for leaf in exact]  # what the dtype can hold
    ours = [leaf.detach().to(device, dtype).requires_grad_() for leaf in exact]
    lengths, cotangent = torch.tensor([40, 40]), torch.randn(2, 6, 40, 64, dtype=torch.float64).to(dtype)
    prefill_attention(*ours[:3], lengths.to(device), sinks=ours[3]).backward(cotangent.to(device))
    reference(*exact[:3], lengths, sinks=exact[3]).backward(cotangent.double())
    # 40 terms a sum in float32, and one rounding to the dtype of the result, at the size of the largest entry.
    tolerance = torch.finfo(dtype).eps + 40 * 64 * torch.finfo(torch.float32).eps
    for leaf, wanted in zip(ours, exact, strict=True):
        assert leaf.grad.dtype == dtype
        assert (leaf.grad.cpu().double() - wanted.grad).abs().max() <= tolerance * wanted.grad.abs().max()


def test_what_no_row_sees_does_not_spoil_gradients() -> None:
    query, keys, values, _ = leaves()
    lengths, first = torch.tensor([4, 6]), torch.tensor([0, 2])
    with torch.no_grad():
        for rows in (keys, values):
            rows[0, :, 4:] = rows[1, :, :2] = float("nan")
        query[0, :, :2] = query[1, :, :2] = float("nan")
    prefill_attention(query, keys, values, lengths, first=first, softcap=2.0).sum().backward()
    for leaf in (query, keys, values):
        assert not leaf.grad.isnan().any()
    assert not keys.grad[0, :, 4:].any()
    assert not query.grad[1, :, :2].any()
    assert query.grad[1, :, 2:].any()


@pytest.mark.parametrize("call", ["prefix", "num_new", "decode", "append"])
def test_a_gradient_that_does_not_exist_is_refused(call: str) -> None:
    query, keys, values, _ = leaves()
    lengths = torch.tensor([6, 6])
    calls = {
        "prefix": lambda: prefill_attention(query[:, :, :2], keys, values, lengths),
        "num_new": lambda: prefill_attention(query, keys, values, lengths, num_new=lengths),
        "decode": lambda: decode_attention(query[:, :, :1], keys, values, lengths),
        "append": lambda: kv_append(keys.detach(), values.detach(), keys[:, :, :1], values[:, :, :1], lengths - 1),
    }
    with pytest.raises(RuntimeError, match=r"no gradient .*torch\.no_grad\(\)"):
        calls[call]()
    with torch.no_grad():
        assert prefill_attention(query[:, :, :2], keys, values, lengths).shape == (2, 6, 2, 5)
        assert decode_attention(query[:, :, :1], keys, values, lengths).shape == (2, 6, 1, 5)
