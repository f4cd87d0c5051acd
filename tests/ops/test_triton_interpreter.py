"""The Triton kernels in Triton's interpreter: their arithmetic and masks, on a machine without a GPU."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "interpreted.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed here")
@pytest.mark.parametrize(
    "op",
    [
        "kv_append",
        "decode_attention",
        "shared_prefix",
        "prefill_attention",
        "prefill_parts",
        "parts_are_even_and_few",
        "cached_attention",
        "skinny_linear",
        "rotary",
    ],
)
def test_kernel_in_the_interpreter(op: str, run_python: Callable[..., str]) -> None:
    assert f"{op} passed" in run_python(str(PROGRAM), op, environ={"TRITON_INTERPRET": "1"})
