"""The soaks, for a few seconds: they run on a GPU for minutes, and under compute-sanitizer (tests/soak)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).parent / "soak"


@pytest.mark.slow
@pytest.mark.parametrize("what", [("memory.py", "--gib", "0.04"), ("serving.py", "--mib", "16")], ids=lambda it: it[0])
def test_nothing_is_lost_or_leaked(what: tuple[str, ...], run_python: Callable[..., str]) -> None:
    script, *size = what
    said = run_python(str(_FOLDER / script), "--device", "cpu", "--seconds", "8", *size)
    assert said.startswith("seed ")
    assert said.endswith("nothing lost, nothing leaked\n")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("script", ["memory.py", "serving.py"])
def test_nothing_is_lost_or_leaked_on_a_gpu(script: str, run_python: Callable[..., str]) -> None:
    assert torch.cuda.is_available()
    said = run_python(str(_FOLDER / script), "--device", "cuda", "--seconds", "30")
    assert said.endswith("nothing lost, nothing leaked\n")
