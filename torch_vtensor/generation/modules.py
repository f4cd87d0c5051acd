"""The modules that a model consists of, looked at in every call of generate(): remembered while they are the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch

__all__ = ["devices_of_layers", "has_foreign_hooks", "is_training", "modules_of"]

is_training = attrgetter("training")
"""Whether a module is in training mode; as a function, which thousands are asked by."""
_hooks, _pre_hooks = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")


def modules_of(model: Any) -> list[Any]:
    """``model.modules()`` in some order, in a fraction of the time: that makes a name for each of thousands."""
    known = _known.get(model)
    modules = None if known is None else known.if_unchanged()
    if modules is None:
        modules = _found_below(model)
        _known[model] = _Modules(modules)
    return modules


class _Modules:
    """The modules that were found below one of them, none of which this keeps alive.

    To see that they are still those takes a fraction of the time that it takes to find them.
    """

    def __init__(self, modules: list[Any]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._children = _children_of(modules)

    def if_unchanged(self) -> list[Any] | None:
        """The modules, if each is alive and has the children that it had."""
        modules = [reference() for reference in self._modules]
        return None if None in modules or _children_of(modules) != self._children else modules


_known: weakref.WeakKeyDictionary[Any, _Modules] = weakref.WeakKeyDictionary()


def _found_below(model: Any) -> list[Any]:
    found: dict[Any, None] = {}
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += module._modules.values() if module._modules else ()
    return list(found)


def _children_of(modules: list[Any]) -> list[int]:
    """Who is below whom, by id: those of a list of living modules that has all of them in it."""
    return [id(child) for module in modules if module._modules for child in module._modules.values()]


def devices_of_layers(model: Any) -> dict[int, torch.device]:
    """The device of each layer's weights, by the layer's index; empty unless ``device_map`` has spread the model."""
    if len({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}) < 2:
        return {}
    layers = ((getattr(module, "layer_idx", None), module) for module in modules_of(model))
    weights = ((index, next(module.parameters(), None)) for index, module in layers if isinstance(index, int))
    return {index: weight.device for index, weight in weights if weight is not None}


def has_foreign_hooks(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether forward passes run hooks that are not transformers' own."""
    modules = list(modules)
    hooks = filter(None, chain(map(_hooks, modules), map(_pre_hooks, modules)))  # of thousands, hardly any
    return any(_is_foreign(hook) for several in hooks for hook in several.values())


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is not transformers' own, which only collect outputs that are asked for."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")
