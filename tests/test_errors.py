"""Errors say what happened wherever they arrive, also in another process."""

import copy
import pickle

import pytest
import torch

from torch_vtensor.errors import CapacityError, ClosedError, DriverError, OutOfPagesError, VTensorError

DEVICE = torch.device("cuda", 1)


@pytest.mark.parametrize(
    "error",
    [
        OutOfPagesError(DEVICE, 3 << 20, 5 << 20, 6 << 20),
        OutOfPagesError(DEVICE, 3 << 20, 5 << 20, None, is_device_full=True),
        OutOfPagesError(DEVICE, 3 << 20, 5 << 20, None),  # over a budget that was taken back meanwhile
        CapacityError(5, 4),
        ClosedError("closed"),
        DriverError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY", DEVICE, 64, "a hint"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_process_can_hand_an_error_on(error: VTensorError) -> None:
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is type(error)
        assert str(same) == str(error)
        assert vars(same) == vars(error)
