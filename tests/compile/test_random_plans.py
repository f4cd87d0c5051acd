"""Random plans for random models compute what one process computes, or are refused before anything runs."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, currently_in_test_context, event, given, note, settings
from hypothesis import strategies as st
from plan_models import find_case
from plan_strategies import REFUSALS, RandomPlan
from plan_worlds import plan_case, run_steps

NUM_MODELS, NUM_MODELS_AT_NIGHT = 12, 120


def try_plan(model: int, choose: random.Random, shuffle: random.Random | None, optimizer: str) -> bool:
    """Plan, check, run two steps and compare; whether the plan was one that can run."""
    case, plan = find_case(model), RandomPlan(choose, in_units=True)
    tell, count = (note, event) if currently_in_test_context() else (print, print)
    try:
        planned = plan_case(case, plan, plan.num_ranks, shuffle)
    except ValueError as error:
        tell(f"{case.name}\n{plan}")
        refused = REFUSALS.search(str(error))
        if refused is None:
            raise
        count(f"refused: {refused[0]}")
        return False
    tell(f"{case.name}\n{plan}")
    count(f"{plan.num_ranks} ranks")
    run_steps(planned, optimizer, emits=choose.random() < 0.2)
    return True


a_plan: Any = {
    "choose": st.randoms(use_true_random=False),
    "shuffle": st.none() | st.integers(0, 2**32).map(random.Random),
    "optimizer": st.sampled_from(["sgd", "adamw"]),
}


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(model=st.integers(0, NUM_MODELS - 1), **a_plan)
def test_a_random_plan_computes_what_one_process_does(
    model: int, choose: random.Random, shuffle: random.Random | None, optimizer: str
) -> None:
    try_plan(model, choose, shuffle, optimizer)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=4000, suppress_health_check=list(HealthCheck))
@given(model=st.integers(0, NUM_MODELS_AT_NIGHT - 1), **a_plan)
def test_thousands_of_random_plans_compute_what_one_process_does(
    model: int, choose: random.Random, shuffle: random.Random | None, optimizer: str
) -> None:
    try_plan(model, choose, shuffle, optimizer)


def test_most_random_plans_can_run() -> None:
    """What is refused proves nothing: the plans tried are mostly those that run."""
    ran = [try_plan(seed % 4, random.Random(seed), None, "sgd") for seed in range(40)]
    assert sum(ran) >= 28
