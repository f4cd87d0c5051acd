"""How much memory a segment takes: what it keeps for backward, and what its passes need while they run.

The graphs are those that inductor would generate code for, traced with fake tensors and cut in two where the least has
to be saved; nothing is generated. Which of their values get memory is inductor's decision, and predicted here: what
matrix products and other library calls read and write, reductions, and what leaves. Everything between, elementwise, is
computed where it is read.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torch_vtensor.compile import _torch_compat, pass_costs
from torch_vtensor.compile.communication import Placed
from torch_vtensor.compile.emit import emit
from torch_vtensor.compile.joint import JointPasses, find_passes, is_primal
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.segment import Arrival, Segment

_FUSED = frozenset(
    [
        *("convert_element_type", "_to_copy", "clone", "where", "constant_pad_nd", "slice_scatter", "select_scatter"),
        *("iota", "full", "full_like", "scalar_tensor", "embedding", "gather", "index"),
        *("inductor_random", "inductor_seeds", "inductor_lookup_seed"),
    ]
)
"""What inductor computes where it is read, besides what is elementwise."""

_READ_WHERE_MADE = frozenset(
    [
        *("sum", "mean", "amax", "amin", "var", "var_mean", "prod", "any", "all", "argmax", "argmin", "cat"),
        *("prepare_softmax_online", "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate"),
        *("scatter", "scatter_add", "scatter_reduce"),
    ]
)
"""What gets memory, and does not need it for what it reads."""

_MOST_READS = 4
"""An elementwise value that several nodes read gets memory if it depends on more buffers than that (inductor's
realize_reads_threshold). What one node reads is part of that."""


@dataclass(frozen=True)
class Footprint:
    """Memory of a segment's passes: F, and B or dI and dW.

    ``saved_bytes`` are kept from forward for each backward pass besides arrivals and departures; of these, a backward
    pass has there while it runs those at the positions ``arrivals`` and ``departures``. ``kept_bytes`` are what dI
    leaves for dW.
    Units:  ``workspace_bytes`` are what a pass needs at its peak besides what it reads and writes; negative for a
            backward pass that frees what was saved before it makes its gradients.
    """

    saved_bytes: tuple[int, ...]
    kept_bytes: int
    arrivals: Mapping[JobKind, tuple[int, ...]]
    departures: Mapping[JobKind, tuple[int, ...]]
    workspace_bytes: Mapping[JobKind, int]


Measure = Callable[[Segment], Footprint]
"""Tells the footprint of a segment."""


def estimate(segment: Segment) -> Footprint:
    """A guess from shapes alone: everything that is made inside is saved, or what enters where that is recomputed.

    What enters is saved by what made it, unless that came from another rank.
    """
    arrivals = {
        part: tuple(
            number
            for number, (arrival, readers) in enumerate(segment.arrivals.items())
            if (number in segment.holds if arrival.exchange.anew else _comes_from_elsewhere(segment, arrival))
            and pass_costs.is_saved_for(segment, part, number, readers)
        )
        for part in segment.parts
    }
    kept = pass_costs.kept_bytes(segment) if len(segment.parts) > 1 else 0
    return Footprint(pass_costs.saved_bytes(segment), kept, arrivals, {}, {})


def _comes_from_elsewhere(segment: Segment, arrival: Arrival) -> bool:
    return segment.recomputes or arrival.exchange.communication.need[Placed(segment.rank, arrival.mask)].tag > 0


class Tracer:
    """Measures segments by tracing them; equal ones, such as those of equal layers, once."""

    def __init__(self, device: torch.device, settings: Mapping[str, Any]) -> None:
        self._device = device
        self._settings = settings
        self._known: dict[tuple[object, ...], Footprint] = {}

    def __call__(self, segment: Segment) -> Footprint:
        """The footprint of a segment."""
        graph = emit(segment)
        _place_what_is_nowhere(graph, self._device)
        inputs = tuple(
            (arrival.mask.shape, arrival.exchange.tensor.dtype, arrival.group is not None)
            for arrival in segment.arrivals
        )
        passes = (*segment.parts.items(), segment.reads_again) if segment.in_passes else None
        key = (graph.code, inputs, segment.recomputes, passes)
        if key not in self._known:
            if segment.in_passes:
                self._known[key] = _measure_passes(segment, self._find_passes(segment, graph, inputs))
            else:
                forward, backward = _torch_compat.trace_passes(graph, inputs, self._settings, self._device)
                self._known[key] = _measure(segment, forward, backward)
        return self._known[key]

    def _find_passes(self, segment: Segment, graph: GraphModule, inputs: Sequence[Any]) -> JointPasses:
        return find_passes(
            graph,
            _torch_compat.without_memory(inputs, self._device),
            [wants for *_, wants in inputs],
            segment.parts,
            self._settings,
            recomputes=segment.recomputes,
            generates=True,
        )


def _place_what_is_nowhere(graph: GraphModule, device: torch.device) -> None:
    """Have a graph captured on the device meta make its tensors where its inputs are."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") == torch.device("meta"):
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()


