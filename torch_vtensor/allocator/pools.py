"""The process's own pool and scheduler for each device, made on first use from the settings."""

from __future__ import annotations

import logging
import os
import threading

import torch

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool, check_budget
from torch_vtensor.settings import load_settings, status_folder
from torch_vtensor.status import StatusFile, StatusRecord

__all__ = ["all_schedulers", "default_pool", "default_scheduler", "set_default_budget"]

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_schedulers: dict[torch.device, GrowthScheduler] = {}
_status_file: StatusFile | None = None
_budget_bytes: int | None = None  # set_default_budget's; before it is called, the settings' one counts


def default_scheduler(device: torch.device) -> GrowthScheduler:
    """The scheduler that owns this process's memory on ``device``.

    Raises: ValueError for a device type without a driver, or for a GPU where torch has none; what the driver raises
        where it cannot work.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise ValueError(f"device is '{device}', but torch {torch.__version__} {reason}: use device 'cpu'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    elif device.type == "cpu":
        device = torch.device("cpu")  # and not cpu:0, which is the same memory
    with _lock:
        scheduler = _schedulers.get(device)
        if scheduler is None:
            budget_bytes = _budget_bytes if _budget_bytes is not None else load_settings().budget_bytes
            pool = PagePool(_make_driver(device), budget_bytes, offload_bytes=load_settings().offload_bytes)
            pool.driver.marks_ranges = load_settings().nvtx and device.type == "cuda"
            scheduler = GrowthScheduler(pool)
            if load_settings().status:
                pool.status = _status_of(device)
            _schedulers[device] = scheduler
        return scheduler


def default_pool(device: torch.device) -> PagePool:
    """The pages of ``default_scheduler(device)``."""
    return default_scheduler(device).pool


def set_default_budget(budget_bytes: int | None) -> None:
    """Limit the physical memory of every device's own pool, those not made yet included.

    Units:  bytes; None takes the limit away.
    Raises: ValueError for less than one byte.
    """
    global _budget_bytes
    check_budget(budget_bytes)
    with _lock:
        _budget_bytes = budget_bytes
        for scheduler in _schedulers.values():
            scheduler.pool.budget_bytes = budget_bytes


def all_schedulers() -> dict[torch.device, GrowthScheduler]:
    """The schedulers made so far, by device."""
    with _lock:
        return dict(_schedulers)


def _status_of(device: torch.device) -> StatusRecord | None:
    """A place in this process's status file; None where none can be made: nothing else depends on it."""
    global _status_file
    try:
        if _status_file is None:
            _status_file = StatusFile(status_folder())
        return _status_file.record(str(device))
    except OSError as error:
        _log.info("no status file, so `torch_vtensor top` will not list this process: %s", error)
        return None


def _make_driver(device: torch.device) -> Driver:
    if device.type == "cuda":
        from torch_vtensor.allocator.cuda_driver import CudaDriver

        return CudaDriver(device)
    if device.type == "cpu":
        from torch_vtensor.allocator.host_driver import HostDriver

        settings = load_settings()
        return HostDriver(settings.page_bytes, settings.offload_folder)
    raise ValueError(f"no memory driver for device '{device}': torch_vtensor supports 'cpu' and 'cuda'")


def _start_afresh_in_child() -> None:
    # The child shares the parent's pages through its inherited mappings and must take none of them: it gets pools of
    # its own. The lock may have been held by a thread that does not exist here.
    global _lock, _status_file
    _lock = threading.Lock()
    _schedulers.clear()
    _status_file = None


os.register_at_fork(after_in_child=_start_afresh_in_child)
