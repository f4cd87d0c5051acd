"""A model of how torch's caching allocator treats memory pools, for tests without a GPU."""

import threading
import weakref

import torch
from fake_cuda import TorchCalls


class FakeTensor:
    """Holds a block of the model's memory as long as it lives."""

    def __init__(self, segment: dict[str, int]) -> None:
        segment["allocated_size"] = segment["total_size"]
        self.address = segment["address"]
        weakref.finalize(self, segment.__setitem__, "allocated_size", 0)


class FakeTorch:
    """What torch's caching allocator does with memory pools, and the rules that it aborts the process for."""

    def __init__(self, calls: TorchCalls) -> None:
        self._calls = calls
        self._uses: dict[tuple[int, int], int] = {}
        self._segments: dict[tuple[int, int], list[dict[str, int]]] = {}
        self._routes: list[tuple[tuple[int, int], int]] = []
        self.num_pools_made = 0
        self.num_caches_emptied = 0
        self.is_capturing = False

    def create_memory_pool(self, allocator: object, device_index: int) -> tuple[int, int]:
        self.num_pools_made += 1
        pool_id = (0, self.num_pools_made)
        self._uses[pool_id], self._segments[pool_id] = 1, []
        return pool_id

    def retire_memory_pool(self, pool_id: tuple[int, int], device_index: int) -> None:
        self._uses[pool_id] -= 1
        assert self._uses[pool_id] >= 0

    def start_routing(self, pool_id: tuple[int, int], device_index: int) -> None:
        assert self._uses[pool_id] > 0, "the pool was retired"
        assert pool_id not in [routed for routed, _ in self._routes], "the pool is routed already"
        self._uses[pool_id] += 1
        self._routes.append((pool_id, threading.get_ident()))

    def stop_routing(self, pool_id: tuple[int, int], device_index: int) -> None:
        (route,) = (route for route in self._routes if route[0] == pool_id)
        self._routes.remove(route)
        self.retire_memory_pool(pool_id, device_index)

    def empty_cache(self) -> None:
        self.num_caches_emptied += 1
        for pool_id in [pool_id for pool_id, uses in self._uses.items() if uses == 0]:
            for segment in list(self._segments[pool_id]):
                if segment["allocated_size"] == 0:
                    self._segments[pool_id].remove(segment)
                    self._calls.free(segment["address"], segment["total_size"], segment["stream"])
            if not self._segments[pool_id]:
                del self._uses[pool_id], self._segments[pool_id]

    def release_all(self) -> None:
        """Free every unused segment, as torch does before it says that it is out of memory."""
        for segments in self._segments.values():
            for segment in [it for it in segments if it["allocated_size"] == 0]:
                segments.remove(segment)
                self._calls.free(segment["address"], segment["total_size"], segment["stream"])

    def empty(self, nbytes: int, stream: int = 0) -> FakeTensor | None:
        """A tensor from the innermost pool that this thread routes to; None: from torch's own memory."""
        pool_id = next((routed for routed, thread in self._routes[::-1] if thread == threading.get_ident()), None)
        if pool_id is None:
            return None
        for segment in self._segments[pool_id]:
            if segment["allocated_size"] == 0 and (segment["total_size"], segment["stream"]) == (nbytes, stream):
                return FakeTensor(segment)
        address = self._calls.alloc(nbytes, stream)
        if address is None:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
        segment = {"address": address, "total_size": nbytes, "allocated_size": 0, "stream": stream}
        self._segments[pool_id].append(segment)
        return FakeTensor(segment)
