"""generate() says the same, bit by bit, with growable memory as with DynamicCache: 17 families, all ways to decode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from paged_memory import Memory
from tiny_models import (
    ENCODER_DECODER,
    FAMILIES,
    OWN_CACHE,
    SLIDING,
    STATEFUL,
    VERSION,
    Inputs,
    assistant_of,
    model_of,
)
from transformers import DynamicCache, EncoderDecoderCache

import torch_vtensor

ANSWER_TOKENS = 32
THIS = f"transformers {transformers.__version__}"
FULL_ATTENTION = ("llama", "mixtral", "deepseek_v3", "gpt2")

Outputs = list[torch.Tensor]
MakeCache = Callable[[Any], Any]


def generate(model: Any, inputs: Inputs, cache: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    if cache is not None:
        options["past_key_values"] = cache
    return model.generate(
        **inputs,
        max_new_tokens=ANSWER_TOKENS,
        suppress_tokens=[2],  # the end of a sequence
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def plain(batch: int = 2, **options: Any) -> Callable[[str, MakeCache], Outputs]:
    """A way of decoding that is a matter of options to generate()."""

    def run(family: str, make_cache: MakeCache) -> Outputs:
        model = model_of(family)
        out = generate(model, FAMILIES[family].inputs(batch), make_cache(model), **options)
        return [out.sequences, *out.scores]

    return run


def assisted(family: str, make_cache: MakeCache) -> Outputs:
    return plain(1, assistant_model=assistant_of(family))(family, make_cache)


def left_padded(family: str, make_cache: MakeCache) -> Outputs:
    model, inputs = model_of(family), FAMILIES[family].inputs(3)
    for row, padding in ((0, 2), (2, 5)):  # before the image, where there is one
        inputs["input_ids"][row, :padding] = 0
        inputs["attention_mask"][row, :padding] = 0
    out = generate(model, inputs, make_cache(model))
    return [out.sequences, *out.scores]


def continued(family: str, make_cache: MakeCache) -> Outputs:
    """Three turns of one conversation, the cache handed on."""
    model, inputs = model_of(family), FAMILIES[family].inputs(2)
    out = generate(model, inputs, make_cache(model))
    outputs = [out.sequences, *out.scores]
    for turn in range(2):
        question = torch.full((2, 7 + turn), 5 + turn)
        ids = torch.cat([out.sequences, question], 1)
        if family in ENCODER_DECODER:
            more = inputs | {"decoder_input_ids": ids}
        else:
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = generate(model, more, out.past_key_values)
        outputs += [out.sequences, *out.scores]
    return outputs


def rearranged(family: str, make_cache: MakeCache) -> Outputs:
    """What contrastive and tree search do: try several next tokens on copies of the slots, keep some, go back."""
    model, inputs = model_of(family), FAMILIES[family].inputs(2)
    cache = make_cache(model) or DynamicCache(config=model.config)
    outputs = []

    def step(ids: torch.Tensor) -> None:
        mask = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.long)
        outputs.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)

    with torch.no_grad():
        step(inputs["input_ids"])
        cache.batch_repeat_interleave(3)
        step(torch.arange(12).reshape(6, 2) + 3)
        cache.batch_select_indices(torch.tensor([1, 5]))
        step(torch.full((2, 4), 11))
        cache.crop(-3)
        step(torch.full((2, 1), 12))
        cache.batch_repeat_interleave(2)
        for beams in ([0, 0, 2, 3], [3, 1, 0, 2], [1, 0, 3, 2], [0, 1, 2, 3], [1, 1, 1, 1]):
            cache.reorder_cache(torch.tensor(beams))
            step(torch.tensor([[20], [21], [22], [23]]))
        cache.crop(-20)
        step(torch.full((4, 3), 13))
    return outputs


MODES: dict[str, Callable[[str, MakeCache], Outputs]] = {
    "greedy": plain(),
    "sampling": plain(do_sample=True),
    "several-samples": plain(do_sample=True, num_return_sequences=3),
    "beams": plain(num_beams=4),
    "several-beams": plain(num_beams=4, num_return_sequences=3),
    "beam-sampling": plain(num_beams=3, do_sample=True),
    "lookup": plain(1, prompt_lookup_num_tokens=3),
    "assisted": assisted,
    "chunked-prefill": plain(prefill_chunk_size=50),
    "left-padded": left_padded,
    "continued": continued,
    "rearranged": rearranged,
}
ALWAYS = ("greedy", "beams", "lookup")
DIAGONAL = {
    "llama": "rearranged",
    "mistral-short-window": "chunked-prefill",
    "mistral-long-window": "continued",
    "gemma3": "assisted",
    "gemma3n": "left-padded",
    "gpt_oss": "beam-sampling",
    "mixtral": "several-samples",
    "deepseek_v3": "assisted",
    "qwen3_next": "continued",
    "falcon_h1": "sampling",
    "gpt2": "chunked-prefill",
    "t5": "several-beams",
    "bart": "continued",
    "whisper": "sampling",
    "mamba": "left-padded",
    "lfm2": "chunked-prefill",
    "llava": "left-padded",
    "qwen2_vl": "continued",
}
"""Of the other modes one for each family, and each for some family: what there is time for at every change."""
assert (DIAGONAL.keys(), {*DIAGONAL.values(), *ALWAYS}) == (FAMILIES.keys(), MODES.keys())


def is_meant(family: str, mode: str) -> bool:
    """Whether this way of decoding means anything for this family."""
    if mode == "left-padded":
        return family != "whisper"  # its prompt is sound
    if mode == "continued":
        return family not in ("whisper", "mamba")  # one answers recordings, the other takes no past_key_values
    if mode == "rearranged":
        return family in FULL_ATTENTION  # a window or a state cannot be cropped at will
    return not is_refused(family, mode)


def is_refused(family: str, mode: str) -> bool:
    """Whether transformers refuses this way of decoding for this family."""
    if mode in ("lookup", "assisted"):
        return family in STATEFUL  # nothing can be guessed ahead where states cannot be cropped
    return mode == "chunked-prefill" and family in ("mamba", "whisper")


def lacks(family: str, mode: str) -> bool:
    """Whether this version of transformers cannot do it."""
    if mode in ("lookup", "assisted") and family in SLIDING:  # by masks that do not fit its cropped windows
        return VERSION == (5, 0) or (mode == "assisted" and (5, 1) <= VERSION < (5, 23))
    if mode == "chunked-prefill":
        if family == "qwen2_vl" and VERSION > (5, 0):
            return VERSION < (5, 23)
        return VERSION == (5, 0) or family in OWN_CACHE or (family in ENCODER_DECODER and VERSION < (5, 1))
    if mode == "continued":
        return family == "lfm2" and VERSION == (5, 0)
    return "beam" in mode and family == "lfm2" and VERSION < (5, 0)


def cases(*modes: str, explicit: bool = False) -> list[Any]:
    """Every family in the modes that mean something for it, with a reason to skip where transformers cannot."""
    params = []
    for family in FAMILIES:
        for mode in modes:
            if is_meant(family, mode) and not (explicit and family == "mamba"):
                marks = skips(family, mode)
                if explicit and family in OWN_CACHE:
                    marks = [pytest.mark.skip(reason=f"{THIS} gives {family} a cache of its own")]
                elif explicit and mode in ("lookup", "assisted") and family in SLIDING and VERSION < (5, 1):
                    marks = [pytest.mark.skip(reason=f"{THIS} cannot crop a sliding window, it makes caches without")]
                elif not explicit and mode not in ALWAYS and DIAGONAL[family] != mode:
                    marks.append(pytest.mark.slow)
                params.append(pytest.param(family, mode, marks=marks, id=f"{family}-{mode}"))
    return params


def refused() -> list[Any]:
    """Every family in the modes that transformers refuses for it."""
    return [
        pytest.param(family, mode, marks=skips(family, mode), id=f"{family}-{mode}")
        for family in FAMILIES
        for mode in MODES
        if is_refused(family, mode)
    ]


def skips(family: str, mode: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skip(reason=f"{THIS} cannot: {family}, {mode}")] if lacks(family, mode) else []


@functools.cache
def expected(family: str, mode: str) -> Outputs:
    """What stock transformers says."""
    assert not torch_vtensor.is_enabled()
    return MODES[mode](family, lambda model: None)


def explicit(model: Any) -> Any:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(*(torch_vtensor.VTensorCache(config=config) for _ in range(2)))
    return torch_vtensor.VTensorCache(config=config)


def check(family: str, mode: str, make_cache: MakeCache, memory: Memory) -> None:
    memory.forget_appends()
    outputs = MODES[mode](family, make_cache)
    assert len(outputs) == len(expected(family, mode))
    # Before 5.1 some attention was a product of matrices, which sums in another order where rows lie apart.
    tolerance = 1e-4 if memory.layout == "token-major" and VERSION < (5, 1) else 0
    for ours, theirs in zip(outputs, expected(family, mode), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    appends = memory.appends
    if family in OWN_CACHE or family == "mamba":
        assert appends == {}
        return
    assert appends["zero-copy"] > 0
    unusual = appends.keys() - {"zero-copy", "reordered"}
    if family == "whisper":  # it cuts the caches that it returns into one for each recording, without no_grad()
        unusual -= {"stock: gradients are enabled (use torch.no_grad())"}
    if family == "falcon_h1" and make_cache is explicit:  # its layers call DynamicLayer's own reorder_cache
        unusual -= {"import"}
    elif "beams" in mode:
        assert appends["reordered"] > 0
    assert not unusual, appends
    if memory.layout == "token-major" or family not in SLIDING:
        assert memory.num_mapped > 0


@pytest.mark.parametrize(("family", "mode"), cases(*MODES))
def test_same_as_dynamic_cache(family: str, mode: str, memory: Memory) -> None:
    expected(family, mode)
    with torch_vtensor.enabled():
        check(family, mode, lambda model: None, memory)


@pytest.mark.parametrize(("family", "mode"), refused())
def test_what_transformers_refuses_stays_refused(family: str, mode: str) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        MODES[mode](family, lambda model: None)
    with torch_vtensor.enabled(), pytest.raises(theirs.type) as ours:
        MODES[mode](family, lambda model: None)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(("family", "mode"), cases("beams", explicit=True))
def test_explicit_cache_same_as_dynamic_cache(family: str, mode: str, memory: Memory) -> None:
    check(family, mode, explicit, memory)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), cases(*(mode for mode in MODES if mode != "beams"), explicit=True))
def test_explicit_cache_same_as_dynamic_cache_in_every_mode(family: str, mode: str, memory: Memory) -> None:
    check(family, mode, explicit, memory)
