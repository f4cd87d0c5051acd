"""Plans on one CUDA GPU: a model trains as without one, in fp32 and in bf16, and chunks save memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_vtensor.compile as ss
from torch_vtensor.compile import Compilation

pytestmark = pytest.mark.gpu

VOCABULARY = 4096
PLANS = ["single", "chunked_loss4", "coshard2", "accumulate2", "recompute", "accumulate2+recompute1+chunked_loss2"]


def llama(dtype: torch.dtype) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to("cuda", dtype)


def batch(rows: int = 4, length: int = 64) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (rows, length), device="cuda")
    labels = tokens.clone()
    labels[0, : length // 2] = -100  # rows count differently in the mean
    return tokens, labels


def loss_of(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=labels, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_language_model_trains_like_eager_in_fp32(plan: str, codegen: str, assert_trains_like_eager: Any) -> None:
    assert_trains_like_eager(
        llama(torch.float32), [batch() for _ in range(3)], loss_of, tolerance=2e-5, plan=plan, codegen=codegen
    )


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_in_bf16_are_as_near_to_exact_ones_as_eager_s(
    plan: str, codegen: str, compiled: Callable[..., Any]
) -> None:
    model, arguments = llama(torch.bfloat16), batch()
    exact = copy.deepcopy(model).float()
    losses = []
    for one in (exact, model):
        loss = loss_of(one, *arguments)
        loss.backward()
        losses.append(loss.item())
    eager, wanted = gradients(model), gradients(exact)
    model.zero_grad()
    loss = compiled(lambda *xs: loss_of(model, *xs), plan=plan, codegen=codegen)(*arguments)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses[0], abs=2 * abs(losses[1] - losses[0]) + 1e-3)
    for name, found in gradients(model).items():
        # One rounding of a sum to bf16 is 2^-9 of it; sums of pieces are rounded once a piece.
        allowed = 2 * distance(eager[name], wanted[name]) + 2**-7
        assert distance(found, wanted[name]) <= allowed, name


def test_a_loss_that_autograd_scales_and_fused_adamw(compiled: Callable[..., Any]) -> None:
    model = llama(torch.float32)
    reference = copy.deepcopy(model)
    tokens, labels = batch()
    for one, step in (
        (model, compiled(lambda *xs: loss_of(model, *xs), plan="accumulate2")),
        (reference, lambda *xs: loss_of(reference, *xs)),
    ):
        optimizer = torch.optim.AdamW(one.parameters(), 1e-2, eps=1e-3, fused=True)
        for _ in range(2):
            (step(tokens, labels) * 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(model.state_dict()), dict(reference.state_dict()), rtol=2e-5, atol=2e-5)


def test_outputs_that_are_no_loss(compiled: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).cuda()
    x = torch.randn(6, 8, device="cuda", requires_grad=True)

    def plan(graph: ss.Graph, mesh: ss.Mesh) -> None:
        ss.op_order(*ss.op_trans(graph.tasks, "batch", 3, recompute=True))

    results = []
    for run in (model, compiled(model, plan=plan, codegen="inductor")):
        out = run(x)
        (out.square().sum() * 3).backward()
        results.append((out.detach(), x.grad, *(parameter.grad for parameter in model.parameters())))
        x.grad = None
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_recomputed_dropout_draws_the_same_numbers(codegen: str, compiled: Callable[..., Any]) -> None:
    weight = torch.ones(1000, requires_grad=True, device="cuda")

    def recomputed(graph: ss.Graph, mesh: ss.Mesh) -> None:
        ss.op_trans(graph.tasks, recompute=True)

    def function(x: Tensor) -> Tensor:
        return (F.dropout(x * weight, 0.5)).sum()

    loss = compiled(function, plan=recomputed, codegen=codegen)(torch.ones(1000, device="cuda"))
    torch.rand(3, device="cuda")  # numbers drawn in between change nothing
    loss.backward()
    kept = weight.grad != 0
    assert 400 < kept.sum() < 600
    torch.testing.assert_close(loss, 2.0 * kept.sum())


def test_a_chunked_loss_needs_a_fraction_of_the_memory(compiled: Callable[..., Any]) -> None:
    head = nn.Linear(64, 50_000, bias=False, device="cuda", dtype=torch.bfloat16)
    body = nn.Sequential(*(nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    model = nn.Sequential(body, head)
    x = torch.randn(8, 1024, 64, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(50_000, (8, 1024), device="cuda")
    peaks = {}
    for name, options in (("whole", {}), ("chunks", {"plan": "chunked_loss8"})):
        step = compiled(
            lambda x, y: F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()), codegen="inductor", **options
        )
        for _ in range(2):
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(x, y).backward()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks["chunks"] < peaks["whole"] / 4


@pytest.mark.parametrize("plan", ["single", "chunked_loss4+layerwise", "accumulate4+layerwise", "recompute+layerwise"])
def test_predicted_memory_is_what_the_step_holds(
    plan: str, compiled: Callable[..., Any], compilations: list[Compilation]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    tokens = torch.randint(16_000, (8, 1024), device="cuda")
    step = compiled(
        lambda x: loss_of(model, x, x), codegen="inductor", plan=plan, memory_budget=1 << 50
    )  # any budget has memory predicted from traced passes
    step(tokens).backward()
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - tokens.nbytes - sum(p.nbytes for p in model.parameters())
    step(tokens).backward()
    measured = torch.cuda.max_memory_allocated() - others
    print(f"{plan}: predicted {compilations[0].predicted_peak_bytes / 2**20:.0f}, measured {measured / 2**20:.0f} MiB")
    assert compilations[0].predicted_peak_bytes == pytest.approx(measured, rel=0.2)
