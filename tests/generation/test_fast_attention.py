"""attention="fast": the same answers as transformers' own attention, by our operators wherever they can."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from paged_memory import PAGE_BYTES, Memory
from test_families import MODES, cases, expected
from tiny_models import FAMILIES, SHORT_WINDOW, SLIDING, VERSION, model_of, prompt, sizes
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import torch_vtensor
from torch_vtensor import ops
from torch_vtensor.allocator import pools
from torch_vtensor.generation import attention, kv_store, shared_reads
from torch_vtensor.generation.attention_masks import VisibleTokens, describing

HAS_INTERFACE = hasattr(AttentionInterface, "get_interface")
EAGER_ONLY = ("gpt_oss", "gemma2")
"""Their class has no sdpa; before 5.1 transformers does not let anyone else attend for them."""
STOCK_REASONS = {
    "t5": {"stock: an argument of the model's own (position_bias)"},
}
"""What keeps calls of a family stock, where it is not its prompt's mask."""
ODD_MASK = "stock: a mask that is more than padding, a window or packed sequences"
"""Of what 5.1 to 5.22 say once a window was cropped, and assisted decoding of tokens that also mean padding."""


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """One layout is enough here."""
    monkeypatch.setenv("TORCH_VTENSOR_PAGE_BYTES", str(PAGE_BYTES))
    monkeypatch.setattr(pools, "_schedulers", {})
    attention.counters.clear()
    yield Memory("strips")
    torch_vtensor.disable()


def registries() -> list[Any]:
    return [
        AttentionInterface.__dict__.get("get_interface"),
        *AttentionInterface._global_mapping.values(),
        *AttentionMaskInterface._global_mapping.values(),
    ]


def test_disable_puts_the_very_functions_back() -> None:
    stock = registries()
    torch_vtensor.enable(attention="fast")
    torch_vtensor.enable(attention="fast")
    assert sum(ours is not theirs for ours, theirs in zip(registries(), stock, strict=True)) == (
        4 if HAS_INTERFACE else 2
    )
    torch_vtensor.disable()
    assert all(now is before for now, before in zip(registries(), stock, strict=True))
    with torch_vtensor.enabled():
        assert all(now is before for now, before in zip(registries(), stock, strict=True)), "it is not the default"
        with torch_vtensor.enabled(attention="fast"), torch_vtensor.enabled():
            assert registries() != stock
        assert all(now is before for now, before in zip(registries(), stock, strict=True))
    torch_vtensor.enable(attention="fast")
    torch_vtensor.enable()
    assert all(now is before for now, before in zip(registries(), stock, strict=True))


def test_other_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'faster'; it is 'fast', or None"):
        torch_vtensor.enable(attention="faster")
    with pytest.raises(ValueError, match="attention is 'faster'"), torch_vtensor.enabled(attention="faster"):
        pass
    assert not torch_vtensor.is_enabled()


