"""A step's graph in pieces, of which inductor compiles those that are alike once: the layers between first and last.

What stands between two attentions is a piece. Inductor cannot look into an attention, and fuses nothing across it, so
pieces have the kernels of the whole graph; borders of layers lie inside of them:

    embedding, norm, q k v ── attention ── o, norm, gate, up, down, norm, q k v ── attention ── … ── norm, logits
          first piece                            all others are this one                            last piece

Of a Llama of 32 layers that is less than a tenth of inductor's work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from torch_vtensor.ops.cached_attention import cached_attention

__all__ = ["compile_in_pieces"]

_ALIGNMENT_BYTES = 16  # kernels count on it where a tensor's address has it


class _Piece(NamedTuple):
    """Nodes that follow each other, with a graph of their own that makes ``gives`` of ``takes``."""

    nodes: list[Node]
    takes: list[Node]
    gives: list[Node]
    graph: Graph


def compile_in_pieces(
    graph_module: GraphModule, example_inputs: Sequence[Any], compile_: Callable[[GraphModule, Sequence[Any]], Any]
) -> Any:
    """The same function, compiled by ``compile_``: what is between its attentions, or all of it if that cannot be cut.

    Effects: the graph becomes one that calls what was compiled.
    """
    graph = graph_module.graph
    pieces = [_piece_of(nodes) for nodes in _stretches(graph)]
    values = [_value(node) for piece in pieces for node in (*piece.takes, *piece.gives)]
    if not all(isinstance(value, (torch.Tensor, torch.SymInt)) for value in values):
        return compile_(graph_module, example_inputs)
    keys = [_key_of(piece) for piece in pieces]
    names: dict[Any, str] = {}
    for key, piece in zip(keys, pieces, strict=True):
        if key not in names:
            names[key] = f"piece_{len(names)}"
            compiled = compile_(GraphModule(graph_module, piece.graph), [_value(node) for node in piece.takes])
            setattr(graph_module, names[key], compiled)
    for key, piece in reversed([*zip(keys, pieces, strict=True)]):  # what later ones take are still the nodes
        _call(names[key], piece)
    graph_module.recompile()
    return graph_module


def _stretches(graph: Graph) -> Iterator[list[Node]]:
    """The nodes between attentions; not cut between what enters a state of torch's and what leaves it."""
    nodes: list[Node] = []
    num_entered = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        num_entered += name.startswith("_enter_") - name.startswith("_exit_")
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target in (cached_attention, cached_attention.default) and num_entered == 0:
            if nodes:
                yield nodes
            nodes = []
        else:
            nodes.append(node)
    if nodes:
        yield nodes


def _piece_of(nodes: list[Node]) -> _Piece:
    inside = set(nodes)
    takes = list(dict.fromkeys(used for node in nodes for used in node.all_input_nodes if used not in inside))
    gives = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in takes:
        copies[node] = graph.placeholder(f"take_{len(copies)}")
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in gives))
    return _Piece(nodes, takes, gives, graph)


def _call(name: str, piece: _Piece) -> None:
    """Have the graph call what was compiled in the place of a piece's nodes."""
    inside, last = set(piece.nodes), piece.nodes[-1]
    graph = last.graph
    with graph.inserting_after(last):
        results = graph.create_node("call_module", name, tuple(piece.takes))
    with graph.inserting_after(results):
        for index, node in reversed([*enumerate(piece.gives)]):
            item = graph.call_function(operator.getitem, (results, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, lambda user: user not in inside)
    for node in reversed(piece.nodes):
        graph.erase_node(node)


def _key_of(piece: _Piece) -> Any:
    """What is equal for pieces that are alike: what they compute of which kinds of values."""
    numbers = {node: number for number, node in enumerate(piece.graph.nodes)}
    storages: dict[Any, tuple[int, Any]] = {}
    return (
        tuple(_kind(_value(node), storages) for node in piece.takes),
        tuple(
            (node.op, node.target, _told(node.args, numbers), _told(node.kwargs, numbers)) for node in piece.graph.nodes
        ),
    )


def _kind(value: Any, storages: dict[Any, tuple[int, Any]]) -> Any:
    if not isinstance(value, torch.Tensor):
        return str(value)
    storage = value.untyped_storage()._cdata
    offset_bytes = value.storage_offset() * value.dtype.itemsize
    number, first_bytes = storages.setdefault(storage, (len(storages), offset_bytes))
    return (
        type(value),
        value.dtype,
        value.device,
        value.layout,
        value.requires_grad,
        str(tuple(value.shape)),
        str(value.stride()),
        str(offset_bytes % _ALIGNMENT_BYTES),
        number,
        str(offset_bytes - first_bytes),  # what overlaps is in the code
    )


def _told(argument: Any, numbers: dict[Node, int]) -> Any:
    """An argument of a node that equals the same one of a node in another graph."""
    if isinstance(argument, Node):
        return Node, numbers[argument]
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_told(each, numbers) for each in argument)
    if isinstance(argument, dict):
        return dict, tuple((name, _told(each, numbers)) for name, each in argument.items())
    if isinstance(argument, slice):
        return slice, tuple(_told(each, numbers) for each in (argument.start, argument.stop, argument.step))
    return type(argument), repr(argument)


def _value(node: Node) -> Any:
    return node.meta.get("example_value")
