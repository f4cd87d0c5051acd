"""How a serving manager's tokens are chosen: transformers' own processors, one choice for requests of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torch_vtensor.generation.decode.sampling import Sampling, sampling_of
from torch_vtensor.generation.serving._transformers_compat import per_request_processors

__all__ = ["Choice", "choice_of"]


class _Waiting(NamedTuple):
    """A request as transformers' processors ask for its numbers."""

    state: Any


class Choice:
    """The next token of each sequence, from logits.

    Args:
        steps: processors, in order; those of requests' own numbers among them.
        sampling: what the others of them say, and whether tokens are drawn.
    """

    def __init__(self, steps: Sequence[Any], sampling: Sampling) -> None:
        self._steps = steps
        self._sampling = sampling
        own = per_request_processors()
        self._own = [isinstance(step, own) for step in steps]
        kinds = tuple((type(step), tuple(sorted(vars(step).items()))) if is_own else None
                      for step, is_own in zip(steps, self._own, strict=True))  # fmt: skip
        self.signature = None if sampling.signature is None else (kinds, sampling.signature)
        """Equal for two that do the same; None where that cannot be told."""

    @property
    def num_arguments(self) -> int:
        """How many numbers each request brings."""
        return sum(self._own)

    def arguments_of(self, state: Any) -> list[int]:
        """A request's own numbers."""
        return [
            int(step.prepare_tensor_args([_Waiting(state)])[0])
            for step, is_own in zip(self._steps, self._own, strict=True)
            if is_own
        ]

    def choose(self, logits: torch.Tensor, arguments: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next tokens [B] after logits [B, V], by requests' numbers [num_arguments, B]."""
        scores, index = logits, 0
        for step, is_own in zip(self._steps, self._own, strict=True):
            if is_own:
                scores = step(scores, arguments[index])
                index += 1
            else:
                scores = step(logits, scores)  # it looks at the scores alone
        return self._sampling.draw(scores, generator)


def choice_of(processors: Sequence[Any], do_sample: bool, device: torch.device) -> Choice | str:
    """The choice that these processors make, or why it cannot be made on the device."""
    own = per_request_processors()
    sampling = sampling_of([each for each in processors if not isinstance(each, own)], do_sample, None, None, device)
    if isinstance(sampling, str):
        return sampling
    if not sampling.looks_at_scores_alone:
        return "a logits processor that looks at tokens or their number"
    plain = iter(sampling.steps)
    return Choice([each if isinstance(each, own) else next(plain) for each in processors], sampling)
