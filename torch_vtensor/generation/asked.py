"""What a call of generate() asks for, known again when the next one asks for the very same, as in a loop or a dialogue.

Most of what transformers does before a call's first kernel is to work out again the settings that it goes by.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from torch_vtensor.generation._transformers_compat import GenerationConfig

__all__ = ["Asked", "asked_of", "is_same", "kept_copy", "prepare_config"]

_ATOMS = (bool, int, float, str, type(None))
_Prepared = tuple[GenerationConfig, dict[str, Any]]


class Asked(NamedTuple):
    """All that the settings of a call are worked out from; equal to another only if that comes to the same ones."""

    arguments: str
    """Those that text tells."""
    others: frozenset[str]
    """The names of all others."""
    given: tuple[type, dict[str, Any]] | None
    """The generation config that the call brings."""
    defaults: dict[str, Any]
    config: dict[str, Any]

    def copied(self) -> Asked | None:
        """The same, whatever becomes of the configs; None if they hold more than settings."""
        configs = kept_copy(self[2:])
        return None if configs is None else Asked(self.arguments, self.others, *configs)


def asked_of(model: Any, generation_config: Any, arguments: Mapping[str, Any]) -> Asked:
    """What ``model.generate(generation_config=generation_config, **arguments)`` asks for now; to be kept as a copy."""
    others = frozenset(name for name, value in arguments.items() if not _is_told_by_text(value))
    told = repr([item for item in arguments.items() if item[0] not in others])
    given = None if generation_config is None else (type(generation_config), vars(generation_config))
    return Asked(told, others, given, vars(model.generation_config), vars(model.config))


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal; those that cannot say, as tensors and arrays, are not."""
    try:
        return bool(one == other)
    except Exception:
        return False


def kept_copy(settings: Any) -> Any:
    """A copy of settings that can be told from later ones; None if there are others among them, such as modules."""
    return copy.deepcopy(settings) if _is_plain(settings) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (*_ATOMS, torch.dtype, torch.device, type)):
        return True
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (PretrainedConfig, GenerationConfig)) and all(map(_is_plain, vars(value).values()))


def prepare_config(
    stock: Callable[..., _Prepared], model: Any, generation_config: Any = None, *args: Any, **kwargs: Any
) -> _Prepared:
    """``GenerationMixin._prepare_generation_config``, which remembers what it came to last.

    Returns: as it does, a config that is the caller's to change, and what is left of ``kwargs``.
    """
    asked = asked_of(model, generation_config, {"": args, **kwargs})
    known = _known.get(model)
    if known is not None and is_same(known.asked, asked):
        left = {name: kwargs.get(name, value) for name, value in known.left.items()}
        return _copied(known.config), left
    before = asked.copied()
    config, left = stock(model, generation_config, *args, **kwargs)
    if before is None:
        return config, left
    has_only_looked = is_same(before, asked_of(model, generation_config, {"": args, **kwargs}))
    if has_only_looked and all(name in kwargs and left.get(name) is kwargs[name] for name in asked.others):
        told = {name: None if name in asked.others else value for name, value in left.items()}
        _known[model] = _Known(before, _copied(config), copy.deepcopy(told))
    return config, left


class _Known(NamedTuple):
    """What a model's settings came to last."""

    asked: Asked
    config: GenerationConfig
    left: dict[str, Any]
    """Of the arguments; None for those that text does not tell."""


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def _copied(config: GenerationConfig) -> GenerationConfig:
    """As ``copy.deepcopy``, which looks up every number in a table."""
    new = copy.copy(config)
    vars(new).update({name: copy.deepcopy(it) for name, it in vars(new).items() if type(it) not in _ATOMS})
    return new


def _is_told_by_text(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(type(each) in _ATOMS for each in value)
    return type(value) in _ATOMS
