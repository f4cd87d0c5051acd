"""CudaDriver: CUDA virtual memory management through cuda-python. The only Python file that calls cuMem*.

Costs on an H200, which shape everything above: reserving is free; create 8, map 1.4, set_access 23, unmap 15 and
destroy 10 us a handle, nearly independent of the handle's size. None of them waits for the device.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from torch_vtensor.allocator.captures import another_captures, between_captures, captures_here
from torch_vtensor.allocator.driver import Pins
from torch_vtensor.allocator.host_memory import cpus_of_node, spare_host_bytes
from torch_vtensor.allocator.pinned_memory import PinnedMemory
from torch_vtensor.errors import DriverError, ForkedProcessError

__all__ = ["CudaDriver", "format_version"]

_LARGE_PAGE_BYTES = 32 * 2**20
_OLDEST_DRIVER = 12050  # cuCtxRecordEvent, by which memory is taken back behind all streams, is of CUDA 12.5
_CAPTURE_NONE = 0
_EVENT_DISABLE_TIMING = 2

_SEM_BYTES = 64  # sizeof(sem_t) is 32 on 64-bit Linux

_libc = ctypes.CDLL(None)
_libc.calloc.restype = ctypes.c_void_p
_libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]


class _EventFence:
    """An event that has passed when all work submitted before it is done: on one stream, or on any of the context."""

    def __init__(self, driver: CudaDriver, stream: int | None) -> None:
        self._driver = driver
        # An event belongs to the context that is current, and on a thread new to CUDA none is.
        driver.call("cuCtxPushCurrent", 0, driver.context)
        try:
            self._event = driver.call("cuEventCreate", 0, _EVENT_DISABLE_TIMING)
            if stream is not None:
                driver.call("cuEventRecord", 0, self._event, stream)
                return
            with between_captures():
                driver.call("cuCtxRecordEvent", 0, driver.context, self._event)
        finally:
            driver.call("cuCtxPopCurrent", 0)

    def passed(self) -> bool:
        (error,) = self._driver.cuda.cuEventQuery(self._event)
        return bool(error == self._driver.cuda.CUresult.CUDA_SUCCESS)

    def wait(self) -> None:
        self._driver.call("cuEventSynchronize", 0, self._event)

    def order_after(self) -> None:
        stream = torch.cuda.current_stream(self._driver.device).cuda_stream
        self._driver.call("cuStreamWaitEvent", 0, stream, self._event, 0)

    def __del__(self) -> None:
        # Allowed while the event is pending: the driver frees it once it has passed.
        if hasattr(self, "_event"):
            self._driver.cuda.cuEventDestroy(self._event)


class _GraphLease:
    """Keeps an object alive until a captured graph, and everything instantiated from it, is destroyed.

    The graph owns a CUDA user object whose destructor is libc's ``sem_post`` on a semaphore of ours: it runs on a
    driver thread, where taking Python's lock could deadlock, so it only posts and ``ended`` looks. The semaphore is
    no Python object, because a graph may outlive the interpreter.
    """

    def __init__(self, cuda: Any, graph: Any, owner: object) -> None:
        self.owner = owner
        self._semaphore = ctypes.c_void_p(_libc.calloc(1, _SEM_BYTES))
        _libc.sem_init(self._semaphore, 0, 0)
        post = ctypes.cast(_libc.sem_post, ctypes.c_void_p).value
        no_sync = cuda.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        error, user_object = cuda.cuUserObjectCreate(self._semaphore.value, cuda.CUhostFn(post), 1, no_sync.value)
        if error == cuda.CUresult.CUDA_SUCCESS:
            move = cuda.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
            (error,) = cuda.cuGraphRetainUserObject(graph, user_object, 1, move.value)
        if error != cuda.CUresult.CUDA_SUCCESS:
            raise DriverError("cuGraphRetainUserObject", error.name, torch.device("cuda"), 0)

    def ended(self) -> bool:
        """True, once, when the graph is gone; do not ask again after that."""
        if _libc.sem_trywait(self._semaphore) != 0:
            return False
        _libc.free(self._semaphore)
        return True


class CudaDriver:
    """Virtual memory of one CUDA device.

    Args:
        device: a CUDA device; the current one where it names no index.

    Raises: DriverError where the device or driver has no virtual memory management, or the driver is older than CUDA
        12.5; ImportError, with the remedy, without cuda-python.
    """

    # To map 2 MiB of the host takes 75 us and to unmap them 40, where they are copied in 38.
    keeps_offloaded_mapped = True
    # A mapping call costs the same for one page as for many tokens, but bytes committed ahead are bytes that no one
    # else can use: the scheduler maps one page ahead in time instead.
    growth_fraction = 0.0
    zeroes_pages = False
    fences_break_captures = True

    def __init__(self, device: torch.device | str | int = "cuda") -> None:
        try:
            from cuda.bindings import driver as cuda
        except ImportError as error:
            raise ImportError(
                "CUDA memory needs cuda-python: pip install 'torch-vtensor[cuda]' (or cuda-bindings)"
            ) from error
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        torch.cuda.init()
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.cuda = cuda
        self._pid = os.getpid()
        self._graph_leases: list[_GraphLease] = []
        self._capture_streams: frozenset[int] = frozenset()
        with torch.cuda.device(index):
            torch.cuda.current_stream().query()  # the primary context exists from here on
            self.context = self.call("cuCtxGetCurrent", 0)
        version = self.call("cuDriverGetVersion", 0)
        if version < _OLDEST_DRIVER:
            wanted = format_version(_OLDEST_DRIVER)
            hint = f"the driver is of CUDA {format_version(version)}; install one of CUDA {wanted} or later"
            raise DriverError("cuCtxRecordEvent", "CUDA_ERROR_NOT_SUPPORTED", self.device, 0, hint)

        self._properties = cuda.CUmemAllocationProp()
        self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = index
        self._offloaded_properties = cuda.CUmemAllocationProp()
        self._offloaded_properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        nearest = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
        node = int(self.call("cuDeviceGetAttribute", 0, nearest, self.call("cuDeviceGet", 0, index)))
        location = self._offloaded_properties.location
        location.type = (
            cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST_NUMA
            if node >= 0
            else cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST
        )
        location.id = max(node, 0)
        can_pin = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED
        self.pins: Pins | None = (
            PinnedMemory(self.device, self._pin, self._unpin, cpus_of_node(node))
            if self.call("cuDeviceGetAttribute", 0, can_pin, self.call("cuDeviceGet", 0, index))
            else None
        )
        self._access = cuda.CUmemAccessDesc()
        self._access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = index
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        recommended = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        granularity = int(self.call("cuMemGetAllocationGranularity", 0, self._properties, recommended))
        large = max(_LARGE_PAGE_BYTES // granularity, 1) * granularity
        self.page_sizes: tuple[int, ...] = (granularity, large) if large > granularity else (granularity,)

    def reserve(self, nbytes: int) -> int:
        return int(self.call("cuMemAddressReserve", nbytes, nbytes, 0, 0, 0))

    def release(self, ptr: int, nbytes: int) -> None:
        self.call("cuMemAddressFree", nbytes, ptr, nbytes)

    def create(self, nbytes: int) -> int:
        return int(self.call("cuMemCreate", nbytes, nbytes, self._properties, 0))

    def check_offload(self, nbytes: int) -> None:
        if (spare_bytes := spare_host_bytes()) < nbytes:
            hint = f"the host has {spare_bytes} bytes to spare, and would kill a process that pins more"
            raise DriverError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY", self.device, nbytes, hint)

    def create_offloaded(self, nbytes: int) -> int:
        return int(self.call("cuMemCreate", nbytes, nbytes, self._offloaded_properties, 0))

    def destroy(self, handle: int, nbytes: int) -> None:
        self.call("cuMemRelease", nbytes, handle)

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        self.call("cuMemMap", nbytes, ptr, nbytes, 0, handle, 0)

    def set_access(self, ptr: int, nbytes: int) -> None:
        self.call("cuMemSetAccess", nbytes, ptr, nbytes, [self._access], 1)

    def unmap(self, ptr: int, nbytes: int) -> None:
        self.call("cuMemUnmap", nbytes, ptr, nbytes)

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        # torch would name the direction, device to device; the driver finds out which side is the host's.
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._in_context("cuMemcpyAsync", nbytes, target_ptr, source_ptr, nbytes, stream)

    def tensor(self, ptr: int, nbytes: int, owner: object) -> torch.Tensor:
        # An empty array names no address, since nothing may be mapped there and torch asks the driver what is.
        return torch.as_tensor(_CudaArray(ptr if nbytes else 0, nbytes, owner), device=self.device)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def fence(self) -> _EventFence:
        return _EventFence(self, None)

    def copied(self) -> _EventFence:
        return _EventFence(self, torch.cuda.current_stream(self.device).cuda_stream)

    def is_capturing(self) -> bool:
        # A fence would break a capture on any stream of the context: also look at those that others captured on.
        return (
            another_captures()
            or torch.cuda.is_current_stream_capturing()
            or any(map(self._is_stream_capturing, self._capture_streams))
        )

    def is_capturing_here(self) -> bool:
        return captures_here() or torch.cuda.is_current_stream_capturing()

    def prepare_thread(self) -> None:
        torch.cuda.set_device(self.device)
        # Another thread may be capturing a graph, in which the default mode forbids event queries on every thread.
        self.call("cuThreadExchangeStreamCaptureMode", 0, self.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)

    def retain_in_capture(self, owner: object) -> None:
        if not torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device).cuda_stream
        error, _, _, graph, *_ = self.cuda.cuStreamGetCaptureInfo(stream)
        if error != self.cuda.CUresult.CUDA_SUCCESS:
            raise DriverError("cuStreamGetCaptureInfo", error.name, self.device, 0)
        self._capture_streams = self._capture_streams | {stream}
        self._graph_leases.append(_GraphLease(self.cuda, graph, owner))

    def collect(self) -> None:
        for lease in list(self._graph_leases):
            if lease.ended():
                self._graph_leases.remove(lease)  # in place: another thread may be adding one

    def call(self, name: str, nbytes: int, *arguments: object) -> Any:
        """Call a driver function and return its first result; ``nbytes`` is what the error message will say."""
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"{name} on {self.device}: CUDA cannot be used in a process made by fork() after CUDA was initialised. "
                "Start workers with the 'spawn' method."
            )
        error, *values = getattr(self.cuda, name)(*arguments)
        if error != self.cuda.CUresult.CUDA_SUCCESS:
            raise DriverError(name, error.name, self.device, nbytes)
        return values[0] if values else None

    def _pin(self, ptr: int, nbytes: int) -> None:
        self._in_context("cuMemHostRegister", nbytes, ptr, nbytes, 0)

    def _unpin(self, ptr: int, nbytes: int) -> None:
        self._in_context("cuMemHostUnregister", nbytes, ptr)

    def _in_context(self, name: str, nbytes: int, *arguments: object) -> None:
        """Call a function that works on the context that is current, on a thread where none may be."""
        self.call("cuCtxPushCurrent", nbytes, self.context)
        try:
            self.call(name, nbytes, *arguments)
        finally:
            self.call("cuCtxPopCurrent", nbytes)

    def _is_stream_capturing(self, stream: int) -> bool:
        error, status = self.cuda.cuStreamIsCapturing(stream)
        return error != self.cuda.CUresult.CUDA_SUCCESS or int(status) != _CAPTURE_NONE


def format_version(number: int) -> str:
    """What the driver means by a version such as 12050: 12.5."""
    return f"{number // 1000}.{number % 1000 // 10}"


class _CudaArray:
    """The CUDA array interface of raw device bytes; torch keeps this object, and with it ``owner``, alive."""

    def __init__(self, ptr: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (ptr, False),
            "version": 3,
            "strides": None,
        }
