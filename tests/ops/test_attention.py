"""decode_attention and prefill_attention against their references, within derived error budgets."""

import dataclasses

import pytest
import torch
from attention_cases import DTYPES, LOW_DTYPES, AttentionCase, attention_cases
from hypothesis import Phase, given, settings

from torch_vtensor.ops import attention_cpu, decode_attention, prefill_attention
from torch_vtensor.ops.decode_attention import reference as decode_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Nearly every case is another kernel to compile: shrinking one that fails would compile for many minutes.
EACH_A_KERNEL = settings(max_examples=30, phases=[Phase.explicit, Phase.generate])


def check_decode(case: AttentionCase, device: str) -> None:
    arguments = case.arguments(device)
    arguments.pop("num_new")
    case.check(decode_attention(**arguments))
    case.check(decode_attention(**arguments, split_tokens=32))


def check_prefill(case: AttentionCase, device: str) -> None:
    case.check(prefill_attention(**case.arguments(device), causal=case.causal))


@given(attention_cases(DTYPES, prefill=False))
@settings(max_examples=80)
def test_decode(case: AttentionCase) -> None:
    check_decode(case, "cpu")


@given(attention_cases(DTYPES, prefill=True))
@settings(max_examples=80)
def test_prefill(case: AttentionCase) -> None:
    check_prefill(case, "cpu")


@pytest.mark.gpu
@given(attention_cases(LOW_DTYPES, prefill=False))
@EACH_A_KERNEL
def test_decode_on_cuda(case: AttentionCase) -> None:
    check_decode(case, "cuda")


@pytest.mark.gpu
@given(attention_cases(LOW_DTYPES, prefill=True))
@EACH_A_KERNEL
def test_prefill_on_cuda(case: AttentionCase) -> None:
    check_prefill(case, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=(5000, 17, 0, 1), heads=1, group=4, room=9),
        AttentionCase(lengths=(1500,) * 2, heads=2, group=4, window=1024, has_sinks=True),
        AttentionCase(lengths=(1024, 1023, 513), heads=2, group=8, num_rows=8, dims=(128, 128), layout="interleaved"),
        AttentionCase(lengths=(500, 300), heads=1, group=16, num_rows=2, dims=(576, 512)),
        AttentionCase(lengths=(4100,), heads=1, group=2, dims=(256, 256), softcap=50.0, window=4096),
    ],
    ids=["one_long", "window_sinks", "several_rows", "mla", "softcap"],
)
def test_decode_of_long_sequences(case: AttentionCase, dtype: torch.dtype, device: str) -> None:
    check_decode(dataclasses.replace(case, dtype=dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=(520, 520), heads=1, group=3, num_rows=520),
        AttentionCase(
            lengths=(700, 800, 290), heads=1, group=2, num_rows=300, num_new=(300, 257, 290), first=(0, 3, 0)
        ),
        AttentionCase(lengths=(600,), heads=2, group=3, num_rows=520, window=128, has_sinks=True, layout="token_major"),
        AttentionCase(lengths=(600, 300), heads=1, group=2, num_rows=300, dims=(192, 128), room=3),
        AttentionCase(lengths=(400,), heads=1, group=2, num_rows=300, softcap=30.0, has_sinks=True),
        AttentionCase(lengths=(400, 333), heads=2, group=1, num_rows=300, causal=False, first=(0, 10)),
    ],
    ids=["no_prefix", "ragged", "window_sinks", "mla", "softcap", "bidirectional"],
)
def test_prefill_of_long_sequences(case: AttentionCase, dtype: torch.dtype, device: str) -> None:
    check_prefill(dataclasses.replace(case, dtype=dtype), device)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"dims": (48, 32)}, {"window": 9}], ids=str)
def test_pieces_that_bound_memory_make_a_whole(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "_SCORE_ELEMENTS", 2 * 50 * 64)  # two of five heads
    monkeypatch.setattr(attention_cpu, "_MASK_ELEMENTS", 4 * 50)  # four rows
    case = AttentionCase(lengths=(50, 44), heads=5, group=2, num_rows=21, has_sinks=True, dtype=torch.bfloat16)
    check_prefill(dataclasses.replace(case, **options), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("change", [{"window": 23}, {"first": (1, 1)}, {"has_sinks": True}, {"softcap": 3.0}], ids=str)
def test_error_budget_sees_a_wrong_visible_token(dtype: torch.dtype, change: dict[str, object]) -> None:
    case = AttentionCase(lengths=(24, 24), dtype=dtype)
    arguments = dataclasses.replace(case, **change).arguments()  # type: ignore[arg-type]
    arguments.pop("num_new")
    with pytest.raises(AssertionError, match="times the error budget"):
        case.check(decode_attention(**arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_decode_and_prefill_agree_on_what_the_last_rows_see(device: str) -> None:
    case = AttentionCase(lengths=(90, 31, 5, 0), num_rows=5, window=20, first=(2, 0, 3, 0), has_sinks=True)
    arguments = case.arguments(device)
    case.check(prefill_attention(**arguments))
    arguments.pop("num_new")
    case.check(decode_attention(**arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_split_tokens_make_a_sequence_independent_of_its_batch(softcap: float | None, device: str) -> None:
    case = AttentionCase(lengths=(700, 33, 700, 256), dtype=torch.bfloat16, softcap=softcap)
    arguments = case.arguments(device)
    arguments.pop("num_new")
    together = decode_attention(**arguments, split_tokens=128)
    for b in range(len(case.lengths)):
        one = {name: arguments[name][b : b + 1] for name in ("query", "keys", "values", "lengths")}
        alone = decode_attention(**one, softcap=softcap, split_tokens=128)
        assert torch.equal(alone[0], together[b])


def test_empty_batch() -> None:
    query, keys = torch.empty(0, 4, 1, 16), torch.empty(0, 2, 8, 16)
    lengths = torch.empty(0, dtype=torch.int64)
    assert decode_attention(query, keys, keys, lengths).shape == (0, 4, 1, 16)
    assert prefill_attention(query, keys, keys, lengths).shape == (0, 4, 1, 16)


def test_reference_is_softmax_attention() -> None:
    query, keys, values = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    out = decode_reference.decode_attention(query, keys, values, torch.tensor([5, 5]))
    repeated = (rows.repeat_interleave(3, 1) for rows in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True)
    torch.testing.assert_close(out, expected)
