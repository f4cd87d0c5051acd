"""A CUDA driver without a GPU (fake_cuda.c), and torch_vtensor's native library built from source to run on it."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import torch

from torch_vtensor.allocator import native
from torch_vtensor.allocator.native_allocator import NativeAllocator
from torch_vtensor.errors import DriverError

MIB = 2**20
PAGE = 2 * MIB
LARGE_PAGE = 32 * MIB
NOT_CAPTURING, CAPTURING, CAPTURING_IMPLICITLY, CAPTURING_UNNOTICED = range(4)
OUT_OF_MEMORY = 2
INVALID_VALUE = 1
_CODES = {OUT_OF_MEMORY: "CUDA_ERROR_OUT_OF_MEMORY", INVALID_VALUE: "CUDA_ERROR_INVALID_VALUE"}

HERE = Path(__file__).parent
NATIVE = Path(native.__file__).parent
COMPILER = [*shlex.split(os.environ.get("CC", "cc")), "-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror"]


def compile_c(output: Path, *arguments: str | Path) -> None:
    """Run the C compiler; a failure shows what it said."""
    command = [*COMPILER, *map(str, arguments), "-o", str(output), "-pthread", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def build(folder: Path, *flags: str) -> tuple[Path, Path]:
    """Build the fake driver and the native library; returns both paths."""
    driver, library = folder / "libfakecuda.so", folder / "libvtensor_pool.so"
    compile_c(driver, *flags, "-O1", "-fPIC", "-shared", f"-I{NATIVE}", HERE / "fake_cuda.c")
    compile_c(library, *flags, "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *sorted(NATIVE.glob("*.c")))
    return driver, library


class FakeCounts(ctypes.Structure):
    """What is alive in the fake; the last two are the calling thread's."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "num_reserved", "num_mapped", "num_handles", "created_bytes", "num_events", "num_modules", "num_contexts",
            "context_depth", "capture_mode",
        )
    )  # fmt: skip


class Launch(ctypes.Structure):
    """A launch of a kernel that copies ``width`` bytes at once."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
    )


class FakeCuda:
    """Controls the fake driver in this process."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fake_num_calls.restype = ctypes.c_int64
        self.library.fake_fail_in.restype = ctypes.c_int64
        self.library.fake_violation.restype = ctypes.c_char_p
        self.library.fake_read_page.restype = ctypes.c_uint64
        for name, arguments in (
            ("fake_reset", [ctypes.c_uint64]),
            ("fake_set_memory", [ctypes.c_uint64]),
            ("fake_fail", [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int]),
            ("fake_launch", [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]),
            ("fake_finish", [ctypes.c_void_p]),
            ("fake_set_capture", [ctypes.c_void_p, ctypes.c_int]),
            ("fake_set_context", [ctypes.c_void_p]),
            ("cuCtxPushCurrent_v2", [ctypes.c_void_p]),
            ("cuMemCreate", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_ulonglong]),
            ("cuMemRelease", [ctypes.c_uint64]),
            ("cuMemAddressReserve", [ctypes.c_void_p, *[ctypes.c_uint64] * 3, ctypes.c_ulonglong]),
            ("cuMemAddressFree", [ctypes.c_uint64] * 2),
            ("cuMemMap", [*[ctypes.c_uint64] * 4, ctypes.c_ulonglong]),
            ("cuMemSetAccess", [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t]),
            ("cuMemUnmap", [ctypes.c_uint64] * 2),
            ("cuMemcpyAsync", [*[ctypes.c_uint64] * 3, ctypes.c_void_p]),
            ("fake_write_page", [ctypes.c_uint64] * 2),
            ("fake_read_page", [ctypes.c_uint64]),
        ):
            getattr(self.library, name).argtypes = arguments

    def reset(self, memory_bytes: int = 4096 * MIB) -> None:
        self.library.fake_reset(memory_bytes)

    def set_memory(self, memory_bytes: int) -> None:
        self.library.fake_set_memory(memory_bytes)

    def fail(self, nth: int = 0, every: str = "", code: int = INVALID_VALUE) -> None:
        """Fail the nth call from now on, of those that can fail, and every call named in `every`."""
        self.library.fake_fail(nth, every.encode(), code)

    def fail_nothing(self) -> bool:
        """Let all calls succeed again; returns whether the nth call has come."""
        has_come = bool(self.library.fake_fail_in() == 0)
        self.fail()
        return has_come

    def write(self, address: int, nbytes: int, content: int) -> None:
        """Give every page of a segment a content of its own."""
        for index, ptr in enumerate(_page_starts(address, nbytes)):
            self.library.fake_write_page(ptr, content + index)

    def read(self, address: int, nbytes: int) -> list[int]:
        """What the pages of a segment hold."""
        return [self.library.fake_read_page(ptr) for ptr in _page_starts(address, nbytes)]

    def launch(self, stream: int, address: int, nbytes: int) -> None:
        """Run a kernel that touches these bytes until its stream is finished."""
        self.library.fake_launch(stream, address, nbytes)

    def finish(self, stream: int) -> None:
        self.library.fake_finish(stream)

    def set_capture(self, stream: int, capture: int) -> None:
        self.library.fake_set_capture(stream, capture)

    def set_context(self, context: int | None) -> None:
        """Make a context current on the calling thread, as torch does with its device's."""
        self.library.fake_set_context(context)

    def set_queue_full(self, full: bool) -> None:
        """Let launches wait as long as the device has no room for them."""
        self.library.fake_set_queue_full(full)

    def set_stuck(self, stuck: bool) -> None:
        """Let whoever waits for an event go on waiting as long as the device is stuck."""
        self.library.fake_set_stuck(stuck)

    def num_waiting(self) -> int:
        return int(self.library.fake_num_waiting())

    def last_launch(self) -> Launch:
        launch = Launch()
        self.library.fake_read_launch(ctypes.byref(launch))
        return launch

    def num_calls(self, name: str = "") -> int:
        return int(self.library.fake_num_calls(name.encode()))

    def counts(self) -> FakeCounts:
        counts = FakeCounts()
        self.library.fake_read(ctypes.byref(counts))
        return counts

    @property
    def violation(self) -> str:
        return str(self.library.fake_violation().decode())

    def check_sound(self) -> None:
        """No rule was broken, and the calling thread is as it was before."""
        assert self.violation == "", self.violation
        counts = self.counts()
        assert (counts.context_depth, counts.capture_mode) == (0, 0)


