"""Run as a program under TRITON_INTERPRET=1: the Triton kernels on the CPU, over a few small cases.

No bfloat16: the interpreter multiplies matrices of it as the integers that it keeps them in.
"""

import contextlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from attention_cases import AttentionCase

from torch_vtensor.ops.decode_attention.reference import decode_attention as decode_reference

DECODE = [
    AttentionCase(lengths=(33, 1, 0), dtype=torch.float32, dims=(16, 16), room=5),
    AttentionCase(lengths=(70, 40), dims=(24, 32), heads=1, group=5, num_rows=3, window=20, first=(0, 9)),
    AttentionCase(lengths=(50, 50), dims=(32, 32), has_sinks=True, softcap=5.0, layout="interleaved"),
    AttentionCase(lengths=(130,), dims=(64, 64), heads=1, group=8, dtype=torch.float16, counts_dtype=torch.int32),
]
PREFILL = [
    AttentionCase(lengths=(40, 33), dims=(16, 16), num_rows=33),
    AttentionCase(
        lengths=(70, 5, 0), dims=(32, 16), heads=1, num_rows=20, num_new=(20, 5, 0), window=9, has_sinks=True
    ),
    AttentionCase(lengths=(37,), dims=(24, 24), num_rows=18, softcap=5.0, first=(3,), layout="token_major"),
    AttentionCase(lengths=(30, 12), dims=(16, 16), num_rows=12, causal=False, dtype=torch.float16),
]


Groups = tuple[tuple[int, ...], ...]
SHARED: list[tuple[AttentionCase, Groups, tuple[int, ...]]] = [
    (AttentionCase(lengths=(70, 90, 66), dims=(16, 16), heads=1, room=3), ((0, 1, 2),), (65, 65, 65)),
    (AttentionCase(lengths=(40, 180, 150, 33), dims=(16, 32), group=2), ((2, 1), (3, 0)), (32, 140, 140, 32)),
    (AttentionCase(lengths=(20, 300, 290), heads=1, dims=(24, 24), num_rows=3, has_sinks=True, softcap=4.0), ((1, 2),),
     (0, 280, 280)),
    (AttentionCase(lengths=(90, 80), heads=1, group=1, dims=(16, 16), first=(7, 7)), ((1, 0),), (70, 70)),
]  # fmt: skip


def decode_attention() -> None:
    from torch_vtensor.ops.decode_attention.triton import launch

    for case in DECODE:
        a = case.arguments()
        tensors = a["query"], a["keys"], a["values"], a["lengths"], a["first"]
        for split_tokens in (None, 32):
            scale = case.dims[0] ** -0.5
            case.check(launch(*tensors, scale, case.window, a["sinks"], case.softcap, split_tokens))


def shared_prefix() -> None:
    from torch_vtensor.ops.decode_attention.prefix_triton import launch

    for case, groups, num_shared in SHARED:
        a = shared(case.arguments(), groups, num_shared)
        table = torch.full((len(groups), 4), -1, dtype=torch.int32)
        for row, slots in enumerate(groups):
            table[row, : len(slots)] = torch.tensor(slots)
        counts = torch.tensor(num_shared, dtype=torch.int32)
        keys, values = (poisoned(a[name], groups, num_shared) for name in ("keys", "values"))
        out = launch(
            a["query"], keys, values, a["lengths"], table, counts, a["first"], case.scale, a["sinks"], case.softcap
        )
        torch.testing.assert_close(out, decode_reference(**a), rtol=1e-5, atol=1e-5)


def shared(arguments: dict[str, Any], groups: Groups, num_shared: tuple[int, ...]) -> dict[str, Any]:
    """The arguments with the same first tokens in all members of a group."""
    for slots in groups:
        for rows in (arguments["keys"], arguments["values"]):
            rows[list(slots), :, : num_shared[slots[0]]] = rows[slots[0], :, : num_shared[slots[0]]].clone()
    return {name: tensor for name, tensor in arguments.items() if name != "num_new"}


def poisoned(rows: torch.Tensor, groups: Groups, num_shared: tuple[int, ...]) -> torch.Tensor:
    """As a proof that a prefix is read from the first member alone: NaN in the others'."""
    rows = rows.clone()
    for slots in groups:
        rows[list(slots[1:]), :, : num_shared[slots[0]]] = float("nan")
    return rows


def prefill_attention() -> None:
    from torch_vtensor.ops.prefill_attention.triton import launch

    for case in PREFILL:
        a = case.arguments()
        tensors = a["query"], a["keys"], a["values"], a["lengths"], a["num_new"], a["first"]
        case.check(launch(*tensors, None, case.window, a["sinks"], case.softcap, case.causal))


