"""The operators as torch sees them: schemas, fakes, compilation, and what their arguments may be."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_vtensor.ops import decode_attention, kv_append, prefill_attention
from torch_vtensor.ops._torch_compat import flash_attention_cpu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = torch.ops.torch_vtensor


def attention_arguments(num_rows: int, capacity: int, device: str = "cpu") -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 6, num_rows, 16), (2, 2, capacity, 16), (2, 2, capacity, 32)]
    tensors = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    return [*tensors, torch.tensor([capacity, capacity // 2], device=device)]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    query, keys, values, lengths = attention_arguments(1, 12, device)
    sinks = torch.randn(6, device=device)
    new = keys[:, :, :1].clone(), values[:, :, :1].clone(), lengths - 1
    torch.library.opcheck(OPS.kv_append.default, (keys, values, *new))
    torch.library.opcheck(OPS.kv_append.default, (keys, values, *new, torch.tensor([1, 0], device=device)))
    torch.library.opcheck(
        OPS.decode_attention.default, (query, keys, values, lengths, lengths // 3, 0.3, 4, sinks, 2.0, 32)
    )
    rows = attention_arguments(12, 12, device)
    options = (lengths // 3, None, 4, sinks, 2.0)
    torch.library.opcheck(OPS.prefill_attention.default, (*rows, lengths // 2, *options))
    for tensor in (*rows[:3], sinks):
        tensor.requires_grad_()
    torch.library.opcheck(OPS.prefill_attention.default, (*rows, None, *options))
    leaves = [tensor.detach() for tensor in rows]
    grad = torch.randn(2, 6, 12, 32, device=device)
    torch.library.opcheck(
        OPS.prefill_attention_backward.default, (grad, *leaves, lengths // 3, None, 4, sinks.detach(), 2.0)
    )


def test_shapes_without_running() -> None:
    with FakeTensorMode():
        query, keys = torch.empty(3, 8, 5, 64, dtype=torch.bfloat16), torch.empty(3, 2, 10**9, 64, dtype=torch.bfloat16)
        values, lengths = torch.empty(3, 2, 10**9, 40, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
        for out in (decode_attention(query, keys, values, lengths), prefill_attention(query, keys, values, lengths)):
            assert (out.shape, out.dtype) == ((3, 8, 5, 40), torch.bfloat16)
            assert out.transpose(1, 2).is_contiguous()
        assert kv_append(keys, values, keys[:, :, :2], values[:, :, :2], lengths) is None


def decode_steps(
    keys: torch.Tensor,
    values: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice append and attend: what the second sees depends on both appends."""
    more = lengths + 1
    kv_append(keys, values, key, value, lengths)
    one = decode_attention(query, keys, values, more)
    kv_append(keys, values, key, value, more, num_new=lengths)  # 0 or 1 of the one token
    return one, decode_attention(query, keys, values, more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_write_where_eager_ones_write(backend: str, device: str) -> None:
    torch._dynamo.reset()
    query, keys, values, _ = attention_arguments(1, 12, device)
    compiled = torch.compile(decode_steps, fullgraph=True, backend=backend)
    for lengths in ([0, 1], [1, 1], [1, 0]):
        key, value = torch.randn(2, 2, 1, 16, device=device), torch.randn(2, 2, 1, 32, device=device)
        new = query, key, value, torch.tensor(lengths, device=device)
        eager_caches = keys.clone(), values.clone()
        expected = decode_steps(*eager_caches, *new)
        addresses = keys.data_ptr(), values.data_ptr()
        got = compiled(keys, values, *new)
        assert (keys.data_ptr(), values.data_ptr()) == addresses
        torch.testing.assert_close((keys, values), eager_caches, rtol=0, atol=0)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_one_compilation_serves_every_length(device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(decode_attention, fullgraph=True, backend=counter)
    query, keys, values, lengths = attention_arguments(1, 12, device)
    for length in (0, 1, 2, 11, 12):
        lengths.fill_(length)
        torch.testing.assert_close(
            compiled(query, keys, values, lengths), decode_attention(query, keys, values, lengths)
        )
    assert counter.frame_count == 1


FIRST_CALL = """
import torch
import torch_vtensor.ops as ops

def attend(query, keys, values, lengths, sinks):
    return ops.prefill_attention(query, keys, values, lengths, window=5, sinks=sinks)

def leaves():
    torch.manual_seed(0)
    shapes = (2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16), (4,)
    return [torch.randn(shape).to("{device}").requires_grad_() for shape in shapes]

lengths = torch.tensor([8, 8], device="{device}")
compiled, eager = leaves(), leaves()
grad = torch.randn(2, 4, 8, 16).to("{device}")
torch.compile(attend, fullgraph=True)(*compiled[:3], lengths, compiled[3]).backward(grad)
attend(*eager[:3], lengths, eager[3]).backward(grad)
for mine, theirs in zip(compiled, eager):
    torch.testing.assert_close(mine.grad, theirs.grad)
print("same gradients")
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_call_may_be_a_compiled_one(device: str, run_python: Callable[..., str]) -> None:
    assert "same gradients" in run_python(FIRST_CALL.replace("{device}", device))


def test_import_loads_neither_triton_nor_transformers(run_python: Callable[..., str]) -> None:
    added = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import torch_vtensor, torch_vtensor.ops\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "assert torch_vtensor.ops.decode_attention.__name__ == 'decode_attention'\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert "torch_vtensor" in added.split()
    assert not {"triton", "transformers", "cuda"} & set(added.split())


def test_private_kernel_is_where_we_know_it_and_gives_logsumexp() -> None:
    query, keys, values = (torch.randn(2, 4, tokens, 16, dtype=torch.float64) for tokens in (3, 7, 7))
    out, logsumexp = flash_attention_cpu(query, keys, values, None, False, 0.5)
    scores = 0.5 * (query @ keys.mT)
    torch.testing.assert_close(logsumexp, scores.logsumexp(3))
    torch.testing.assert_close(out, scores.softmax(3) @ values)


QUERY, KEYS, VALUES, LENGTHS = attention_arguments(4, 12)


@pytest.mark.parametrize("attend", [decode_attention, prefill_attention])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": QUERY[0]}, ValueError, r"query has shape \[6, 4, 16\].*must be \[B, Hq, T, D\]"),
        ({"query": QUERY[:, :5]}, ValueError, "query has 5 heads and keys have 2; .*multiple"),
        ({"query": QUERY[..., :8]}, ValueError, "keys' B 2 and D 16"),
        ({"query": QUERY.bfloat16()}, TypeError, r"query are torch.bfloat16 and keys torch.float32; convert"),
        ({"query": QUERY.mT.contiguous().mT}, ValueError, r"strides .*the last must be 1 .*contiguous\(\)"),
        ({"keys": KEYS[:, :, :5]}, ValueError, r"keys have shape .* and values"),
        ({"values": VALUES.to("meta")}, ValueError, "keys are on cpu and values on meta; move"),
        ({"keys": KEYS.long(), "values": VALUES.long(), "query": QUERY.long()}, TypeError, "pass a floating dtype"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths have shape \[1\].*must be \[2\]"),
        ({"lengths": LENGTHS.float()}, TypeError, "lengths are torch.float32; pass torch.int32 or torch.int64"),
        ({"lengths": LENGTHS + 1}, ValueError, r"lengths\[0\] is 13; keys and values have 12 tokens"),
        ({"lengths": LENGTHS - 7}, ValueError, r"lengths\[1\] is -1"),
        ({"first": LENGTHS[:1]}, ValueError, r"first have shape"),
        ({"window": 0}, ValueError, "window is 0; .*at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; .*above 0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks have shape \[2\].*\[6\]"),
        ({"sinks": torch.zeros(6, dtype=torch.int64)}, TypeError, "sinks are torch.int64"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    attend: Callable[..., torch.Tensor], changed: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"query": QUERY, "keys": KEYS, "values": VALUES, "lengths": LENGTHS}
    with pytest.raises(error, match=message):
        attend(**(arguments | changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode_attention(QUERY, KEYS, VALUES, LENGTHS, split_tokens=0), "split_tokens is 0"),
        (
            lambda: prefill_attention(QUERY, KEYS, VALUES, LENGTHS, window=3, causal=False),
            "window is 3 with causal=Fal",
        ),
        (
            lambda: prefill_attention(QUERY, KEYS, VALUES, LENGTHS, num_new=LENGTHS),
            r"num_new\[0\] is 12; query holds 4",
        ),
        (lambda: kv_append(KEYS, VALUES, KEYS[:, :, :1], VALUES[:, :1, :1], LENGTHS), r"must be \[2, 2, T, 16\] and"),
        (lambda: kv_append(KEYS, VALUES, KEYS[:, :, :1], VALUES[:, :, :2], LENGTHS), r"must be \[2, 2, T, 16\] and"),
        (lambda: kv_append(KEYS, VALUES, KEYS[:1, :, :1], VALUES[:, :, :1], LENGTHS), r"must be \[2, 2, T, 16\] and"),
    ],
)
def test_wrong_arguments_of_one_operator_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_new_tokens_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError, match=r"key is torch\.float64 on cpu; keys and values are torch\.float32"):
        kv_append(KEYS, VALUES, KEYS[:, :, :1].double(), VALUES[:, :, :1], LENGTHS - 1)
