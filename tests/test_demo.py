"""The demo: it ends well where all is well, and says so where it is not."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import torch_vtensor
from torch_vtensor.cli import main
from torch_vtensor.demo import branches, compare, text, train

LESS = ["demo", "--quick", "--tokens", "16"]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo's folder, in a process whose demo does not train."""
    monkeypatch.setattr(train, "train", lambda *_: None)
    return tmp_path


@pytest.fixture
def tiny_model() -> Any:
    torch.manual_seed(0)
    return train.make_model(num_layers=2, hidden_size=128).eval()


def run_contender(model: Any, contender: compare.Contender, num_new: int, num_prompt: int = 250) -> compare.Run:
    prompt = torch.arange(num_prompt)[None] % 256
    return compare.generate(model, contender, prompt, num_new, seed=0, capacity=num_prompt + num_new)


def check_story(printed: str, folder: Path) -> None:
    """That a demo trained, saved, loaded, generated, compared and drew."""
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("torch_vtensor  "))
    assert row[-1] == "identical"
    assert printed.splitlines()[-1].startswith("next: ")
    for name in ("memory.png", "branches.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "text.txt").read_text(encoding="utf-8") in printed
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.model_type == "llama"


@pytest.mark.slow
def test_quick_demo_of_a_fresh_process(run_python: Callable[..., str], tmp_path: Path) -> None:
    check_story(run_python("-m", "torch_vtensor", "demo", "--quick", "--out", "out"), tmp_path / "out")


def test_a_small_demo_trains_generates_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LESS, "--steps", "2", "--out", str(tmp_path)]) == 0
    check_story(capsys.readouterr().out, tmp_path)


def test_other_tokens_than_dynamic_cache_end_the_demo_with_an_error(
    untrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock_generate = compare.generate

    def generate(model: Any, contender: compare.Contender, *arguments: Any) -> compare.Run:
        run = stock_generate(model, contender, *arguments)
        if contender is compare.VTENSOR and len(run.tokens) == 16:
            run.tokens[5] = (run.tokens[5] + 1) % 256
        return run

    monkeypatch.setattr(compare, "generate", generate)
    assert main([*LESS, "--out", str(untrained)]) == 1
    printed = capsys.readouterr()
    (row,) = (line.split() for line in printed.out.splitlines() if line.startswith("torch_vtensor  "))
    assert row[-1] == "different"
    assert "token 5 of 16" in printed.err


def test_running_out_of_pages_ends_the_demo_with_the_remedy(
    untrained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any) -> None:
        raise torch_vtensor.OutOfPagesError(torch.device("cpu"), 1, 0, 0)

    monkeypatch.setattr(compare, "generate", generate)
    assert main([*LESS, "--out", str(untrained)]) == 1
    assert "raise the budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "mps"], "runs on cpu, cuda"),
        (["--device", "gpu"], "--device is gpu; the demo runs on cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "--device cpu"),
        (["--out", __file__], "exists"),
    ],
    ids=["no driver", "no device", "no such GPU", "not a folder"],
)
def test_demo_says_why_it_cannot_start(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--tokens", "15"], ["--tokens", "100000"], ["--steps", "x"]])
def test_demo_refuses_sizes_out_of_bounds(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_demo_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_vtensor.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo"]) == 2
    assert "tqdm: pip install 'torch-vtensor[demo]'" in capsys.readouterr().err


def test_text_survives_encoding_and_cannot_steer_a_terminal() -> None:
    page = text.read_text()
    assert len(page) > 100_000
    assert text.decode(text.encode(page).tolist()) == page
    assert text.decode(b"ok\n\x1b[31m\xff") == "ok\n·[31m\N{REPLACEMENT CHARACTER}"


@pytest.mark.slow
def test_training_goes_on_operator_by_operator_without_a_cpp_compiler(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from torch_vtensor.demo import text, train\n"
        "sys.stderr = sys.stdout\n"
        "model = train.make_model(1, 64)\n"
        "before = model.lm_head.weight.clone()\n"
        "train.train(model, text.encode(text.read_text()), 2, None)\n"
        "print('trained:', not model.lm_head.weight.equal(before))\n"
    )
    environ = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    printed = run_python(code, environ=environ)
    assert "operators run one by one" in printed
    assert "trained: True" in printed


def test_dynamic_cache_peak_is_what_cat_really_holds(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(torch.zeros(1, 9, dtype=torch.long), past_key_values=cache)
    stock_cat, held = torch.cat, []

    def cat(tensors: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        result = stock_cat(tensors, *arguments, **options)
        there = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        if any(tensor is other for tensor in tensors for other in there):
            held.append(sum(tensor.nbytes for tensor in [*there, result]))
        return result

    monkeypatch.setattr(torch, "cat", cat)
    tiny_model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    assert compare.DYNAMIC.measure(cache, 10).peak_bytes == max(held)


def test_branches_hold_the_document_once(tiny_model: Any) -> None:
    page_bytes, num_strips = 64 * 1024, 2 * 2 * 4  # layers, keys and values, heads
    grown = branches.grow(tiny_model, num_document=1100, num_branches=3, num_new=4, seed=0)
    document, *others = grown.sessions
    assert [held.num_tokens for held in others] == [1101 + 4 + len(f"\n\n{start} ") for start in
                                                    ("In short,", "For example,", "Note that")]  # fmt: skip
    assert {held.shared_bytes for held in grown.sessions} == {4 * num_strips * page_bytes}  # of 256 tokens
    own_bytes = sum(held.committed_bytes - held.shared_bytes for held in grown.sessions)
    assert grown.together_bytes == document.shared_bytes + own_bytes
    assert grown.apart_bytes - grown.together_bytes == 3 * document.shared_bytes
    assert f"together {grown.together_bytes / 2**20:.2f} MiB" in branches.format_branches(grown)


def test_measured_memory_is_what_the_caches_are_made_for(tiny_model: Any) -> None:
    token_bytes = 2 * 2 * 4 * 64 * 4  # layers, keys and values, heads, dim, float32
    torch_vtensor.trim()
    dynamic, vtensor, static = (
        run_contender(tiny_model, contender, num_new=20)
        for contender in (compare.DYNAMIC, compare.VTENSOR, compare.STATIC)
    )
    assert [step.num_tokens for step in vtensor.steps] == list(range(250, 270))
    for run in (dynamic, vtensor, static):
        assert run.tokens == dynamic.tokens
        assert [step.memory.written_bytes for step in run.steps] == [token_bytes * n for n in range(250, 270)]
    assert {step.memory.held_bytes for step in static.steps} == {token_bytes * 270}
    assert [step.memory.held_bytes for step in dynamic.steps] == [token_bytes * n for n in range(250, 270)]
    # 256 tokens are one page a head: on from ordinary memory to pages, then no driver call.
    assert vtensor.steps[0].memory.reserved_bytes == 0 < vtensor.steps[-1].memory.reserved_bytes
    assert vtensor.steps[-1].memory.held_bytes % (64 * 1024) == 0
    assert sum(calls > 0 for calls in vtensor.num_driver_calls) == 1
    assert not any(dynamic.num_driver_calls + static.num_driver_calls)
