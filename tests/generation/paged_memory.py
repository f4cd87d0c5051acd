"""What a test may ask of the memory that its caches came from."""

from __future__ import annotations

import time

import garbage

import torch_vtensor
from torch_vtensor.allocator import pools
from torch_vtensor.generation import layers

PAGE_BYTES = 4096


class Memory:
    """The memory of a test, which began with none, in one layout: "strips", the CPU's, or "token-major", CUDA's."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    @property
    def appends(self) -> dict[str, int]:
        """How often layers appended in place or not since the test began, or since `forget_appends`."""
        return torch_vtensor.stats().appends

    def forget_appends(self) -> None:
        layers.counters.clear()

    @property
    def num_stock(self) -> int:
        return sum(count for reason, count in self.appends.items() if reason.startswith("stock"))

    @property
    def num_mapped(self) -> int:
        """How many pages were mapped so far."""
        return sum(
            pool.driver_calls["map"].count
            for pool in torch_vtensor.stats().devices.values()
            if "map" in pool.driver_calls
        )

    @property
    def live_bytes(self) -> int:
        """Physical bytes that caches hold right now, once the memory of ended ones was taken back."""
        self.settle()
        return sum(pool.live_bytes for pool in torch_vtensor.stats().devices.values())

    def settle(self) -> None:
        """Wait until what ended is unmapped."""
        for scheduler in pools.all_schedulers().values():
            scheduler.reap()
            scheduler.settle()

    def wait_for_idle_memory(self) -> None:
        """Wait until what nobody wants went back by itself."""
        deadline = time.monotonic() + 60
        while any(
            pool.parked_bytes + pool.pooled_bytes > pool.live_bytes // 5
            for pool in torch_vtensor.stats().devices.values()
        ):
            assert time.monotonic() < deadline, torch_vtensor.stats()
            time.sleep(0.002)

    def check_nothing_left(self) -> None:
        """Every cache of the test has ended: all of its memory and addresses go back."""
        garbage.collect()
        torch_vtensor.trim()
        for device, scheduler in pools.all_schedulers().items():
            pool = scheduler.stats()
            assert (pool.live_bytes, pool.committed_bytes, pool.reserved_bytes) == (0, 0, 0), (
                f"left on {device}: {pool}"
            )
            scheduler.pool.check_integrity()
