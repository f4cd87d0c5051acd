"""Run as a program under TRITON_INTERPRET=1: the Triton kernels on the CPU, over a few small cases.

No bfloat16: the interpreter multiplies matrices of it as the integers that it keeps them in.
"""

import sys
from types import SimpleNamespace

import torch
from attention_cases import AttentionCase

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


def decode_attention() -> None:
    from torch_vtensor.ops.decode_attention.triton import launch

    for case in DECODE:
        a = case.arguments()
        tensors = a["query"], a["keys"], a["values"], a["lengths"], a["first"]
        for split_tokens in (None, 32):
            scale = case.dims[0] ** -0.5
            case.check(launch(*tensors, scale, case.window, a["sinks"], case.softcap, split_tokens))


def prefill_attention() -> None:
    from torch_vtensor.ops.prefill_attention.triton import launch

    for case in PREFILL:
        a = case.arguments()
        tensors = a["query"], a["keys"], a["values"], a["lengths"], a["num_new"], a["first"]
        case.check(launch(*tensors, None, case.window, a["sinks"], case.softcap, case.causal))


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

    from torch_vtensor.ops.attention_triton import Rows
    from torch_vtensor.ops.decode_attention.triton import launch_rows
    from torch_vtensor.ops.prefill_attention.triton import launch_rows as launch_prompt

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
    for case in PROMPTS:
        call = CachedCall(case, "cpu")
        query, key, value, key_addresses, value_addresses, lengths, firsts, sinks, *_, num_new = call.arguments()
        keys, values = call.given["keys"], call.given["values"]
        rows = Rows((0, *keys.stride()[1:3]), (0, *values.stride()[1:3]), key_addresses, value_addresses)
        out = launch_prompt(
            query, query, query, rows, lengths, case.heads, case.dims[1], num_new, firsts, case.scale, case.window,
            sinks, case.softcap, new=(key, value),
        )  # fmt: skip
        call.check(out)


def skinny_linear() -> None:
    from skinny_cases import CASES as SKINNY
    from skinny_cases import GATED

    from torch_vtensor.ops.skinny_linear import triton

    for case in SKINNY:
        a = case.arguments()
        norm = None if a.norm is None else triton.Norm(a.norm, 0.0, a.eps)
        case.check(triton.launch(a.x, a.weights, a.biases, norm, a.residual, early=False))
    for case in GATED:
        a = case.arguments()
        norm = None if a.norm is None else triton.Norm(a.norm, 0.0, a.eps)
        case.check_gated(triton.launch_gated(a.x, *a.weights, norm, early=False))


if __name__ == "__main__":
    # A device so small that a few tokens are already shared out among its programs.
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=5, name="interpreter")
    import torch_vtensor.ops.cached_attention  # noqa: F401  registers the operator that results are compared with

    globals()[sys.argv[1]]()
    print(sys.argv[1], "passed")
