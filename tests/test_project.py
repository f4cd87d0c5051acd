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
HEAVY = {"cuda", "cupy", "matplotlib", "numba", "tqdm", "transformers", "triton"}
MODULES = (
    "torch_vtensor",
    "torch_vtensor.allocator.torch_pool",
    "torch_vtensor.allocator.vtensor",
    "torch_vtensor.cli",
    "torch_vtensor.compile",
    "torch_vtensor.ops",
    "torch_vtensor.settings",
)
# Each module is imported by a process that has imported torch and nothing of ours: forks of one that has.
IMPORTS = """
import builtins, importlib, os, sys, torch

import_ = builtins.__import__
asked = set()

def note(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if level == 0 and importer != name.partition(".")[0]:
        asked.add(f"{importer}:{name.partition('.')[0]}")
    return import_(name, globals, locals, fromlist, level)

for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        builtins.__import__ = note
        importlib.import_module(module)
        builtins.__import__ = import_
        assert not torch.cuda.is_initialized()
        print(module, *asked, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
assert not any(name.startswith("torch_vtensor") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def asked_for() -> dict[str, list[list[str]]]:
    """By module: who asks for what while it is imported."""
    command = [sys.executable, "-c", IMPORTS, *MODULES]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {module: [pair.split(":") for pair in pairs] for module, *pairs in map(str.split, printed)}


@pytest.mark.xdist_group("imports")  # one process sees them all
@pytest.mark.parametrize("module", MODULES)
def test_import_asks_for_nothing_heavy_beside_torch(module: str, asked_for: dict[str, list[list[str]]]) -> None:
    """Also not for what torch has loaded already where it is installed, as it does with cuda-bindings."""
    asked = asked_for[module]
    assert ["torch_vtensor", "logging"] in asked, "it was imported just now"
    assert [(importer, name) for importer, name in asked if name in HEAVY and importer != "torch"] == []


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
