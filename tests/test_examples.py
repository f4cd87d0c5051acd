"""Every example runs on this machine and shows what it says that it shows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SHOWS = {
    "chat_fork": "four conversations hold",
    "compile_backend": "1 graph compiled",
    "explicit_cache": "the same 100 tokens, at the same address: True",
    "generate": "tokens are DynamicCache's: True",
    "memory_pool": "returned to the device" if torch.cuda.is_available() else "This example needs a CUDA GPU",
    "vtensor": "same address after growth: True",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_shows_what_it_says(example: Path, run_python: Callable[..., str]) -> None:
    assert SHOWS[example.stem] in run_python("-u", str(example))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_what_to_look_at(example: Path) -> None:
    source = example.read_text(encoding="utf-8")
    assert source.startswith('"""')
    assert len(source.splitlines()) < 60


def test_no_example_is_missing() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(SHOWS)
