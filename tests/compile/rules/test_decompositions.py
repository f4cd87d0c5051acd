"""Losses written so that rows, or classes, can be cut, and constants that read nothing."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brute_force import case
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torch_vtensor.compile.pieces import cuttable
from torch_vtensor.compile.rules import DECOMPOSITIONS, cross_entropy_over_cut_classes, has_rule
from torch_vtensor.compile.task_graph import Task

aten = torch.ops.aten
_generator = torch.Generator()


@pytest.fixture(autouse=True)
def numbers_of_its_own() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    _generator.manual_seed(0)


def logits(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, generator=_generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def targets(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def compare(loss: Callable[..., Tensor], same: Callable[..., Tensor], x: Tensor, *rest: Any) -> None:
    (made, gradient), (expected, expected_gradient) = (
        (value, torch.autograd.grad(value.sum(), x)[0]) for value in (loss(x, *rest), same(x, *rest))
    )
    # What is as large as the logits before their difference is taken is rounded as they are.
    atol = 2 * torch.finfo(x.dtype).eps * max(x.abs().max().item(), 10)
    torch.testing.assert_close(made, expected, rtol=1.3e-6, atol=atol)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1.3e-6, atol=atol)


@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3)])
def test_a_mean_is_a_sum_over_a_count(
    shape: tuple[int, ...], smoothing: float, weighted: bool, ignore_index: int
) -> None:
    weight = torch.rand(4, generator=_generator, dtype=torch.float64) if weighted else None
    arguments = (targets(4, shape[0], *shape[2:]), weight, 1, ignore_index)
    cross_entropy = aten.cross_entropy_loss.default
    compare(DECOMPOSITIONS[cross_entropy], cross_entropy, logits(*shape), *arguments, smoothing)
    compare(DECOMPOSITIONS[aten.nll_loss_nd.default], aten.nll_loss_nd.default, logits(*shape), *arguments)


def test_probabilities_as_targets_count_all_rows() -> None:
    for shape in [(6, 4), (2, 4, 3), (4,)]:
        same = aten.cross_entropy_loss.default
        compare(DECOMPOSITIONS[same], same, logits(*shape), logits(*shape).detach().softmax(-1), None, 1, -100, 0.1)


@pytest.mark.parametrize(("reduction", "ignore_index"), list(itertools.product((0, 1, 2), (-100, 1))))
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("num_classes", [50, 128], ids=["sums", "parts"])
def test_classes_can_be_cut_exactly(num_classes: int, scale: float, reduction: int, ignore_index: int) -> None:
    target = targets(num_classes, 12)
    target[::3] = ignore_index
    same = aten.cross_entropy_loss.default
    arguments = (target, None, reduction, ignore_index)
    compare(cross_entropy_over_cut_classes, same, logits(12, num_classes, scale=scale), *arguments)
    # A single precision that loses nothing: logits far apart, equal, and all far from zero.
    for x in (
        logits(12, num_classes, scale=scale, dtype=torch.float32),
        torch.full((12, num_classes), 3e4, requires_grad=True),
    ):
        compare(cross_entropy_over_cut_classes, same, x, *arguments)
    low = logits(12, num_classes, dtype=torch.bfloat16)
    made, expected = cross_entropy_over_cut_classes(low, *arguments), same(low.float(), *arguments)
    assert made.dtype == torch.bfloat16
    # Rounded once: to the nearest of numbers with eight digits, which is 2^-8 of it away at most.
    torch.testing.assert_close(made.float(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("num_classes", [50, 128], ids=["sums", "parts"])
def test_classes_that_are_ruled_out_have_no_gradient(num_classes: int) -> None:
    allowed = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
    allowed[:3] = 0
    same = aten.cross_entropy_loss.default
    compare(
        lambda x, target: cross_entropy_over_cut_classes(x + allowed, target),
        lambda x, target: same(x + allowed, target),
        logits(12, num_classes),
        targets(3, 12),
    )


def test_no_rows_have_the_loss_that_pytorch_gives_them() -> None:
    assert cross_entropy_over_cut_classes(logits(0, 128), targets(128, 0)).isnan()
    assert cross_entropy_over_cut_classes(logits(0, 128), targets(128, 0), None, 2) == 0


def test_unusual_losses_keep_their_classes_whole() -> None:
    same = aten.cross_entropy_loss.default
    compare(cross_entropy_over_cut_classes, same, logits(6, 4), targets(4, 6), None, 1, -100, 0.1)
    compare(cross_entropy_over_cut_classes, same, logits(2, 4, 3), targets(4, 2, 3))
    as_it_is = cross_entropy_over_cut_classes(logits(6, 4), targets(4, 6), torch.ones(4), 2)
    assert as_it_is is NotImplemented


@pytest.mark.parametrize(("num_classes", "num_parts"), [(5, 5), (384, 192)], ids=["sums", "parts"])
def test_every_operator_over_classes_lets_them_be_cut(num_classes: int, num_parts: int) -> None:
    traced = make_fx(lambda x, target: cross_entropy_over_cut_classes(x, target), pre_dispatch=True)(
        logits(6, num_classes), targets(num_classes, 6)
    )
    values: dict[torch.fx.Node, Any] = {}
    made = iter((logits(6, num_classes), targets(num_classes, 6)))
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(made)
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            operator = case(node.target, *args, **kwargs).operator
            shapes = [tensor.shape for tensor in (*operator.inputs, *operator.outputs) if tensor is not None]
            assert has_rule(operator)
            if any(num_classes in shape for shape in shapes):
                assert {num_classes, num_parts}.intersection(cuttable(Task.of(operator)).values()), operator


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.new_zeros.default, ([3, 2],)),
        (aten.new_ones.default, ([],)),
        (aten.new_full.default, ([3], 7)),
        (aten.zeros_like.default, ()),
        (aten.ones_like.default, ()),
        (aten.full_like.default, (2.5,)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bool}, {"pin_memory": False}])
def test_constants_read_no_tensor(target: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    x = torch.ones(2, 3, dtype=torch.float32)
    traced = make_fx(
        lambda x: target(x, *args, **options), pre_dispatch=True, decomposition_table=dict(DECOMPOSITIONS)
    )(x)
    assert not next(iter(traced.graph.find_nodes(op="placeholder"))).users
    torch.testing.assert_close(traced(x), target(x, *args, **options))
