"""A graph that no plan cuts becomes the very code that inductor makes of it, so it cannot run slower."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from torch_vtensor.compile import Uncut


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 4))


def train(function: Any) -> list[torch.Tensor]:
    """Run a step from a fixed seed; return everything that it made."""
    x = torch.ones(3, 4, requires_grad=True)
    torch.manual_seed(1)
    out = function(x)
    out.sum().backward()
    return [out.detach(), x.grad]


def infer(function: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [function(torch.ones(3, 4))]


def kernel_cache_counts() -> dict[str, int]:
    return {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache_")}


@pytest.mark.parametrize(("run", "num_graphs", "dynamic"), [(train, 2, None), (train, 2, True), (infer, 1, None)])
def test_every_graph_is_found_in_the_cache_that_inductor_filled(
    run: Any, num_graphs: int, dynamic: bool | None, compiled: Any
) -> None:
    model = make_model()
    expected = run(torch.compile(model, backend="inductor", dynamic=dynamic))
    torch.compiler.reset()
    counters.clear()
    got = run(compiled(model, codegen="inductor", dynamic=dynamic))
    assert kernel_cache_counts() == {"fxgraph_cache_hit": num_graphs}
    # Bit for bit, random numbers of dropout included.
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_inductor_is_asked_for_reaches_it(compiled: Any, compilations: list[Uncut]) -> None:
    seen = []

    def keep_everything(graph: torch.fx.Graph) -> None:
        seen.append(graph)

    options = {"post_grad_custom_post_pass": keep_everything}
    train(compiled(make_model(), codegen="inductor", inductor=options))
    assert len(seen) == 2
    assert len(compilations) == 1


def test_a_mode_of_torch_compile_is_inductors() -> None:
    model = make_model()
    infer(torch.compile(model, backend="inductor", mode="max-autotune-no-cudagraphs"))
    torch.compiler.reset()
    counters.clear()
    infer(torch.compile(model, backend="superscaler", mode="max-autotune-no-cudagraphs"))
    assert kernel_cache_counts() == {"fxgraph_cache_hit": 1}


def test_compiled_steps_are_kept_over_processes_unless_phases_are_looked_at(compiled: Any) -> None:
    model = make_model()
    for function, kept in ((torch.compile(model, backend="superscaler"), 1), (compiled(model, codegen="inductor"), 0)):
        train(function)
        torch.compiler.reset()
        counters.clear()
        train(function)
        assert counters["aot_autograd"]["autograd_cache_hit"] == kept
        torch.compiler.reset()
