"""`demo`: train a small model, save it, load it, generate over growing memory, compare with the stock caches, draw."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from torch_vtensor.demo.scale import FULL, QUICK
from torch_vtensor.errors import VTensorError

NAME = "demo"
SUMMARY = "train a byte-level Llama, generate with it, and compare memory and time with the stock caches"

_EXTRA = ("matplotlib", "safetensors", "tqdm", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    parser.add_argument(
        "--steps", type=_integer(1), help=f"training steps (default: {FULL.num_steps}; with --quick {QUICK.num_steps})"
    )
    parser.add_argument(
        "--tokens",
        type=_integer(16, 8000),
        help=f"tokens to generate (default: {FULL.num_tokens}; with --quick {QUICK.num_tokens})",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if torch sees one, else cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sampling (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where model, text and picture go (default: a new temporary folder)"
    )
    parser.add_argument(
        "--codegen",
        choices=("inductor", "eager"),
        help="who generates the training kernels (default: inductor if it finds a C++ compiler; with --quick eager)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model, hardly trained: shows in seconds that everything works"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 1 if its tokens are not DynamicCache's or memory runs out, 2 if it cannot start."""
    try:
        from torch_vtensor.demo import story
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        return _fail(2, f"the demo needs {error.name}: pip install 'torch-vtensor[demo]'")
    try:
        device = _choose_device(arguments.device)
        folder = _make_folder(arguments.out)
    except (OSError, ValueError) as error:
        return _fail(2, str(error))
    defaults = QUICK if arguments.quick else FULL
    scale = defaults._replace(
        num_steps=arguments.steps or defaults.num_steps,
        num_tokens=arguments.tokens or defaults.num_tokens,
        codegen=arguments.codegen or defaults.codegen,
    )
    try:
        difference = story.tell(scale, device, folder, arguments.seed)
    except VTensorError as error:
        return _fail(1, str(error))
    return _fail(1, difference) if difference else 0


def _fail(status: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # torch's answer to a name that is no device's
        raise ValueError(f"--device is {name}; the demo runs on cpu, cuda and cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; the demo runs on cpu, cuda and cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        num_devices = torch.cuda.device_count()
        raise ValueError(f"--device is {name}, but torch sees {num_devices} CUDA devices. Try --device cpu.")
    return device


def _make_folder(asked: Path | None) -> Path:
    if asked is None:
        return Path(tempfile.mkdtemp(prefix="torch_vtensor_demo_"))
    asked.mkdir(parents=True, exist_ok=True)
    return asked


def _integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number within bounds."""

    def read(text: str) -> int:
        value = int(text)
        if value < lowest or (highest is not None and value > highest):
            bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"it is {value}, but must be {bounds}")
        return value

    read.__name__ = "whole number"  # argparse names it when the text is no number
    return read
