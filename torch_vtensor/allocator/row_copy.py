"""RowCopier: a step's new keys and values copied to their places by one kernel launch.

torch would take two views and two copies, each with a launch of its own. Here one call into C reads the four tensors
through DLPack's exchange interface and launches one kernel for both; its source is native/row_copy.cu.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

import torch

from torch_vtensor.allocator import native
from torch_vtensor.allocator._torch_compat import tensor_exchange
from torch_vtensor.allocator.ledger import load_library
from torch_vtensor.allocator.native_allocator import read_failure
from torch_vtensor.allocator.nvrtc import compile_cubin
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.errors import DriverError

__all__ = ["CAPTURED", "COPIED", "KERNEL_SOURCE", "NOT_COPIED", "RowCopier", "row_copier"]

NOT_COPIED, COPIED, CAPTURED = range(3)
"""What became of a copy: nothing happened; it runs; each replay of the graph that is being captured will run it."""

KERNEL_SOURCE = Path(native.__file__).with_name("row_copy.cu")

_log = logging.getLogger(__name__)


class _Config(ctypes.Structure):
    _fields_ = (
        ("driver", ctypes.c_char_p),
        ("device", ctypes.c_int32),
        ("image", ctypes.c_char_p),
        ("exchange", ctypes.c_void_p),
        ("release_gil", ctypes.c_void_p),
        ("take_gil", ctypes.c_void_p),
    )


class RowCopier:
    """Copies the new rows of two tensors on one CUDA device with one launch; before `load`, nothing.

    Args:
        device: a CUDA device with its index.
        library: the compiled half of the allocator, which must keep the GIL during calls.
        driver: the CUDA driver's library.
    """

    def __init__(self, device: torch.device, library: ctypes.PyDLL, driver: str = "libcuda.so.1") -> None:
        self.device = device
        self.why_not: str | None = "its kernel is still being compiled"
        """Why rows are left to torch's own kernels; None once they are not."""
        self._library = library
        self._driver = driver
        self._handle: ctypes.c_void_p | None = None  # lives as long as the process, like the kernels in the driver
        library.vtp_rows_open.restype = ctypes.c_void_p
        self._copy = library.vtp_rows_copy
        pointer, tensor = ctypes.c_void_p, ctypes.py_object
        self._copy.argtypes = (pointer, tensor, tensor, ctypes.c_int64, tensor, tensor)

    def load(self, image: bytes, exchange: int) -> None:
        """From here on, copy: with the kernels in ``image``, reading tensors through the table at ``exchange``.

        Raises: DriverError, with the copier as it was.
        """
        gil = (ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread)
        release_gil, take_gil = (ctypes.cast(function, ctypes.c_void_p).value for function in gil)
        config = _Config(self._driver.encode(), self.device.index, image, exchange, release_gil, take_gil)
        handle = self._library.vtp_rows_open(ctypes.byref(config))
        if not handle:
            raise self._failure()
        self._handle = ctypes.c_void_p(handle)
        self.why_not = None

    def copy(
        self, keys: torch.Tensor, values: torch.Tensor, position: int, key: torch.Tensor, value: torch.Tensor
    ) -> int:
        """Write ``key`` and ``value`` to tokens [``position``, ``position`` + T) of ``keys`` and ``values``.

        As ``copy_`` it runs on torch's current stream, behind the work there, and may be captured into a graph. Unlike
        ``copy_`` it leaves the tensors' version counters as they are: autograd learns from them that what it saved for
        a backward pass was overwritten. The caller sees to it that no one else's view shows the rows written here.

        Shapes:  key [B, H, T, D_k], value [B, H, T, D_v]; keys, values [B, H, >= position + T, ...], of their dtypes.
        Returns: NOT_COPIED where a tensor is not for this kernel (another device, rows that are not contiguous, complex
            numbers) or the kernel is not loaded: let torch copy. COPIED or CAPTURED otherwise.
        Raises:  DriverError where the launch fails.
        """
        if key.is_neg() or value.is_neg():  # not yet negated in memory
            return NOT_COPIED
        try:
            result: int = self._copy(self._handle, keys, values, position, key, value)
        except (BufferError, RuntimeError):  # DLPack has no name for the dtype
            return NOT_COPIED
        if result < 0:
            raise self._failure()
        return result

    def _failure(self) -> DriverError:
        failure = read_failure(self._library)
        return DriverError(failure.call, failure.code, self.device, failure.nbytes)


_lock = threading.Lock()
_copiers: dict[torch.device, RowCopier] = {}


def row_copier(device: torch.device) -> RowCopier | None:
    """The device's copier; None for devices whose copies cost no launch.

    Effects: the first call has the kernel compiled in the background, which takes about a fifth of a second.
    """
    if device.type != "cuda":
        return None
    with _lock:
        copier = _copiers.get(device)
        if copier is None:
            copier = _copiers[device] = RowCopier(device, load_library())
            default_scheduler(device).run_soon(lambda: _prepare(copier))
        return copier


def _prepare(copier: RowCopier) -> None:
    try:
        capability = torch.cuda.get_device_capability(copier.device)
        copier.load(compile_cubin(KERNEL_SOURCE.read_bytes(), KERNEL_SOURCE.name, capability), tensor_exchange())
    except (ImportError, RuntimeError) as error:
        copier.why_not = f"{type(error).__name__}: {error}"
        _log.info("new keys and values on %s are copied by torch, two launches a layer: %s", copier.device, error)


def _start_afresh_in_child() -> None:
    # The lock may have been held by a thread that does not exist here; the kernels are in the parent's context.
    global _lock
    _lock = threading.Lock()
    _copiers.clear()


os.register_at_fork(after_in_child=_start_afresh_in_child)
