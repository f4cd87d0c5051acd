"""What CudaDriver says where it cannot work, on a pretended GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from torch_vtensor.allocator.cuda_driver import CudaDriver
from torch_vtensor.errors import DriverError

bindings = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings, which is not installed here")


def test_a_driver_too_old_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    success = bindings.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=lambda: True))
    monkeypatch.setattr(bindings, "cuCtxGetCurrent", lambda: (success, 1))
    monkeypatch.setattr(bindings, "cuDriverGetVersion", lambda: (success, 12040))
    with pytest.raises(DriverError, match=r"on cuda:0.*is of CUDA 12\.4; install one of CUDA 12\.5 or later"):
        CudaDriver(0)
