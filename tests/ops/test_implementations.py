"""Which implementation an attention operator takes, that a forced one is taken or refused, and that each is right."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import AttentionCase

from torch_vtensor.ops import attention_choice, decode_attention, implementations, prefill_attention
from torch_vtensor.ops.attention_choice import MEASURED, NAMES, Case, choose, regime_of, why_not

H100 = torch.device("cuda", 0)
DECODE = Case("decode", H100, torch.bfloat16, 128, 128, 8, 32, 8, 1, 4096, True, False, ())
EXTEND = DECODE._replace(op="prefill", num_rows=64)
PREFILL = EXTEND._replace(num_rows=8192, num_tokens=8192)


@pytest.fixture(autouse=True)
def on_a_hopper_without_fa3(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("torch_vtensor.ops.attention_choice._why_not_here", lambda name, index: WHERE[name])


WHERE = {"gluon": None, "cudnn": None, "flash": None, "fa3": "flash_attn_interface is not installed"}


@pytest.mark.parametrize(
    ("case", "chosen"),
    [
        (DECODE, "flash"),
        (DECODE._replace(num_tokens=65536), "triton"),
        (DECODE._replace(dim=64), "triton"),  # unlike the values
        (EXTEND, "gluon"),
        (EXTEND._replace(batch=1, num_rows=16), "triton"),
        (EXTEND._replace(options=("window", "sinks")), "gluon"),
        (PREFILL._replace(batch=1), "gluon"),
        (PREFILL, "gluon"),
        (PREFILL._replace(is_aligned=False), "cudnn"),
        (PREFILL._replace(options=("softcap",)), "triton"),
    ],
)
def test_who_is_chosen(case: Case, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(case) == chosen
    monkeypatch.setitem(WHERE, "fa3", None)
    assert choose(case) == ("fa3" if case.num_rows > 1 and not case.options else chosen)
    if chosen == "gluon":
        monkeypatch.setitem(WHERE, "gluon", "another Triton")
        monkeypatch.setitem(WHERE, "fa3", "not installed")
        assert choose(case) == ("cudnn" if case is PREFILL else "triton")


def test_regimes_order_who_they_measured() -> None:
    for regime in MEASURED:
        rows, tokens = regime.example
        assert regime_of(DECODE._replace(num_rows=rows, num_tokens=tokens)) is regime
        assert set(regime.order) <= regime.ratios.keys() < set(NAMES)
        times = [regime.ratios[name] for name in regime.order]
        assert times == sorted(times)
        assert regime.order[-1] == "triton"


def test_work_is_counted() -> None:
    assert DECODE.nbytes == 8 * 8 * 4096 * 2 * 128 * 2
    assert DECODE._replace(num_rows=3, num_tokens=5).flops == 4 * 8 * 32 * 128 * (3 + 4 + 5)
    assert DECODE._replace(num_rows=3, num_tokens=5, causal=False).flops == 4 * 8 * 32 * 128 * 15
    assert DECODE._replace(num_rows=33).num_blocks == 8 * 8 * 2


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("cudnn", DECODE._replace(has_counts=True), "on the device"),
        ("flash", PREFILL._replace(options=("window", "sinks")), "window, sinks asked for"),
        ("flash", DECODE._replace(dtype=torch.float32), "torch.float32 is not of 16 bits"),
        ("cudnn", PREFILL._replace(value_dim=64), "head dims 128 and 64"),
        ("cudnn", PREFILL._replace(dim=256, value_dim=256), "up to 128"),
        ("flash", PREFILL._replace(num_rows=9000), "some rows see nothing"),
        ("cudnn", EXTEND, "aligns them with the first token"),
        ("flash", DECODE._replace(batch=0), "nothing to do"),
        ("fa3", DECODE, "flash_attn_interface is not installed"),
        ("gluon", DECODE, "made for prefill_attention"),
        ("gluon", PREFILL._replace(dtype=torch.float32), "torch.float32 is not of 16 bits"),
        ("gluon", PREFILL._replace(value_dim=64), "head dims 128 and 64; both must be 64, or both 128"),
        ("gluon", PREFILL._replace(is_aligned=False), "not aligned to 16 bytes"),
        ("gluon", PREFILL._replace(options=("window", "softcap")), "softcap asked for"),
        ("gluon", PREFILL._replace(num_tokens=0), "nothing to do"),
        ("triton", DECODE._replace(dtype=torch.float64), "no float64"),
        ("cpu", DECODE, "the tensors are on cuda"),
    ],
)
def test_who_cannot_is_not_chosen_and_refused_if_forced(name: str, case: Case, reason: str) -> None:
    assert reason in str(why_not(name, case))
    assert choose(case) != name or name == "triton"
    with pytest.raises(ValueError, match=f"implementation '{name}' was asked for and cannot do this call of {case.op}"):
        choose(case, name)


def test_calls_with_numbers_on_the_device_are_our_kernels() -> None:
    for case, chosen in ((DECODE, "triton"), (EXTEND, "gluon"), (PREFILL, "gluon")):
        assert choose(case._replace(has_counts=True)) == chosen
        assert choose(case._replace(device=torch.device("cpu"))) == "cpu"


@pytest.mark.parametrize(
    ("change", "is_aligned"),
    [
        (lambda rows: rows, True),
        (lambda rows: rows.transpose(1, 2).contiguous().transpose(1, 2), True),
        (lambda rows: rows[:1].expand(2, -1, -1, -1), True),
        (lambda rows: rows[:, :1].expand(-1, 2, -1, -1), False),
        (lambda rows: rows.flatten()[4:-12].as_strided((2, 2, 8, 16), rows.stride()), False),
        (lambda rows: rows.flatten().as_strided((2, 2, 8, 12), (200, 100, 12, 1)), False),
    ],
    ids=["heads", "tokens", "one_for_all_slots", "one_for_all_heads", "offset", "odd_rows"],
)
def test_which_rows_are_aligned(change: Any, is_aligned: bool) -> None:
    rows = change(torch.zeros(2, 2, 9, 16, dtype=torch.bfloat16))
    query = torch.zeros(2, 4, 3, rows.shape[3], dtype=torch.bfloat16)
    assert Case.of("prefill", query, rows, rows).is_aligned == is_aligned


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((9, 0), "3.6.0", None),
        ((9, 0), "3.7.1", "Triton 3.7.1 is installed, and it was tried with 3.6 alone"),
        ((10, 0), "3.6.0", "the device has compute capability (10, 0), not 9.x"),
    ],
)
def test_gluon_is_for_the_chip_and_the_triton_that_it_ran_with(
    capability: tuple[int, int], triton: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # what the other tests say of the machine
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    attention_choice._why_not_here.cache_clear()
    try:
        assert why_not("gluon", PREFILL) == reason
    finally:
        attention_choice._why_not_here.cache_clear()


def cpu_arguments(num_rows: int) -> dict[str, Any]:
    arguments = AttentionCase(lengths=(9, 9), num_rows=num_rows).arguments()
    return {name: arguments[name] for name in ("query", "keys", "values")}


@pytest.mark.parametrize(
    ("op", "attend", "num_rows"), [("decode", decode_attention, 1), ("prefill", prefill_attention, 9)]
)
def test_a_forced_implementation_is_taken_or_refused(op: str, attend: Any, num_rows: int) -> None:
    arguments = cpu_arguments(num_rows)
    torch.testing.assert_close(attend(**arguments, implementation="cpu"), attend(**arguments), rtol=0, atol=0)
    for name in ("triton", "flash"):
        with pytest.raises(ValueError, match=rf"'{name}' was asked for .* {op}_attention: the tensors are on cpu"):
            attend(**arguments, implementation=name)
    with pytest.raises(ValueError, match="implementation is 'fastest'; it is one of 'triton', 'gluon'"):
        attend(**arguments, implementation="fastest")


def test_the_table_prints() -> None:
    table = implementations("decode", **cpu_arguments(1))
    assert [entry.name for entry in table if entry.is_chosen] == ["cpu"]
    assert str(table).count("\n") == len(NAMES)
    with pytest.raises(ValueError, match="op is 'append'"):
        implementations("append", **cpu_arguments(1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_lengths_are_full_lengths(device: str) -> None:
    for num_rows in (1, 5, 9):
        case = AttentionCase(lengths=(9, 9), num_rows=num_rows, has_sinks=True, first=(0, 2))
        arguments = case.arguments(device) | {"lengths": None}
        case.check(prefill_attention(**arguments))
        arguments.pop("num_new")
        case.check(decode_attention(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["head_major", "interleaved"])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=(700, 700), heads=2, group=4, dims=(128, 128), dtype=torch.bfloat16),
        AttentionCase(lengths=(300,), heads=2, group=4, num_rows=40, dims=(128, 128), dtype=torch.bfloat16),
        AttentionCase(lengths=(300, 300), heads=2, group=4, num_rows=300, dims=(64, 64), dtype=torch.float16),
        AttentionCase(lengths=(200,), heads=2, group=3, num_rows=70, causal=False, dtype=torch.bfloat16, scale=0.3),
    ],
    ids=["decode", "extend", "prefill", "bidirectional"],
)
def test_every_implementation_is_right(case: AttentionCase, layout: str) -> None:
    case = dataclasses.replace(case, layout=layout)
    arguments = case.arguments("cuda") | {"lengths": None}
    arguments.pop("num_new")
    attend: Any = prefill_attention
    if case.num_rows == 1:
        attend, op = decode_attention, "decode"
    else:
        op = "prefill"
        arguments["causal"] = case.causal
    options = {name: arguments[name] for name in ("query", "keys", "values", "causal") if name in arguments}
    tried = 0
    for entry in implementations(op, **options):
        if entry.why_not is None:
            out = attend(**arguments, implementation=entry.name)
            case.check(out)
            assert out.transpose(1, 2).is_contiguous()
            tried += 1
    assert tried >= 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", ["head_major", "interleaved"])
@pytest.mark.parametrize(("num_rows", "first"), [(1, None), (2, (3, 3, 0, 3, 0))])
def test_a_shared_prefix_gives_what_every_slot_by_itself_gives(
    num_rows: int, first: tuple[int, ...] | None, layout: str, device: str
) -> None:
    case = AttentionCase(
        lengths=(700, 950, 40, 701, 640), heads=2, group=4, num_rows=num_rows, dims=(128, 128), first=first,
        dtype=torch.bfloat16, layout=layout, has_sinks=True,
    )  # fmt: skip
    arguments = case.arguments(device)
    arguments.pop("num_new")
    for rows in (arguments["keys"], arguments["values"]):
        for slot, leader, shared in ((1, 0, 690), (3, 0, 690), (4, 2, 33)):
            rows[slot, :, :shared] = rows[leader, :, :shared].clone()
    groups = torch.tensor([[0, 1, 3], [2, 4, -1]], dtype=torch.int32, device=device)
    num_shared = torch.tensor([690, 690, 33, 690, 33], dtype=torch.int32, device=device)
    if first is not None:
        arguments["first"][4] = 0
    alone = decode_attention(**arguments)
    out = decode_attention(**arguments, groups=groups, num_shared=num_shared)
    torch.testing.assert_close(out, alone, rtol=2e-2, atol=2e-2)


def test_groups_that_do_not_fit_are_named() -> None:
    arguments = cpu_arguments(1)
    groups, num_shared = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="belong together"):
        decode_attention(**arguments, groups=groups)
    with pytest.raises(ValueError, match=r"groups have shape \[1, 2\], torch.int64"):
        decode_attention(**arguments, groups=groups.long(), num_shared=num_shared)
    with pytest.raises(ValueError, match=r"num_shared have shape \[1\]"):
        decode_attention(**arguments, groups=groups, num_shared=num_shared[:1])
