"""Layers that dynamo traces once: marked as regions while it traces, and then put back where they are called.

Dynamo traces the first call of a region. Of each other call it looks whether what the trace depended on, of the layer
and of the arguments, is the same there; if so the call has the same body, and is traced like the first if not::

    layers.0 ── traced ──► body     x, w0 ─ region ─► y           x, w0 ─ body's nodes ─► y
    layers.1 ── same guards ──►     y, w1 ─ region ─► z     →     y, w1 ─ body's nodes ─► z
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import GraphModule, Node

from torch_vtensor.compile import _torch_compat

_CONTAINERS = nn.ModuleList, nn.ModuleDict, nn.Sequential
_FEWEST = 3  # alike: to trace a region takes longer than to trace what is none
_REGION = "_region_of_layer"  # set on layers while they are traced
_PLAIN = bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size
_OF_MODULES = frozenset(vars(nn.Module()))
_marking = threading.RLock()


@contextlib.contextmanager
def layers_traced_once(function: Callable[..., Any]) -> Iterator[bool]:
    """Have dynamo trace layers once that are alike, in the models that a function is, is a method of or names.

    Returns whether there are any.

    Effects: meanwhile these layers have another attribute and their classes another ``__call__``, which computes the
    same.
    """
    alike: list[list[nn.Module]] = []
    with contextlib.ExitStack() as marked:
        if _torch_compat.reuses_regions():
            marked.enter_context(_marking)
            models = {id(held): held for held in _held_by(function) if isinstance(held, nn.Module)}
            alike = _alike(list(models.values()))
            for number, layers in enumerate(alike):
                region = _region(type(layers[0]), number)
                for layer in layers:
                    vars(layer)[_REGION] = region
                    marked.callback(vars(layer).pop, _REGION, None)
            for cls in dict.fromkeys(type(layers[0]) for layers in alike):
                marked.enter_context(_calls_regions(cls))
        yield bool(alike)


def _held_by(function: Callable[..., Any]) -> Iterator[Any]:
    """What a function is, is a method of, or names as globals or from the functions around it."""
    yield function
    of = getattr(function, "__self__", None)
    yield of
    yield from getattr(of, "__dict__", {}).values()
    code = getattr(function, "__code__", None)
    if code is not None:
        known = getattr(function, "__globals__", {})
        yield from (known[name] for name in code.co_names if name in known)
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # nothing in it yet
                yield cell.cell_contents


def _alike(models: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The layers that can be regions, those together that differ in nothing but what dynamo sees for itself.

    These are numbers and text, of which its guards tell those that the trace depends on. They do not tell hooks, nor
    what is one object in one layer and another in the next, or is shared with the rest of the model by one of them.
    """
    occurrences = Counter(id(part) for model in models for _, part in _parts(model))
    alike: list[list[nn.Module]] = []
    ahead = list(models)
    while ahead:
        kinds: dict[Hashable, dict[nn.Module, None]] = {}
        for layer in (layer for module in ahead for layer in _layers(module)):
            kinds.setdefault(_kind(layer, occurrences), {})[layer] = None
        regions = [layers for kind, layers in kinds.items() if kind is not None and len(layers) >= _FEWEST]
        alike += map(list, regions)
        ahead = [layer for layers in kinds.values() if layers not in regions for layer in layers]
    return alike


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of lists that have modules of their own, and not such entries inside them."""
    for child in module.children():
        is_entry = isinstance(module, _CONTAINERS) and not isinstance(child, nn.ModuleList | nn.ModuleDict)
        if is_entry and next(child.children(), None) is not None:
            yield child
        else:
            yield from _layers(child)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module | torch.Tensor]]:
    """The module, all those inside it, and their parameters and buffers, with names; those with two names twice."""
    yield from module.named_modules(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _kind(layer: nn.Module, occurrences: Counter[int]) -> Hashable | None:
    """Equal for layers of which one's trace can be another's; None for one with hooks."""
    parts = list(_parts(layer))
    inside = Counter(id(part) for _, part in parts)
    number: dict[int, int] = {}
    kind: list[Hashable] = []
    for name, part in parts:
        shared = occurrences[id(part)] != inside[id(part)]
        kind.append((name, id(part) if shared else -1 - number.setdefault(id(part), len(number)), type(part)))
        if isinstance(part, torch.Tensor):
            kind.append((part.shape, part.stride(), part.dtype, part.device, part.requires_grad))
            continue
        if _torch_compat.has_module_hooks(part):
            return None
        kind.append(part.training)
        kind.extend((key, _identity(value)) for key, value in vars(part).items() if key not in _OF_MODULES)
    return tuple(kind)


def _identity(value: Any) -> Hashable:
    """Equal for values that are the same object, or made of the same; nothing of numbers and text but what they are."""
    if isinstance(value, _PLAIN):
        return (type(value),)
    if isinstance(value, Mapping):
        return type(value), tuple((key, _contents(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_contents, value))
    if isinstance(value, functools.partial):
        return _identity(value.func), _identity(value.args), _identity(value.keywords)
    return id(value)


def _contents(value: Any) -> Hashable:
    return (type(value), value) if isinstance(value, _PLAIN) else _identity(value)


def _region(cls: type[nn.Module], number: int) -> Callable[..., Any]:
    """A region that calls a layer of a class. It takes flat arguments: these dynamo compares much faster.

    ``form`` has the number of arguments without names, then the names of the others, then for each argument a dash or,
    if it is a tuple, its length.
    """
    called = cls.__call__

    def flat(layer: nn.Module, form: str, *leaves: Any) -> Any:
        num_args, names, *lengths = form.split(";")
        rest = iter(leaves)
        values = [
            next(rest) if length == "-" else tuple([next(rest) for _ in range(int(length))]) for length in lengths
        ]
        args, named = values[: int(num_args)], values[int(num_args) :]
        return called(layer, *args, **dict(zip(names.split(",") if names else (), named, strict=True)))

    # Dynamo tells regions apart by their code; those of other kinds are none that this could be.
    flat.__code__ = flat.__code__.replace(co_name=f"{cls.__module__}.{cls.__qualname__}:{number}")
    return _torch_compat.region(flat)


@contextlib.contextmanager
def _calls_regions(cls: type[nn.Module]) -> Iterator[None]:
    """Have calls of a class's modules call their regions; not its forward, since some look at which one they have."""
    called = cls.__call__
    own = vars(cls).get("__call__")

    @functools.wraps(called)
    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        form = f"{len(args)};{','.join(kwargs)}"
        leaves: list[Any] = []
        for value in (*args, *kwargs.values()):
            if type(value) is tuple:
                form += f";{len(value)}"
                leaves.extend(value)
            else:
                form += ";-"
                leaves.append(value)
        # Dynamo compares by value alone, and 1 is 1.0 and True.
        has_numbers = any(isinstance(leaf, int | float) and not isinstance(leaf, bool) for leaf in leaves)
        if has_numbers or not hasattr(layer, _REGION):
            return called(layer, *args, **kwargs)
        return getattr(layer, _REGION)(layer, form, *leaves)

    cls.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del cls.__call__
        else:
            cls.__call__ = own  # type: ignore[method-assign]