def check_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """The same tokens, and scores within what another order of sums explains."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        if our.is_floating_point():
            torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(our, their)


def check_family(family: str, mode: str) -> None:
    stock = expected(family, mode)
    attention.counters.clear()
    with torch_vtensor.enabled(attention="fast"):
        check_same(MODES[mode](family, lambda model: None), stock)
    counted = torch_vtensor.stats().attention
    reasons = {reason for reason in counted if reason != "fast"}
    if family in ("t5", "mamba") or (family in EAGER_ONLY and not HAS_INTERFACE):
        assert "fast" not in counted
        return
    assert counted["fast"] > 0
    allowed = STOCK_REASONS.get(family, set())
    is_cropped = mode == "lookup" and family in SLIDING and (5, 1) <= VERSION < (5, 23)
    if is_cropped or (mode == "assisted" and family == "qwen2_vl"):
        allowed = allowed | {ODD_MASK}
    assert reasons <= allowed, counted


QUICK = [
    *((family, "greedy") for family in ("llama", "gemma3", "gpt_oss", "deepseek_v3", "gpt2", "t5", "bart", "llava")),
    *((family, "left-padded") for family in ("llama", "mistral-short-window", "gpt_oss")),
    ("mistral-short-window", "continued"),
    ("llama", "beams"),
]
OTHERS = [case for case in cases(*MODES) if case.values not in QUICK and "sampl" not in case.values[1]]


@pytest.mark.parametrize(("family", "mode"), QUICK)
def test_same_tokens(family: str, mode: str) -> None:
    check_family(family, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), OTHERS)
def test_same_tokens_in_every_mode(family: str, mode: str) -> None:
    check_family(family, mode)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["half", "whole"])
@pytest.mark.parametrize("family", ["llama", "mistral-short-window", "gemma3", "gpt_oss", "deepseek_v3", "bart"])
def test_same_tokens_on_cuda(family: str, layout: str) -> None:
    """In float32, whose sums leave no room for another token; half of the prompt of one sequence may be padding."""
    model = copy.deepcopy(model_of(family)).cuda()
    inputs = {name: tensor.cuda() for name, tensor in FAMILIES[family].inputs(2).items()}
    if layout == "half" and family != "bart":
        inputs["input_ids"][0, :65] = 0
        inputs["attention_mask"][0, :65] = 0
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_scores": True}
    outputs = []
    for fast in (None, "fast"):
        with torch_vtensor.enabled(attention=fast):
            out = model.generate(**inputs, **options)
        outputs.append([out.sequences, *out.scores])
    check_same(*outputs)
    assert attention.counters["fast"] > 0
    assert attention.counters.keys() == {"fast"}


@functools.cache
def gemma2() -> Any:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma2Config(
        **sizes(layer_types=kinds, sliding_window=SHORT_WINDOW), attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def logits_of(model: Any, fast: bool, **inputs: Any) -> torch.Tensor:
    attention.counters.clear()
    with torch.no_grad(), torch_vtensor.enabled(attention="fast" if fast else None):
        logits: torch.Tensor = model(**inputs).logits
    return logits


def check_logits(model: Any, **inputs: Any) -> dict[str, int]:
    """The logits with and without it are the same; what was counted with it."""
    stock = logits_of(model, False, **inputs)
    torch.testing.assert_close(logits_of(model, True, **inputs), stock, rtol=1e-3, atol=1e-3)
    return dict(attention.counters)


@pytest.mark.skipif(not HAS_INTERFACE, reason="this version looks no eager attention up")
def test_soft_cap() -> None:
    assert check_logits(gemma2(), **prompt(2)) == {"fast": 3}


@pytest.mark.skipif(not HAS_INTERFACE, reason="this version does not tell whether weights are collected")
def test_attention_weights_come_from_the_stock_function() -> None:
    stock = logits_of(gemma2(), False, **prompt(2))
    with torch.no_grad(), torch_vtensor.enabled(attention="fast"):
        out = gemma2()(**prompt(2), output_attentions=True)
    assert torch.equal(out.logits, stock)
    assert len(out.attentions) == 3
    assert out.attentions[0].shape == (2, 4, 130, 130)
    assert attention.counters == {"stock: attention weights are asked for": 3}


@pytest.mark.parametrize("family", ["llama", "mistral-short-window", "gpt_oss"])
def test_packed_sequences(family: str) -> None:
    positions = torch.cat([torch.arange(70), torch.arange(5), torch.arange(55)])[None].expand(2, -1).clone()
    positions[1] = torch.arange(130)
    counted = check_logits(model_of(family), input_ids=prompt(2)["input_ids"], position_ids=positions, use_cache=False)
    assert counted == ({"fast": 3} if family not in EAGER_ONLY or HAS_INTERFACE else {})


def mask_with_holes() -> torch.Tensor:
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, 40:50] = 0
    return mask


def right_padding() -> torch.Tensor:
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, 100:] = 0
    return mask


def custom_mask() -> torch.Tensor:
    mask = torch.ones(130, 130, dtype=torch.bool).tril()
    mask[100:, 3] = False
    return mask.expand(2, 1, -1, -1)


@pytest.mark.parametrize("make", [mask_with_holes, right_padding, custom_mask])
def test_other_masks_take_the_stock_function(make: Callable[[], torch.Tensor]) -> None:
    ids = prompt(2)["input_ids"]
    counted = check_logits(model_of("llama"), input_ids=ids, attention_mask=make())
    assert counted == {"stock: a mask that is more than padding, a window or packed sequences": 3}


def test_training_takes_the_stock_function() -> None:
    model = model_of("llama")
    ids = prompt(2)["input_ids"]
    losses = []
    for fast in (None, "fast"):
        with torch_vtensor.enabled(attention=fast):
            losses.append(model(input_ids=ids, labels=ids).loss)
    assert torch.equal(*losses)
    assert losses[1].requires_grad
    assert attention.counters == {"stock: gradients are enabled (use torch.no_grad())": 3}


def test_an_encoder_with_padding_on_the_right() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.2,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    ids, mask = prompt(2)["input_ids"], right_padding()
    stock, ours = (logits_of(model, fast, input_ids=ids, attention_mask=mask) for fast in (False, True))
    torch.testing.assert_close(ours[mask.bool()], stock[mask.bool()], rtol=1e-3, atol=1e-3)
    if HAS_INTERFACE:
        assert attention.counters == {"fast": 2}


def test_slots_in_the_same_pages_are_told_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose slots were multiplied is read once: groups hold as long as nobody writes into shared pages."""
    monkeypatch.setattr(kv_store, "TOKEN_MAJOR_DEVICES", {"cpu"})
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    told = []

    def decode_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        told.append((kwargs.get("groups"), kwargs.get("num_shared")))
        return ops.decode_attention(query, *args, **kwargs)

    monkeypatch.setattr(attention, "decode_attention", decode_attention)
    model, ids = model_of("llama"), prompt(2)["input_ids"]

    def step(cache: Any, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache).logits[:, -1]
        return logits

    with torch.no_grad():
        answers = []
        for fast in (None, "fast"):
            with torch_vtensor.enabled(attention=fast):
                cache = transformers.DynamicCache(config=model.config)
                step(cache, ids)
                cache.batch_repeat_interleave(3)
                answers.append([step(cache, torch.arange(6)[:, None] + token) for token in (3, 20)])
                cache.crop(-92)  # to 40 tokens
                answers[-1].append(step(cache, torch.arange(6)[:, None] + 30))
                del cache
        check_same(*answers)
    groups, num_shared = told[0]
    assert groups.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(set(num_shared.tolist())) == 1
    assert 40 < num_shared[0] <= 130
    assert told[3][0] is groups, "one table serves all layers and steps"
    written_apart = told[2 * len(model.model.layers) :]
    assert all(shared is None or shared.max() <= 40 for _, shared in written_apart), "it is shared no longer"


