"""skinny_linear and skinny_gated_linear: one row times matrices, with what comes before and after, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from skinny_cases import CASES, GATED, SkinnyCase

from torch_vtensor.ops.skinny_linear import MAX_WEIGHTS, skinny_gated_linear, skinny_linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_as_torch_sees_them(device: str) -> None:
    for case in CASES[:3]:
        torch.library.opcheck(
            skinny_linear.default, case.arguments(device), test_utils=("test_schema", "test_faketensor")
        )
    a = GATED[1].arguments(device)
    arguments = a.x, *a.weights, a.norm, a.eps
    torch.library.opcheck(skinny_gated_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_what_the_kernels_do_not_take() -> None:
    a = CASES[0].arguments("cuda")
    with pytest.raises(ValueError, match="one contiguous row"):
        skinny_linear(a.x.expand(2, 1, -1), a.weights, a.biases, None, 0.0, None)
    with pytest.raises(ValueError, match="1 to 3"):
        skinny_linear(a.x, a.weights * (MAX_WEIGHTS + 1), [None] * (MAX_WEIGHTS + 1), None, 0.0, None)
