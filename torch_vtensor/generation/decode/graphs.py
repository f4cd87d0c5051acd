"""What makes a model's step fast: inductor's code for it, and CUDA graphs of a few kernels each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from torch_vtensor.allocator.captures import capturing
from torch_vtensor.generation._torch_compat import mark_any_size
from torch_vtensor.generation.decode.fuse import fuse
from torch_vtensor.generation.decode.pieces import compile_in_pieces
from torch_vtensor.generation.decode.step import LayerRows, Step

__all__ = [
    "CaptureSpace",
    "Captures",
    "Graph",
    "LatestGraphs",
    "capture",
    "capture_space",
    "compile_step",
    "workspace",
]

Graph = Callable[[], None]
StepForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Step], torch.Tensor]


def workspace(batch: int, layers: tuple[LayerRows, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention of a step with up to ``batch`` sequences needs beside its inputs: partial sums, arrivals."""
    if device.type != "cuda":
        return torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    from torch_vtensor.ops.decode_attention.triton import make_workspace

    heads, value_dim = max(layer.heads for layer in layers), max(layer.value_dim for layer in layers)
    return make_workspace(batch, heads, value_dim, device)


def compile_step(forward: StepForward, of_any_batch: bool = False) -> StepForward:
    """A step as `step_forward` makes it, compiled by inductor at its first call, for tensors of those sizes.

    Args:
        of_any_batch: for all batches of two and more instead.
    """
    # A code object of its own: dynamo counts recompilations by code object, and every batch size is meant to be one.
    forward.__code__ = forward.__code__.replace()

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        fuse(graph_module)
        return compile_in_pieces(graph_module, example_inputs, compile_fx)

    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
    return _of_any_batch(compiled) if of_any_batch else compiled


def _of_any_batch(compiled: StepForward) -> StepForward:
    """The same, of which nothing but the number of sequences, and of groups that share tokens, is any number.

    Were all sizes, inductor would take twice as long for them and dynamo would trace all layers once more to find which
    numbers are not.
    """

    def forward(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, step: Step) -> torch.Tensor:
        of_batch = [tokens, positions, mask]
        for group in step.groups:
            of_batch += [group.key_addresses, group.value_addresses, group.lengths, group.firsts]
            if group.shared is not None:
                of_batch.append(group.shared.num_shared)
                mark_any_size(group.shared.groups, 0, from_zero=True)
                mark_any_size(group.shared.groups, 1)
        for tensor in of_batch:
            mark_any_size(tensor, 0)
        return compiled(tokens, positions, mask, step)

    return forward


class CaptureSpace(NamedTuple):
    """Where a program's graphs are captured: they run one after the other, so they share a stream and their memory."""

    stream: torch.cuda.Stream
    memory: Any


def capture_space(device: torch.device) -> CaptureSpace | None:
    """A stream and memory for a program's graphs; None without a GPU."""
    if device.type != "cuda":
        return None
    return CaptureSpace(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


class Captures:
    """Captures one graph of a program after the other.

    Args:
        generator: what they draw random numbers from; default: the device's own generator.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.device = device
        self.generator = generator
        self._space = capture_space(device)

    def __call__(self, run: Callable[[], None], rehearse: Callable[[], None] | None = None) -> Graph:
        """``run`` as a captured graph: see `capture`."""
        try:
            return capture(run, self.device, self._space, rehearse, self.generator)
        except Exception:
            self._space = capture_space(self.device)  # others go on in a pool that no broken capture holds
            raise


class LatestGraphs:
    """The graphs that were used last, ``most`` of them, by what they do."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._graphs: dict[Hashable, Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, what: Hashable | None, make: Callable[[], Graph]) -> Graph:
        """The graph that does this, made if there is none; one of which that cannot be told (None) is not kept."""
        graph = self._graphs.pop(what, None) or make()
        if what is not None:
            self._graphs[what] = graph  # the last one used comes last
            if len(self._graphs) > self._most:
                del self._graphs[next(iter(self._graphs))]
        return graph

    def clear(self) -> None:
        """Keep none of them."""
        self._graphs.clear()


def capture(
    run: Callable[[], None],
    device: torch.device,
    space: CaptureSpace | None,
    rehearse: Callable[[], None] | None = None,
    generator: torch.Generator | None = None,
) -> Graph:
    """``run`` as a captured graph; without a GPU, ``run`` itself. ``rehearse`` is what to do before, ``run`` if None.

    Args:
        generator: what both draw random numbers from; default: the device's own. While a graph is captured other
            threads can draw from that one only if this is another, and not in the microseconds when capturing begins.

    Effects: the generator and the current stream are as before, also after an error.
    """
    rehearse = rehearse or run
    if space is None:
        with _unchanged(generator or torch.default_generator):
            rehearse()
        return run
    default = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    current = torch.cuda.current_stream(device)
    space.stream.wait_stream(current)
    try:
        with _unchanged(generator or default), torch.cuda.stream(space.stream):
            for _ in range(2):
                rehearse()
    finally:
        current.wait_stream(space.stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph = _GraphOfOwnNumbers()
        graph.default, graph.own = default, generator
    with (
        capturing(),
        torch.cuda.stream(current),  # which a capture that fails would leave for its own
        torch.cuda.graph(graph, pool=space.memory, stream=space.stream, capture_error_mode="thread_local"),
    ):
        run()
    return graph.replay


class _GraphOfOwnNumbers(torch.cuda.CUDAGraph):
    """A graph that draws from ``own``.

    Every capture takes possession of the state of the default generator, from which no other thread can draw until it
    ends: it gets an error. So ``own``'s state stands in for that at the moment when a capture begins. That another
    thread draws just then torch gives no means to prevent.
    """

    default: torch.Generator
    own: torch.Generator

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        state = self.default.graphsafe_get_state()
        self.default.graphsafe_set_state(self.own.graphsafe_get_state())
        try:
            super().capture_begin(*args, **kwargs)
        finally:
            self.default.graphsafe_set_state(state)


@contextmanager
def _unchanged(generator: torch.Generator) -> Iterator[None]:
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)
