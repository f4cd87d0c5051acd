"""Every rule by brute force: pieces of a call, put together, are the call; so are their gradients."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from brute_force import Case, check, filled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule_cases import cases
from torch.fx.experimental.proxy_tensor import make_fx

from torch_vtensor.compile.pieces import cut, cuttable, local_call, replicate, split_value
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import Interval, cut_evenly

CASES = cases()


@pytest.mark.parametrize("example", CASES, ids=str)
def test_every_cut_gives_the_whole(example: Case) -> None:
    whole = Task.of(example.operator)
    check(example, [whole])
    for identifier, size in cuttable(whole).items():
        check(example, cut(whole, identifier, [Interval(0, 1), Interval(1, size)]))
        check(example, cut(whole, identifier, cut_evenly(size, size)))
    for inputs in find_rule(example.operator).linear:
        check(example, split_value(whole, inputs, 3))


@pytest.mark.parametrize("example", CASES, ids=str)
def test_pieces_that_need_several_operators_can_be_traced(example: Case) -> None:
    whole = Task.of(example.operator)
    for identifier, size in cuttable(whole).items():
        for task in cut(whole, identifier, [Interval(0, 1), Interval(1, size)]):
            call = local_call(task)
            if not isinstance(call.target, torch._ops.OpOverload):
                views = [view.mask.within(view.tensor.whole.mask) for view in task.inputs]
                local = [tensor[view] for tensor, view in zip(example.tensors, views, strict=True)]
                traced = make_fx(lambda *x, call=call: call.target(*filled(call.args, x), **filled(call.kwargs, x)))
                made = traced(*local)(*local)
                torch.testing.assert_close(made, call.target(*filled(call.args, local), **filled(call.kwargs, local)))


@st.composite
def cut_cases(draw: st.DrawFn) -> tuple[Case, Sequence[Task]]:
    """An operator cut up at random: nested, uneven, by value, replicated."""
    example = draw(st.sampled_from(CASES))
    tasks = [Task.of(example.operator)]
    for _ in range(draw(st.integers(1, 5))):
        task = tasks.pop(draw(st.integers(0, len(tasks) - 1)))
        choices = cuttable(task)
        rule = find_rule(example.operator)
        kind = draw(st.sampled_from([*choices, *rule.linear, "replicate"]))
        if kind == "replicate":
            tasks += replicate(task, 2)
        elif isinstance(kind, str):
            has = task.cuts.get(kind, Interval(0, rule.sizes[kind]))
            middle = st.integers(has.start + 1, has.stop - 1)
            bounds = [has.start, *sorted(draw(st.sets(middle, min_size=1, max_size=3))), has.stop]
            tasks += cut(task, kind, [Interval(*pair) for pair in itertools.pairwise(bounds)])
        else:
            before = [inputs for inputs in rule.linear if all(task.inputs[i].mask.chunk.of > 1 for i in inputs)]
            tasks += split_value(task, before[0] if task.chunk.of > 1 else kind, 2)
    return example, tasks


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cut_cases())
def test_random_nested_cuts_give_the_whole(drawn: tuple[Case, Sequence[Task]]) -> None:
    example, tasks = drawn
    # Replicas compute what their originals do; one of each is the operator.
    check(example, [task for task in tasks if task.replica == 0])
