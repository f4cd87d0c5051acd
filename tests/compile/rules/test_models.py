"""Operators of whole models: each has a rule."""

from collections.abc import Callable

import pytest
from model_zoo import MODELS, Program, captured

from torch_vtensor.compile.rules import has_rule


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_no_operator_of_these_models_lacks_a_rule(make: Callable[[], Program]) -> None:
    graph = captured(make())
    lacking = [str(operator) for operator in graph.operators if not has_rule(operator)]
    assert not lacking, "\n".join(lacking)
