"""What makes a model's step fast: inductor's code for it, and CUDA graphs of a few kernels each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from torch_vtensor.generation.decode.fuse import fuse
from torch_vtensor.generation.decode.step import LayerRows

__all__ = ["CaptureSpace", "Graph", "capture", "capture_space", "compile_step", "workspace"]

Graph = Callable[[], None]


def workspace(batch: int, layers: tuple[LayerRows, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention of a step with up to ``batch`` sequences needs beside its inputs: partial sums, arrivals."""
    if device.type != "cuda":
        return torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    from torch_vtensor.ops.decode_attention.triton import make_workspace

    heads, value_dim = max(layer.heads for layer in layers), max(layer.value_dim for layer in layers)
    return make_workspace(batch, heads, value_dim, device)


def compile_step(forward: Callable[..., torch.Tensor], of_any_batch: bool = False) -> Callable[..., torch.Tensor]:
    """The same function, compiled by inductor at its first call, for tensors of those sizes.

    Args:
        of_any_batch: for all batches of two and more instead, with what surrounds matrix products as it is.
    """
    # A code object of its own: dynamo counts recompilations by code object, and every batch size is meant to be one.
    forward.__code__ = forward.__code__.replace()

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        if not of_any_batch:
            fuse(graph_module)
        return compile_fx(graph_module, example_inputs)

    return torch.compile(forward, backend=backend, fullgraph=True, dynamic=of_any_batch)


class CaptureSpace(NamedTuple):
    """Where a program's graphs are captured: they run one after the other, so they share a stream and their memory."""

    stream: torch.cuda.Stream
    memory: Any


def capture_space(device: torch.device) -> CaptureSpace | None:
    """A stream and memory for a program's graphs; None without a GPU."""
    if device.type != "cuda":
        return None
    return CaptureSpace(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


def capture(
    run: Callable[[], None],
    device: torch.device,
    space: CaptureSpace | None,
    rehearse: Callable[[], None] | None = None,
) -> Graph:
    """``run`` as a captured graph; without a GPU, ``run`` itself. ``rehearse`` is what to do before, ``run`` if None.

    Effects: the random state and the current stream are as before, also after an error.
    """
    rehearse = rehearse or run
    if space is None:
        random = torch.get_rng_state()
        try:
            rehearse()
        finally:
            torch.set_rng_state(random)
        return run
    random = torch.cuda.get_rng_state(device)
    current = torch.cuda.current_stream(device)
    space.stream.wait_stream(current)
    try:
        with torch.cuda.stream(space.stream):
            for _ in range(2):
                rehearse()
    finally:
        current.wait_stream(space.stream)
        torch.cuda.set_rng_state(random, device)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(current),  # which a capture that fails would leave for its own
        torch.cuda.graph(graph, pool=space.memory, stream=space.stream, capture_error_mode="thread_local"),
    ):
        run()
    return graph.replay
