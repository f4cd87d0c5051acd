"""Make the project's virtual environment: `python3 tools/make_venv.py .venv`. Running it again brings it up to date.

A Python that already has a supported torch (a GPU machine's image, say) lends its packages: nothing that it has is
downloaded again, and where it has all that is needed no network is used. Otherwise everything comes through pip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TORCH = "torch==2.13.0"
LENT_PACKAGES = "lent_packages.pth"


def main() -> None:
    """Create the environment, then torch, then this package with its extras, each only if it is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the environment lies")
    parser.add_argument("--extras", default="test", help="extras to install, with commas between (default: test)")
    parser.add_argument("--wanted", metavar="EXTRAS", help="extras to install if they can be had; tests skip without")
    parser.add_argument("--torch", metavar="REQUIREMENT", help="install this torch, whatever the Python at hand has")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"Python is {sys.version.split()[0]}; 3.11 or later is needed. Try: make PYTHON=python3.12 ...")
    if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        sys.exit("No C compiler (cc, gcc, clang) is on the PATH. Install one, or name it in CC.")

    python = arguments.folder / "bin" / "python"
    lends = arguments.torch is None and has_supported_torch()
    make_environment(arguments.folder, python, lends)
    if arguments.torch or not succeeds(python, "import torch"):
        install(python, arguments.torch or DEFAULT_TORCH)
    extras = arguments.extras
    if succeeds(python, "import sys, torch; sys.exit(torch.version.cuda is None)"):
        extras += ",cuda"
    isolation = ["--no-build-isolation"] if succeeds(python, "import scikit_build_core") else []
    install(python, *isolation, "--editable", f"{ROOT}[{extras}]")
    if arguments.wanted:
        install_if_possible(python, *isolation, "--editable", f"{ROOT}[{extras},{arguments.wanted}]")


def has_supported_torch() -> bool:
    """Whether the Python that runs this has a torch within pyproject.toml's bounds."""
    import tomllib

    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    (torch,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest, above = re.findall(r"\d[\d.]*", torch)
    return parse_release(lowest) <= parse_release(version) < parse_release(above)


def parse_release(version: str) -> tuple[int, ...]:
    """`2.11.0+cu130` is (2, 11)."""
    return tuple(int(number) for number in version.split(".")[:2])


def make_environment(folder: Path, python: Path, lends: bool) -> None:
    """Make the environment unless it is there already; if `lends`, put this Python's packages behind its own."""
    has_lent = any(folder.glob(f"lib/python*/site-packages/{LENT_PACKAGES}"))
    usable = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if has_lent == lends and succeeds(python, usable):
        return
    # pip is lent as well: ensurepip would put its old setuptools, where it has one, in front of the lent one.
    pip = ["--without-pip"] if lends and importlib.util.find_spec("pip") else []
    if not pip and importlib.util.find_spec("ensurepip") is None:
        sys.exit(f"{sys.executable} has no ensurepip. Install it: on Debian and Ubuntu, apt install python3-venv.")
    run(sys.executable, "-m", "venv", "--clear", *pip, folder)
    if lends:
        # Not --system-site-packages: where this Python is a virtual environment itself, as on many images, that would
        # lend the packages of the Python below it.
        paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / LENT_PACKAGES).write_text("".join(f"{path}\n" for path in paths))
        say(f"lending it the packages of {sys.executable}: torch {importlib.metadata.version('torch')} and more")


def succeeds(python: Path, code: str) -> bool:
    """Whether this code runs without an error in the environment's Python, if that is there."""
    return python.exists() and subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def install(python: Path, *requirements: str) -> None:
    """Install with pip what is not there yet."""
    run(python, "-m", "pip", "install", "--disable-pip-version-check", *requirements)


def install_if_possible(python: Path, *requirements: str) -> None:
    """The same, but where it cannot be had, as without a network, say so and go on."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--retries", "1", *requirements]
    say(shlex.join(map(str, command)))
    if subprocess.run(command, check=False).returncode:
        say("not all of it could be had; tests of the rest are skipped, with the reason")


def run(*command: str | Path) -> None:
    """Show a command, run it, and stop with its exit status if it fails."""
    words = [str(word) for word in command]
    say(shlex.join(words))
    if status := subprocess.run(words, check=False).returncode:
        sys.exit(status)


def say(text: str) -> None:
    """Tell what is done, before it is done."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