def _page_starts(address: int, nbytes: int) -> list[int]:
    num_large = nbytes // LARGE_PAGE
    starts = [index * LARGE_PAGE for index in range(num_large)]
    return [address + start for start in [*starts, *range(num_large * LARGE_PAGE, nbytes, PAGE)]]


class _PassedFence:
    """The fake copies on the spot."""

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class _Zeroes:
    """A tensor that can be made zeros."""

    def __init__(self, fake: FakeCuda, ptr: int, nbytes: int) -> None:
        self.zero_ = lambda: [fake.library.fake_write_page(start, 0) for start in _page_starts(ptr, nbytes)]


class FakeDriver:
    """A `Driver` on the fake: its pages and the native allocator's are of one kind."""

    device = torch.device("cuda", 0)
    page_sizes = (PAGE, LARGE_PAGE)
    keeps_offloaded_mapped = True
    pins = None
    growth_fraction = 0.0
    zeroes_pages = False
    fences_break_captures = True

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self._cuda = fake.library

    def reserve(self, nbytes: int) -> int:
        ptr = ctypes.c_uint64()
        self._in_context("cuMemAddressReserve", nbytes, ctypes.byref(ptr), nbytes, 0, 0, 0)
        return ptr.value

    def release(self, ptr: int, nbytes: int) -> None:
        self._in_context("cuMemAddressFree", nbytes, ptr, nbytes)

    def map(self, ptr: int, nbytes: int, handle: int) -> None:
        self._cuda.fake_set_sharing(1)  # what could not be unmapped yet may be mapped again
        try:
            self._in_context("cuMemMap", nbytes, ptr, nbytes, 0, handle, 0)
        finally:
            self._cuda.fake_set_sharing(0)

    def set_access(self, ptr: int, nbytes: int) -> None:
        self._in_context("cuMemSetAccess", nbytes, ptr, nbytes, None, 1)

    def unmap(self, ptr: int, nbytes: int) -> None:
        self._in_context("cuMemUnmap", nbytes, ptr, nbytes)

    def copy(self, target_ptr: int, source_ptr: int, nbytes: int) -> None:
        self._in_context("cuMemcpyAsync", nbytes, target_ptr, source_ptr, nbytes, None)

    def check_offload(self, nbytes: int) -> None:
        return None

    def create_offloaded(self, nbytes: int) -> int:
        return self.create(nbytes)

    def tensor(self, ptr: int, nbytes: int, owner: object) -> _Zeroes:
        return _Zeroes(self._fake, ptr, nbytes)

    def fence(self) -> _PassedFence:
        return _PassedFence()

    def copied(self) -> _PassedFence:
        return _PassedFence()

    def is_capturing(self) -> bool:
        return False

    def is_capturing_here(self) -> bool:
        return False

    def collect(self) -> None:
        return None

    def prepare_thread(self) -> None:
        return None

    def free_bytes(self) -> int:
        return 2**40

    def create(self, nbytes: int) -> int:
        handle = ctypes.c_uint64()
        self._in_context("cuMemCreate", nbytes, ctypes.byref(handle), nbytes, None, 0)
        return handle.value

    def destroy(self, handle: int, nbytes: int) -> None:
        self._in_context("cuMemRelease", nbytes, handle)

    def _in_context(self, name: str, nbytes: int, *arguments: object) -> None:
        """Call the driver, whose failures are of this call alone: pushing a context is not made to fail here."""
        self._cuda.fake_set_context(0xC0)
        result = getattr(self._cuda, name)(*arguments)
        self._cuda.fake_set_context(None)
        if result != 0:
            raise DriverError(name, _CODES.get(result, str(result)), self.device, nbytes)


class TorchCalls(NativeAllocator):
    """The native allocator, with the two functions that torch's caching allocator calls."""

    def __init__(self, library: Path, driver: Path) -> None:
        super().__init__(str(library), str(driver))
        self._library.vtp_torch_alloc.restype = ctypes.c_void_p
        self._library.vtp_torch_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._library.vtp_torch_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    @property
    def functions(self) -> tuple[int | None, int | None]:
        """The addresses of alloc and free, as torch is given them."""
        return tuple(
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (self._library.vtp_torch_alloc, self._library.vtp_torch_free)
        )

    def alloc(self, nbytes: int, stream: int = 0, device: int = 0) -> int | None:
        return self._library.vtp_torch_alloc(nbytes, device, stream)

    def free(self, address: int | None, nbytes: int, stream: int = 0, device: int = 0) -> None:
        self._library.vtp_torch_free(address, nbytes, device, stream)
