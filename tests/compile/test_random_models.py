"""Random models compute, with the backend, what they compute without it."""

import copy
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from torch_vtensor.compile import Uncut

WIDTHS = st.sampled_from([1, 3, 8])


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A chain of layers, some tied, normalized, dropped out, skipped or frozen."""
    width = draw(WIDTHS)
    layers: list[nn.Module] = [nn.Linear(draw(WIDTHS), width)]
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["linear", "tied", "norm", "batch norm", "dropout", "residual", "activation"]))
        if kind == "linear":
            width, before = draw(WIDTHS), width
            layers.append(nn.Linear(before, width, bias=draw(st.booleans())))
        elif kind == "tied":
            square = nn.Linear(width, width)
            layers += [square, square]
        elif kind == "residual":
            layers.append(Residual(nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, width))))
        else:
            layers.append(
                {
                    "norm": nn.LayerNorm(width),
                    "batch norm": nn.BatchNorm1d(width),
                    "dropout": nn.Dropout(0.3),
                    "activation": draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Softmax(dim=-1)])),
                }[kind]
            )
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    return model


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models(), num_rows=st.integers(2, 5), input_needs_gradient=st.booleans())
def test_random_models_match_eager(
    model: nn.Module, num_rows: int, input_needs_gradient: bool, compiled: Any, compilations: list[Uncut]
) -> None:
    torch.compiler.reset()
    compilations.clear()
    reference = copy.deepcopy(model)
    inputs = torch.randn(num_rows, model[0].in_features, dtype=torch.double)
    results = []
    for function, parameters in ((reference, reference.parameters()), (compiled(model), model.parameters())):
        x = inputs.clone().requires_grad_(input_needs_gradient)
        torch.manual_seed(1)
        out = function(x)
        if out.requires_grad:
            out.square().sum().backward()
        results.append((out.detach(), [tensor.grad for tensor in (x, *parameters)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(model.state_dict()), dict(reference.state_dict()), rtol=1e-9, atol=1e-9)
    (compilation,) = compilations
    assert compilation.is_joint == (out.grad_fn is not None)
