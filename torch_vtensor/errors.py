"""The exceptions of torch_vtensor: what failed, with which numbers, and what to do about it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "AsleepError",
    "CapacityError",
    "ClosedError",
    "DriverError",
    "ForkedProcessError",
    "OffloadLimitError",
    "OutOfPagesError",
    "VTensorError",
]


class VTensorError(RuntimeError):
    """Base of every error that is about a resource and not about a caller's argument.

    Can be pickled, as worker processes do to hand an error to the one that waits for them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made again from its message, which is not what our __init__ functions take.
        return _restore, (type(self), self.args, self.__dict__)


class OutOfPagesError(VTensorError, torch.OutOfMemoryError):
    """No physical page is left for a request; every tensor is as it was before the call.

    Also a ``torch.OutOfMemoryError``, so code that already handles running out of memory handles this.

    The message names what was the limit, the budget or the device itself, and what helps against that one.

    Args:
        budget_bytes: the budget that is set, whether or not it was the limit; None: there is none, or none any more.
        is_device_full: the device had no more, within the budget or without one.

    Units: bytes in every field.
    """

    def __init__(
        self,
        device: torch.device,
        asked_bytes: int,
        committed_bytes: int,
        budget_bytes: int | None,
        *,
        is_device_full: bool = False,
        is_capturing: bool = False,
    ) -> None:
        self.device = device
        self.asked_bytes = asked_bytes
        self.committed_bytes = committed_bytes
        self.budget_bytes = budget_bytes
        self.is_device_full = is_device_full
        if is_device_full:
            within = "" if budget_bytes is None else f" of a budget of {_mib(budget_bytes)}"
            limit = f"{_mib(committed_bytes)} committed{within}, and the device has no more"
            last = "have torch let go of what it caches (torch.cuda.empty_cache())" if device.type == "cuda" else ""
        else:
            budget = "was exceeded, and is another now" if budget_bytes is None else f"is {_mib(budget_bytes)}"
            limit = f"{_mib(committed_bytes)} committed, and the budget {budget}"
            last = "raise the budget (budget_bytes= of enable(), or TORCH_VTENSOR_BUDGET_BYTES)"
        kept = " While a graph is being captured, nothing is taken back: commit before." if is_capturing else ""
        super().__init__(
            f"out of pages on {device}: asked for {_mib(asked_bytes)} more with {limit}. Nothing was changed. "
            "Call torch_vtensor.trim(), move what is idle elsewhere (torch_vtensor.offload(cache) or sleep()), close "
            f"or shorten sequences, take a smaller batch{', or ' + last if last else ''}.{kept}"
        )


class CapacityError(VTensorError, ValueError):
    """A tensor was asked to hold more rows than the address range that it reserved."""

    def __init__(self, asked_rows: int, capacity: int) -> None:
        self.asked_rows = asked_rows
        self.capacity = capacity
        super().__init__(
            f"{asked_rows} rows do not fit the reserved capacity of {capacity}. Reserving costs addresses, not memory: "
            f"create the tensor with capacity >= {asked_rows}."
        )


class AsleepError(VTensorError):
    """A VTensor was used between ``sleep()`` and ``wake()``."""


class OffloadLimitError(VTensorError):
    """More was to be offloaded than may be; everything stays where it was."""

    def __init__(self, device: torch.device, asked_bytes: int, offloaded_bytes: int, limit_bytes: int) -> None:
        self.device = device
        self.asked_bytes = asked_bytes
        self.offloaded_bytes = offloaded_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            f"{_mib(asked_bytes)} more of {device} cannot be offloaded with {_mib(offloaded_bytes)} offloaded, and the "
            f"limit is {_mib(limit_bytes)}. Raise it (TORCH_VTENSOR_OFFLOAD_BYTES), or discard what can be computed "
            "again (sleep(discard=...))."
        )


class ClosedError(VTensorError):
    """A VTensor was used after close()."""


class ForkedProcessError(VTensorError):
    """Memory made before os.fork() was asked to change in the child process."""


class DriverError(VTensorError):
    """A memory driver refused a call.

    ``code`` is the driver's own name of the failure (a CUresult or an errno name).
    """

    def __init__(self, call: str, code: str, device: torch.device, nbytes: int, hint: str = "") -> None:
        self.call = call
        self.code = code
        self.device = device
        self.nbytes = nbytes
        super().__init__(f"{call} failed with {code} on {device} for {nbytes} bytes" + (f": {hint}" if hint else ""))

    @property
    def is_out_of_memory(self) -> bool:
        """True where the driver says that physical memory has run out."""
        return self.code in ("CUDA_ERROR_OUT_OF_MEMORY", "ENOSPC", "ENOMEM")


def _restore(kind: type[VTensorError], args: tuple[Any, ...], fields: dict[str, Any]) -> VTensorError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
