"""RowCopier on a CUDA driver without a GPU, which runs the real kernels on the host: what copy_ does, in one launch."""

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from fake_cuda import CAPTURING, NATIVE, FakeCuda, build, compile_c
from hypothesis import given
from hypothesis import strategies as st
from pretended_cuda import DLTensor, Exchange, PretendedCuda

from torch_vtensor.allocator import _torch_compat, row_copy
from torch_vtensor.allocator.nvrtc import compile_cubin
from torch_vtensor.allocator.row_copy import CAPTURED, KERNEL_SOURCE, NOT_COPIED, RowCopier, row_copier
from torch_vtensor.errors import DriverError

DEVICE = torch.device("cuda", 0)
CONTEXT, OTHER_CONTEXT = 0xC0, 0xC1  # the fake's primary contexts of devices 0 and 1
IMAGE = b"fake image"
DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64)
WIDTHS = (16, 8, 4, 2, 1)
LOAD_CALLS = (
    "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode", "cuModuleLoadData",
    *["cuModuleGetFunction"] * len(WIDTHS),
)  # fmt: skip
COPY_CALLS = ("cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuStreamIsCapturing", "cuLaunchKernel")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def pretended() -> PretendedCuda:
    return PretendedCuda()


@pytest.fixture(scope="module")
def fake_for_module(built: tuple[Path, Path]) -> FakeCuda:
    return FakeCuda(built[0])


@pytest.fixture
def fake(fake_for_module: FakeCuda) -> Iterator[FakeCuda]:
    fake_for_module.reset()
    fake_for_module.set_context(CONTEXT)
    yield fake_for_module
    fake_for_module.check_sound()
    fake_for_module.set_context(None)


@pytest.fixture
def unloaded(fake: FakeCuda, built: tuple[Path, Path]) -> RowCopier:
    return RowCopier(DEVICE, ctypes.PyDLL(str(built[1])), str(built[0]))


@pytest.fixture
def copier(unloaded: RowCopier, pretended: PretendedCuda) -> RowCopier:
    unloaded.load(IMAGE, pretended.address)
    return unloaded


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of the storage behind a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def strided(sizes: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, start: int, gap: int) -> torch.Tensor:
    """A tensor [B, H, T, D] over random bytes whose dimensions lie in memory in ``order``, D last, with gaps."""
    laid_out = [sizes[dim] for dim in order]
    row_pitch = sizes[3] + gap
    num_bytes = (start + math.prod(laid_out) * row_pitch) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8)
    rows = raw.view(dtype)[start:].view(*laid_out, row_pitch)[..., : sizes[3]]
    return rows.permute(*(order.index(dim) for dim in range(3)), 3)


def cache_like(like: torch.Tensor) -> torch.Tensor:
    """A tensor of the same strides over a copy of the same bytes."""
    raw = bytes_of(like).clone()
    return torch.empty(0, dtype=like.dtype).set_(
        raw.untyped_storage(), like.storage_offset(), like.shape, like.stride()
    )


class Step(NamedTuple):
    """Arguments of RowCopier.write."""

    keys: torch.Tensor
    values: torch.Tensor
    position: int
    key: torch.Tensor
    value: torch.Tensor


