"""Status files: what each process holds on each device, for others to read; and budgets that others ask for.

    <folder>/<pid>      header: magic, pid, when the process started
                        record 0: a device, its figures, the budget that somebody asks for
                        record 1: ...

A process maps its own file and writes figures with plain stores, so publishing costs no system call. Whoever lists the
folder removes what killed processes left. Needs neither torch nor a device.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["DeviceStatus", "Figures", "StatusFile", "StatusRecord", "ask_for_budget", "processes"]

_MAGIC = b"vtensor1"
_MOST_DEVICES = 64
_NO_LIMIT = -1
_UNFINISHED = ".new"
_HEADER = struct.Struct("<8sqq")
_NAME = struct.Struct("<32s")
_WISH = struct.Struct("<qq")  # its number, and the budget; written by others


class Figures(NamedTuple):
    """Bytes that a process has on a device; shared are those of pages that several of its tensors or prefixes use."""

    reserved_bytes: int
    committed_bytes: int
    pooled_bytes: int
    shared_bytes: int
    offloaded_bytes: int
    budget_bytes: int
    """-1: no limit."""


_FIGURES = struct.Struct(f"<q{len(Figures._fields)}qq")  # between two equal version numbers: otherwise half written
_RECORD_BYTES = _NAME.size + _WISH.size + _FIGURES.size
_FILE_BYTES = _HEADER.size + _MOST_DEVICES * _RECORD_BYTES


class DeviceStatus(NamedTuple):
    """What another process said last about one device."""

    pid: int
    command: str
    device: str
    figures: Figures


class StatusFile:
    """This process's own file, which is removed when it ends; one that was killed is removed by others.

    Raises: OSError where the folder cannot be made, or is not this user's alone.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(folder)
        _remove_stale(folder)
        pid = os.getpid()
        self.path = folder / str(pid)
        new = folder / f"{pid}{_UNFINISHED}"
        with new.open("w+b") as file:
            file.truncate(_FILE_BYTES)
            self._map = mmap.mmap(file.fileno(), _FILE_BYTES)
        _HEADER.pack_into(self._map, 0, _MAGIC, pid, _start_of(pid))
        new.replace(self.path)
        self._records: dict[str, StatusRecord] = {}
        weakref.finalize(self, _remove, self.path, pid)

    def record(self, device: str) -> StatusRecord:
        """The place for the figures of one device.

        Raises: OSError for more devices than there are places.
        """
        if device not in self._records:
            if len(self._records) == _MOST_DEVICES:
                raise OSError(f"{self.path} has no place for {device!r}: {_MOST_DEVICES} are taken")
            offset = _HEADER.size + len(self._records) * _RECORD_BYTES
            self._records[device] = StatusRecord(self._map, offset, device)
        return self._records[device]


class StatusRecord:
    """Where one device's figures are published, and where others ask for another budget."""

    def __init__(self, buffer: mmap.mmap, offset: int, device: str) -> None:
        self._buffer = buffer
        self._wish_at = offset + _NAME.size
        self._figures_at = self._wish_at + _WISH.size
        self._version = 0
        self._num_granted = 0
        _NAME.pack_into(buffer, offset, device.encode())

    def publish(self, figures: Figures) -> None:
        """Show these figures to others from now on."""
        self._version += 1
        _FIGURES.pack_into(self._buffer, self._figures_at, self._version, *figures, self._version)

    def asked_budget(self) -> tuple[int | None] | None:
        """The budget that somebody has asked for since the last call, None in it for no limit; None if nobody has."""
        number, budget_bytes = _WISH.unpack_from(self._buffer, self._wish_at)
        if number == self._num_granted:
            return None
        self._num_granted = number
        return (None if budget_bytes == _NO_LIMIT else budget_bytes,)


