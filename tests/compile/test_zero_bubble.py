"""Backward in two: each half does its own work and no other, keeps what it needs, and fills what were bubbles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ready_models import captured, gpt2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from virtual import Captures, assert_plan_is_right, capture_call

import torch_vtensor.compile as ss
from torch_vtensor.compile import Mesh
from torch_vtensor.compile.backend import compile_plan
from torch_vtensor.compile.codegen import CodeGenerator, InPasses, Recorded
from torch_vtensor.compile.emit import emit
from torch_vtensor.compile.plans import named
from torch_vtensor.compile.program import Backward
from torch_vtensor.compile.segment import Segment


def middle_segment(call: Captures, plan: Any = None) -> Segment:
    """The segment of the last stage for the first microbatch, whose backward is in two."""
    compilation = compile_plan(call.captured, plan or named("zb/2", 2), Mesh((0, 1), {"pp": 2}), trains=True)
    halves = [s for s in compilation.program.segments if len(s.parts) == 2 and s.microbatch == 0]
    return max(halves, key=lambda segment: len(segment.tasks))


def arguments_of(segment: Segment) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(arrival.mask.shape, dtype=arrival.exchange.tensor.dtype, generator=generator)
        if arrival.exchange.tensor.dtype.is_floating_point
        else torch.ones(arrival.mask.shape, dtype=arrival.exchange.tensor.dtype)
        for arrival in segment.arrivals
    ]


def flops_of(run: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.gelu(block(x))
        return x.square().mean()


def convolutions() -> Captures:
    model = Convolutions().double()
    return capture_call(lambda x: model(x), torch.randn(4, 3, 6, 6, dtype=torch.double))


def transformer() -> Captures:
    return captured(gpt2, False)[1]


@pytest.mark.parametrize("make", [transformer, convolutions])
def test_each_product_is_in_one_of_the_passes(make: Callable[[], Captures]) -> None:
    segment = middle_segment(make())
    inputs = arguments_of(segment)
    tangents = [torch.ones(view.mask.shape, dtype=view.tensor.dtype) for view in segment.departures]
    halves, whole = CodeGenerator("eager", {})(segment), Recorded(segment, emit(segment))
    assert isinstance(halves, InPasses)

    outputs, in_one = whole.forward(inputs)
    flops_backward, (expected, _) = flops_of(lambda: whole.backward("B", in_one, [None] * len(inputs), tangents))
    halves.forward(inputs)  # traces
    flops_forward, (found, (for_inputs, for_weights)) = flops_of(lambda: halves.forward(inputs))
    no_inputs = [None] * len(inputs)
    flops_inputs, (of_inputs, kept) = flops_of(
        lambda: halves.backward("dI", [for_inputs, for_weights], no_inputs, tangents)
    )
    flops_weights, (of_weights, _) = flops_of(lambda: halves.backward("dW", [for_weights, kept], no_inputs, ()))

    torch.testing.assert_close(found, outputs)
    together = [one if other is None else other for one, other in zip(of_inputs, of_weights, strict=True)]
    torch.testing.assert_close(together, list(expected))
    assert flops_inputs + flops_weights == flops_backward
    # Gradients of weights cost what their products cost forward; attention has no weights.
    assert 0 < flops_weights <= flops_forward
    assert flops_inputs >= flops_weights
    if make is convolutions:
        assert flops_forward == flops_inputs == flops_weights


def test_dW_keeps_what_products_read_and_the_gradients_of_what_they_make() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)) for _ in range(2))).double()
    call = capture_call(lambda x: model(x).square().sum(), torch.randn(4, 6, dtype=torch.double))
    segment = middle_segment(call)
    code, inputs = CodeGenerator("eager", {})(segment), arguments_of(segment)
    _, (for_inputs, for_weights) = code.forward(inputs)
    tangents = [torch.ones(view.mask.shape, dtype=view.tensor.dtype) for view in segment.departures]
    rows = 2

    def shapes(saved: Any) -> list[tuple[int, ...]]:
        return sorted(tuple(tensor.shape) for tensor in saved[0].values())

    # Weights, and what square reads; tanh's result is among what dW reads.
    assert shapes(for_inputs) == [(rows, 6), (6, 20), (20, 6)]
    _, kept = code.backward("dI", [for_inputs, for_weights], [None] * len(inputs), tangents)
    assert shapes(for_inputs) == [(6, 20), (20, 6)]  # weights are others' too
    assert shapes(for_weights) == [(rows, 6), (rows, 20)]  # x of both products
    assert shapes(kept) == [(rows, 6), (rows, 20)]  # dy of both
    code.backward("dW", [for_weights, kept], [], [])
    assert (rows, 20) not in shapes(for_weights)


# ------------------------------------------------------------------------------------------------------------ time


LAYERS, WIDTH, ROWS = 4, 2**17, 8 * 4096


def explained(name: str, **layers: Any) -> ss.Explanation:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        x = torch.empty(ROWS, WIDTH)
    plan = named(name, LAYERS)
    return ss.explain(lambda x: model(x).sum(), x, plan=plan, mesh=dict(plan.axes))


def test_the_bubble_is_a_third_of_1f1b() -> None:
    ordinary, ours = explained("1f1b/8"), explained("zb/8")
    busy = max(ordinary.timelines[0].busy_seconds.values())
    assert max(ours.timelines[0].busy_seconds.values()) == pytest.approx(busy)
    p, m = LAYERS, 8
    # Forward, dI and dW of a linear layer cost the same; messages, which the formulas leave out, are short.
    assert ordinary.seconds == pytest.approx(busy * (m + p - 1) / m, rel=0.05)
    assert ours.seconds == pytest.approx(busy * (3 * m + p - 1) / (3 * m), rel=0.05)


def test_memory_is_that_of_1f1b_and_what_waits_for_dW() -> None:
    ordinary, ours = explained("1f1b/8"), explained("zb/8")
    waits = 2 * ROWS // 8 * WIDTH * 4  # what a product with weights reads, and the gradient of what it makes
    for rank in range(LAYERS):
        # One more than wait, while one more gradient of an input is being computed.
        assert ours.peak_bytes[rank] <= ordinary.peak_bytes[rank] + (rank + 1) * waits
    assert max(ours.peak_bytes.values()) <= 1.02 * max(ordinary.peak_bytes.values())


def test_what_only_dI_reads_is_freed_before_dW() -> None:
    _, call = captured(gpt2, False)
    plan = named("zb/4", 2)
    compilation = compile_plan(call.captured, plan, Mesh((0, 1), plan.axes), trains=True)
    row = [(action.kind, action.name) for action in compilation.schedule.actions[1]]
    halves = [s.name for s in compilation.program.segments if len(s.parts) == 2 and s.rank == 1]
    assert len(halves) == 4
    for name in halves:
        freed = row.index(("FREE", f"saved {name}"))
        assert row.index(("dI", f"dI {name}")) < freed < row.index(("dW", f"dW {name}"))


# --------------------------------------------------------------------------------------------------- code and corners


def test_recomputed_segments_run_forward_again_in_dI_only() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)) for _ in range(2))).double()

    def plan(graph: ss.Graph, mesh: ss.Mesh) -> None:
        named("zb/2", 2)(graph, mesh)
        for layer in graph.layers("*"):
            ss.op_trans(layer, recompute=True)

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().sum()

    x = torch.randn(4, 6, dtype=torch.double)
    call = capture_call(loss_of, x)
    mesh = Mesh((0, 1), {"pp": 2})
    compilation = assert_plan_is_right(model, loss_of, (x,), plan, mesh, call=call)
    (segment,) = (s for s in compilation.program.segments if len(s.parts) == 2 and s.recomputes and s.microbatch == 0)
    code, inputs = CodeGenerator("eager", {})(segment), arguments_of(segment)
    code.forward(inputs)
    flops_forward, (_, saved) = flops_of(lambda: code.forward(inputs))
    assert all(name.startswith("primals_") for some in saved for name in some[0])
    tangents = [torch.ones(view.mask.shape, dtype=view.tensor.dtype) for view in segment.departures]
    flops_inputs, (_, kept) = flops_of(lambda: code.backward("dI", saved, [None] * len(inputs), tangents))
    flops_weights, _ = flops_of(lambda: code.backward("dW", [saved[-1], kept], [None] * len(inputs), ()))
    # Forward again, but for the last product, of which nobody needs the result.
    assert flops_inputs == flops_forward // 2 + flops_forward
    assert flops_weights == flops_forward


@pytest.mark.slow
def test_inductor_generates_each_half() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))).double()

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean()

    x = torch.randn(4, 6, dtype=torch.double)
    compilation = assert_plan_is_right(
        model, loss_of, (x,), named("zb/2", 2), Mesh((0, 1), {"pp": 2}), codegen="inductor"
    )
    parts = [work.part for work in compilation.program.work.values() if isinstance(work, Backward)]
    assert sorted(parts) == ["B", "B", "dI", "dI", "dW", "dW"]
