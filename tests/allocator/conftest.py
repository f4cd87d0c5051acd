"""Schedulers that must end with every byte given back."""

import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from scripted_drivers import OFFLOAD_FOLDER, PAGE
from vtensors import MakeScheduler, assert_all_given_back

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool

# HYPOTHESIS_PROFILE=nightly searches longer than there is time for at every change.
hypothesis.settings.register_profile(
    "nightly", hypothesis.settings.get_profile("torch_vtensor"), max_examples=2000, stateful_step_count=100
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "torch_vtensor"))


@pytest.fixture
def make_scheduler() -> Iterator[MakeScheduler]:
    """`make_scheduler(driver=HostDriver(PAGE), budget_bytes=None, idle_bytes=None, idle_seconds=None, clock=…)`.

    None of them may leak.
    """
    made = []

    def make(
        driver: Driver | None = None,
        budget_bytes: int | None = None,
        idle_bytes: int | None = None,
        **options: Any,
    ) -> GrowthScheduler:
        pool = PagePool(driver or HostDriver(PAGE, OFFLOAD_FOLDER), budget_bytes)
        scheduler = GrowthScheduler(pool, idle_bytes, **{"idle_seconds": None, **options})
        made.append(scheduler)
        return scheduler

    yield make
    for scheduler in made:
        assert_all_given_back(scheduler)


@pytest.fixture
def make_cuda_scheduler() -> Iterator[MakeScheduler]:
    """As `make_scheduler`, over a CudaDriver; the device must have as much free memory afterwards as before."""
    from torch_vtensor.allocator.cuda_driver import CudaDriver

    made = []
    driver = CudaDriver("cuda")
    torch.empty(1, device=driver.device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_bytes = torch.cuda.mem_get_info()[0]

    def make(budget_bytes: int | None = None, idle_bytes: int | None = None, **options: Any) -> GrowthScheduler:
        made.append(GrowthScheduler(PagePool(driver, budget_bytes), idle_bytes, **{"idle_seconds": None, **options}))
        return made[-1]

    yield make
    gc.collect()
    torch.cuda.synchronize()
    deadline = time.monotonic() + 10
    while any(scheduler.trim() or scheduler.stats().reserved_bytes for scheduler in made):
        if time.monotonic() > deadline:
            break  # the driver tells of a graph's end a little later, but not this much
        time.sleep(0.01)
    for scheduler in made:
        assert_all_given_back(scheduler)
    torch.cuda.empty_cache()
    # Kernels' code and library workspaces stay; a leaked page would be 2 MiB for every one of the test's.
    assert free_bytes - torch.cuda.mem_get_info()[0] < 256 * 2**20
