"""The protocol between the allocator and a kind of memory: addresses, physical pages, and binding one to the other.

Two implementations exist, ``cuda_driver.CudaDriver`` and ``host_driver.HostDriver``, and one contract suite
(tests/allocator/test_driver_contract.py) that both pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

__all__ = ["Driver", "Fence", "Pins", "round_up"]


class Fence(Protocol):
    """A point in the device's work: everything submitted before it was made."""

    def passed(self) -> bool:
        """True once the device has done all work before the fence. Never waits."""

    def wait(self) -> None:
        """Block the host until the fence has passed: only for memory that must come back now."""

    def order_after(self) -> None:
        """Make the current stream's next work start after the fence. The host does not wait."""


class Pins(Protocol):
    """A way to memory outside the device that is only good for copies, and had sooner than what can be mapped."""

    def pin(self, sizes: Sequence[int], keep: Callable[[int, int], object]) -> None:
        """Call ``keep`` with the address and size of new memory; raise DriverError in the end if some was refused."""

    def unpin(self, ptr: int, nbytes: int) -> None:
        """Give memory back to the system."""


class Driver(Protocol):
    """What the allocator needs of a device. No method waits for the device; each raises DriverError on refusal.

    Units:   bytes everywhere; addresses are plain integers.
    Source:  vTensor (arXiv 2407.15309) section 4, the operations below vAlloc, vFree and pAlloc.
    """

    device: torch.device
    page_sizes: tuple[int, ...]
    """Sizes a handle may have, ascending; each divides the next. The first is the granularity of every address."""
    keeps_offloaded_mapped: bool
    """Whether memory outside the device is slow to map: better once and for all, for copies to and from it."""
    pins: Pins | None
    """Where memory outside the device for copies alone is better from."""
    growth_fraction: float
    """How much of a range's committed bytes is worth committing ahead in one batch when it grows."""
    zeroes_pages: bool
    """Whether what ``create`` returns surely holds zeros, whatever was destroyed before."""
    fences_break_captures: bool
    """Whether a fence breaks a capture that another thread has under way."""

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses, aligned to the granularity, and return the first. Takes no physical memory."""

    def release(self, ptr: int, nbytes: int) -> None:
        """Give back a whole reservation in which nothing is mapped any more."""

    def create(self, nbytes: int) -> int:
        """Create physical memory of one of ``page_sizes`` and return its handle."""

    def check_offload(self, nbytes: int) -> None:
        """Raise the error that there is no memory outside the device, if so many bytes more would bring harm there."""

    def create_offloaded(self, nbytes: int) -> int:
        """Create memory outside the device's own, of one of ``page_sizes``: a handle that maps like any other, slower.

        For a GPU that is pinned memory of the host, for the CPU a file on a disk.
        """

    def destroy(self, handle: int, nbytes: int) -> None:
        """Return a handle's memory to the system; it must not be mapped anywhere."""

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        """Bind a whole handle to reserved addresses. Usable only after ``set_access``."""

    def set_access(self, ptr: int, nbytes: int) -> None:
        """Make mapped addresses readable and writable by the device."""

    def unmap(self, ptr: int, nbytes: int) -> None:
        """Unbind whole handles from their addresses, which stay reserved."""

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        """Copy between mapped addresses, behind the current stream's work and before its next."""

    def tensor(self, ptr: int, nbytes: int, owner: object) -> torch.Tensor:
        """A uint8 tensor [nbytes] over ``ptr`` whose storage keeps ``owner`` alive until its last view is gone.

        With ``nbytes`` 0 nothing needs to be mapped at ``ptr``.
        """

    def free_bytes(self) -> int:
        """Physical memory of the device that nobody uses at this moment."""

    def fence(self) -> Fence:
        """Mark the device's work as submitted so far, on every stream."""

    def copied(self) -> Fence:
        """Mark the current stream's work as submitted so far: cheaper than ``fence``, and for this thread's copies."""

    def is_capturing(self) -> bool:
        """True while the current stream, or one known to be captured at times, is being captured into a graph.

        No fence may be made or asked then.
        """

    def is_capturing_here(self) -> bool:
        """Whether it is the calling thread that captures: to wait for the end would be in vain."""

    def prepare_thread(self) -> None:
        """Make the calling thread fit to call this driver."""

    def retain_in_capture(self, owner: object) -> None:
        """If the current stream is being captured into a graph, keep ``owner`` alive as long as that graph."""

    def collect(self) -> None:
        """Let go of what ended graphs kept alive."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
