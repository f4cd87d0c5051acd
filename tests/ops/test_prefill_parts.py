"""Blocks of rows that do not fill a GPU, cut into parts: as right as whole ones, and the same every time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import AttentionCase
from cached_cases import PROMPTS, CachedCall
from parts_cases import CASES, LONG

from torch_vtensor.ops import prefill_attention
from torch_vtensor.ops.prefill_attention.reference import prefill_attention as reference

pytestmark = pytest.mark.gpu


def launched(case: AttentionCase, num_sms: int) -> torch.Tensor:
    from torch_vtensor.ops.attention_triton import Rows
    from torch_vtensor.ops.prefill_attention.triton import launch_rows

    a = case.arguments("cuda")
    rows = Rows.of(a["keys"], a["values"])
    return launch_rows(
        a["query"], a["keys"], a["values"], rows, a["lengths"], case.heads, case.dims[1], a["num_new"], a["first"],
        case.scale, case.window, a["sinks"], case.softcap, case.causal, num_sms=num_sms,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
@pytest.mark.parametrize("case", LONG, ids=range(len(LONG)))
def test_long_sequences(case: AttentionCase, dtype: torch.dtype, dim: int) -> None:
    case = dataclasses.replace(case, dims=(dim, dim), dtype=dtype)
    case.check(prefill_attention(**case.arguments("cuda"), causal=case.causal))
    out = launched(case, 132)
    case.check(out)
    assert torch.equal(launched(case, 132), out)
    case.check(launched(case, 0))


@pytest.mark.parametrize(("case", "num_sms"), CASES, ids=range(len(CASES)))
def test_edges(case: AttentionCase, num_sms: int) -> None:
    case.check(launched(case, num_sms))


@pytest.mark.parametrize("num_sms", [13, 60, 132])
@pytest.mark.parametrize("case", PROMPTS, ids=range(len(PROMPTS)))
def test_rows_that_are_written_first(case: AttentionCase, num_sms: int) -> None:
    call = CachedCall(dataclasses.replace(case, dtype=torch.bfloat16), "cuda")
    call.check(call.launch_prompt(num_sms))


def test_one_captured_graph_serves_all_lengths() -> None:
    from torch_vtensor.ops.attention_triton import Rows
    from torch_vtensor.ops.prefill_attention.triton import launch_rows

    heads, num_rows, capacity, dim = 2, 20, 9000, 64
    keys, values = (torch.randn(1, heads, capacity, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    query = torch.randn(1, 4 * heads, num_rows, dim, device="cuda", dtype=torch.float16)
    lengths, num_new = (torch.tensor([number], device="cuda", dtype=torch.int32) for number in (num_rows, num_rows))

    def attend() -> torch.Tensor:
        return launch_rows(query, keys, values, Rows.of(keys, values), lengths, heads, dim, num_new, num_sms=132)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for length, count in ((20, 20), (64, 3), (65, 20), (1000, 1), (capacity, 20), (0, 0), (capacity - 1, 20)):
        lengths.fill_(length)
        num_new.fill_(count)
        graph.replay()
        doubles = (tensor.double() for tensor in (query, keys, values))
        expected = reference(*doubles, lengths, num_new)
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
