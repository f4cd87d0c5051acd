"""Status files: what each process holds on each device, for others to read, and what others ask of it.

    <folder>/<pid>      header: magic, pid, when the process started
                        record 0: a device │ what others ask │ figures
                        record 1: ...

A process maps its own file, and its ledger writes the figures there with plain stores (`vtp_shown` in
native/vtensor_pool.h), whoever takes memory, so publishing costs no system call. They lie behind a version that is odd
while they are written: a sequence lock. Who asks something writes through the file, by which a process that sleeps on
it hears. Whoever lists the folder removes what killed processes left. Needs neither torch nor a device.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import struct
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "DeviceStatus",
    "Figures",
    "Request",
    "StatusFile",
    "StatusRecord",
    "ask_for_budget",
    "ask_to_trim",
    "processes",
]

_MAGIC = b"vtensor2"
_MOST_DEVICES = 64
_NO_LIMIT = -1
_UNFINISHED = ".new"
# Native: of eight bytes, and so stored and loaded at once, which "<q" is not.
_HEADER = struct.Struct("@8sqq")
_NAME = struct.Struct("@32s40s")  # as this process calls the device, and what it is for all of them
_NUMBER = struct.Struct("@q")
_WISHES = struct.Struct("@qqqqq")  # written by others: the budget's number and bytes, the trim's; ours: trims done
_FIGURES = struct.Struct("@q7q")  # version, and as in Figures
_WISHES_AT = _NAME.size
_FIGURES_AT = _WISHES_AT + _WISHES.size
_RECORD_BYTES = _FIGURES_AT + _FIGURES.size
_FILE_BYTES = _HEADER.size + _MOST_DEVICES * _RECORD_BYTES
_MOST_TRIES = 10_000  # a process that is writing is done in a moment; one that was killed while it did is not


class Figures(NamedTuple):
    """Bytes that a process has on a device; shared are those of pages that several of its tensors or prefixes use."""

    committed_bytes: int
    pooled_bytes: int
    torch_bytes: int
    budget_bytes: int
    """-1: no limit."""
    reserved_bytes: int
    shared_bytes: int
    offloaded_bytes: int


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

    def record(self, device: str, identity: str = "") -> StatusRecord:
        """The place for the figures of one device.

        Args:
            identity: what all processes know the device by, whatever they call it; default: its name.

        Raises: OSError for more devices than there are places.
        """
        if device not in self._records:
            if len(self._records) == _MOST_DEVICES:
                raise OSError(f"{self.path} has no place for {device!r}: {_MOST_DEVICES} are taken")
            offset = _HEADER.size + len(self._records) * _RECORD_BYTES
            self._records[device] = StatusRecord(self._map, offset, device, identity or device)
        return self._records[device]


class StatusRecord:
    """Where one device's figures are published, and where others ask for another budget, or for idle memory."""

    def __init__(self, buffer: mmap.mmap, offset: int, device: str, identity: str) -> None:
        self.identity = identity
        self._buffer = buffer
        self._offset = offset
        self._num_granted = 0
        self._num_trims = 0
        _NAME.pack_into(buffer, offset, device.encode(), identity.encode())

    @property
    def figures_address(self) -> int:
        """Where a ledger writes the figures, for as long as this record lives."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._buffer, self._offset + _FIGURES_AT))

    def asked_budget(self) -> tuple[int | None] | None:
        """The budget that somebody has asked for since the last call, None in it for no limit; None if nobody has."""
        number, budget_bytes, *_ = _WISHES.unpack_from(self._buffer, self._offset + _WISHES_AT)
        if number == self._num_granted:
            return None
        self._num_granted = number
        return (None if budget_bytes == _NO_LIMIT else budget_bytes,)

    def asked_trim(self) -> int:
        """How many idle bytes somebody has asked for since ``trimmed`` was called; 0 if nobody has."""
        _, _, self._num_trims, nbytes, num_done = _WISHES.unpack_from(self._buffer, self._offset + _WISHES_AT)
        return int(nbytes) if self._num_trims != num_done else 0

    def trimmed(self) -> None:
        """Tell who asked that what can be had of it went."""
        _NUMBER.pack_into(self._buffer, self._offset + _WISHES_AT + 4 * _NUMBER.size, self._num_trims)


class Request(NamedTuple):
    """Idle memory that another process was asked for."""

    path: Path
    offset: int
    number: int

    def is_answered(self) -> bool:
        """Whether the process has given what it can, or has ended."""
        try:
            with self.path.open("rb") as file:
                return self.number <= int(_WISHES.unpack(os.pread(file.fileno(), _WISHES.size, self.offset))[4])
        except (OSError, struct.error):
            return True


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
            found += [DeviceStatus(pid, _command_of(pid), name, it.figures) for name, it in _records(path).items()]
    return found


def ask_for_budget(folder: Path, pid: int, budget_bytes: int | None, device: str | None = None) -> list[str]:
    """Ask a process for another budget, which it takes at once if it watches its file; returns the devices.

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
    for name in wanted:
        _ask(path, records[name].offset + _WISHES_AT, _NO_LIMIT if budget_bytes is None else budget_bytes)
    return wanted