def inline_regions(gm: GraphModule) -> GraphModule:
    """The graph with the nodes of regions in place of their calls, in the modules in which they would be without.

    Itself where it has none, where one holds what is none, or where what module a node belongs to is not to be seen.
    """
    bodies: dict[str, GraphModule] = {}
    first: dict[str, Node] = {}
    for node in gm.graph.nodes:
        if called := _torch_compat.region_called(node):
            if called.body not in bodies:
                bodies[called.body] = inline_regions(getattr(gm, called.body))
                first[called.body] = node
            if not _tells_modules(bodies[called.body], first[called.body], node):
                return gm
    if not bodies or any(body.graph.find_nodes(op="get_attr") for body in bodies.values()):
        return gm
    graph = fx.Graph()
    copies: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if called := _torch_compat.region_called(node):
            body = bodies[called.body].graph
            operands = [copies[operand] for operand in called.operands]
            inside: dict[Node, Any] = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
            for one in body.nodes:
                if one.op not in ("placeholder", "output"):
                    inside[one] = graph.node_copy(one, inside.__getitem__)
                    _torch_compat.move_module_path(inside[one], first[called.body], node)
            (made,) = next(iter(body.find_nodes(op="output"))).args
            copies[node] = fx.node.map_arg(made, inside.__getitem__)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple | list):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node.op != "get_attr" or node.target not in bodies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(gm, graph)


def _tells_modules(body: GraphModule, first: Node, call: Node) -> bool:
    """Whether the modules of a body's nodes at a call follow from those at its first, which was traced.

    They do not where one module calls a region with weights of several others.
    """
    path = _torch_compat.module_path_of(call)
    if first is call or path != _torch_compat.module_path_of(first):
        return True
    weights = [
        [_torch_compat.source_of(node) if node.op == "placeholder" else None for node in called.operands]
        for one in (first, call)
        if (called := _torch_compat.region_called(one))
    ]
    return weights[0] == weights[1] or all(
        _torch_compat.module_path_of(node) in (None, path) for node in body.graph.nodes
    )
