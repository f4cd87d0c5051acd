"""skinny_linear and its kind: a few rows times matrices, with what comes before and after, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from skinny_cases import CASES, GATED, SEVERAL, SEVERAL_GATED, SkinnyCase

from torch_vtensor.ops.skinny_linear import (
    MAX_ROWS,
    MAX_WEIGHTS,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_normed,
    takes,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NARROW = [torch.bfloat16, torch.float16]
LARGE = [
    SkinnyCase(4096, (4096, 1024, 1024), has_norm=True),
    SkinnyCase(4096, (4096,), has_residual=True),
    SkinnyCase(14336, (4096,), has_residual=True),
    SkinnyCase(2048, (128, 1, 3), (True, True, True)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("device", DEVICES)
def test_products(device: str, case: SkinnyCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    case.check(skinny_linear(*case.arguments(device)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=range(len(LARGE)))
def test_products_of_models(case: SkinnyCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    case.check(skinny_linear(*case.arguments("cuda")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GATED, ids=range(len(GATED)))
@pytest.mark.parametrize("device", DEVICES)
def test_gated_products(device: str, case: SkinnyCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    a = case.arguments(device)
    case.check_gated(skinny_gated_linear(a.x, *a.weights, a.norm, a.eps))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", SEVERAL, ids=range(len(SEVERAL)))
@pytest.mark.parametrize("device", DEVICES)
def test_products_of_several_rows(device: str, case: SkinnyCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    a = case.arguments(device)
    case.check(skinny_linear(*a))
    again = skinny_linear(*a)
    assert all(torch.equal(one, other) for one, other in zip(skinny_linear(*a), again, strict=True)), (
        "the same every time"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2, 32, 64])
@pytest.mark.parametrize("case", LARGE[:3], ids=range(3))
def test_products_of_models_with_several_rows(case: SkinnyCase, num_rows: int) -> None:
    case = dataclasses.replace(case, dtype=torch.bfloat16, num_rows=num_rows)
    case.check(skinny_linear(*case.arguments("cuda")))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", [SEVERAL[2], dataclasses.replace(LARGE[2], num_rows=32)], ids=["small", "large"])
@pytest.mark.parametrize("device", DEVICES)
def test_sums_that_are_normed(device: str, case: SkinnyCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    a = case.arguments(device)
    weight = torch.linspace(0.5, 2, a.weights[0].shape[0]).to(dtype).to(device)
    case.check_normed(*skinny_linear_normed(a.x, a.weights[0], a.biases[0], a.residual, weight, a.eps), weight)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", SEVERAL_GATED, ids=range(len(SEVERAL_GATED)))
@pytest.mark.parametrize("device", DEVICES)
def test_gated_products_of_several_rows(device: str, case: SkinnyCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    a = case.arguments(device)
    case.check_gated(skinny_gated_linear(a.x, *a.weights, a.norm, a.eps))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_taken(device: str) -> None:
    weight = torch.empty(8, 64, device=device, dtype=torch.bfloat16)
    x = torch.empty(MAX_ROWS + 1, 64, device=device, dtype=torch.bfloat16)
    assert takes(x[:1], weight)
    assert takes(x[1:], weight)
    assert not takes(x, weight)
    assert not takes(x[:2].float(), weight)
    assert takes(x[:2].float(), weight.float()) is (device == "cpu")
    assert takes(x[:2, :40].contiguous(), weight[:, :40].contiguous()) is (device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_as_torch_sees_them(device: str) -> None:
    for case in CASES[:3]:
        torch.library.opcheck(
            skinny_linear.default, case.arguments(device), test_utils=("test_schema", "test_faketensor")
        )
    a = dataclasses.replace(SEVERAL[2], dtype=torch.bfloat16).arguments(device)
    weight = a.weights[0].new_ones(40)
    torch.library.opcheck(
        skinny_linear_normed.default,
        (a.x, a.weights[0], a.biases[0], a.residual, weight, 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )
    a = GATED[1].arguments(device)
    arguments = a.x, *a.weights, a.norm, a.eps
    torch.library.opcheck(skinny_gated_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_what_the_kernels_do_not_take() -> None:
    a = CASES[0].arguments("cuda")
    with pytest.raises(ValueError, match="1 to 3"):
        skinny_linear(a.x, a.weights * (MAX_WEIGHTS + 1), [None] * (MAX_WEIGHTS + 1), None, 0.0, None)
