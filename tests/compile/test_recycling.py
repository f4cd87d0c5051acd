"""3F1B: a model that goes through its layers three times runs every pass in the same stages, and keeps the last."""

import pytest
import torch
from ready_models import evoformer, recycling
from test_plans import assert_right, compiled_by_name, record_of
from torch import Tensor, nn
from virtual import capture_call, run_plan

from torch_vtensor.compile import Mesh
from torch_vtensor.compile.plans import named
from torch_vtensor.compile.schedules.pipelines import three_f_one_b


@pytest.mark.parametrize(("name", "world"), [pytest.param("3f1b/4", 2, marks=pytest.mark.slow), ("dp2+3f1b/2", 4)])
def test_recycling_computes_what_one_process_does(name: str, world: int) -> None:
    compiled_by_name(recycling, name, world)


def test_each_rank_runs_the_passes_of_its_layers_in_the_order_of_3f1b() -> None:
    plan = named("3f1b/4", 2)
    compilation = assert_right(recycling, plan, Mesh((0, 1), plan.axes))
    segment_of = {segment.name: segment for segment in compilation.program.segments}
    for rank, order in three_f_one_b(2, 4).items():
        found = []
        for action in compilation.schedule.compute_actions(rank):
            segment = segment_of[action.name.split(" ", 1)[1]]
            # Beside the layers, zeros to begin with are made and losses of microbatches added up.
            if segment.microbatch is not None and any("blocks" in task.operator.module for task in segment.tasks):
                found.append((action.kind, segment.stage, segment.microbatch))
        assert list(dict.fromkeys(found)) == [tuple(compute) for compute in order]


def test_passes_before_the_last_keep_nothing_for_backward() -> None:
    plan = named("3f1b/4", 2)
    program = assert_right(recycling, plan, Mesh((0, 1), plan.axes)).program
    layers = [s for s in program.segments if any("blocks" in task.operator.module for task in s.tasks)]
    kept = {value.key for value in program.values if value.kind == "saved"}
    for segment in layers:
        assert (f"saved {segment.name}" in kept) == (segment.stage >= 4)
        assert any(arrival.group is not None for arrival in segment.arrivals) == (segment.stage >= 4)


def test_a_model_that_recycles_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"goes through its 2 layers once.*Use one_f_one_b"):
        record_of(evoformer, named("3f1b/2", 2), Mesh((0, 1), {"pp": 2}))


class Unrolled(nn.Module):
    """Goes through its layers twice, and learns from both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.layers):
            x = torch.tanh(layer(x))
        return x.square().sum()


def test_gradients_through_an_earlier_pass_are_refused() -> None:
    model = Unrolled().double()
    call = capture_call(lambda x: model(x), torch.randn(4, 4, dtype=torch.double))
    with pytest.raises(ValueError, match=r"stage 0 forward only, and gradients flow through .*torch.no_grad"):
        run_plan(call, named("3f1b/2", 2), Mesh((0, 1), {"pp": 2}))
