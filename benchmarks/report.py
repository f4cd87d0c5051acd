"""Result files: what was measured, where, with which versions. Written by the benchmarks, never by hand."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Median and spread of repeated measurements, in seconds."""

    median: float
    low: float
    high: float

    def __format__(self, unit: str) -> str:
        scale = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit or "ms"]
        return f"{self.median * scale:.2f} ({self.low * scale:.2f}-{self.high * scale:.2f})"


def timing(seconds: Sequence[float]) -> Timing:
    """Median, 10th and 90th percentile."""
    ordered = sorted(seconds)
    low, high = ordered[int(len(ordered) * 0.1)], ordered[min(int(len(ordered) * 0.9), len(ordered) - 1)]
    return Timing(statistics.median(ordered), low, high)


def measure(action: Callable[[], object], device: torch.device, repeats: int, warmup: int = 2) -> Timing:
    """Time ``action`` from call to completion on the device, ``repeats`` times."""
    seconds = []
    for index in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return timing(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """A short name for file names: ``h200`` or ``cpu``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace("nvidia", "").strip().replace(" ", "-")
    return "cpu"


def versions(device: torch.device) -> str:
    """The machine and the versions that matter, in one line."""
    parts = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "cuda-bindings", "torch-vtensor"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{where}; {', '.join(parts)}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write(subject: str, device: torch.device, body: str, out: Path | None = None) -> Path:
    """Write ``<subject>_<device>_<date>.md`` and return its path."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = (out or RESULTS) / f"{subject}_{device_name(device)}_{date}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {subject}\n\n{date}. {versions(device)}.\n\n{body}\n")
    return path
