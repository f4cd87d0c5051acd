"""The private torch APIs that the allocator uses. Checked on torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import ctypes

import torch

__all__ = [
    "PoolId",
    "create_memory_pool",
    "num_storage_users",
    "retire_memory_pool",
    "start_routing",
    "stop_routing",
    "tensor_exchange",
]


def num_storage_users(tensor: torch.Tensor) -> int:
    """How many tensors share ``tensor``'s storage, itself included."""
    # The Python storage object made here is one more user of the storage.
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1
    return count


PoolId = tuple[int, int]
"""What torch's caching allocator knows a memory pool by."""


def create_memory_pool(allocator: torch.cuda.CUDAPluggableAllocator, device_index: int) -> PoolId:
    """A pool of torch's caching allocator whose segments come from ``allocator``; it lives until `retire_memory_pool`.

    No ``torch.cuda.MemPool`` object stays: the destructor of the last user of a pool aborts the process while any
    thread routes allocations (until torch 2.12) or captures a graph. It is harmless for a pool that has another user,
    so we become one, and stop being one in a call that only marks the pool as releasable.
    """
    with torch.cuda.device(device_index):
        pool = torch.cuda.MemPool(allocator.allocator())
        pool_id: PoolId = pool.id
        torch._C._cuda_beginAllocateCurrentThreadToPool(device_index, pool_id)
        torch._C._cuda_endAllocateToPool(device_index, pool_id)
        del pool
    return pool_id


def retire_memory_pool(pool_id: PoolId, device_index: int) -> None:
    """No one allocates there any more: ``torch.cuda.empty_cache()`` may release its segments once they are unused."""
    torch._C._cuda_releasePool(device_index, pool_id)


def start_routing(pool_id: PoolId, device_index: int) -> None:
    """Send the calling thread's allocations on the device to the pool, until `stop_routing`."""
    torch._C._cuda_beginAllocateCurrentThreadToPool(device_index, pool_id)


def stop_routing(pool_id: PoolId, device_index: int) -> None:
    """End what `start_routing` began; any thread may do it."""
    torch._C._cuda_endAllocateToPool(device_index, pool_id)
    torch._C._cuda_releasePool(device_index, pool_id)


def tensor_exchange() -> int:
    """The address of torch's DLPackExchangeAPI: how C reads a tensor and finds the current stream.

    DLPack itself, attribute and capsule included, is public; that torch has its version 1 is what to check.
    """
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address: int = get_pointer(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    return address