def _measure(segment: Segment, forward: GraphModule, backward: GraphModule | None) -> Footprint:
    """That of a segment with backward in one, which autograd records."""
    num_arrivals, num_departures = len(segment.arrivals), len(segment.departures)
    ahead = _Graph(forward)
    leaving = ahead.outputs[:num_departures]
    of_departures = {ahead.base(node): number for number, node in enumerate(leaving)}
    outputs_bytes = _bytes_of(base for base in of_departures if base.op != "placeholder")
    if backward is None:
        return Footprint((0,), 0, {}, {}, {"F": ahead.peak(leaving) - outputs_bytes})
    saved = dict.fromkeys(map(ahead.base, ahead.outputs[num_departures:]))
    position = {node: number for number, node in enumerate(ahead.inputs)}
    own = [node for node in saved if node.op != "placeholder" and node not in of_departures]
    saved_bytes = _bytes_of(own)
    behind = _Graph(backward)
    # Backward takes what was saved, under the names that it has in forward, and frees it after its last use.
    names = {node.name for node in ahead.outputs[num_departures:] if ahead.base(node) in own}
    freed = [node for node in behind.inputs if node.name in names]
    gradients_bytes = _bytes_of({behind.base(node) for node in behind.outputs if node is not None} - set(behind.inputs))
    # Autograd holds on to the arrivals whose gradients are wanted.
    wanted = {number for number, arrival in enumerate(segment.arrivals) if arrival.group is not None}
    arrivals = tuple(
        sorted(wanted | {position[node] for node in saved if position.get(node, num_arrivals) < num_arrivals})
    )
    behind_peak = behind.peak(behind.outputs, freed)
    if segment.recomputes:
        again = max(ahead.peak(ahead.outputs), behind_peak)
        workspace: dict[JobKind, int] = {"F": ahead.peak(leaving) - outputs_bytes, "B": again - gradients_bytes}
        return Footprint((0,), 0, {"B": tuple(range(num_arrivals))}, {}, workspace)
    departures = tuple(number for node, number in of_departures.items() if node in saved)
    workspace = {
        "F": ahead.peak(ahead.outputs) - outputs_bytes - saved_bytes,
        "B": behind_peak - saved_bytes - gradients_bytes,
    }
    return Footprint((saved_bytes,), 0, {"B": arrivals}, {"B": departures}, workspace)


def _measure_passes(segment: Segment, passes: JointPasses) -> Footprint:
    """That of a segment whose backward passes are cut out of its joint graph."""
    ahead = _Graph(passes.forward.graph)
    made = dict(zip(passes.forward.makes, ahead.outputs, strict=True))
    of_departures = {ahead.base(node): number for number, node in enumerate(ahead.outputs[: passes.num_outputs])}
    outputs_bytes = _bytes_of(base for base in of_departures if base.op != "placeholder")
    owned: dict[JobKind, dict[str, Node]] = {}
    arrivals: dict[JobKind, tuple[int, ...]] = {}
    departures: dict[JobKind, tuple[int, ...]] = {}
    for part in reversed(list(segment.parts)):  # what both passes read stays for the second
        entering = {int(name.removeprefix("primals_")) for name in passes.saved[part] if is_primal(name)}
        bases = {name: ahead.base(made[name]) for name in passes.saved[part] if not is_primal(name)}
        arrivals[part] = tuple(sorted(entering - set(segment.reads_again)))
        departures[part] = tuple(sorted({of_departures[base] for base in bases.values() if base in of_departures}))
        later = {base for some in owned.values() for base in some.values()}
        owned[part] = {name: base for name, base in bases.items() if base not in of_departures and base not in later}
    saved_bytes = {part: _bytes_of(some.values()) for part, some in owned.items()}
    workspace: dict[JobKind, int] = {"F": ahead.peak(ahead.outputs) - outputs_bytes - sum(saved_bytes.values())}
    kept_bytes = 0
    for part, one in passes.backward.items():
        # What a pass reads is there to its end, but for what was saved for it alone and is nothing else's memory.
        behind = _Graph(one.graph)
        written = {behind.base(node) for node in behind.outputs if node is not None} - set(behind.inputs)
        uses = Counter(owned[part].values())
        own = {name for name, base in owned[part].items() if uses[base] == 1}
        freed = [node for name, node in zip(one.reads, behind.inputs, strict=True) if name in own]
        workspace[part] = behind.peak(behind.outputs, freed) - _bytes_of(freed) - _bytes_of(written)
        if part == "dW":
            kept = [node for name, node in zip(one.reads, behind.inputs, strict=True) if name in passes.kept]
            kept_bytes = _bytes_of(kept)
            # Gradients that dI hands on are there already while it runs.
            workspace["dI"] -= _bytes_of(node for node in kept if node.name.startswith("tangents_"))
    saved = tuple(saved_bytes[part] for part in segment.parts)
    return Footprint(saved, kept_bytes, arrivals, departures, workspace)


