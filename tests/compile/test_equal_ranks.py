"""What is predicted from one rank of those that do the same is what is predicted from all."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
import ready_models
import torch
import transformers
from ready_models import evoformer, gpt2, llama, swin, t5
from torch import Tensor, nn

from torch_vtensor.compile import Mesh
from torch_vtensor.compile.backend import Compilation, compile_plan
from torch_vtensor.compile.explanation import CapturedCall, Explanation, capture_call
from torch_vtensor.compile.plans import cuts_classes, named
from torch_vtensor.compile.schedules import Action

WIDTH, BATCH = 512, 64


def large_llama() -> tuple[Callable[..., Tensor], list[Tensor]]:
    """One whose tensors are so large that collectives are the fastest way to move them."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model, tokens = transformers.LlamaForCausalLM(config), torch.zeros(BATCH, 1024, dtype=torch.long)
    return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss, [tokens]


def hidden_states() -> tuple[Callable[..., Tensor], list[Tensor]]:
    """No loss: backward comes apart from forward."""
    with torch.device("meta"):
        layers = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(4)]
        return nn.Sequential(*layers), [torch.empty(BATCH, 256, WIDTH)]


@cache
def captured(make: Callable[[], tuple[Callable[..., Tensor], list[Tensor]]], cuts: bool) -> CapturedCall:
    return capture_call(*make(), cuts_classes=cuts)


def both(make: Callable, name: str, num_ranks: int) -> tuple[Compilation, Compilation]:
    """A plan for all ranks, and for one of each kind."""
    plan = named(name, num_ranks)
    cuts = cuts_classes(plan)
    call = captured(make, cuts) if make in (large_llama, hidden_states) else ready_models.captured(make, cuts)[1]
    graph = call.captured
    mesh = Mesh(tuple(range(num_ranks)), plan.axes)
    of_all, of_some = (compile_plan(graph, plan, mesh, trains=True, one_of_each=one) for one in (False, True))
    return of_all, of_some


def assert_alike(of_all: Compilation, of_some: Compilation) -> None:
    """Every rank does in the plan of all what the one does that stands for it, and what is predicted is the same."""
    like = of_some.program.flow.like
    assert list(like) == list(of_all.program.flow.like)
    expected, found = Explanation(of_all), Explanation(of_some)
    assert found.peak_bytes == expected.peak_bytes
    assert found.sent_bytes == expected.sent_bytes
    assert found.seconds == pytest.approx(expected.seconds, rel=1e-12)
    assert str(found) == str(expected)
    for whole, some in zip(of_all.passes.schedules, of_some.passes.schedules, strict=True):
        for rank, one in like.items():
            assert [*seen(whole.actions[rank])] == [*seen(some.actions[one])], f"rank {rank}"
        planned = frozenset(like.values())
        for rank in planned:
            row = some.actions[rank]
            assert [named_alike(action, planned) for action in whole.actions[rank]] == [*map(named_alike, row)]


def seen(row: Sequence[Action]) -> Iterator[tuple[object, ...]]:
    """What a rank computes and communicates; the order in which views are taken between that is anyone's."""
    for kind, _, _, stage, microbatch, _ in row:
        if kind not in ("MOVE", "FREE"):
            yield kind, stage, microbatch


def named_alike(action: Action, planned: frozenset[int] | None = None) -> tuple[object, ...]:
    """An action without the numbers of segments, and without peers that are not planned, where some are not."""
    peers = tuple(peer for peer in action.peers if planned is None or peer in planned)
    return action.kind, action.stage, action.microbatch, re.sub(r"\bs\d+\b", "s", action.name), peers


@pytest.mark.parametrize(
    ("make", "name", "num_ranks", "num_planned"),
    [
        (large_llama, "dp8", 8, 1),
        (large_llama, "tp4", 4, 1),
        (large_llama, "dp4+tp2", 8, 1),
        (large_llama, "pp2+dp2+tp2+1f1b/4", 8, 2),
        (large_llama, "pp4+dp4+zb/8", 16, 4),
        (large_llama, "pp2+dp4+gpipe/4", 8, 2),
        (large_llama, "zero3/2", 8, 1),
        (large_llama, "zero2+pp2+1f1b/4", 8, 2),
        (large_llama, "zero3+sp2", 8, 1),
        (large_llama, "interlaced/4", 4, 4),
        (hidden_states, "dp4", 4, 1),
        (hidden_states, "pp2+dp4+1f1b/4", 8, 8),
        (hidden_states, "zero3", 4, 1),
    ],
)
def test_one_rank_stands_for_those_that_do_the_same(
    make: Callable, name: str, num_ranks: int, num_planned: int
) -> None:
    of_all, of_some = both(make, name, num_ranks)
    assert len(of_some.program.flow.plan.mesh) == num_planned
    assert_alike(of_all, of_some)


@pytest.mark.parametrize(
    ("name", "num_ranks"), [("dp4", 4), ("tp2", 2), ("dp2+tp2", 4), ("pp2+dp2+1f1b/2", 4), ("zero3/2", 2), ("zero3", 4)]
)
@pytest.mark.parametrize("make", [gpt2, llama, t5, swin, evoformer])
def test_small_models_are_predicted_alike(make: Callable, name: str, num_ranks: int) -> None:
    assert_alike(*both(make, name, num_ranks))
