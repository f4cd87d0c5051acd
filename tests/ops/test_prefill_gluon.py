"""The prompt kernel for Hopper, asked for by name: tiles and blocks, ragged lengths, what lies beyond the tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import AttentionCase
from cached_cases import CachedCall
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from torch_vtensor.ops import implementations, prefill_attention
from torch_vtensor.ops.cached_attention import cached_attention

pytestmark = pytest.mark.gpu
TILE = 128
EDGES = (0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 5 * TILE + 3)


@pytest.fixture(autouse=True, scope="module")
def where_it_runs() -> None:
    rows = torch.zeros(1, 1, TILE, 128, dtype=torch.bfloat16, device="cuda")
    (reason,) = (entry.why_not for entry in implementations("prefill", rows, rows, rows) if entry.name == "gluon")
    if reason is not None:
        pytest.skip(reason)


def check(case: AttentionCase) -> None:
    """Right, and the same to the last bit when it is called again."""
    arguments = case.arguments("cuda") | {"causal": case.causal, "implementation": "gluon"}
    out = prefill_attention(**arguments)
    case.check(out)
    assert torch.equal(prefill_attention(**arguments), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=(TILE - 1, TILE, TILE + 1, 3 * TILE), heads=2, group=4, num_rows=TILE - 1),
        AttentionCase(lengths=(520, 520), heads=1, group=3, num_rows=520, layout="token_major"),
        AttentionCase(lengths=(700, 800, 290, 3), heads=1, group=2, num_rows=300, num_new=(300, 257, 290, 0), room=5),
        AttentionCase(lengths=(700, 640, 290), heads=2, group=5, num_rows=250, first=(0, 391, 289), room=130),
        AttentionCase(lengths=(400, 333, 128), heads=2, group=1, num_rows=300, causal=False, first=(0, 10, 128)),
        AttentionCase(lengths=(60, 1100), heads=16, group=2, num_rows=700, layout="interleaved", room=9),
        AttentionCase(lengths=(900, 600), heads=2, group=4, num_rows=300, window=200, room=7),
        AttentionCase(lengths=(900, 64), heads=1, group=8, num_rows=64, num_new=(64, 9), window=1, has_sinks=True),
        AttentionCase(lengths=(300, 290), heads=2, group=4, num_rows=129, first=(7, 280), window=90, has_sinks=True),
        AttentionCase(lengths=(300, 200), heads=1, group=8, num_rows=170, scale=-0.3, counts_dtype=torch.int32),
        AttentionCase(lengths=(300, 200), heads=1, group=8, num_rows=170, scale=0.0),
    ],
    ids=["edges", "no_prefix", "ragged", "first", "bidirectional", "many_blocks", "window",
         "window_of_one", "window_and_sinks", "negative_scale", "no_scale"],
)  # fmt: skip
@pytest.mark.parametrize("dim", [64, 128])
def test_cases(case: AttentionCase, dim: int, dtype: torch.dtype) -> None:
    check(dataclasses.replace(case, dims=(dim, dim), dtype=dtype))


@st.composite
def around_edges(draw: st.DrawFn) -> AttentionCase:
    """Sequences that end, begin and have their new tokens around the edges of tiles, few kernels among them."""
    lengths = draw(st.lists(st.sampled_from(EDGES), min_size=1, max_size=6))
    num_rows = draw(st.sampled_from((1, 31, 32, 33, TILE, 200)))
    return AttentionCase(
        lengths=tuple(lengths),
        heads=2,
        group=draw(st.sampled_from((1, 4))),
        num_rows=num_rows,
        dims=(128, 128),
        num_new=tuple(draw(st.integers(0, min(num_rows, length))) for length in lengths),
        first=tuple(draw(st.integers(0, length)) for length in lengths),
        dtype=torch.bfloat16,
        causal=(causal := draw(st.booleans())),
        window=draw(st.sampled_from((None, 1, 77, TILE, 300))) if causal else None,
        has_sinks=draw(st.booleans()),
        layout=draw(st.sampled_from(("head_major", "token_major", "interleaved"))),
        room=draw(st.sampled_from((0, 1, TILE))),
    )


@given(around_edges())
@settings(max_examples=80, phases=[Phase.explicit, Phase.generate])
def test_around_the_edges_of_tiles(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=(700, 600, 650), heads=4, group=8, num_rows=500, room=3),
        AttentionCase(
            lengths=(700, 150, 80), heads=8, group=4, num_rows=200, num_new=(200, 149, 7), first=(0, 100, 73)
        ),
        AttentionCase(lengths=(700, 600), heads=8, group=4, num_rows=300, window=150, has_sinks=True),
    ],
    ids=["all_new", "part_new", "window"],
)
@pytest.mark.parametrize("layout", ["head_major", "token_major", "interleaved"])
def test_prompts_of_captured_graphs(case: AttentionCase, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over rows at addresses, whose newest are written on the way."""
    from torch_vtensor.ops.prefill_attention import gluon

    calls = []
    launch_rows = gluon.launch_rows
    monkeypatch.setattr(gluon, "launch_rows", lambda *args, **kwargs: calls.append(1) or launch_rows(*args, **kwargs))
    call = CachedCall(dataclasses.replace(case, dims=(128, 128), dtype=torch.bfloat16, layout=layout), "cuda")
    call.check(cached_attention(*call.arguments()))
    assert calls == [1]
