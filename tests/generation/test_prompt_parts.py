"""What inductor makes of a prompt: all between its matrix products, the same code for all layers and sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import model_of

from torch_vtensor.generation.decode import prompt_parts

pytestmark = pytest.mark.parametrize("memory", ["token-major"], indirect=True)


@pytest.mark.parametrize(
    ("family", "num_functions"),
    [("llama", 3), ("gemma3", 3), ("mixtral", 3), ("gpt2", 3)],  # norm, gate, rotation; gpt2 has products of its own
)
def test_parts_are_compiled_once_for_all_layers(
    family: str, num_functions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    ran: list[Any] = []

    def compile_(function: Any, dynamic: bool) -> Any:
        assert dynamic
        code = function.__code__
        compiled.append(code)

        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(code)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    model = model_of(family)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        twin = copy.deepcopy(model)
        prompt_parts.compile_parts(twin)
        logits = twin(tokens).logits
        assert len(set(compiled)) == len(set(ran)) == num_functions
        assert torch.equal(logits, expected)
        ran.clear()
        model(tokens)
        assert ran == []


@pytest.mark.slow
def test_compiled_parts_compute_what_the_model_does() -> None:
    model = model_of("llama")
    twin = copy.deepcopy(model)
    prompt_parts.compile_parts(twin)
    for num_tokens in (9, 17):
        tokens = torch.arange(3, 3 + num_tokens)[None].repeat(2, 1)
        with torch.no_grad():
            torch.testing.assert_close(twin(tokens).logits, model(tokens).logits)
