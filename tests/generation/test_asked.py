"""What a call of generate() asks for is known again when it is the very same, and only then."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import model_of
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import WatermarkingConfig

import torch_vtensor

pytestmark = pytest.mark.parametrize("memory", ["token-major"], indirect=True)


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """How often transformers has worked out the settings of a call."""
    calls: list[None] = []
    stock = GenerationMixin._prepare_generation_config

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return stock(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_prepare_generation_config", counted)
    with torch_vtensor.enabled(compile=True):
        yield calls


def settings(model: Any, given: GenerationConfig | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config, left = model._prepare_generation_config(given, **kwargs)
    told = config.to_dict()
    config.eos_token_id = config.max_new_tokens = -1  # it is the caller's
    if isinstance(config.suppress_tokens, list):
        config.suppress_tokens.append(-1)
    left["max_new_tokens"] = -1
    return told, left


def fresh(model: Any) -> Any:
    """The same for someone who has never been asked."""
    return copy.deepcopy(model)


def test_the_same_again(worked_out: list[None]) -> None:
    model, mask = copy.deepcopy(model_of("llama")), torch.ones(1, 3)
    model.generation_config.suppress_tokens = [3]
    asked: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 3, "do_sample": True, "top_k": 4},
        {"given": GenerationConfig(max_new_tokens=7, suppress_tokens=[4]), "output_attentions": True},
        {"attention_mask": mask, "logits_to_keep": 1},
        {"eos_token_id": [1, 2], "bad_words_ids": None},
        {"watermarking_config": WatermarkingConfig(bias=1.5)},
    ]
    for kwargs in asked:
        first = settings(model, **kwargs)
        num_worked_out = len(worked_out)
        for _ in range(2):
            again = settings(model, **kwargs)
            assert again == first
            assert again[1].get("attention_mask") is kwargs.get("attention_mask")
        is_known = "watermarking_config" not in kwargs  # an object that is put into the config
        assert (len(worked_out) == num_worked_out) == is_known
        assert first == settings(fresh(model), **kwargs)
    other = torch.ones(1, 4)
    num_worked_out = len(worked_out)
    assert settings(model, attention_mask=mask)[1]["attention_mask"] is mask
    assert settings(model, attention_mask=other)[1]["attention_mask"] is other
    assert len(worked_out) == num_worked_out + 1


def test_whatever_changes_is_seen(worked_out: list[None]) -> None:
    model, given = copy.deepcopy(model_of("llama")), GenerationConfig(max_new_tokens=7, suppress_tokens=[4])
    model.generation_config.suppress_tokens = [3]
    model.generation_config.sequence_bias = {(1, 2): 0.5}

    def change(what: Any, name: str, value: Any) -> None:
        setattr(what, name, value)

    changes = [
        lambda: change(given, "max_new_tokens", 8),
        lambda: change(given, "top_k", 5),
        lambda: given.suppress_tokens.append(5),
        lambda: change(model.generation_config, "temperature", 0.5),
        lambda: model.generation_config.suppress_tokens.append(6),
        lambda: model.generation_config.sequence_bias.update({(1, 2): 1.5}),
        lambda: change(model, "generation_config", GenerationConfig(top_p=0.5)),
        lambda: change(model.generation_config, "eos_token_id", torch.tensor([1, 2])),  # nothing to compare
        lambda: change(model.config, "anything", 5),
    ]
    for make_change in changes:
        for kwargs in ({"given": given}, {"do_sample": True}):
            settings(model, **kwargs)
        make_change()
        for kwargs in ({"given": given}, {"do_sample": True}):
            now, then = settings(model, **kwargs), settings(fresh(model), **kwargs)
            assert repr(now) == repr(then)
    for kwargs in ({"top_k": 1}, {"top_k": True}, {"top_k": 1.0}):
        assert repr(settings(model, **kwargs)) == repr(settings(fresh(model), **kwargs))


def test_what_is_refused_is_refused_again(worked_out: list[None]) -> None:
    model = copy.deepcopy(model_of("llama"))
    settings(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="max_new_tokens"):
            settings(model, max_new_tokens=-1)
    model.config.temperature = 0.5  # not where generate() looks for it
    for _ in range(2):
        num_worked_out = len(worked_out)
        try:
            settings(model)
        except ValueError:  # by most versions
            assert len(worked_out) == num_worked_out + 1


def test_a_config_that_holds_more_than_settings_is_not_copied(worked_out: list[None]) -> None:
    """A lock cannot be, and weights are not to be."""
    model = copy.deepcopy(model_of("llama"))
    model.config.lock, model.config.module = threading.Lock(), torch.nn.Linear(2, 2)
    model.config.module.__deepcopy__ = None  # would raise
    prompt = torch.arange(5)[None] + 3
    with torch_vtensor.Session(model) as session:
        session.generate(prompt[0], max_new_tokens=2, do_sample=False)
        session.generate(prompt[0], max_new_tokens=2, do_sample=False)
    for _ in range(2):
        before = len(worked_out)
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        assert len(worked_out) > before
