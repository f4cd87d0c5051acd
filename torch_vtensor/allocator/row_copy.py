"""RowCopier: a step's new keys and values copied to their places by one call.

torch would take two views and two copies, on CUDA each with a launch of its own. Here one call into C reads the four
tensors through DLPack's exchange interface and, on CUDA, launches one kernel for both (native/row_copy.cu).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from torch_vtensor.allocator import native
from torch_vtensor.allocator._torch_compat import tensor_exchange
from torch_vtensor.allocator.ledger import load_library
from torch_vtensor.allocator.native_allocator import read_failure
from torch_vtensor.allocator.nvrtc import compile_cubin
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.errors import DriverError

__all__ = ["CAPTURED", "KERNEL_SOURCE", "NOT_COPIED", "RowCopier", "row_copier"]

NOT_COPIED = 0
CAPTURED = 1 << 40
"""Or-ed to the number of tokens: each replay of the graph that is being captured will copy them."""

KERNEL_SOURCE = Path(native.__file__).with_name("row_copy.cu")

_METH_FASTCALL = 0x80
_log = logging.getLogger(__name__)


class _Python(ctypes.Structure):
    _fields_ = (
        ("release_gil", ctypes.c_void_p),
        ("take_gil", ctypes.c_void_p),
        ("capsule_pointer", ctypes.c_void_p),
        ("read_int", ctypes.c_void_p),
        ("make_int", ctypes.c_void_p),
        ("clear_error", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
        ("on_failure", ctypes.py_object),
    )

    @classmethod
    def calling(cls, on_failure: Callable[[], NoReturn]) -> _Python:
        names = (
            "PyEval_SaveThread", "PyEval_RestoreThread", "PyCapsule_GetPointer", "PyLong_AsLongLong",
            "PyLong_FromLongLong", "PyErr_Clear", "PyObject_CallNoArgs",
        )  # fmt: skip
        functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in names]
        return cls(*functions, on_failure)


class _Config(ctypes.Structure):
    _fields_ = (
        ("driver", ctypes.c_char_p),
        ("device", ctypes.c_int32),
        ("image", ctypes.c_char_p),
        ("exchange", ctypes.c_void_p),
        ("python", _Python),
    )


class _MethodDef(ctypes.Structure):
    """PyMethodDef: a function of C as Python's interpreter calls it, with less around it than ctypes puts there."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_python = ctypes.pythonapi
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _python)
)
_new_function = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.POINTER(_MethodDef), ctypes.py_object, ctypes.c_void_p)(
    ("PyCFunction_NewEx", _python)
)


class RowCopier:
    """Copies the new rows of two tensors on one device by one call; before `load`, nothing.

    Args:
        device: the host, or a CUDA device with its index.
        library: the compiled half of the allocator, which must keep the GIL during calls.
        driver: the CUDA driver's library.
    """

    write: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor], int]
    """Write key and value to tokens [position, position + T) of keys and values: ``write(keys, values, position, key,
    value)``.

    As ``copy_`` it runs on torch's current stream, behind the work there, and may be captured into a graph. Unlike
    ``copy_`` it leaves the tensors' version counters as they are: autograd learns from them that what it saved for
    a backward pass was overwritten. The caller sees to it that no one else's view shows the rows written here.

    Shapes:  key [B, H, T, D_k], value [B, H, T, D_v]; keys, values [B, H, >= position + T, ...], of their dtypes.
    Returns: T once they are copied; T | CAPTURED where a graph is being captured; NOT_COPIED where a tensor is not for
        this copier (another device or shape, rows that are not contiguous, complex numbers, nothing to copy, on the
        host also much to copy) or nothing is loaded: let torch copy.
    Raises:  DriverError where the launch fails.
    """

    def __init__(self, device: torch.device, library: ctypes.PyDLL, driver: str = "libcuda.so.1") -> None:
        self.device = device
        self.write = _write_nothing
        self.why_not: str | None = "its kernel is still being compiled"
        """Why rows are left to torch's own kernels; None once they are not."""
        self._library = library
        self._driver = driver.encode() if device.type == "cuda" else None
        self._method: _MethodDef | None = None  # to live as long as the function that it describes
        self._on_failure: Callable[[], NoReturn] | None = None  # to live as long as C knows it
        library.vtp_rows_open.restype = ctypes.c_void_p

    def load(self, image: bytes | None, exchange: int) -> None:
        """From here on, copy: with the kernels in ``image``, reading tensors through the table at ``exchange``.

        Raises: DriverError, with the copier as it was.
        """
        python = _Python.calling(self._fail)
        config = _Config(self._driver, self.device.index or 0, image, exchange, python)
        handle = self._library.vtp_rows_open(ctypes.byref(config))
        if not handle:
            self._fail()
        # The handle, like the kernels in the driver, lives as long as the process.
        self.write = self._function_of(_new_capsule(handle, None, None))
        self._on_failure = python.on_failure
        self.why_not = None

    def _function_of(self, capsule: object) -> Callable[..., int]:
        function = ctypes.cast(self._library.vtp_rows_call, ctypes.c_void_p)
        self._method = _MethodDef(b"write", function, _METH_FASTCALL, None)
        made: Callable[..., int] = _new_function(ctypes.byref(self._method), capsule, None)
        return made

    def _fail(self) -> NoReturn:
        failure = read_failure(self._library)
        raise DriverError(failure.call, failure.code, self.device, failure.nbytes)


def _write_nothing(
    keys: torch.Tensor, values: torch.Tensor, position: int, key: torch.Tensor, value: torch.Tensor
) -> int:
    return NOT_COPIED


_lock = threading.Lock()
_copiers: dict[torch.device, RowCopier] = {}


def row_copier(device: torch.device) -> RowCopier:
    """The device's copier, which leaves everything to torch where none can be made.

    Effects: the first call for a CUDA device has the kernel compiled in the background, which takes about a fifth of a
        second.
    """
    with _lock:
        copier = _copiers.get(device)
        if copier is None:
            copier = _copiers[device] = RowCopier(device, load_library())
            if device.type == "cuda":
                made = copier
                default_scheduler(device).run_soon(lambda: _prepare(made))
            else:
                copier.load(None, tensor_exchange())
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
