"""The process's own pool and scheduler for each device, made on first use from the settings."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Iterator

import torch

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.neighbours import idle_memory_of_others
from torch_vtensor.allocator.page_pool import PagePool, read_budget
from torch_vtensor.allocator.recorder import Recorder
from torch_vtensor.allocator.watcher import Watcher
from torch_vtensor.allocator.worker import is_ahead_of_need
from torch_vtensor.settings import load_settings, status_folder
from torch_vtensor.status import StatusFile

__all__ = ["DEVICE_TYPES", "all_schedulers", "default_pool", "default_scheduler", "set_default_budget", "set_recording"]

DEVICE_TYPES = ("cpu", "cuda")
"""Devices whose memory there is a driver for."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_schedulers: dict[torch.device, GrowthScheduler] = {}
_status_file: StatusFile | None = None
_watcher: Watcher | None = None
_watcher_lock = threading.Lock()  # taken behind a pool's
_recording: tuple[float, int] | None = None  # set_recording's
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
            scheduler = GrowthScheduler(pool, idle_seconds=load_settings().idle_seconds)
            if load_settings().status:
                _show(pool)
            _record(pool)
            _schedulers[device] = scheduler
        return scheduler


def default_pool(device: torch.device) -> PagePool:
    """The pages of ``default_scheduler(device)``."""
    return default_scheduler(device).pool


def set_default_budget(budget_bytes: int | str | None) -> None:
    """Limit the physical memory of every device's own pool, those not made yet included.

    Units:  bytes, or a text such as "8GiB"; None takes the limit away.
    Raises: ValueError for less than one byte, or a text that is no size; TypeError for anything else.
    """
    global _budget_bytes
    read = read_budget(budget_bytes)
    with _lock:
        _budget_bytes = read
        for scheduler in _schedulers.values():
            scheduler.pool.budget_bytes = read


def set_recording(recording: tuple[float, int] | None) -> None:
    """Have every device's own pool keep what it holds, those not made yet included.

    Args:
        recording: seconds between samples, and how many at most; None: no longer.
    """
    global _recording
    with _lock:
        _recording = recording
        for scheduler in _schedulers.values():
            _record(scheduler.pool)


def _record(pool: PagePool) -> None:
    with pool.lock:
        pool.recorder = None if _recording is None else Recorder(pool.sample, *_recording)


def all_schedulers() -> dict[torch.device, GrowthScheduler]:
    """The schedulers made so far, by device."""
    with _lock:
        return dict(_schedulers)


def _show(pool: PagePool) -> None:
    """Give a pool a place in this process's status file, if there can be one: nothing else depends on it."""
    global _status_file
    folder, device = status_folder(), pool.device
    try:
        if _status_file is None:
            _status_file = StatusFile(folder)
        identity = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
        pool.show(_status_file.record(str(device), identity), _watch)
    except OSError as error:
        _log.info("no status file, so `torch_vtensor top` will not list this process: %s", error)
        return
    own = weakref.ref(pool)

    def ask(nbytes: int) -> Iterator[None]:
        alive = own()
        if alive is not None and not is_ahead_of_need():
            yield from idle_memory_of_others(folder, identity, nbytes, alive.heed)

    pool.ask_others = ask


def _watch() -> None:
    """Have what other processes ask for done at once, and not only when this one needs memory."""
    global _watcher
    with _watcher_lock:
        if _watcher is None and _status_file is not None:
            try:
                _watcher = Watcher(_status_file.path, _heed)
            except (OSError, RuntimeError) as error:
                _log.info("what other processes ask for is done when memory is needed next: %s", error)


def _heed() -> None:
    for scheduler in all_schedulers().values():
        scheduler.pool.driver.prepare_thread()
        scheduler.pool.heed()


def _hide() -> None:
    """Nobody writes to the status file while the interpreter ends, and the file's mapping with it."""
    for scheduler in all_schedulers().values():
        scheduler.pool.ledger.show(None)


atexit.register(_hide)


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
    global _lock, _watcher_lock, _status_file, _watcher
    _lock, _watcher_lock = threading.Lock(), threading.Lock()
    _schedulers.clear()
    if _watcher is not None:
        _watcher.forsake()
    _status_file = _watcher = None


os.register_at_fork(after_in_child=_start_afresh_in_child)
