"""The package as users install and import it."""

import ctypes
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import torch_vtensor
from torch_vtensor.allocator import native

ROOT = Path(__file__).parent.parent
HEAVY = ["cuda", "cupy", "matplotlib", "numba", "tqdm", "transformers", "triton"]


@pytest.mark.parametrize("module", ["torch_vtensor", "torch_vtensor.cli", "torch_vtensor.settings"])
def test_import_adds_nothing_heavy_to_torch(module: str, run_python: Callable[..., str]) -> None:
    added = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert "torch_vtensor" in added.split()
    assert not set(HEAVY) & set(added.split())


def test_version_is_that_of_the_installed_package() -> None:
    assert torch_vtensor.__version__ == importlib.metadata.version("torch-vtensor")


def test_backend_is_listed_without_importing_the_package(run_python: Callable[..., str]) -> None:
    listed = run_python(
        "import sys, torch\nprint(*torch._dynamo.list_backends())\nassert 'torch_vtensor' not in sys.modules\n"
    )
    assert "superscaler" in listed.split()


def test_native_library_loads() -> None:
    library = ctypes.CDLL(str(native.library_path()))
    assert library.vtensor_pool_abi_version() >= 1


def test_missing_native_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"pip install -e \.") as caught:
        native.library_path()
    assert str(tmp_path) in str(caught.value)


def test_wheel_serves_every_python_and_holds_what_it_needs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "torch_vtensor/py.typed",
        "torch_vtensor/allocator/native/libvtensor_pool.so",
        "torch_vtensor/allocator/native/row_copy.cu",
        f"torch_vtensor-{torch_vtensor.__version__}.dist-info/licenses/LICENSE",
    } <= files
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "torch_vtensor").rglob("*.py")}
    assert modules == {name for name in files if name.endswith(".py")}
    assert not [name for name in files if name.endswith((".c", ".h", "CMakeLists.txt"))]


def test_environment_switch_enables_on_import(run_python: Callable[..., str]) -> None:
    code = "import torch_vtensor; print(torch_vtensor.is_enabled())"
    assert run_python(code, environ={"TORCH_VTENSOR_ENABLE": "1"}).strip() == "True"
    assert run_python(code, environ={"TORCH_VTENSOR_ENABLE": "0"}).strip() == "False"