def prefill_parts() -> None:
    from cached_cases import CachedCall
    from parts_cases import CACHED
    from parts_cases import CASES as PARTS

    from torch_vtensor.ops.attention_triton import Rows
    from torch_vtensor.ops.prefill_attention.triton import launch_rows

    for case, num_sms in PARTS:
        a = case.arguments()
        out = launch_rows(
            a["query"], a["keys"], a["values"], Rows.of(a["keys"], a["values"]), a["lengths"], case.heads,
            case.dims[1], a["num_new"], a["first"], case.scale, case.window, a["sinks"], case.softcap,
            case.causal, num_sms=num_sms,
        )  # fmt: skip
        case.check(out)
    for case, num_sms in CACHED:
        call = CachedCall(case, "cpu")
        call.check(call.launch_prompt(num_sms))


def parts_are_even_and_few() -> None:
    """What ``share_out`` divides: nothing twice, never more than there are programs, about as much for each."""
    from parts_kernel import keep_parts

    from torch_vtensor.ops.prefill_attention.triton import _num_programs

    def shared_out(lengths: list[int], num_query: int, heads: int = 8, sms: int = 132) -> tuple[list[int], int]:
        group, block_m, lines = 4, 128, 64
        num_blocks = -(-num_query * group // block_m)
        num_whole = len(lengths) * num_blocks
        num_programs = _num_programs(num_whole * heads, sms, sms)
        assert 2 * num_whole * heads <= num_programs <= 2 * sms
        out = torch.zeros(2, lines, dtype=torch.int32)
        keep_parts[(1,)](
            torch.tensor(lengths), out, len(lengths), num_query, num_blocks, sms, num_programs,
            heads, group, block_m, 64, lines,
        )  # fmt: skip
        parts, ends = out.tolist()
        assert [sum(parts[: line + 1]) * heads for line in range(lines)] == ends
        assert min(parts[:num_whole]) >= 1
        assert not any(parts[num_whole:])
        assert ends[-1] <= num_programs
        return parts[:num_whole], num_programs

    assert shared_out([16384 + 128], 128) == ([4] * 4, 132)
    assert shared_out([4096 + 16], 16) == ([13], 132)
    assert shared_out([3000 + 129], 192)[0] in ([5] * 6, [6] * 6)
    assert shared_out([100], 16) == ([1], 132)
    assert shared_out([0, 1], 16) == ([1, 1], 132)
    assert _num_programs(132, 132, 264) == 0
    assert shared_out([16384] * 16, 16) == ([1] * 16, 264)  # two parts each would come one after the other
    parts, _ = shared_out([16384, 512, 512, 512], 16)
    assert parts[0] > 10
    assert max(parts[1:]) == 1
    parts, _ = shared_out([512], 512)  # the last rows see all of the tokens, the first ones few
    assert parts == sorted(parts)
    random = torch.Generator().manual_seed(0)
    for num_slots in (1, 3, 7, 16):
        lengths = torch.randint(0, 20000, (num_slots,), generator=random).tolist()
        for heads, sms in ((1, 40), (2, 132), (8, 200)):
            parts, num_programs = shared_out(lengths, 32, heads, sms)
            steps = [max(-(-length // 64), 1) for length in lengths]
            longest = max(-(-all_steps // num) for all_steps, num in zip(steps, parts, strict=True))
            assert longest <= 4 * max(2, -(-sum(steps) * heads // num_programs))


def kv_append() -> None:
    from torch_vtensor.ops.kv_append.reference import kv_append as reference
    from torch_vtensor.ops.kv_append.triton import launch

    for num_new in (None, torch.tensor([3, 0, 1])):
        keys, values = torch.full((3, 2, 12, 16), float("nan")), torch.full((3, 2, 12, 24), float("nan"))
        expected = keys.clone(), values.clone()
        new = torch.randn(3, 2, 3, 16), torch.randn(3, 2, 3, 24), torch.tensor([0, 9, 4])
        launch(keys, values, *new, num_new)
        reference(*expected, *new, num_new)
        torch.testing.assert_close((keys, values), expected, rtol=0, atol=0, equal_nan=True)


def cached_attention() -> None:
    from cached_cases import CASES, PROMPTS, CachedCall
    from cached_cases import SHARED as SHARED_CALLS

    from torch_vtensor.ops.attention_triton import Rows
    from torch_vtensor.ops.decode_attention.prefix_triton import launch_rows as launch_shared
    from torch_vtensor.ops.decode_attention.triton import launch_rows

    for case in CASES:
        for has_rotation in (False, True):
            call = CachedCall(case, "cpu", has_rotation)
            query, key, value, key_addresses, value_addresses, lengths, firsts, sinks, *_ = call.arguments()
            keys, values = call.given["keys"], call.given["values"]
            rows = Rows(
                (0, *keys.stride()[1:3]), (0, *values.stride()[1:3]), key_addresses, value_addresses
            )  # fmt: skip
            out = launch_rows(
                query, query, query, rows, lengths, case.heads, case.dims[1], 0, firsts, case.scale, case.window,
                sinks, case.softcap, new=(key, value), rotation=call.rotation,
            )  # fmt: skip
            if has_rotation:
                plain = CachedCall(case, "cpu")
                call.check_rotated(out, torch.ops.torch_vtensor.cached_attention(*plain.arguments()))
            else:
                call.check(out)
    for case, groups, num_shared in SHARED_CALLS:
        call = CachedCall(case, "cpu")
        tables = call.share(groups, num_shared)
        expected = torch.ops.torch_vtensor.cached_attention(*call.arguments())
        call.forget(groups, num_shared)
        query, key, value, key_addresses, value_addresses, lengths, firsts, sinks, *_ = call.arguments()
        keys, values = call.given["keys"], call.given["values"]
        rows = Rows((0, *keys.stride()[1:3]), (0, *values.stride()[1:3]), key_addresses, value_addresses)
        out = launch_shared(
            query, query, query, rows, lengths, *tables, case.heads, case.dims[1], 0, firsts, case.scale, sinks,
            case.softcap, (key, value), out=torch.empty_like(expected),
        )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for case in PROMPTS:
        call = CachedCall(case, "cpu")
        call.check(call.launch_prompt())


def skinny_linear() -> None:
    from skinny_cases import CASES as SKINNY
    from skinny_cases import GATED, SEVERAL, SEVERAL_GATED, Arguments

    from torch_vtensor.ops.skinny_linear import rows_triton, triton

    rows_triton.has_kernel = lambda x: x.dtype.itemsize == 2 and x.shape[-1] % 64 == 0  # type: ignore[assignment]
    rows_triton._shared_bytes = lambda device_index: 50_000  # type: ignore[assignment]
    for case in SKINNY:
        a = case.arguments()
        norm = None if a.norm is None else triton.Norm(a.norm, 0.0, a.eps)
        case.check(triton.launch(a.x, a.weights, a.biases, norm, a.residual, early=False))
    for case in GATED:
        a = case.arguments()
        norm = None if a.norm is None else triton.Norm(a.norm, 0.0, a.eps)
        case.check_gated(triton.launch_gated(a.x, *a.weights, norm, early=False))

    def flat(a: Arguments) -> Arguments:
        residual = None if a.residual is None else a.residual.flatten(0, 1)
        return a._replace(x=a.x.flatten(0, 1), residual=residual)

    for case in (replace(case, dtype=torch.float16) for case in SEVERAL if max(case.widths) < 1000):
        a = flat(case.arguments())
        norm = None if a.norm is None else triton.Norm(a.norm, 0.0, a.eps)
        outs = rows_triton.launch(a.x, a.weights, a.biases, norm, a.residual, early=False)
        case.check([out.unflatten(0, (-1, 1)) for out in outs])
    for case in (replace(case, dtype=torch.float16) for case in SEVERAL_GATED):
        a = flat(case.arguments())
        norm = None if a.norm is None else triton.Norm(a.norm, 0.0, a.eps)
        case.check_gated(rows_triton.launch_gated(a.x, *a.weights, norm, early=False).unflatten(0, (-1, 1)))
    case = replace(SEVERAL[2], dtype=torch.float16)
    a = flat(case.arguments())
    weight = torch.linspace(0.5, 2, len(a.weights[0])).half()
    normed = triton.Norm(weight, 0.0, a.eps)
    outs = rows_triton.launch_summed(a.x, a.weights[0], a.biases[0], a.residual, normed, early=False)
    case.check_normed(*(out.unflatten(0, (-1, 1)) for out in outs), weight)


def rotary() -> None:
    from torch_vtensor.ops.rotary_triton import rotate

    torch.cuda.device = lambda device: contextlib.nullcontext()
    for batch, num_tokens, query_heads, heads, dim, own in ((2, 5, 4, 2, 16, True), (1, 7, 9, 1, 24, False)):
        query, key = (torch.randn(batch, num_tokens, n, dim).half().transpose(1, 2) for n in (query_heads, heads))
        cos, sin = torch.randn(2, batch if own else 1, num_tokens, dim).half()
        for made, x in zip(rotate(query, key, cos, sin), (query, key), strict=True):
            first, second = x.float().chunk(2, -1)
            expected = x * cos.float()[:, None] + torch.cat([-second, first], -1) * sin.float()[:, None]
            torch.testing.assert_close(made, expected.half())


if __name__ == "__main__":
    # A device so small that a few tokens are already shared out among its programs.
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=5, name="interpreter")
    import torch_vtensor.ops.cached_attention  # noqa: F401  registers the operator that results are compared with

    globals()[sys.argv[1]]()
    print(sys.argv[1], "passed")