def test_explain_says_who_attends() -> None:
    model = model_of("llama")
    assert {line.attention for line in torch_vtensor.explain(model)} == {"stock"}
    with torch_vtensor.enabled(attention="fast"):
        assert {line.attention for line in torch_vtensor.explain(model)} == {"fast"}
        assert {line.attention for line in torch_vtensor.explain(model.config)} == {"fast"}
        model.config._attn_implementation = "flex_attention"
        try:
            lines = torch_vtensor.explain(model)
        finally:
            model.config._attn_implementation = "sdpa"
        assert "attention stock: attn_implementation is 'flex_attention'" in str(lines)


@pytest.mark.slow
def test_compiled_models_keep_the_stock_function() -> None:
    model = model_of("llama")
    ids = prompt(1, 8)["input_ids"]
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    with torch.no_grad(), torch_vtensor.enabled(attention="fast"):
        out = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(out, logits_of(model, False, input_ids=ids), rtol=1e-3, atol=1e-3)
    assert "fast" not in attention.counters


# Masks by themselves


def arguments_of(function: Any, rows: int, tokens: int, offset: int, padding: torch.Tensor | None) -> dict[str, Any]:
    arguments = {
        "batch_size": 2, "kv_length": tokens, "kv_offset": offset, "mask_function": function,
        "attention_mask": padding, "allow_is_causal_skip": False, "dtype": torch.float32, "config": None,
    }  # fmt: skip
    first = offset + tokens - rows
    if HAS_INTERFACE and "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters:
        return arguments | {"q_length": rows, "q_offset": first, "device": "cpu"}
    return arguments | {"cache_position": torch.arange(first, offset + tokens)}


def said(mask: VisibleTokens) -> torch.Tensor:
    """The tensor that a mask's pattern stands for, by what the operators' documentation says."""
    pattern, (batch, _, rows, tokens) = mask.pattern, mask.shape
    assert pattern is not None
    token = torch.arange(tokens)
    position = (tokens - rows + torch.arange(rows))[:, None]
    visible = torch.ones(batch, rows, tokens, dtype=torch.bool)
    if pattern.causal:
        visible &= token <= position
    if pattern.window is not None:
        visible &= token > position - pattern.window
    if pattern.first is not None and pattern.stop is not None:
        visible &= (token >= pattern.first[:, None, None]) & (token < pattern.stop[:, None, None])
    if pattern.segments is not None:
        ids = torch.tensor([[i for i, (a, b) in enumerate(row) for _ in range(a, b)] for row in pattern.segments])
        visible &= ids[:, :, None] == ids[:, None, :]
    return visible[:, None]


