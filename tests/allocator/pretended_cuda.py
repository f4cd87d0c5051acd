"""Tensors in host memory that C code is told are on a GPU: torch's own exchange table, with another device in it."""

import ctypes

import torch

from torch_vtensor.allocator._torch_compat import tensor_exchange

CUDA = 2


class DLTensor(ctypes.Structure):
    """DLPack's description of a tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


READ = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
CURRENT_STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class Exchange(ctypes.Structure):
    """DLPack's table of functions."""

    _fields_ = (
        ("major_version", ctypes.c_uint32),
        ("minor_version", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("unused", ctypes.c_void_p * 3),
        ("read", READ),
        ("current_stream", CURRENT_STREAM),
    )


class PretendedCuda:
    """A table by which every tensor is on cuda:0, or on the device that ``device_ids`` names for it."""

    def __init__(self) -> None:
        self.stream = 0x51
        self.device_ids: dict[int, int] = {}
        torchs = Exchange.from_address(tensor_exchange())

        @READ
        def read(tensor: torch.Tensor, out: "ctypes._Pointer[DLTensor]") -> int:
            result = torchs.read(tensor, out)
            out.contents.device_type, out.contents.device_id = CUDA, self.device_ids.get(id(tensor), 0)
            return result

        @CURRENT_STREAM
        def current_stream(device_type: int, device_id: int, out: "ctypes._Pointer[ctypes.c_void_p]") -> int:
            assert (device_type, device_id) == (CUDA, 0)
            out[0] = self.stream
            return 0

        self.table = Exchange(torchs.major_version, torchs.minor_version, read=read, current_stream=current_stream)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.table)
