"""Physical memory as the system counts it, and giving back what nobody uses."""

from __future__ import annotations

import gc

import torch

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler

__all__ = ["give_back", "used_bytes"]


def used_bytes(device: torch.device) -> int:
    """Physical bytes in use on the device, by whomever; on a CPU those of torch_vtensor's pages."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return int(default_scheduler(device).pool.driver.inner.physical_bytes())


def give_back(device: torch.device) -> None:
    """Give back everything that is not in use."""
    gc.collect()
    torch_vtensor.trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()
