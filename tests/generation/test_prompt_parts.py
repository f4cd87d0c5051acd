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


def test_rotations_of_halves_are_known_by_what_they_do() -> None:
    from transformers.models.cohere import modeling_cohere
    from transformers.models.glm import modeling_glm
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    for module, expected in (
        (modeling_llama, True),
        (modeling_mistral, True),
        (modeling_cohere, False),  # neighbours turn against each other
        (modeling_glm, False),
    ):
        assert prompt_parts._turns_halves(module.apply_rotary_pos_emb) is expected, module.__name__
    assert not prompt_parts._turns_halves(lambda query, key, cos: (query, key))
    assert not prompt_parts._turns_halves(lambda query, key, cos, sin: None)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [48, 128])
def test_the_kernel_turns_halves_wherever_they_lie(dim: int) -> None:
    from torch_vtensor.ops.rotary_triton import rotate

    query, key = (torch.randn(2, 300, heads, dim, device="cuda").bfloat16().transpose(1, 2) for heads in (20, 5))
    cos, sin = torch.randn(2, 1, 300, dim, device="cuda").bfloat16()
    assert prompt_parts._can_rotate(query, key, cos, sin)
    assert not prompt_parts._can_rotate(query, key, cos[..., :16], sin[..., :16])
    for made, x in zip(rotate(query, key, cos, sin), (query, key), strict=True):
        first, second = x.float().chunk(2, -1)
        expected = x * cos.float()[:, None] + torch.cat([-second, first], -1) * sin.float()[:, None]
        torch.testing.assert_close(made, expected.bfloat16())


@pytest.mark.slow
def test_compiled_parts_compute_what_the_model_does() -> None:
    model = model_of("llama")
    twin = copy.deepcopy(model)
    prompt_parts.compile_parts(twin)
    for num_tokens in (9, 17):
        tokens = torch.arange(3, 3 + num_tokens)[None].repeat(2, 1)
        with torch.no_grad():
            torch.testing.assert_close(twin(tokens).logits, model(tokens).logits)
