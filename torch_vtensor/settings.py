"""What the environment asks for: the one place that reads it."""

import logging
import math
import mmap
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
IDLE_SECONDS = 5.0
"""Calls a second apart find their memory still mapped, and to map 5 GiB again takes 5 ms, a thousandth of this."""

_PREFIX = "TORCH_VTENSOR_"
_UNIT_BYTES = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}
_BYTES_PATTERN = re.compile(r"(\d+)(?:\.(\d+))?\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process starts with; arguments given in code come before these.

    Units:   budget_bytes, page_bytes, offload_bytes bytes; idle_seconds seconds; log_level as in `logging`.
    """

    enable: bool = False
    """TORCH_VTENSOR_ENABLE: importing torch_vtensor also calls `enable()`."""

    budget_bytes: int | None = None
    """TORCH_VTENSOR_BUDGET_BYTES: most physical bytes a page pool may hold; None: what the device has."""

    page_bytes: int = 64 * KIB
    """TORCH_VTENSOR_PAGE_BYTES: page of the host driver. A CUDA device names its own."""

    offload_bytes: int | None = None
    """TORCH_VTENSOR_OFFLOAD_BYTES: most bytes outside a device that its pages may be offloaded to; None: no limit."""

    offload_folder: str = "/var/tmp"
    """TORCH_VTENSOR_OFFLOAD_FOLDER: where the unnamed file for offloaded pages of the CPU is; best on a disk."""

    idle_seconds: float | None = IDLE_SECONDS
    """TORCH_VTENSOR_IDLE_SECONDS: how long memory that nobody wants is kept, beyond a fifth of what is live; None, as
    text "never": until trim()."""

    status: bool = True
    """TORCH_VTENSOR_STATUS: whether other processes can see, and limit, what this one holds (`top`, `limit`)."""

    nvtx: bool = False
    """TORCH_VTENSOR_NVTX: whether profiles that read NVTX show the calls of a GPU's memory driver as ranges."""

    log_level: int = logging.WARNING
    """TORCH_VTENSOR_LOG: level of the `torch_vtensor` logger."""

    def __post_init__(self) -> None:
        """Refuse values that no driver can serve."""
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise ValueError(f"budget_bytes is {self.budget_bytes}; a budget is above 0. Leave it unset for no limit.")
        if self.page_bytes < mmap.PAGESIZE or self.page_bytes.bit_count() != 1:
            raise ValueError(
                f"page_bytes is {self.page_bytes}; a page is a power of two of at least {mmap.PAGESIZE} bytes, "
                "this system's own page. Try 64KiB."
            )
        if self.idle_seconds is not None and not 0 < self.idle_seconds < math.inf:
            raise ValueError(f"idle_seconds is {self.idle_seconds}; give more than 0 seconds, or 'never'.")


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the TORCH_VTENSOR_* variables; unset or empty ones keep their default.

    Raises:  ValueError for a value that cannot be read or a variable that does not exist, naming both and the remedy.
    """
    environ = os.environ if environ is None else environ
    given = {
        name.removeprefix(_PREFIX): text.strip()
        for name, text in environ.items()
        if name.startswith(_PREFIX) and text.strip()
    }
    if unknown := sorted(given.keys() - _READERS.keys()):
        raise ValueError(
            f"{_PREFIX}{unknown[0]} is not a setting of torch_vtensor; "
            f"the settings are {', '.join(_PREFIX + name for name in _READERS)}."
        )
    settings = Settings()
    for name, text in given.items():
        field, read = _READERS[name]
        try:
            settings = replace(settings, **{field: read(text)})
        except ValueError as error:
            raise ValueError(f"{_PREFIX}{name}={text}: {error}") from None
    return settings


def status_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where this user's processes have their status files (`torch_vtensor.status`): in memory, and theirs alone.

    Containers that share a folder, and count processes by themselves, have folders of their own in it.
    """
    runtime = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    namespace = os.stat("/proc/self/ns/pid").st_ino
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / f"torch_vtensor-{namespace}"
    return Path(f"/dev/shm/torch_vtensor-{os.getuid()}-{namespace}")


def parse_bytes(text: str) -> int:
    """Read a size such as `8GiB`, `1.5 MiB` or `65536`.

    Raises:  ValueError for another unit, a sign, or a part of a byte.
    """
    match = _BYTES_PATTERN.fullmatch(text.strip())
    units = {unit.lower(): num_bytes for unit, num_bytes in _UNIT_BYTES.items()} | {"": 1}
    if match is None or match[3].lower() not in units:
        raise ValueError(
            f"{text!r} is not a size; a size is a number and one of {', '.join(_UNIT_BYTES)}, such as 8 GiB or 512MiB."
        )
    whole, fraction = match[1], match[2] or ""
    num_bytes, rest = divmod(int(whole + fraction) * units[match[3].lower()], int("1" + "0" * len(fraction)))
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes; use a smaller unit.")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """Write a size exactly, in the largest unit that divides it: 65536 is `64 KiB`, and `parse_bytes` reads it back."""
    if num_bytes < 0:
        raise ValueError(f"num_bytes is {num_bytes}; a size is at least 0.")
    if num_bytes == 0:
        return "0 B"
    unit = max((unit for unit in _UNIT_BYTES if num_bytes % _UNIT_BYTES[unit] == 0), key=_UNIT_BYTES.__getitem__)
    return f"{num_bytes // _UNIT_BYTES[unit]} {unit}"


def _parse_switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"{text!r} is neither on nor off; use 1 or 0.")
    return _SWITCH[text.lower()]


def _parse_seconds(text: str) -> float | None:
    try:
        return None if text.lower() == "never" else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number of seconds; use one such as 5 or 0.5, or 'never'.") from None


def _parse_log_level(text: str) -> int:
    if text.upper() not in _LOG_LEVELS:
        raise ValueError(f"{text!r} is not a level; the levels are {', '.join(_LOG_LEVELS)}.")
    return logging.getLevelNamesMapping()[text.upper()]


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "ENABLE": ("enable", _parse_switch),
    "BUDGET_BYTES": ("budget_bytes", parse_bytes),
    "PAGE_BYTES": ("page_bytes", parse_bytes),
    "OFFLOAD_BYTES": ("offload_bytes", parse_bytes),
    "OFFLOAD_FOLDER": ("offload_folder", str),
    "IDLE_SECONDS": ("idle_seconds", _parse_seconds),
    "STATUS": ("status", _parse_switch),
    "NVTX": ("nvtx", _parse_switch),
    "LOG": ("log_level", _parse_log_level),
}
