"""What every test can rely on: no network, GPU tests skipped with the reason, a fresh Python to run code in."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# Models in tests are built from configurations; a test that would download one fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# What a test looks at stays, however slow the machine is; those of idle memory say otherwise.
os.environ["TORCH_VTENSOR_IDLE_SECONDS"] = "never"

# Where inductor's cache is empty it first compiles a probe of each vector instruction set, half a minute together, and
# code that uses them takes twice as long to compile as plain C++.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core: threads of theirs would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start
    torch.set_num_threads(1)

# Times vary on shared machines; pytest-timeout stops what hangs.
hypothesis.settings.register_profile("torch_vtensor", deadline=None, print_blob=True)
hypothesis.settings.load_profile("torch_vtensor")


USE_A_GPU_IF_THERE_IS_ONE = {"test_cli.py", "test_demo.py", "test_examples.py"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, and report why, where they cannot run; where they can, run them one after the other."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if torch.cuda.is_available():  # they look at the device's free memory
        for item in items:
            if item in gpu_items or item.path.name in USE_A_GPU_IF_THERE_IS_ONE:
                item.add_marker(pytest.mark.xdist_group("gpu"))
    elif gpu_items:
        found = "sees none" if torch.version.cuda else "is built without CUDA"
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} {found}"))


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before_stays() -> None:
    """Collections of garbage look at what this file's tests make alone, and not at imports and kept models as well.

    Hundreds of tests collect to see that nothing is left; each took a second for a million objects that stay anyway.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run code or a module in a fresh Python, outside the source tree; return what it printed.

    `run_python("import torch_vtensor")`, `run_python("-m", "torch_vtensor", "info", environ={"NAME": "value"})`
    """

    def run(*arguments: str, environ: dict[str, str] | None = None) -> str:
        command = [sys.executable, *(arguments if len(arguments) > 1 else ("-c", *arguments))]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | (environ or {}), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
