"""What the user calls the inputs and modules of a captured graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from torch_vtensor.compile import _torch_compat

_CONTAINER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_SIZE = re.compile(r"\.size\(\)\[(\d+)\]")
_CELL = re.compile(r"\.__closure__\[(\d+)\]\.cell_contents")
_SUBSCRIPT = re.compile(r"\['?([^'\]]*)'?\]")
_ARGUMENT = re.compile(r"args\[(\d+)\]")


@dataclass(frozen=True)
class InputNames:
    """Kind and name of every input of a dynamo graph, by position.

    ``root`` is what held the model (``self``, ``model``, ``loss_of.cell0`` of a function's closure), left out of every
    name where all parameters and buffers live under one: names are then the keys of the model's state_dict.
    """

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    root: str | None

    def kind(self, expression: str) -> str | None:
        """The kind of an input given as ``args[3]``; None for any other expression."""
        argument = _ARGUMENT.fullmatch(expression)
        return self.kinds[int(argument[1])] if argument else None

    def substitute(self, expression: str) -> str:
        """The expression with every ``args[i]`` replaced by that input's name."""
        return _ARGUMENT.sub(lambda match: self.names[int(match[1])], expression)

    def module(self, path: str | None) -> str:
        """The name of a module given by dynamo's path to it; ``""`` for the model itself and outside any module."""
        return "" if path is None else _without_root(_readable(path), self.root)


def name_inputs(gm: GraphModule, example_inputs: Sequence[object]) -> InputNames:
    """Name the inputs of a dynamo graph after where dynamo found them; an input that is a list counts as its leaves."""
    kinds: list[str] = []
    names: list[str] = []
    roots: set[str] = set()
    for placeholder, example in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        source = _torch_compat.source_of(placeholder)
        name = placeholder.name if source is None else _readable(source)
        leaves = _torch_compat.leaves(example)
        kinds.extend(_kind(source, leaf) for leaf in leaves)
        is_list = isinstance(example, list | tuple | dict)
        names.extend(f"{name}.{index}" if is_list else name for index in range(len(leaves)))
        if source is not None and (container := _CONTAINER.search(_plain(source))):
            roots.add(_readable(_plain(source)[: container.start()]))
    root = roots.pop() if len(roots) == 1 else None
    return InputNames(tuple(kinds), tuple(_without_root(name, root) for name in names), root)


def _kind(source: str | None, example: object) -> str:
    if isinstance(example, nn.Parameter):
        return "parameter"
    if source is not None and "._buffers['" in source:
        return "buffer"
    return "input" if hasattr(example, "shape") else "number"


def _readable(source: str) -> str:
    """``L['self']._modules['layers']._parameters['weight']`` → ``self.layers.weight``."""
    source = _plain(source)
    for pattern, shown in ((_CONTAINER, r".\1"), (_SIZE, r".size(\1)"), (_CELL, r".cell\1"), (_SUBSCRIPT, r".\1")):
        source = pattern.sub(shown, source)
    return source.removeprefix("L.").removeprefix("G.")


def _plain(source: str) -> str:
    return source.replace(".__dict__['_modules']", "._modules")  # how dynamo reads some modules' children


def _without_root(name: str, root: str | None) -> str:
    if root is None:
        return name
    return "" if name == root else name.removeprefix(f"{root}.")
