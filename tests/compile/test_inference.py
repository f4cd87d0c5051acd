"""Models answer with the backend as they do without it, whatever they are called with."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from torch_vtensor.compile import Uncut


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_without_gradients(mode: Any, codegen: str, compiled: Any, compilations: list[Uncut]) -> None:
    model, x = make_model(), torch.randn(3, 4)
    with mode():
        torch.testing.assert_close(compiled(model, codegen=codegen)(x), model(x))
    (compilation,) = compilations
    assert not compilation.is_joint


def test_a_compiled_model_changes_between_training_and_inference(compiled: Any, compilations: list[Uncut]) -> None:
    model, x = make_model(), torch.randn(3, 4)
    function = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x))
    torch.testing.assert_close(function(x), model(x))
    assert function(x).requires_grad
    model.train()
    function(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x))
    assert [compilation.is_joint for compilation in compilations] == [False, True, True, False]


def test_outputs_keep_their_structure_and_what_is_no_tensor(compiled: Any) -> None:
    model = make_model()

    def function(x: torch.Tensor, scale: float, extra: torch.Tensor | None = None) -> dict[str, Any]:
        out = model(x) * scale
        return {"out": out, "none": extra, "pair": (out.sum(), [3, "text"]), "detached": out.detach(), "input": x}

    x = torch.randn(3, 4)
    got, expected = compiled(function)(x, 0.5), function(x, 0.5)
    assert got["input"] is x
    assert got["none"] is None
    assert not got["detached"].requires_grad
    assert got["pair"][1] == [3, "text"]
    torch.testing.assert_close(got["out"], expected["out"])
    torch.testing.assert_close(got["pair"][0], expected["pair"][0])


def test_outputs_that_alias_an_input_share_its_memory(compiled: Any) -> None:
    x = torch.randn(3, 4)
    flat, row, product = compiled(lambda x: (x.view(-1), x[1], x * 2))(x)
    flat[0] = 7
    row[0] = 8
    assert x[0, 0] == 7
    assert x[1, 0] == 8
    assert product[0, 0] != 14


def test_inputs_changed_in_place_are_changed(compiled: Any) -> None:
    def function(counter: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        view.mul_(2)
        return counter + view

    results = []
    for run in (function, compiled(function)):
        base = torch.arange(6.0)
        counter = torch.zeros(2)
        out = run(counter, base[2:4])
        results.append((out, counter, base))
    torch.testing.assert_close(results[1], results[0])


def test_graph_breaks_make_several_graphs(compiled: Any, compilations: list[Uncut]) -> None:
    first, second = make_model(), make_model()

    def function(x: torch.Tensor) -> torch.Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    x = torch.randn(3, 4, requires_grad=True)
    out = compiled(function)(x)
    torch.testing.assert_close(out, function(x))
    out.sum().backward()
    assert len(compilations) == 2


def test_a_graph_that_computes_nothing(compiled: Any, compilations: list[Uncut]) -> None:
    assert compiled(lambda x: (x, torch.ones(2)))(torch.zeros(1))[1].tolist() == [1, 1]
    assert len(compilations) == 1


def test_nested_compiled_regions_belong_to_the_graph_around_them(compiled: Any, compilations: list[Uncut]) -> None:
    model = make_model()
    region = torch.compiler.nested_compile_region(lambda x: model(x))
    x = torch.randn(3, 4, requires_grad=True)
    out = compiled(lambda x: region(region(x)))(x)
    torch.testing.assert_close(out, model(model(x)))
    out.sum().backward()
    assert len(compilations) == 1


def test_tensor_subclasses(compiled: Any) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    scale = nn.Parameter(torch.randn(3))
    x = TwoTensor(torch.randn(3), torch.randn(3)).requires_grad_()
    out = compiled(lambda x: (x * scale).sin())(x)
    assert isinstance(out, TwoTensor)
    torch.testing.assert_close(out.a, (x.a * scale).sin())
    out.sum().backward()
    torch.testing.assert_close(x.grad.b, (x.b * scale).cos() * scale)


def test_compiled_autograd(compiled: Any) -> None:
    model, x = make_model(), torch.randn(3, 4)
    model(x).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    def step(x: torch.Tensor) -> None:
        model(x).sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled(step)(x)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_generate_gives_the_same_tokens(compiled: Any, compilations: list[Uncut]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(31, (2, 5))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, **settings)
    model.forward = compiled(model.forward)
    assert model.generate(prompt, **settings).tolist() == expected.tolist()
    assert compilations


def test_the_backend_is_found_by_name_without_importing_it(run_python: Any) -> None:
    printed = run_python(
        """
import sys, torch
assert "superscaler" in torch.compiler.list_backends()
assert not any(name.startswith("torch_vtensor") for name in sys.modules)
model, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
out = torch.compile(model, backend="superscaler", options={"codegen": "eager"})(x)
torch.testing.assert_close(out, model(x))
out.sum().backward()
print("torch_vtensor.compile.backend" in sys.modules)
"""
    )
    assert printed.strip() == "True"


def test_reset_reaches_the_backend(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resets = []
    monkeypatch.setattr(sys.modules["torch_vtensor.compile.backend"].superscaler, "reset", lambda: resets.append(1))
    compiled(lambda x: x + 1)(torch.ones(1))
    torch.compiler.reset()
    assert resets
