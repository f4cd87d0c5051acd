"""Compiling in tests: each test starts with nothing compiled, and sees what the phases made."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from torch_vtensor.compile import Compilation, Uncut


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests of one ready model share a process, which captures the model once."""
    for item in items:
        called = getattr(item, "callspec", None)
        make = called and called.params.get("make")
        if getattr(make, "__module__", None) == "ready_models":
            item.add_marker(pytest.mark.xdist_group(make.__name__))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compilations() -> list[Compilation | Uncut]:
    """What `compiled` compiled so far, one for each captured graph."""
    return []


@pytest.fixture
def compiled(compilations: list[Compilation | Uncut]) -> Callable[..., Any]:
    """`torch.compile` with our backend; operator by operator unless told otherwise, in one second, not twenty."""

    def compile_(function: Any, *, codegen: str = "eager", dynamic: bool | None = None, **options: Any) -> Any:
        options = {"codegen": codegen, "inspect": compilations.append, **options}
        return torch.compile(function, backend="superscaler", dynamic=dynamic, options=options)

    return compile_


@pytest.fixture
def assert_trains_like_eager(compiled: Callable[..., Any]) -> Callable[..., None]:
    """Train a model and its copy, compiled and not: every loss, gradient, parameter and buffer has to be the same."""

    def check(
        model: nn.Module,
        batches: Sequence[tuple[Any, ...]],
        loss_of: Callable[..., torch.Tensor],
        tolerance: float = 1e-9,
        **options: Any,
    ) -> None:
        reference = copy.deepcopy(model)
        step = compiled(lambda *batch: loss_of(model, *batch), **options)
        # A large eps: otherwise a gradient of pure rounding noise becomes a step of the full learning rate.
        optimizer, reference_optimizer = (torch.optim.AdamW(m.parameters(), 1e-2, eps=1e-3) for m in (model, reference))
        close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
        for index, batch in enumerate(batches):
            torch.manual_seed(index)
            loss = step(*batch)
            torch.manual_seed(index)
            expected = loss_of(reference, *batch)
            loss.backward()
            expected.backward()
            close(loss, expected)
            theirs = dict(reference.named_parameters())
            for name, parameter in model.named_parameters():
                close(parameter.grad, theirs[name].grad, msg=lambda text, name=name: f"gradient of {name}: {text}")
            optimizer.step()
            reference_optimizer.step()
            close(dict(model.state_dict()), dict(reference.state_dict()))
            optimizer.zero_grad()
            reference_optimizer.zero_grad()

    return check
