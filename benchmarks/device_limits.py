"""What a device can do at most, and how long a kernel takes by itself: read ceiling, matmul ceiling, timed graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import report
import torch

__all__ = ["Stopwatch", "matmul_flops", "read_bandwidth"]

_READ_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a kernel that does nothing but read: the best of several shapes."""
    source = torch.zeros(_READ_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    if device.type == "cpu":
        return source.nbytes / report.measure(source.sum, device, 5).median
    from read_kernel import SHAPES, read

    stopwatch = Stopwatch(device, repeats=5)
    return source.nbytes / min(stopwatch.time(lambda shape=shape: read(source, *shape)).median for shape in SHAPES)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two large matrices."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / Stopwatch(device, repeats=10).time(lambda: a @ b).median


class Stopwatch:
    """Times work with none of its data in the device's L2 cache.

    On CUDA the work is captured as a graph, and its repetitions stand in the queue before the first one starts: between
    the two events of one there is nothing but the work. On a CPU it is called.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        if device.type == "cuda":
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            # Read, not written: lines that wait to be written back would be written during the work.
            self.others = torch.zeros(4 * cache_bytes // 4, dtype=torch.int32, device=device)

    def time(self, action: Callable[[], object]) -> report.Timing:
        """Median and spread of the work's time on the device."""
        if self.device.type == "cpu":
            return report.measure(action, self.device, self.repeats)
        graph = self._captured(action)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        self._replay(graph, *events[0])
        start = time.perf_counter()
        self._replay(graph, *events[0])
        host_seconds = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(2e9 * (0.002 + 2 * host_seconds * self.repeats)))  # cycles, of at most 2 GHz
        for begin, end in events:
            self._replay(graph, begin, end)
        torch.cuda.synchronize(self.device)
        return report.timing([begin.elapsed_time(end) / 1e3 for begin, end in events])

    def _captured(self, action: Callable[[], object]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, chooses, and makes workspaces
                action()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        from read_kernel import SHAPES, read

        read(self.others, *SHAPES[0])
        begin.record()
        graph.replay()
        end.record()
