"""What the machine is: versions looked up without importing, devices asked through the drivers that serve them."""

import importlib.metadata
import mmap
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_vtensor import __version__
from torch_vtensor.allocator.cuda_driver import CudaDriver, format_version
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.native import library_path
from torch_vtensor.allocator.nvrtc import nvrtc_version
from torch_vtensor.errors import DriverError
from torch_vtensor.settings import Settings, format_bytes

_MAX_MAP_COUNT = "/proc/sys/vm/max_map_count"


@dataclass(frozen=True)
class Device:
    """One device, and the driver that will serve it with its page sizes; None and no sizes where none can.

    Units:   memory_bytes, page_sizes bytes.
    """

    device: str
    name: str
    memory_bytes: int
    virtual_memory: bool
    driver: str | None
    page_sizes: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Machine:
    """Everything `info` prints; a version is None for what is not installed, the library for what is not built."""

    versions: dict[str, str | None]
    library: str | None
    devices: list[Device]
    missing: list[str]
    settings: Settings


def inspect_machine(settings: Settings) -> Machine:
    """Look at this machine as a process with these settings would find it."""
    versions = {
        "torch_vtensor": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "cuda-bindings": _version("cuda-bindings"),
        "CUDA driver": None,
        "NVRTC": None,
    }
    missing: list[str] = []
    if versions["transformers"] is None:
        missing.append("transformers, for generate(): pip install 'torch-vtensor[transformers]'")
    library = None
    try:
        library = str(library_path())
    except FileNotFoundError as error:
        missing.append(f"native library: {error}")
    devices = [_inspect_cpu(settings)]
    try:
        driver_version, cuda_devices = _inspect_cuda()
    except CudaUnavailableError as error:
        missing.append(f"CUDA: {error}")
    else:
        versions["CUDA driver"] = driver_version
        devices += cuda_devices
        try:
            versions["NVRTC"] = nvrtc_version()
        except (ImportError, RuntimeError) as error:
            missing.append(
                f"NVRTC ({str(error).partition(', ')[0]}): without it torch copies new keys and values, in two "
                "launches a layer instead of one; pip install nvidia-cuda-nvrtc"
            )
    return Machine(versions, library, devices, missing, settings)


class CudaUnavailableError(RuntimeError):
    """Says what is missing before a GPU can be used, and the remedy."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _inspect_cpu(settings: Settings) -> Device:
    with open(_MAX_MAP_COUNT, encoding="ascii") as file:
        max_map_count = int(file.read())
    return Device(
        device="cpu",
        name=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE,
        virtual_memory=True,
        driver="HostDriver",
        page_sizes=HostDriver(settings.page_bytes).page_sizes,
        reason=f"Linux maps memfd pages at any address; system page {format_bytes(mmap.PAGESIZE)}, "
        f"at most {max_map_count} mappings a process",
    )


def _inspect_cuda() -> tuple[str, list[Device]]:
    """Ask the driver itself, by cuda-bindings: it knows devices that this torch was not built for."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise CudaUnavailableError("cuda-bindings is not installed: pip install 'torch-vtensor[cuda]'") from None
    try:
        _call(driver.cuInit, 0)
    except RuntimeError as error:
        raise CudaUnavailableError(
            f"the NVIDIA driver does not start ({error}): it needs an NVIDIA GPU, its driver installed, and, "
            "in a container, both passed through"
        ) from None
    version = _call(driver.cuDriverGetVersion)
    devices = [_inspect_cuda_device(driver, ordinal) for ordinal in range(_call(driver.cuDeviceGetCount))]
    return format_version(version), devices


def _inspect_cuda_device(driver: Any, ordinal: int) -> Device:
    handle = _call(driver.cuDeviceGet, ordinal)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    virtual_memory = bool(_call(driver.cuDeviceGetAttribute, attribute, handle))
    page_sizes: tuple[int, ...] = ()
    if not virtual_memory:
        reason = "the device has no virtual memory management"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    elif ordinal >= torch.cuda.device_count():
        reason = (
            f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; install one that fits the driver"
        )
    else:
        try:
            page_sizes = CudaDriver(ordinal).page_sizes
            reason = "the device manages virtual memory and torch sees it"
        except DriverError as error:
            reason = str(error)
    return Device(
        device=f"cuda:{ordinal}",
        name=_call(driver.cuDeviceGetName, 256, handle).split(b"\0")[0].decode(),
        memory_bytes=_call(driver.cuDeviceTotalMem, handle),
        virtual_memory=virtual_memory,
        driver="CudaDriver" if page_sizes else None,
        page_sizes=page_sizes,
        reason=reason,
    )


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call the driver and return its one result, if it has one."""
    result, *values = function(*arguments)
    if result.name != "CUDA_SUCCESS":
        raise RuntimeError(f"{function.__name__} answered {result.name}")
    return values[0] if values else None
