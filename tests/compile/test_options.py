"""Options are honoured or refused, never ignored."""

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from torch_vtensor.compile.options import parse_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"plann": print},
            r"options has no 'plann'\. Did you mean 'plan'\? "
            r"Known: codegen, inductor, inspect, memory_budget, mesh, plan\.",
        ),
        ({"max_autotune": True}, r"options has no 'max_autotune'\. Known: codegen"),
        ({"plan": 3}, r"plan is 3; a plan is a function of \(graph, mesh\)"),
        ({"plan": "dp2+tq"}, r"unknown part 'tq'"),
        ({"plan": "nowhere.py:plan"}, r"no file 'nowhere.py'"),
        ({"codegen": "c"}, r"codegen is 'c'; choose one of inductor, eager"),
        ({"inductor": "max_autotune"}, r"inductor is 'max_autotune'; give a dict"),
        (
            {"inductor": {"max_autotun": True}},
            r"options\['inductor'\] has no 'max_autotun'\. Did you mean 'max_autotune'",
        ),
        ({"memory_budget": "8GB"}, r"memory_budget: '8GB' is not a size"),
        ({"memory_budget": []}, r"memory_budget is \[\]; give a number of bytes"),
        ({"inspect": []}, r"inspect is \[\]; give a function"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        torch.compile(lambda x: x + 1, backend="superscaler", options=options)(torch.ones(1))
    assert isinstance(caught.value.inner_exception, ValueError | TypeError)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match="fastest"):
        torch.compile(lambda x: x + 1, backend="superscaler", mode="fastest")(torch.ones(1))


def test_modes_come_before_settings_of_ones_own() -> None:
    options = parse_options("max-autotune-no-cudagraphs", {"inductor": {"coordinate_descent_tuning": False}})
    assert options.config_patches["max_autotune"] is True
    assert options.config_patches["coordinate_descent_tuning"] is False


def test_a_memory_budget_may_be_text() -> None:
    assert parse_options(None, {"memory_budget": "1.5 GiB"}).memory_budget == 3 << 29


def test_guard_filters_stay_with_torch(compiled: Any) -> None:
    function = compiled(lambda x: x + 1, guard_filter_fn=lambda guards: [True] * len(guards))
    assert function(torch.ones(1)).item() == 2
