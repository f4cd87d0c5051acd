"""cached_attention: attention over rows at addresses, whose newest it writes, and nothing beyond them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attention_cases import AttentionCase
from cached_cases import CASES, PROMPTS, SHARED, CachedCall
from test_unmapped_memory import CUDA, MAKE, STRICT_HOST

from torch_vtensor.ops.cached_attention import cached_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES + PROMPTS, ids=range(len(CASES + PROMPTS)))
@pytest.mark.parametrize("device", DEVICES)
def test_attends_and_writes(device: str, case: AttentionCase, dtype: torch.dtype) -> None:
    call = CachedCall(dataclasses.replace(case, dtype=dtype), device)
    call.check(cached_attention(*call.arguments()))


@pytest.mark.parametrize("num_rows", [1, 24])
@pytest.mark.parametrize("device", DEVICES)
def test_a_rotation_on_the_way(device: str, num_rows: int) -> None:
    case = AttentionCase(lengths=(33, 1, 70), room=5) if num_rows == 1 else PROMPTS[0]
    plain, rotated = CachedCall(case, device), CachedCall(case, device, has_rotation=True)
    without = cached_attention(*plain.arguments())
    rotated.check_rotated(cached_attention(*rotated.arguments()), without)


@pytest.mark.parametrize("has_rotation", [False, True])
@pytest.mark.parametrize(("case", "groups", "num_shared"), SHARED, ids=range(len(SHARED)))
@pytest.mark.parametrize("device", DEVICES)
def test_what_sequences_share_is_read_once(
    device: str,
    case: AttentionCase,
    groups: tuple[tuple[int, ...], ...],
    num_shared: tuple[int, ...],
    has_rotation: bool,
) -> None:
    call = CachedCall(case, device, has_rotation)
    tables = call.share(groups, num_shared)
    before = {name: call.given[name].clone() for name in ("keys", "values")}
    expected = cached_attention(*call.arguments())
    written = {name: call.given[name].clone() for name in ("keys", "values")}
    for name, rows in before.items():
        call.given[name].copy_(rows)
    if device == "cuda":  # elsewhere each sequence reads its own, which is the same
        call.forget(groups, num_shared)
    out = cached_attention(*call.arguments(), groups=tables[0], num_shared=tables[1])
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    for slot, length in enumerate(case.lengths):
        for name, rows in written.items():  # where a rotation is a step of its own, it rounds on its own
            tolerance = 1e-6 if has_rotation and name == "keys" else 0
            now, then = call.given[name][slot, :, length - 1], rows[slot, :, length - 1]
            torch.testing.assert_close(now, then, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_tables_without_groups_share_nothing(device: str) -> None:
    call = CachedCall(SHARED[1][0], device, has_rotation=True)
    rows = {name: call.given[name].clone() for name in ("keys", "values")}
    expected = cached_attention(*call.arguments())
    for name, before in rows.items():
        call.given[name].copy_(before)
    nothing = torch.zeros(0, 4, dtype=torch.int32, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    assert torch.equal(cached_attention(*call.arguments(), groups=nothing[0], num_shared=nothing[1]), expected)


def test_offsets_and_repeated_steps() -> None:
    """Two layers in one memory, one step after another: as if all tokens had been there from the start."""
    heads, dim, room, steps = 2, 8, 9, 9
    memory = torch.full((2, 2, heads, room, dim), float("nan"))  # layer, keys and values
    keys, values, query = (torch.randn(2, 1, heads, steps, dim) for _ in range(3))
    base = torch.tensor([memory.data_ptr()])
    none = torch.zeros(1, dtype=torch.int32)
    for step in range(steps):
        for layer in range(2):
            new = slice(step, step + 1)
            strides = memory[layer, 0].stride()[:2] * 2
            offsets = [memory[layer, part].storage_offset() for part in range(2)]
            rows = (each[layer, :, :, new] for each in (query, keys, values))
            workspace = torch.zeros(0), none
            out = cached_attention(
                *rows, base, base, none + step, none, None, *workspace, *offsets, *strides, 0.5, None, None
            )
            seen = slice(0, step + 1)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[layer, :, :, new], keys[layer, :, :, seen], values[layer, :, :, seen], scale=0.5
            )
            torch.testing.assert_close(out, expected)
    assert torch.equal(memory[:, 0], keys[:, 0])
    assert torch.equal(memory[:, 1], values[:, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_as_torch_sees_it(device: str) -> None:
    call = CachedCall(AttentionCase(lengths=(33, 9), dims=(64, 32), has_sinks=True), device)
    # On a GPU the workspace is written to, which the schema keeps from torch: what is in it afterwards means nothing.
    tests = ("test_schema", "test_faketensor") if device == "cpu" else "test_faketensor"
    torch.library.opcheck(cached_attention.default, call.arguments(), test_utils=tests)
    call.check(cached_attention(*call.arguments()))


STEP = """
from torch_vtensor.ops.cached_attention import cached_attention
vtensors = cache(tokens - 1), cache(tokens - 1)
assert [vtensor.committed for vtensor in vtensors] == [tokens, tokens]
keys, values = (vtensor.tensor() for vtensor in vtensors)
addresses = [
    torch.tensor([vtensor.data_ptr + slot * vtensor.strides()[0] * 2 for slot in range(2)], device=device)
    for vtensor in vtensors
]
if device == "cuda":
    from torch_vtensor.ops.decode_attention.triton import make_workspace
    workspace = make_workspace(2, heads, dim, torch.device("cuda", 0))
else:
    workspace = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
for window in (None, 7):
    new = torch.ones(2, heads, 1, dim, dtype=torch.bfloat16, device=device)
    query = torch.randn(2, 3 * heads, 1, dim, dtype=torch.bfloat16, device=device)
    lengths = torch.tensor([tokens - 1, 3], dtype=torch.int32, device=device)  # the last row there is memory for
    out = cached_attention(
        query, new, new, *addresses, lengths, lengths * 0, None, *workspace, 0, 0, *vtensors[0].strides()[1:3],
        *vtensors[1].strides()[1:3], 0.125, window, None)
    assert not out.isnan().any()
print("attended")
"""


@pytest.mark.parametrize("driver", [STRICT_HOST, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
def test_nothing_behind_the_last_page_is_touched(driver: str, run_python: Callable[..., str]) -> None:
    printed = run_python(driver + MAKE + STEP + ("torch.cuda.synchronize()" if driver is CUDA else ""))
    assert printed.split() == ["attended"]
