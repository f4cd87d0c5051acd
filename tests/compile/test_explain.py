"""A plan can be looked at for any number of ranks, without a process group and without memory for the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_vtensor.compile as ss
from torch_vtensor.compile import _torch_compat

NUM_LAYERS, WIDTH, BATCH = 4, 64, 32


def make_step(num_layers: int = NUM_LAYERS) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        layers = [
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(num_layers)
        ]
        return nn.Sequential(*layers), torch.empty(BATCH, WIDTH)


def data(graph: ss.Graph, mesh: ss.Mesh) -> None:
    ss.op_assign(ss.op_trans(graph.tasks, "batch", len(mesh)), mesh.all)


def pipeline(graph: ss.Graph, mesh: ss.Mesh) -> None:
    micro = graph.microbatch(4)
    ss.op_assign(ss.balance(graph.layers("*"), len(mesh)), mesh.all)
    ss.order.one_f_one_b(micro)


def test_data_parallel_sends_what_a_ring_sends() -> None:
    model, x = make_step()
    explained = ss.explain(lambda x: model(x).square().sum(), x, plan=data, mesh=8)
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert set(explained.sent_bytes) == {"all_reduce"}
    for rank in range(8):
        # A ring sends 2 (n - 1) / n of it; the loss is the rest, and parts are rounded up.
        assert explained.sent_bytes["all_reduce"][rank] == pytest.approx(2 * 7 / 8 * num_bytes, rel=1e-3)
    assert explained.peak_bytes[0] >= 2 * num_bytes


def test_a_page_says_all_that_matters() -> None:
    model, x = make_step()
    page = str(ss.explain(lambda x: model(x).square().sum(), x, plan=pipeline, mesh={"pp": 2}))
    assert "Plan for a Mesh pp 2, 2 ranks, 4 microbatches" in page
    assert "rank 0 | " in page
    assert "F1.3" in page
    assert "transfer" in page
    assert "time of a step, predicted" in page


def test_a_larger_pipeline_needs_less_memory_a_rank() -> None:
    model, x = make_step()
    peaks = [
        max(ss.explain(lambda x: model(x).square().sum(), x, plan=pipeline, mesh=ranks).peak_bytes.values())
        for ranks in (1, 2, 4)
    ]
    assert peaks[0] > peaks[1] > peaks[2]


def test_a_share_of_the_uncut_step_is_measured_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace = _torch_compat.trace_passes

    def watched(graph: torch.fx.GraphModule, *arguments: Any) -> Any:
        traced.append(str(graph.code).count("torch.ops.aten.linear"))
        return trace(graph, *arguments)

    monkeypatch.setattr(_torch_compat, "trace_passes", watched)
    model, x = make_step()
    explained = ss.explain(lambda x: model(x).square().sum(), x, plan="zb/4", mesh=2, memory_budget=1.0)
    of_stage = 2 * NUM_LAYERS // 2
    assert max(traced) == of_stage, "never all layers at once"
    assert max(explained.peak_bytes.values()) > 0


def test_memory_is_predicted_for_a_model_without_memory_that_makes_tensors() -> None:
    model, x = make_step()

    def step(x: torch.Tensor) -> torch.Tensor:
        return model(x * torch.arange(WIDTH, device=x.device)).square().sum()

    assert max(ss.explain(step, x, memory_budget="1TiB").peak_bytes.values()) > x.nbytes


def test_timelines_are_drawn_and_traced(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, x = make_step()
    explained = ss.explain(lambda x: model(x).square().sum(), x, plan=pipeline, mesh=2)
    explained.draw(tmp_path / "step.png")
    explained.write_trace(tmp_path / "step.json")
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert json.loads((tmp_path / "step.json").read_text())


def test_what_torch_compile_returned_is_explained_too() -> None:
    model, x = make_step()
    step = torch.compile(lambda x: model(x).square().sum(), backend="superscaler")
    assert ss.explain(step, x, plan=data, mesh=2).seconds > 0


def test_nothing_of_what_is_explained_runs() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    x = torch.ones(BATCH, WIDTH)
    before = torch.get_rng_state()
    ss.explain(lambda x: model(x).sum(), x, plan="single")
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_function_of_one_graph_and_what_is_none_is_explained() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return (x * 2).sum()

    assert ss.explain(function, torch.ones(4, 3), plan="single").seconds > 0


def test_a_function_of_several_graphs_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    with pytest.raises(RuntimeError, match="2 graphs, and a plan is for one"):
        ss.explain(function, torch.ones(3), plan=data)