class _Graph:
    """Which nodes of a graph of aten operators have memory of their own, and until when."""

    def __init__(self, module: GraphModule) -> None:
        self._nodes = list(module.graph.nodes)
        self.inputs = [node for node in self._nodes if node.op == "placeholder"]
        (output,) = module.graph.find_nodes(op="output")
        self.outputs: list[Any] = list(output.args[0])
        self._base: dict[Node, Node] = {}
        self._buffers: dict[Node, tuple[Node, ...]] = {}
        needed = self._needed_in_memory()
        for node in self._nodes:
            if node.op != "call_function":
                self._base[node] = node
                self._buffers[node] = (node,)
            elif _names_memory(node):
                source = next(arg for arg in node.all_input_nodes)
                self._base[node] = self._base[source]
                self._buffers[node] = self._buffers[source]
            else:
                self._base[node] = node
                read = tuple(dict.fromkeys(buffer for arg in node.all_input_nodes for buffer in self._buffers[arg]))
                is_read_once = len(node.users) < 2 or len(read) <= _MOST_READS
                fused = _is_fused(node) and node not in needed and is_read_once
                self._buffers[node] = read if fused else (node,)

    def base(self, node: Node) -> Node:
        """The node whose memory another one names."""
        return self._base[node]

    def _needed_in_memory(self) -> set[Node]:
        """What leaves, or is read by a call of a library, through views."""
        ahead = [node for node in self.outputs if isinstance(node, Node)]
        for node in self._nodes:
            if node.op == "call_function" and not (
                _names_memory(node) or _is_fused(node) or _name(node) in _READ_WHERE_MADE
            ):
                ahead.extend(node.all_input_nodes)
        found: set[Node] = set()
        while ahead:
            node = ahead.pop()
            if node not in found:
                found.add(node)
                if node.op == "call_function" and _names_memory(node):
                    ahead.extend(node.all_input_nodes[:1])
        return found

    def peak(self, kept: Sequence[Any], freed: Sequence[Node] = ()) -> int:
        """The most bytes at once: of what nodes make, and of those inputs that go after their last use.

        ``kept`` stay to the end; other outputs go like everything else.
        """
        last: dict[Node, int] = {}
        for number, node in enumerate(self._nodes):
            for arg in node.all_input_nodes if node.op == "call_function" and self._buffers[node] == (node,) else ():
                last.update(dict.fromkeys(self._buffers[arg], number))
        stays = {self._base[node] for node in kept if isinstance(node, Node)}
        goes: dict[int, list[Node]] = {}
        for node, number in last.items():
            if node not in stays and (node.op == "call_function" or node in freed):
                goes.setdefault(number, []).append(node)
        held = peak = _bytes_of(freed)
        for number, node in enumerate(self._nodes):
            going = goes.get(number, ())
            if node.op == "call_function" and self._buffers[node] == (node,) and (node in last or node in stays):
                # What is elementwise is written over an equally large value that it reads for the last time.
                in_place = _is_fused(node) and any(num_bytes(other) == num_bytes(node) for other in going)
                held += num_bytes(node)
                peak = max(peak, held - num_bytes(node) if in_place else held)
            held -= _bytes_of(going)
        return peak


def _bytes_of(nodes: Iterable[Node]) -> int:
    return sum(map(num_bytes, dict.fromkeys(nodes)))


def num_bytes(node: Node) -> int:
    """Bytes of all tensors that a node makes."""
    made = node.meta.get("val")
    values = made if isinstance(made, list | tuple) else (made,)
    return sum(math.prod(value.shape) * value.element_size() for value in values if isinstance(value, torch.Tensor))


def _name(node: Node) -> str:
    """``mm`` of ``aten.mm.default``."""
    parts = _torch_compat.operator_name(node).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _names_memory(node: Node) -> bool:
    """Whether a node only names memory that another node has: a view, or one of several results."""
    return node.target is operator.getitem or _torch_compat.is_view(node)


def _is_fused(node: Node) -> bool:
    return _torch_compat.is_pointwise(node) or _name(node) in _FUSED
