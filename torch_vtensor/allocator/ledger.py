"""Ledger: which bytes of physical memory a device has given us, counted in C for Python and PyTorch alike."""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Callable
from typing import NamedTuple

from torch_vtensor.allocator import native
from torch_vtensor.errors import ClosedError

__all__ = ["Ledger", "LedgerCounts", "Take", "load_library"]

_ABI_VERSION = 6
_INT64_MAX = 2**63 - 1


class Take(enum.Enum):
    """What `Ledger.take` answers when it has no pooled page to give."""

    CHARGED = "charged"
    """The bytes are charged: create a page of them, or uncharge them."""
    OVER_BUDGET = "over budget"
    """Nothing was charged."""


class LedgerCounts(NamedTuple):
    """A ledger's figures at one moment: ``committed_bytes = free_bytes + torch_bytes + what PagePool holds``.

    Of the ``free_bytes``, which are pooled, ``unwanted_bytes`` are those that ``Ledger.watch`` explains.
    """

    committed_bytes: int
    free_bytes: int
    torch_bytes: int
    budget_bytes: int | None
    num_free_pages: int
    num_pages: int
    unwanted_bytes: int


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in LedgerCounts._fields]


@functools.cache
def load_library() -> ctypes.PyDLL:
    """Open the compiled half of the allocator.

    Raises: FileNotFoundError where it was not built, ImportError where it was built from other sources; with remedy.
    """
    path = str(native.library_path())
    # PyDLL keeps the GIL: these calls take tens of nanoseconds, letting go of the GIL costs more and invites a switch.
    library = ctypes.PyDLL(path)
    found = library.vtensor_pool_abi_version()
    if found != _ABI_VERSION:
        raise ImportError(
            f"{path} has interface version {found}, this torch_vtensor needs {_ABI_VERSION}: "
            "build it again with `pip install -e .` (or `make test`) in the source tree."
        )
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", pointer, [i64]),
        ("delete", None, [pointer]),
        ("take", ctypes.c_int, [pointer, i64, pointer]),
        ("put", ctypes.c_int, [pointer, ctypes.c_uint64, i64]),
        ("pop", ctypes.c_int, [pointer, pointer, pointer]),
        ("pop_unwanted", ctypes.c_int, [pointer, pointer, pointer]),
        ("watch", None, [pointer]),
        ("give_up", None, [pointer, i64, i64]),
        ("uncharge", ctypes.c_int, [pointer, i64]),
        ("set_budget", None, [pointer, i64]),
        ("show", None, [pointer, pointer]),
        ("note", None, [pointer, i64, i64, i64]),
        ("read", None, [pointer, pointer]),
    ):
        function = getattr(library, f"vtp_ledger_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class Ledger:
    """The bytes of physical memory of one device: charged against one budget, and which pages of them are pooled.

    A page is *taken* (reused, or charged and then created by the caller) and later *put* back, which pools it, or
    destroyed and *uncharged*. ``PagePool`` and the torch allocator share a ledger, hence one budget and one set of
    pooled pages serve both. No call here touches a driver, and none but `take` of a new page can fail.

    Args:
        budget_bytes: the most bytes to charge, pooled pages included; None for no limit.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._library = load_library()
        self._address: int | None = self._library.vtp_ledger_new(_as_budget(budget_bytes))
        if not self._address:
            raise MemoryError("no host memory for a ledger")

    @property
    def address(self) -> int:
        """The C ledger, for the native allocator; raises ClosedError after `close`."""
        if self._address is None:
            raise ClosedError("this ledger was closed: its pool is gone. Use a pool that is open.")
        return self._address

    def take(self, nbytes: int) -> int | Take:
        """A pooled page's handle, or ``Take.CHARGED``: create one, or ``Take.OVER_BUDGET``: nothing was charged.

        Where the budget was lowered below what is committed, pooled pages are given out only as long as those in use
        stay within it.
        """
        if nbytes <= 0:
            raise ValueError(f"nbytes is {nbytes}; a page has at least 1 byte.")
        handle = ctypes.c_uint64()
        result = self._library.vtp_ledger_take(self.address, nbytes, ctypes.byref(handle))
        if result == 1:
            return handle.value
        if result < 0:
            raise MemoryError(f"no host memory to note a page of {nbytes} bytes")
        return Take.CHARGED if result else Take.OVER_BUDGET

    def put(self, handle: int, nbytes: int) -> None:
        """Pool a page that was taken; its bytes stay charged."""
        was_out = self._library.vtp_ledger_put(self.address, handle, nbytes)
        assert was_out, f"page {handle:#x} of {nbytes} bytes was put back, but no page of that size is out"

    def pop_free(self) -> tuple[int, int] | None:
        """Take the largest pooled page out, as (handle, bytes), to destroy it and then `uncharge` its bytes."""
        return self._pop(self._library.vtp_ledger_pop)

    def watch(self) -> None:
        """From here on, pooled pages that nobody takes are unwanted: of each size the fewest that were pooled since."""
        self._library.vtp_ledger_watch(self.address)

    def give_up(self, nbytes: int, num_pages: int) -> None:
        """Count so many more pooled pages of a size as unwanted, if there are so many."""
        self._library.vtp_ledger_give_up(self.address, nbytes, num_pages)

    def pop_unwanted(self) -> tuple[int, int] | None:
        """As ``pop_free``, of the unwanted ones."""
        return self._pop(self._library.vtp_ledger_pop_unwanted)

    def uncharge(self, nbytes: int) -> None:
        """Note that one page of these bytes was destroyed, or never created."""
        was_out = self._library.vtp_ledger_uncharge(self.address, nbytes)
        assert was_out, f"{nbytes} bytes were uncharged, but no page of that size is out"

    def counts(self) -> LedgerCounts:
        """All figures at one moment."""
        counts = self._read()
        values = {name: getattr(counts, name) for name in LedgerCounts._fields}
        return LedgerCounts(**values | {"budget_bytes": _from_budget(counts.budget_bytes)})

    @property
    def committed_bytes(self) -> int:
        """Bytes of physical memory charged: in use, pooled, or under torch's tensors."""
        return int(self._read().committed_bytes)

    @property
    def free_bytes(self) -> int:
        """Bytes of pooled pages."""
        return int(self._read().free_bytes)

    @property
    def torch_bytes(self) -> int:
        """Bytes that the torch allocator holds: under its segments, or waiting for the device to be done with them."""
        return int(self._read().torch_bytes)

    @property
    def budget_bytes(self) -> int | None:
        """The most bytes to charge. Lowering it refuses new charges until enough was given back."""
        return _from_budget(self._read().budget_bytes)

    @budget_bytes.setter
    def budget_bytes(self, value: int | None) -> None:
        self._library.vtp_ledger_set_budget(self.address, _as_budget(value))

    def show(self, address: int | None) -> None:
        """Write all figures to a ``vtp_shown`` at ``address``, now and at every change, until it is None."""
        self._library.vtp_ledger_show(self.address, address)

    def note(self, reserved_bytes: int, shared_bytes: int, offloaded_bytes: int) -> None:
        """Show these beside the ledger's own figures."""
        self._library.vtp_ledger_note(self.address, reserved_bytes, shared_bytes, offloaded_bytes)

    def close(self) -> None:
        """Let go of the C ledger; pooled pages are forgotten, so destroy them first. Closing twice is closing once."""
        address, self._address = self._address, None
        if address is not None:
            self._library.vtp_ledger_show(address, None)  # which others that own it go on with
            self._library.vtp_ledger_delete(address)

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self.close()

    def _pop(self, pop: Callable[..., int]) -> tuple[int, int] | None:
        handle, nbytes = ctypes.c_uint64(), ctypes.c_int64()
        found = pop(self.address, ctypes.byref(handle), ctypes.byref(nbytes))
        return (handle.value, nbytes.value) if found else None

    def _read(self) -> _Counts:
        counts = _Counts()
        self._library.vtp_ledger_read(self.address, ctypes.byref(counts))
        return counts


def _as_budget(value: int | None) -> int:
    if value is None:
        return -1
    if not 0 <= value <= _INT64_MAX:
        raise ValueError(f"budget_bytes is {value}; a budget is at least 0 bytes, or None for no limit.")
    return value


def _from_budget(value: int) -> int | None:
    return None if value < 0 else value