def processes(folder: Path) -> list[DeviceStatus]:
    """The figures of all living processes, by device; removes the files of dead ones.

    Raises: PermissionError for a folder that is not this user's alone.
    """
    if not os.path.lexists(folder):
        return []
    _check(folder)
    _remove_stale(folder)
    found = []
    for path in _files(folder):
        with suppress(OSError, ValueError):  # it ended meanwhile
            buffer = path.read_bytes()
            pid = _HEADER.unpack_from(buffer)[1]
            found += [DeviceStatus(pid, _command_of(pid), name, it) for name, (_, it) in _records(path).items()]
    return found


def ask_for_budget(folder: Path, pid: int, budget_bytes: int | None, device: str | None = None) -> list[str]:
    """Ask a process for another budget, which it takes when it next needs memory; returns the devices.

    Args:
        device: only this one; default: every one that the process uses.

    Raises: ProcessLookupError if there is no such process; ValueError for a budget of less than a byte, or a device
        that the process does not use; PermissionError for a folder that is not this user's alone.
    """
    if budget_bytes is not None and budget_bytes < 1:
        raise ValueError(f"budget_bytes is {budget_bytes}: give at least one byte, or None for no limit")
    if os.path.lexists(folder):
        _check(folder)
    path = folder / str(pid)
    if not _is_alive(path):
        raise ProcessLookupError(
            f"process {pid} has no memory of torch_vtensor: `python -m torch_vtensor top` lists those that have"
        )
    records = _records(path)
    wanted = list(records) if device is None else [device]
    if unknown := [name for name in wanted if name not in records]:
        raise ValueError(f"process {pid} has nothing on {unknown[0]!r}; it uses {', '.join(records) or 'no device'}")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), _FILE_BYTES) as buffer:
        for name in wanted:
            at = records[name][0] + _NAME.size
            number, _ = _WISH.unpack_from(buffer, at)
            # The budget first: the process looks at the number.
            struct.pack_into("<q", buffer, at + 8, _NO_LIMIT if budget_bytes is None else budget_bytes)
            struct.pack_into("<q", buffer, at, number + 1)
    return wanted


def _records(path: Path) -> Mapping[str, tuple[int, Figures]]:
    """By device: where its record is, and its figures; without those that were not published yet."""
    records = {}
    for _ in range(1000):  # a process that is writing is done in a moment
        buffer, is_whole = path.read_bytes(), True
        if len(buffer) != _FILE_BYTES or _HEADER.unpack_from(buffer)[0] != _MAGIC:
            raise ValueError(f"{path} is no status file of this version of torch_vtensor")
        for offset in range(_HEADER.size, _FILE_BYTES, _RECORD_BYTES):
            name = _NAME.unpack_from(buffer, offset)[0].rstrip(b"\0").decode()
            version, *figures, end = _FIGURES.unpack_from(buffer, offset + _NAME.size + _WISH.size)
            is_whole &= version == end
            if name and version:
                records[name] = offset, Figures(*figures)
        if is_whole:
            break
    return records


def _check(folder: Path) -> None:
    """Refuse a folder into which others may have put something, or which leads elsewhere."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} is not a folder of this user's alone (mode 0700): remove it, or set XDG_RUNTIME_DIR to another"
        )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.name.isdecimal())


def _remove_stale(folder: Path) -> None:
    unfinished = (path for path in folder.iterdir() if path.suffix == _UNFINISHED)
    stale = [path for path in _files(folder) if not _is_alive(path)]
    stale += [path for path in unfinished if not Path(f"/proc/{path.stem}").exists()]
    for path in stale:
        with suppress(OSError):
            path.unlink()


def _is_alive(path: Path) -> bool:
    """Whether the process that made the file lives, and not another one with its number."""
    try:
        with path.open("rb") as file:
            magic, pid, started = _HEADER.unpack(file.read(_HEADER.size))
        return bool(magic == _MAGIC and _start_of(pid) == started)
    except (OSError, struct.error):
        return False


def _start_of(pid: int) -> int:
    """When a process started, in the system's ticks; tells it from another one with the same number."""
    # The name, in parentheses, may hold anything.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not in a child that fork() made
        with suppress(OSError):
            path.unlink()
