"""Annotations: what they say, how they print, and what is refused."""

import pytest
import torch
from brute_force import Case, case
from rule_cases import cases, x

from torch_vtensor.compile.rules import Rule, find_rule
from torch_vtensor.compile.rules.annotation import parse

aten = torch.ops.aten


def bound(annotation: str, example: Case, **sizes: int) -> Rule:
    return parse(annotation).bind(example.operator, sizes)


@pytest.mark.parametrize(
    ("annotation", "example"),
    [
        ("m k+, k+ n -> m n", case(aten.mm.default, x(2, 3), x(3, 4))),
        ("m k+, n k+, n/k -> m n", case(aten.linear.default, x(2, 3), x(4, 3), x(4))),
        ("h d -> (h d)", case(aten.view.default, x(2, 3), [6])),
        ("m^ -> m^", case(aten.sort.default, x(3), 0)),
        ("m+ -> ()", case(aten.sum.default, x(3))),
        ("1 n -> m n", case(aten.expand.default, x(1, 3), [2, 3])),
    ],
)
def test_an_annotation_that_says_all_prints_as_it_was_written(annotation: str, example: Case) -> None:
    outputs = len(example.operator.outputs)
    annotation += ", m^" * (outputs - 1)
    assert str(bound(annotation, example)) == annotation


def test_linear_prints_as_people_write_it() -> None:
    assert str(find_rule(case(aten.linear.default, x(2, 3), x(4, 3), x(4)).operator)) == "a k+, n k+, n/k -> a n"


def test_a_mark_counts_wherever_the_identifier_is() -> None:
    example = case(aten.mm.default, x(2, 3), x(3, 4))
    assert bound("m k+, k n -> m n", example).summed == {"k"} == bound("m k, k+ n -> m n", example).summed


def test_any_number_of_leading_dimensions_broadcasts() -> None:
    rule = bound("* m k+, * k n -> * m n", case(aten.matmul.default, x(2, 1, 3, 4), x(5, 4, 6)))
    assert rule.inputs[0][:2] == (("x1",), ())
    assert rule.inputs[1][0] == rule.outputs[0][1] == ("x0",)  # type: ignore[index]
    assert rule.sizes["x0"] == 5


def test_sizes_of_a_composite_come_from_another_tensor_or_are_given() -> None:
    merged = case(aten.view.default, x(2, 3), [6])
    assert bound("h d -> (h d)", merged).sizes == {"h": 2, "d": 3}
    doubled = case(aten.neg.default, x(6))
    assert bound("(h d) -> (h d)", doubled, h=2).sizes == {"h": 2, "d": 3}
    with pytest.raises(ValueError, match=r"leave the sizes of d, h open .* give them with sizes="):
        bound("(h d) -> (h d)", doubled)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("m n", "has no '->'"),
        ("m & n -> m", "cannot be read at '& n'"),
        ("(m n -> m n", "parentheses without"),
        ("m * n -> m", r"'\*' in 'm \* n' is out of place"),
        ("m) -> m", "out of place"),
        ("m+ n, m^ n -> n", "marks m both"),
    ],
)
def test_what_cannot_be_read_is_shown(annotation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(annotation)


@pytest.mark.parametrize("annotation", ["m k, k n -> m n", "m k+, k+ n -> m k"])
def test_an_identifier_is_in_every_output_or_summed(annotation: str) -> None:
    with pytest.raises(ValueError, match="cannot be right for k"):
        bound(annotation, case(aten.mm.default, x(2, 3), x(3, 3)))


def test_sizes_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit .*\(m\) does not make a dimension of 3"):
        bound("m -> m m", case(aten.expand.default, x(2), [3, 2]))


def test_our_own_rules_can_be_written_as_annotations() -> None:
    for example in cases():
        rule = find_rule(example.operator)
        again = parse(str(rule)).bind(example.operator, dict(rule.sizes))
        assert (again.inputs, again.outputs) == (rule.inputs, rule.outputs)
        assert (again.summed, again.whole, again.taken_once) == (rule.summed, rule.whole, rule.taken_once)