@given(st.data())
def test_a_mask_says_what_it_looks_like(data: st.DataObject) -> None:
    tokens, offset = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 5))
    kind = data.draw(st.sampled_from(["causal", "window", "bidirectional", "packed", "chunked"]))
    rows = tokens if kind == "packed" else data.draw(st.integers(1, tokens))
    offset = 0 if kind == "packed" else offset
    padding = None
    if kind != "packed" and data.draw(st.booleans()):
        bits = st.lists(st.booleans(), min_size=tokens + offset, max_size=tokens + offset)
        runs = st.tuples(st.integers(0, tokens), st.integers(0, tokens)).map(
            lambda cut: [cut[0] <= i < tokens + offset - cut[1] for i in range(tokens + offset)]
        )
        padding = torch.tensor([data.draw(runs | bits) for _ in range(2)])
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", masking_utils.causal_mask_function)
    function = {
        "causal": lambda: masking_utils.causal_mask_function,
        "window": lambda: masking_utils.sliding_window_causal_mask_function(data.draw(st.integers(1, 12))),
        "bidirectional": lambda: bidirectional,
        "packed": lambda: masking_utils.and_masks(
            masking_utils.causal_mask_function,
            masking_utils.packed_sequence_mask_function(
                torch.tensor([data.draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens)) for _ in "ab"])
                .cumsum(1)
            ),
        ),
        "chunked": lambda: masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int)),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for stock, is_eager in ((masking_utils.sdpa_mask, False), (masking_utils.eager_mask, True)):
            arguments = arguments_of(function, rows, tokens, offset, padding)
            mask = describing(stock, is_eager)(**arguments)
            if not isinstance(mask, VisibleTokens):
                holes = padding is not None and kind != "packed"
                assert kind == "chunked" or holes, "nothing but a mask with holes has to be filled at once"
                continue
            theirs = stock(**arguments).expand(mask.shape)
            seen = theirs if not is_eager else theirs == 0
            # Rows of padding see nothing here and, in one window, other padding there: nobody reads them.
            real = said(mask).any(3, keepdim=True)
            assert torch.equal(said(mask) & real, seen & real)
            assert torch.equal(mask + 0, theirs + 0), "whoever looks in finds transformers' own mask"
            assert torch.equal(mask[:, :, -1], theirs[:, :, -1])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda mask: mask.masked_fill_(torch.tensor([True, False, False]), False),
    "an operator": lambda mask: operator.iand(mask, torch.tensor([False, True, True])),
    "a slice": lambda mask: operator.setitem(mask, (..., slice(None, 1)), False),
    "a view": lambda mask: mask[:, :, :, 0].logical_and_(torch.tensor(False)),
    "a view of a view": lambda mask: mask.transpose(2, 3)[..., 0, :].zero_(),
    "parts": lambda mask: mask.unbind(-1)[0].fill_(False),
    "an attribute": lambda mask: mask.mT[..., 0, :].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_padded", [True, False])
def test_a_changed_mask_is_no_longer_described(change: str, mode: Callable[[], Any], is_padded: bool) -> None:
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]]) if is_padded else None
    with mode():
        arguments = arguments_of(masking_utils.causal_mask_function, 3, 3, 0, padding)
        mask = describing(masking_utils.sdpa_mask, False)(**arguments)
        assert isinstance(mask, VisibleTokens)
        assert mask[..., 0].any()
        assert mask.pattern is not None, "looking in changes nothing"
        if change == "a view" and mask.filled.stride(0) == 0:
            with pytest.raises(RuntimeError, match="single memory location"):
                CHANGES[change](mask)  # as on transformers' own, which sequences share
            return
        CHANGES[change](mask)
        assert mask.pattern is None
        assert not mask.as_stock()[..., 0].any()
        assert not mask[..., 0].any()
        assert mask[..., 1].any()


def test_a_mask_that_a_model_changes_in_part_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was when it is handed to a layer, whatever the layers before have learned of it."""
    model, inputs = copy.deepcopy(model_of("llama")), prompt(2, 20)
    inputs["attention_mask"][0, :3] = 0
    for layer in model.model.layers[1:]:

        def forward(*args: Any, stock: Any = layer.forward, **kwargs: Any) -> Any:
            kwargs["attention_mask"][..., :6] = False
            return stock(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", forward)
    with torch.no_grad():
        theirs = model(**inputs).logits[:, 6:]
        with torch_vtensor.enabled(attention="fast"):
            ours = model(**inputs).logits[:, 6:]
    torch.testing.assert_close(ours, theirs)
