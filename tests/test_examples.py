"""Every example, and what the README shows, runs on this machine and prints what it says that it shows."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHOWS = {
    "branches": "five sessions hold",
    "chat_fork": "four conversations hold",
    "compile_backend": "1 graph compiled",
    "explicit_cache": "the same 100 tokens, at the same address: True",
    "generate": "tokens are DynamicCache's: True",
    "serve_requests": "answers are those of generate() alone: True",
    "memory_pool": "returned to the device" if torch.cuda.is_available() else "This example needs a CUDA GPU",
    "train_with_a_plan": "plan dp1",
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


def test_readme_begins_with_lines_that_run(run_python: Callable[..., str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    printed = run_python(code[1])
    assert "torch.Size([1, 532])" in printed
    assert re.search(r"appends zero-copy: [1-9]", printed)


def test_readme_links_to_files_and_sections_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    sections = {"#" + re.sub("[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert [target for target in targets if target not in sections and not (ROOT / target).exists()] == []