def step(
    dtype: torch.dtype = torch.bfloat16, tokens: int = 1, position: int = 2, key_dim: int = 16, value_dim: int = 16
) -> Step:
    cache, new = (2, 3, position + tokens + 1), (2, 3, tokens)
    keys, values = (strided((*cache, dim), (0, 1, 2), dtype, 0, 0) for dim in (key_dim, value_dim))
    key, value = (strided((*new, dim), (0, 2, 1), dtype, 0, 0) for dim in (key_dim, value_dim))
    return Step(keys, values, position, key, value)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Steps of every layout: token-major, head-major, with gaps between rows, at any offset, of odd dims."""
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    position, room = draw(st.integers(0, 4)), draw(st.integers(0, 2))
    dtype = draw(st.sampled_from(DTYPES))
    dims = draw(st.tuples(*[st.sampled_from((1, 2, 3, 4, 8, 12, 16, 64))] * 2))

    def rows(num_tokens: int, dim: int) -> torch.Tensor:
        order = draw(st.permutations(range(3)))
        start, gap = (draw(st.sampled_from((0, 0, 0, 1, 2, 4, 8, 16))) for _ in range(2))
        made = strided((batch, heads, num_tokens, dim), tuple(order), dtype, start, gap)
        # The stride of a dimension of one says nothing.
        strides = [7 if size == 1 else stride for size, stride in zip(made.shape, made.stride(), strict=True)]
        return made.as_strided(made.shape, strides) if draw(st.booleans()) else made

    keys, values = (rows(position + tokens + room, dim) for dim in dims)
    key, value = (rows(tokens, dim) for dim in dims)
    if draw(st.booleans()):
        key = key[:1].expand(batch, -1, -1, -1)
    return Step(keys, values, position, key, value)


def check(copier: RowCopier, step: Step, flags: int = 0) -> None:
    """The rows are where copy_ puts them, and nothing else has changed."""
    expected = []
    for whole, rows in ((step.keys, step.key), (step.values, step.value)):
        other = cache_like(whole)
        other.narrow(2, step.position, rows.shape[2]).copy_(rows)
        expected.append(bytes_of(other))
    assert copier.write(*step) == step.key.shape[2] | flags
    assert torch.equal(bytes_of(step.keys), expected[0])
    assert torch.equal(bytes_of(step.values), expected[1])


def widest(step: Step) -> int:
    """The most bytes that may be copied at once, from the address of every single row."""
    tensors = (*(t.narrow(2, step.position, step.key.shape[2]) for t in step[:2]), step.key, step.value)
    numbers = []
    for tensor in tensors:
        numbers.append(tensor.shape[3] * tensor.itemsize)
        for index in itertools.product(*map(range, tensor.shape[:3])):
            numbers.append(tensor[index].data_ptr())
    return next(width for width in WIDTHS if all(number % width == 0 for number in numbers))


@given(step=steps())
def test_rows_arrive_as_by_copy(built: tuple[Path, Path], pretended: PretendedCuda, step: Step) -> None:
    fake, copier = FakeCuda(built[0]), RowCopier(DEVICE, ctypes.PyDLL(str(built[1])), str(built[0]))
    fake.reset()
    fake.set_context(CONTEXT)
    copier.load(IMAGE, pretended.address)
    # A row of one number has no stride that says whether it is stored as it is.
    is_left_to_torch = step.key.numel() == 0 or 1 in (step.key.shape[3], step.value.shape[3])
    if is_left_to_torch:
        assert copier.write(*step) == NOT_COPIED
    else:
        check(copier, step)
    assert fake.num_calls("cuLaunchKernel") == (0 if is_left_to_torch else 1)
    assert fake.last_launch().width == (0 if is_left_to_torch else widest(step))
    fake.check_sound()


@given(step=steps())
def test_rows_of_the_host_arrive_as_by_copy(built: tuple[Path, Path], step: Step) -> None:
    copier = RowCopier(torch.device("cpu"), ctypes.PyDLL(str(built[1])))
    copier.load(None, _torch_compat.tensor_exchange())
    if step.key.numel() == 0 or 1 in (step.key.shape[3], step.value.shape[3]):
        assert copier.write(*step) == NOT_COPIED
    else:
        check(copier, step)


def test_much_to_copy_on_the_host_is_left_to_torchs_threads() -> None:
    copier = row_copier(torch.device("cpu"))
    most = 256 * 1024 // (6 * 32 * 2)
    check(copier, step(torch.bfloat16, most, 0))
    assert copier.write(*step(torch.bfloat16, most + 1, 0)) == NOT_COPIED


def test_the_stride_of_a_single_row_costs_nothing(copier: RowCopier, fake: FakeCuda) -> None:
    made = step()
    rows = [tensor[:1, :1].as_strided((1, 1, 1, 16), (7, 7, 7, 1)) for tensor in made[3:]]
    check(copier, Step(*(tensor[:1, :1] for tensor in made[:2]), 2, *rows))
    assert fake.last_launch().width == 16


@pytest.mark.parametrize("dims", [(64, 64), (576, 512), (5, 3)])
def test_more_rows_than_threads(copier: RowCopier, fake: FakeCuda, dims: tuple[int, int]) -> None:
    threads_at_most = 4096 * 128
    tokens = threads_at_most * 16 // (6 * min(dims)) + 7
    check(copier, step(torch.uint8, tokens, 1, *dims))
    launch = fake.last_launch()
    assert launch.num_blocks * launch.num_threads == threads_at_most


def test_a_step_is_one_launch_on_torchs_current_stream(
    copier: RowCopier, fake: FakeCuda, pretended: PretendedCuda
) -> None:
    before = fake.num_calls()
    for stream in (0x52, 0x53):
        pretended.stream = stream
        check(copier, step())
        assert fake.last_launch().stream == stream
    assert fake.num_calls("cuLaunchKernel") == 2
    assert fake.num_calls() - before == 2 * 3, "a launch, and questions for the context and a capture"


@pytest.mark.parametrize("current", [OTHER_CONTEXT, None])
def test_another_devices_context_or_none_is_current(copier: RowCopier, fake: FakeCuda, current: int | None) -> None:
    fake.set_context(current)
    check(copier, step())
    after = ctypes.c_void_p()
    assert fake.library.cuCtxGetCurrent(ctypes.byref(after)) == 0
    assert after.value == current


def test_a_launch_that_waits_lets_other_threads_run(copier: RowCopier, fake: FakeCuda) -> None:
    fake.set_queue_full(True)
    thread = threading.Timer(0.02, fake.set_queue_full, [False])
    thread.start()
    check(copier, step())
    thread.join()


def test_a_capture_is_left_alone(unloaded: RowCopier, fake: FakeCuda, pretended: PretendedCuda) -> None:
    fake.set_capture(pretended.stream, CAPTURING)
    unloaded.load(IMAGE, pretended.address)
    check(unloaded, step(), CAPTURED)


def test_every_call_of_load_may_fail(unloaded: RowCopier, fake: FakeCuda, pretended: PretendedCuda) -> None:
    for nth, call in enumerate(LOAD_CALLS, 1):
        fake.fail(nth)
        with pytest.raises(DriverError, match=f"{call} failed with CUDA_ERROR_INVALID_VALUE on cuda:0"):
            unloaded.load(IMAGE, pretended.address)
        counts = fake.counts()
        assert (counts.num_modules, counts.num_contexts, counts.context_depth, counts.capture_mode) == (0, 0, 0, 0)
        assert unloaded.why_not is not None
        assert unloaded.write(*step()) == NOT_COPIED
    fake.fail(len(LOAD_CALLS) + 1)
    unloaded.load(IMAGE, pretended.address)
    assert not fake.fail_nothing(), "it makes no other call that can fail"
    assert unloaded.why_not is None
    check(unloaded, step())


def test_every_call_of_a_copy_may_fail(copier: RowCopier, fake: FakeCuda) -> None:
    fake.set_context(OTHER_CONTEXT)
    for nth, call in enumerate(COPY_CALLS, 1):
        arguments = step()
        before = bytes_of(arguments.keys).clone()
        fake.fail(nth)
        with pytest.raises(DriverError, match=f"{call} failed with CUDA_ERROR_INVALID_VALUE on cuda:0"):
            copier.write(*arguments)
        fake.fail()
        fake.check_sound()
        assert torch.equal(bytes_of(arguments.keys), before)
        check(copier, arguments)


def test_an_image_that_is_none_is_named(unloaded: RowCopier, pretended: PretendedCuda) -> None:
    with pytest.raises(DriverError, match="cuModuleLoadData failed with CUDA_ERROR_INVALID_VALUE on cuda:0"):
        unloaded.load(b"no image", pretended.address)


def test_another_exchange_is_refused(unloaded: RowCopier, pretended: PretendedCuda) -> None:
    table = Exchange(2, 0, read=pretended.table.read, current_stream=pretended.table.current_stream)
    with pytest.raises(DriverError, match="torch exchanges tensors in another way"):
        unloaded.load(IMAGE, ctypes.addressof(table))
    assert unloaded.write(*step()) == NOT_COPIED


def negated(rows: torch.Tensor) -> torch.Tensor:
    return torch.complex(rows.float(), rows.float()).conj().imag


UNSUITED: dict[str, Callable[[Step], Step]] = {
    "a row with gaps": lambda s: s._replace(key=torch.zeros(*s.key.shape[:3], 32, dtype=s.key.dtype)[..., ::2]),
    "another dtype": lambda s: s._replace(value=s.value.float()),
    "another dtype of as many bytes": lambda s: s._replace(value=s.value.half()),
    "complex numbers": lambda s: step(torch.complex64),
    "not yet negated": lambda s: step(torch.float32)._replace(key=negated(s.key)),
    "no rows of a cache": lambda s: s._replace(value=s.value[0]),
    "another batch": lambda s: s._replace(key=s.key[:1], value=s.value[:1]),
    "another number of heads": lambda s: s._replace(key=s.key[:, :1], value=s.value[:, :1]),
    "fewer values than keys": lambda s: s._replace(value=s.value[:, :, :0]),
    "a longer row": lambda s: s._replace(value=torch.zeros(2, 3, 1, 32, dtype=s.value.dtype)),
    "past the end of the values": lambda s: s._replace(values=s.values[:, :, :2]),
    "before the beginning": lambda s: s._replace(position=-1),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_what_the_kernel_is_not_for_is_left_to_torch(copier: RowCopier, fake: FakeCuda, name: str) -> None:
    assert copier.write(*UNSUITED[name](step())) == NOT_COPIED
    assert fake.num_calls("cuLaunchKernel") == 0
    assert row_copier(torch.device("cpu")).write(*UNSUITED[name](step())) == NOT_COPIED


def test_another_number_of_arguments_copies_nothing(copier: RowCopier) -> None:
    assert copier.write(*step()[:4]) == NOT_COPIED
    assert copier.write(*step(), 1) == NOT_COPIED


@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_tensors_of_another_device_are_left_to_torch(
    copier: RowCopier, fake: FakeCuda, pretended: PretendedCuda, index: int
) -> None:
    arguments = step()
    pretended.device_ids = {id(arguments[index]): 1}
    assert copier.write(*arguments) == NOT_COPIED
    pretended.device_ids = {}
    assert fake.num_calls("cuLaunchKernel") == 0


def test_host_tensors_and_dtypes_without_a_name_are_left_to_torch(unloaded: RowCopier, fake: FakeCuda) -> None:
    unloaded.load(IMAGE, _torch_compat.tensor_exchange())
    assert unloaded.write(*step()) == NOT_COPIED
    keys, values, position, key, value = step(torch.uint8)
    keys, values, key, value = (tensor.view(torch.bits8) for tensor in (keys, values, key, value))
    with pytest.raises(BufferError):
        keys.__dlpack__()
    assert unloaded.write(keys, values, position, key, value) == NOT_COPIED
    assert fake.num_calls("cuLaunchKernel") == 0


@pytest.fixture
def jobs(
    monkeypatch: pytest.MonkeyPatch, copier: RowCopier, built: tuple[Path, Path], pretended: PretendedCuda
) -> list[Callable[[], object]]:
    """What row_copier() asks a device's scheduler to do, with a device whose kernel is the fake's."""
    jobs: list[Callable[[], object]] = []
    monkeypatch.setattr(row_copy, "_copiers", {})
    monkeypatch.setattr(row_copy, "default_scheduler", lambda device: SimpleNamespace(run_soon=jobs.append))
    monkeypatch.setattr(row_copy, "load_library", lambda: ctypes.PyDLL(str(built[1])))
    monkeypatch.setattr(row_copy, "tensor_exchange", lambda: pretended.address)
    monkeypatch.setattr(row_copy, "compile_cubin", lambda source, name, capability: IMAGE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return jobs


def test_a_device_has_one_copier_compiled_in_the_background(jobs: list[Callable[[], object]]) -> None:
    made = row_copier(DEVICE)
    assert made is row_copier(DEVICE) is not row_copier(torch.device("cuda", 1))
    assert len(jobs) == 2
    assert made.write(*step()) == NOT_COPIED
    assert made.why_not == "its kernel is still being compiled"
    jobs[0]()
    assert made.why_not is None
    check(made, step())


@pytest.mark.parametrize("error", [ImportError("no cuda-python"), RuntimeError("no libnvrtc.so.13")])
def test_without_nvrtc_torch_copies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, jobs: list[Callable[[], object]],
    error: Exception,
) -> None:  # fmt: skip
    def fail(source: bytes, name: str, capability: tuple[int, int]) -> bytes:
        raise error

    monkeypatch.setattr(row_copy, "compile_cubin", fail)
    made = row_copier(DEVICE)
    with caplog.at_level("INFO", logger="torch_vtensor"):
        jobs[0]()
    assert made.why_not == f"{type(error).__name__}: {error}"
    assert str(error) in caplog.text
    assert made.write(*step()) == NOT_COPIED


def test_torchs_exchange_table_reads_tensors() -> None:
    remedy = f"moved in torch {torch.__version__}: adapt tensor_exchange() in torch_vtensor/allocator/_torch_compat.py"
    table = Exchange.from_address(_torch_compat.tensor_exchange())
    assert table.major_version == 1, remedy
    tensor, read = torch.randn(4, 3, 5)[1:, :, ::2], DLTensor()
    assert table.read(tensor, ctypes.pointer(read)) == 0, remedy
    assert read.data + read.byte_offset == tensor.data_ptr(), remedy
    assert (tuple(read.shape[:3]), tuple(read.strides[:3])) == ((3, 3, 3), (15, 5, 2)), remedy
    assert (read.device_type, read.code, read.bits, read.lanes) == (1, 2, 32, 1), remedy


def test_declarations_agree_with_torchs_dlpack_h(tmp_path: Path) -> None:
    names = {
        "DL_CPU": "kDLCPU",
        "DL_CUDA": "kDLCUDA",
        "DL_COMPLEX": "kDLComplex",
        "DL_MAJOR_VERSION": "DLPACK_MAJOR_VERSION",
    }
    layouts = [
        ("dl_tensor", "DLTensor", {
            "data": "data", "device": "device", "num_dims": "ndim", "dtype": "dtype", "shape": "shape",
            "strides": "strides", "byte_offset": "byte_offset",
        }),
        ("dl_device", "DLDevice", {"type": "device_type", "id": "device_id"}),
        ("dl_dtype", "DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
        ("dl_exchange", "DLPackExchangeAPI", {
            "major_version": "header.version.major", "minor_version": "header.version.minor",
            "read": "dltensor_from_py_object_no_sync", "current_stream": "current_work_stream",
        }),
    ]  # fmt: skip
    lines = ["#include <ATen/dlpack.h>", f'#include "{NATIVE / "tensor_exchange.h"}"', "#include <stddef.h>"]
    lines += [f'_Static_assert((int){ours} == (int){theirs}, "{ours}");' for ours, theirs in names.items()]
    for ours, theirs, fields in layouts:
        lines.append(f'_Static_assert(sizeof({ours}) == sizeof({theirs}), "{ours}");')
        for our_field, their_field in fields.items():
            sizes = f"sizeof((({ours} *)0)->{our_field}) == sizeof((({theirs} *)0)->{their_field})"
            offsets = f"offsetof({ours}, {our_field}) == offsetof({theirs}, {their_field})"
            lines.append(f'_Static_assert({sizes} && {offsets}, "{ours}.{our_field}");')
    source = tmp_path / "compare.c"
    source.write_text("\n".join(lines) + "\n")
    compile_c(tmp_path / "compare.o", f"-I{Path(torch.__file__).parent / 'include'}", "-c", source)


@pytest.fixture
def nvrtc() -> None:
    try:
        compile_cubin(b"", "nothing.cu", (9, 0))
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs NVRTC, but no GPU: {error}")


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_the_kernels_compile(capability: tuple[int, int]) -> None:
    cubin = compile_cubin(KERNEL_SOURCE.read_bytes(), KERNEL_SOURCE.name, capability)
    assert all(f"copy_rows_{width}\0".encode() in cubin for width in WIDTHS)


@pytest.mark.usefixtures("nvrtc")
def test_the_compilers_message_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION: wrong\.cu\(1\): error"):
        compile_cubin(b"nonsense;", "wrong.cu", (9, 0))