def ask_to_trim(folder: Path, identity: str, nbytes: int) -> list[Request]:
    """Ask all other processes on a device to give so many bytes that they keep idle back to it.

    Raises: OSError where the folder cannot be read, or is not this user's alone.
    """
    _check(folder)
    _remove_stale(folder)
    requests = []
    for path in _files(folder):
        if path.name == str(os.getpid()):
            continue
        with suppress(OSError, ValueError):  # it ended meanwhile
            for record in _records(path).values():
                if record.identity == identity and record.figures.committed_bytes > 0:
                    at = record.offset + _WISHES_AT
                    requests.append(Request(path, at, _ask(path, at + 2 * _NUMBER.size, nbytes)))
    return requests


class _Record(NamedTuple):
    offset: int
    identity: str
    figures: Figures


def _ask(path: Path, at: int, value: int) -> int:
    """Write a wish and its number, by which the process sees that it is new; returns the number."""
    with path.open("r+b") as file:
        number = int(_NUMBER.unpack(os.pread(file.fileno(), _NUMBER.size, at))[0]) + 1
        os.pwrite(file.fileno(), _NUMBER.pack(value), at + _NUMBER.size)
        os.pwrite(file.fileno(), _NUMBER.pack(number), at)
    return number


def _records(path: Path) -> Mapping[str, _Record]:
    """By device: where its record is, and its figures."""
    records = {}
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != _FILE_BYTES:
            raise ValueError(f"{path} is no status file of this version of torch_vtensor")
        with mmap.mmap(file.fileno(), _FILE_BYTES, prot=mmap.PROT_READ) as buffer:
            if _HEADER.unpack_from(buffer)[0] != _MAGIC:
                raise ValueError(f"{path} is no status file of this version of torch_vtensor")
            for offset in range(_HEADER.size, _FILE_BYTES, _RECORD_BYTES):
                name, identity = (it.rstrip(b"\0").decode() for it in _NAME.unpack_from(buffer, offset))
                if name:
                    records[name] = _Record(offset, identity, _read_whole(buffer, offset + _FIGURES_AT))
    return records


def _read_whole(buffer: mmap.mmap, at: int) -> Figures:
    """The figures behind a version, as they were at one moment."""
    for tries in range(_MOST_TRIES):
        (before,) = _NUMBER.unpack_from(buffer, at)
        figures = Figures(*_FIGURES.unpack_from(buffer, at)[1:])
        (after,) = _NUMBER.unpack_from(buffer, at)
        if before == after and before % 2 == 0:
            break
        if tries % 100 == 99:
            time.sleep(0.0001)  # it may need this processor to go on
    return figures


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
