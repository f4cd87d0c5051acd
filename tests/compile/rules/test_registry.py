"""Rules that users register, and operators without one."""

from collections.abc import Iterator

import pytest
import torch
from brute_force import case, check
from rule_cases import x
from torch import Tensor

from torch_vtensor.compile.pieces import cut, cuttable, local_call, replicate
from torch_vtensor.compile.rules import Call, _torch_compat, find_rule, has_rule, register_rule, registry
from torch_vtensor.compile.task_graph import Slot, Task
from torch_vtensor.compile.tensor_view import Interval

HALVES = [Interval(0, 1), Interval(1, 3)]


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture(scope="module")
def mm() -> torch.library.CustomOpDef:
    """A custom operator with a gradient."""

    @torch.library.custom_op("vtensor_rules_test::mm", mutates_args=())
    def mm(a: Tensor, b: Tensor, shift: float = 0.0) -> Tensor:
        return a @ b + shift

    mm.register_autograd(
        lambda ctx, g: (g @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ g, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
    )
    return mm


def test_a_custom_operator_is_cut_as_its_annotation_says(mm: torch.library.CustomOpDef) -> None:
    assert register_rule("m k+, k+ n -> m n")(mm) is mm
    example = case(torch.ops.vtensor_rules_test.mm.default, x(2, 3), x(3, 4))
    whole = Task.of(example.operator)
    assert cuttable(whole) == {"m": 2, "k": 3, "n": 4}
    check(example, cut(whole, "k", HALVES))


def test_a_decorated_function_adapts_the_call_of_a_piece(mm: torch.library.CustomOpDef) -> None:
    @register_rule("m k+, k+ n -> m n", operator=mm)
    def shift_once(task: Task) -> Call:
        first = task.cuts.get("k", Interval(0, 3)).start == 0
        return Call(task.operator.target, (Slot(0), Slot(1), task.operator.args[2] if first else 0.0), {})

    example = case(torch.ops.vtensor_rules_test.mm.default, x(2, 3), x(3, 4), 5.0)
    pieces = cut(Task.of(example.operator), "k", HALVES)
    assert [local_call(piece).args[2] for piece in pieces] == [5.0, 0.0]
    check(example, pieces)


def test_registering_again_replaces_what_was_found_before(mm: torch.library.CustomOpDef) -> None:
    operator = case(torch.ops.vtensor_rules_test.mm.default, x(2, 3), x(3, 4)).operator
    assert not has_rule(operator)
    register_rule("m k^, k^ n -> m n")(torch.ops.vtensor_rules_test.mm)
    assert find_rule(operator).whole == {"k"}
    register_rule("m^ k^, k^ n^ -> m^ n^")(torch.ops.vtensor_rules_test.mm.default)
    assert find_rule(operator).whole == {"m", "k", "n"}


def test_the_first_annotation_that_fits_counts(mm: torch.library.CustomOpDef) -> None:
    register_rule("k+, k+ n -> n", "m k+, k+ n -> m n")(mm)
    operator = case(torch.ops.vtensor_rules_test.mm.default, x(2, 3), x(3, 4)).operator
    assert str(find_rule(operator)) == "m k+, k+ n -> m n"
    register_rule("k+, k+ n -> n")(mm)
    with pytest.raises(ValueError, match=r"no rule of .*mm.default fits a call with \[2, 3\], \[3, 4\]"):
        find_rule(operator)


def test_sizes_may_depend_on_the_call(mm: torch.library.CustomOpDef) -> None:
    register_rule("(h d) k+, k+ n -> (h d) n", sizes=lambda operator: {"h": int(operator.args[2])})(mm)
    operator = case(torch.ops.vtensor_rules_test.mm.default, x(6, 3), x(3, 4), 2.0).operator
    assert find_rule(operator).sizes == {"h": 2, "d": 3, "k": 3, "n": 4}


def test_an_operator_without_a_rule_may_only_be_replicated() -> None:
    operator = case(torch.ops.aten.cdist.default, x(2, 3), x(4, 3)).operator
    whole = Task.of(operator)
    assert not has_rule(operator)
    assert cuttable(whole) == {}
    assert len(replicate(whole, 2)) == 2
    with pytest.raises(ValueError, match=r"aten.cdist.default.* cannot be cut along a: .* it can only be replicated"):
        cut(whole, "a", HALVES)


def test_the_private_torch_apis_are_where_they_were(mm: torch.library.CustomOpDef) -> None:
    aten = torch.ops.aten
    assert _torch_compat.named_arguments(aten.transpose.int, (1, 2), {"dim1": 3}) == {"self": 1, "dim0": 2, "dim1": 3}
    assert _torch_compat.named_arguments(aten.add.Tensor, (1, 2), {})["alpha"] == 1
    assert _torch_compat.overload_of(mm) is torch.ops.vtensor_rules_test.mm.default
    assert _torch_compat.qualified_name(aten.sum.dim_IntList) == "aten::sum"
