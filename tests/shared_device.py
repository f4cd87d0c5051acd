"""A device of host memory that several processes share, as they share a GPU."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.errors import DriverError


class SharedDriver(HostDriver):
    """Refuses what does not fit beside the memory of all living processes. What a killed one had is free again.

    Args:
        limit_bytes: what the device has; each process counts its part in a file of the folder SHARED_DEVICE_FOLDER.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(65536, "/dev/shm")
        self._limit_bytes = limit_bytes
        self._folder = Path(os.environ["SHARED_DEVICE_FOLDER"])
        self._own_bytes = 0

    def create(self, nbytes: int) -> int:
        with self._alone():
            if self._used_bytes() + nbytes > self._limit_bytes:
                raise DriverError("create", "ENOMEM", self.device, nbytes)
            handle = super().create(nbytes)
            self._count(nbytes)
        return handle

    def destroy(self, handle: int, nbytes: int) -> None:
        super().destroy(handle, nbytes)
        if handle < 1 << 62:  # the others lie outside the device
            with self._alone():
                self._count(-nbytes)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _count(self, nbytes: int) -> None:
        self._own_bytes += nbytes
        (self._folder / str(os.getpid())).write_text(str(self._own_bytes))

    def _used_bytes(self) -> int:
        counts = [path for path in self._folder.iterdir() if path.name.isdecimal()]
        return sum(int(path.read_text()) for path in counts if Path(f"/proc/{path.name}").exists())
