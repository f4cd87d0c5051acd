"""From logits to the next token on the device: transformers' own processors, where capturing them is sound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.generation import logits_process

__all__ = ["Sampling", "sampling_of"]

# They look at the scores alone, and at nothing that the host would have to know. (Those that make a
# torch.distributions.Categorical do: it checks its arguments there.)
_OF_SCORES = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
# They look at which tokens came before, not at where: a token may stand there twice.
_OF_TOKENS = ("RepetitionPenaltyLogitsProcessor",)
# They forbid the end until enough tokens are there.
_OF_LENGTH = ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor")


def _are_among(values: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
    """``torch.isin``, which for more than a few would sort and wait for the device."""
    return (values[:, None] == few).any(1)


class _EarliestEnd:
    """``MinLength`` and ``MinNewTokens`` with the length on the device."""

    def __init__(self, num_tokens: int, end_tokens: torch.Tensor) -> None:
        self.num_tokens = num_tokens
        self.end_tokens = end_tokens

    def __call__(self, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_end = _are_among(torch.arange(scores.shape[-1], device=scores.device), self.end_tokens)
        return torch.where(is_end & (length < self.num_tokens), -torch.inf, scores)


class _Suppressed:
    """``SuppressTokens``."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, tokens_so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_suppressed = _are_among(torch.arange(scores.shape[-1], device=scores.device), self.tokens)
        return torch.where(is_suppressed, -torch.inf, scores)


class Sampling:
    """How the next token is found.

    Args:
        steps: functions of (tokens so far, scores) or of (length, scores), in order.
        do_sample: draw from the softmax of the scores, or take the highest.
        end_tokens: tokens that end a sequence, or None; ``pad_token`` then follows them.
    """

    def __init__(
        self, steps: Sequence[Any], do_sample: bool, end_tokens: torch.Tensor | None, pad_token: torch.Tensor | None
    ) -> None:
        self.steps = steps
        self.do_sample = do_sample
        self.end_tokens = end_tokens
        self.pad_token = pad_token

        self.signature = _signature(steps, do_sample, end_tokens, pad_token)
        """Equal for two samplings that do the same; None where that cannot be told."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the tokens so far are looked at."""
        return any(type(step).__name__ in _OF_TOKENS for step in self.steps)

    @property
    def looks_at_scores_alone(self) -> bool:
        """Whether sequences' tokens and lengths do not matter."""
        return not self.needs_tokens and not any(isinstance(step, _EarliestEnd) for step in self.steps)

    def scores(self, logits: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after all processors; ``tokens`` [B, any], ``length`` a scalar: what the sequences have."""
        scores = logits
        for step in self.steps:
            scores = step(length if isinstance(step, _EarliestEnd) else tokens, scores)
        return scores

    def draw(self, scores: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The next tokens [B] of sequences that go on; random numbers come from the device's generator or this one."""
        if not self.do_sample:
            return _highest(scores)
        # What torch.multinomial does for one draw, without its check of the probabilities on the host.
        probabilities = torch.softmax(scores, dim=-1)
        return _highest(probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator))

    def choose(self, scores: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
        """The next tokens [B]; the padding token for sequences that are not open [B] any more."""
        tokens = self.draw(scores)
        return tokens if self.pad_token is None else torch.where(is_open, tokens, self.pad_token)

    def remains_open(self, tokens: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
        """Which sequences [B] go on after these tokens."""
        return is_open if self.end_tokens is None else is_open & ~_are_among(tokens, self.end_tokens)


def _highest(scores: torch.Tensor) -> torch.Tensor:
    """``scores.argmax(-1)`` [B] of scores [B, V], the first of equals, in two steps.

    torch's own gives a row to one multiprocessor, which for few rows leaves the others of a GPU idle.
    """
    size = scores.shape[-1]
    num_parts = next(number for number in range(min(256, size), 0, -1) if size % number == 0)
    values, places = scores.unflatten(-1, (num_parts, -1)).max(-1)
    part = values.argmax(-1, keepdim=True)
    highest: torch.Tensor = part * (size // num_parts) + places.gather(-1, part)
    return highest.squeeze(-1)


def _signature(steps: Sequence[Any], *others: Any) -> Any:
    try:
        return tuple((type(step), _plain(vars(step))) for step in steps), _plain(others)
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    """The value as something that can be compared and hashed."""
    if isinstance(value, torch.Tensor):
        # A few tokens; reading them waits for nothing that a call has launched yet.
        return value.dtype, tuple(value.flatten().tolist())
    if isinstance(value, dict):
        return tuple((name, _plain(value[name])) for name in sorted(value))
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be compared")


def sampling_of(
    processors: Iterable[Any],
    do_sample: bool,
    end_tokens: torch.Tensor | None,
    pad_token: torch.Tensor | None,
    device: torch.device,
) -> Sampling | str:
    """The same choice on the device, or why it cannot be made there."""
    steps: list[Any] = []
    for processor in processors:
        name = type(processor).__name__
        if type(processor) is not getattr(logits_process, name, None):
            return f"a logits processor of its own ({name})"
        if name in _OF_LENGTH:
            steps.append(_earliest_end(processor, device))
        elif name == "SuppressTokensLogitsProcessor":
            steps.append(_Suppressed(processor.suppress_tokens.to(device)))
        elif name in _OF_SCORES or (name in _OF_TOKENS and not getattr(processor, "prompt_ignore_length", None)):
            steps.append(processor)
        else:
            return f"{name} needs the host"
    on_device = [None if tokens is None else tokens.to(device) for tokens in (end_tokens, pad_token)]
    return Sampling(steps, do_sample, *on_device)


def _earliest_end(processor: Any, device: torch.device) -> _EarliestEnd:
    num_tokens = getattr(processor, "min_length", None)
    if num_tokens is None:
        num_tokens = processor.prompt_length_to_skip + processor.min_new_tokens
    return _EarliestEnd(num_tokens, processor.eos_token_id.to(device))
