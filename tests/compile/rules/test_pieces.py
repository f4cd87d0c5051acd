"""What pieces read and write, which can be cut further, and what is refused."""

from collections.abc import Sequence

import pytest
import torch
from brute_force import case
from rule_cases import x

from torch_vtensor.compile.pieces import cut, cuttable, gradient_chunk, local_call, replicate, split_value
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import Interval, ValueChunk, cut_evenly

aten = torch.ops.aten


def linear() -> Task:
    return Task.of(case(aten.linear.default, x(4, 6), x(5, 6), x(5)).operator)


def test_a_summed_cut_gives_value_chunks_and_takes_the_bias_once() -> None:
    first, second = cut(linear(), "k", [Interval(0, 4), Interval(4, 6)])
    assert [str(view.mask) for view in second.inputs] == ["[0:4, 4:6]", "[0:5, 4:6]", "[0:5] 1 of 2"]
    assert [str(piece.outputs[0].mask) for piece in (first, second)] == ["[0:4, 0:5] 0 of 2", "[0:4, 0:5] 1 of 2"]
    assert second.name == "op[k 4:6]"


def test_nested_summed_cuts_split_chunks() -> None:
    _, rest = cut(linear(), "k", [Interval(0, 3), Interval(3, 6)])
    pieces = cut(rest, "k", [Interval(3, 4), Interval(4, 6)])
    assert [piece.outputs[0].mask.chunk for piece in pieces] == [ValueChunk(2, 4), ValueChunk(3, 4)]
    assert [piece.cuts["k"] for piece in pieces] == [Interval(3, 4), Interval(4, 6)]


def test_only_the_outer_part_of_a_composite_is_cut_until_one_of_it_is_left() -> None:
    whole = Task.of(case(aten.view.default, x(2, 3, 5), [6, 5]).operator)
    assert cuttable(whole) == {"a": 2, "c": 5}
    with pytest.raises(ValueError, match=r"along b: it lies inside a, which has to be cut .* cut is a \(2\), c \(5\)"):
        cut(whole, "b", cut_evenly(3, 3))
    second = cut(whole, "a", cut_evenly(2, 2))[1]
    assert cuttable(second) == {"b": 3, "c": 5}
    piece = cut(second, "b", [Interval(0, 1), Interval(1, 3)])[1]
    assert str(piece.inputs[0].mask) == "[1:2, 1:3, 0:5]"
    assert str(piece.outputs[0].mask) == "[4:6, 0:5]"


@pytest.mark.parametrize(
    ("target", "args", "identifier", "message"),
    [
        (aten.softmax.int, (x(3, 4), 1), "b", r"aten.softmax.int\) cannot be cut along b: its rule keeps that whole"),
        (aten.softmax.int, (x(3, 4), 1), "z", r"no such identifier. Rule: a b\^ -> a b\^; what can be cut is a \(3\)"),
        (aten.sort.default, (x(3), 0), "a", "it can only be replicated"),
    ],
)
def test_a_cut_that_the_rule_does_not_allow_is_refused(
    target: object, args: Sequence[object], identifier: str, message: str
) -> None:
    whole = Task.of(case(target, *args).operator)
    with pytest.raises(ValueError, match=message):
        cut(whole, identifier, [Interval(0, 1), Interval(1, 3)])


def test_a_single_index_cannot_be_cut() -> None:
    one = cut(linear(), "a", cut_evenly(4, 4))[2]
    assert "a" not in cuttable(one)
    with pytest.raises(ValueError, match="one index of it is left"):
        cut(one, "a", [Interval(2, 3)])


@pytest.mark.parametrize(
    "bounds", [[], [(0, 2)], [(0, 2), (3, 4)], [(0, 2), (2, 2), (2, 4)], [(1, 4)], [(2, 4), (0, 2)]]
)
def test_intervals_that_do_not_tile_are_refused(bounds: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"op has a 0:4: intervals .* do not tile it in order"):
        cut(linear(), "a", [Interval(*bound) for bound in bounds])


def test_one_interval_is_the_task_itself() -> None:
    task = linear()
    assert cut(task, "a", [Interval(0, 4)]) == (task,)


def test_value_splits_are_of_inputs_in_which_the_operator_is_linear() -> None:
    pieces = split_value(linear(), [2, 0], 2)
    assert [view.mask.chunk for view in pieces[1].inputs] == [ValueChunk(1, 2), ValueChunk(0, 1), ValueChunk(1, 2)]
    assert pieces[1].name == "op(1 of 2)"
    with pytest.raises(ValueError, match=r"values of inputs \[0\]: .*linear.* may be split by \[0, 2\], \[1, 2\]"):
        split_value(linear(), [0], 2)
    with pytest.raises(ValueError, match=r"may be split by \[0, 2\]\."):
        split_value(pieces[0], [1, 2], 2)
    with pytest.raises(ValueError, match="may be split by no inputs"):
        split_value(Task.of(case(aten.relu.default, x(3)).operator), [0], 2)


def test_a_split_can_be_split_again_also_where_a_sum_takes_the_bias_once() -> None:
    piece = split_value(cut(linear(), "k", cut_evenly(6, 3))[1], [1, 2], 2)[1]
    again = split_value(piece, [1, 2], 2)[0]
    assert again.chunk == ValueChunk(2, 4)
    assert again.inputs[2].mask.chunk == again.outputs[0].mask.chunk == ValueChunk(6, 12)
    assert again.inputs[1].mask.chunk == ValueChunk(2, 4)


def test_replicas_are_told_apart_by_number_alone() -> None:
    first, second = replicate(replicate(linear(), 2)[1], 2)
    assert (first.replica, second.replica) == (2, 3)
    assert first.inputs == second.inputs
    with pytest.raises(ValueError, match="0 times; choose 1 or more"):
        replicate(linear(), 0)


def test_gradients_add_up_over_cuts_that_an_input_does_not_follow() -> None:
    rows = cut(linear(), "a", cut_evenly(4, 2))
    assert [gradient_chunk(task, 0) for task in rows] == [(), ()]
    assert [gradient_chunk(task, 1) for task in rows] == [(("a", (0, 2)),), (("a", (2, 4)),)]
    summed = cut(linear(), "k", cut_evenly(6, 2))
    assert {gradient_chunk(task, 2) for task in summed} == {()}  # taken once: each has the gradient of all chunks
    split = split_value(linear(), [0, 2], 2)
    assert {gradient_chunk(task, 0) for task in split} == {()}
    assert len({gradient_chunk(task, 1) for task in split}) == 2


def test_calls_of_pieces_are_the_operators_own_where_nothing_changes() -> None:
    task = linear()
    for piece in (task, *cut(task, "n", cut_evenly(5, 2))):
        assert local_call(piece).target is aten.linear.default
        assert local_call(piece).args is task.operator.args


def test_causal_attention_of_later_queries_reads_no_key_behind_them() -> None:
    inputs = [x(1, 1, 4, 2) for _ in range(3)]
    whole = Task.of(case(aten.scaled_dot_product_attention.default, *inputs, is_causal=True).operator)
    call = local_call(cut(whole, "q", [Interval(0, 1), Interval(1, 3), Interval(3, 4)])[1])
    q, k, v = (tensor.detach().clone() for tensor in inputs)
    k[:, :, 3], v[:, :, 3] = torch.nan, torch.nan
    assert call.target(q[:, :, 1:3], k, v, *call.args[3:], **call.kwargs).isfinite().all()
