"""VTensor: a tensor that reserves its full length of addresses once and takes physical pages as it grows."""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType

import torch

from torch_vtensor.allocator import tiers
from torch_vtensor.allocator._torch_compat import num_storage_users
from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.captures import no_captures, outlast_captures, outside_captures
from torch_vtensor.allocator.growth import GrowthScheduler, RangeHold
from torch_vtensor.allocator.page_pool import Tier
from torch_vtensor.allocator.page_run import PageRun
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.errors import AsleepError, CapacityError, ClosedError, DriverError, OutOfPagesError, VTensorError

__all__ = ["VTensor"]


class VTensor:
    """A growable tensor [*outer, length, *row] whose address never moves and whose growth copies nothing.

    ``length`` rows are written, ``committed`` rows have memory, ``capacity`` rows have addresses:

        [0, length) [length, committed) [committed, capacity)
          readable      no driver call         addresses only

    Each of the ``outer`` indices (slots, heads) is a strip of its own that grows from its own start.

    Args:
        row_shape: the shape of one row, for example (num_heads, head_dim).
        capacity: rows to reserve. Addresses are free: reserve what could ever be needed.
        dtype, device: as in torch; the CPU and CUDA devices have drivers.
        outer_shape: leading dimensions, for example (batch,).
        first_rows: rows that the caller is about to write; a hint for which parked range to adopt.
        scheduler: where memory comes from; default: the device's own.
        adopt: whether the tensor may start in an ended tensor's range.
        tag: by which ``sleep`` and ``wake`` can name it.
        salt: the tenant whose rows they will be. Memory that was another tenant's is overwritten with zeros first.

    Effects: reserves addresses and takes no memory; may adopt the still mapped range of an ended tensor.
    Raises:  ValueError for a shape that holds nothing.
    Source:  vTensor (arXiv 2407.15309) section 4.1. There one tensor per request; here also one strip per slot or head.
    """

    def __init__(
        self,
        row_shape: Sequence[int],
        *,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        outer_shape: Sequence[int] = (),
        first_rows: int = 0,
        scheduler: GrowthScheduler | None = None,
        adopt: bool = True,
        salt: Hashable = None,
        tag: str = "kv_cache",
    ) -> None:
        self.row_shape, self.outer_shape = tuple(row_shape), tuple(outer_shape)
        if capacity < 1 or min((*self.row_shape, *self.outer_shape), default=1) < 1:
            raise ValueError(
                f"outer_shape {self.outer_shape}, capacity {capacity} and row_shape {self.row_shape} must all be at "
                "least 1"
            )
        self.dtype = dtype
        self.row_bytes = math.prod(self.row_shape) * dtype.itemsize
        self.scheduler = scheduler or default_scheduler(torch.device(device))
        self.device = self.scheduler.pool.device
        self.length = 0
        self._seen_rows = 0  # a live view made earlier may show rows below this
        self._shared_bytes = 0  # offsets below this may be mapped by another tensor
        self._common: tuple[tuple[AddressRange, int], tuple[tuple[tuple[int, ...], int], ...]] | None = None
        self._base: torch.Tensor | None = None
        self._base_rows = 0
        self.salt = salt
        self.tag = tag
        self._lease = threading.RLock()
        self._hold: RangeHold | None = self.scheduler.reserve(
            math.prod(self.outer_shape),
            capacity * self.row_bytes,
            first_rows * self.row_bytes if adopt else None,
            salt,
            tag,
        )
        self._hold.range.lease = self._lease
        self.capacity = capacity

    # What it is

    @property
    def committed(self) -> int:
        """Rows that have physical memory."""
        return min(self._range.committed_bytes // self.row_bytes, self.capacity)

    @property
    def first_row(self) -> int:
        """The first row that still has memory: 0 until ``drop_head`` gave earlier ones back."""
        return -(-self._range.head_bytes // self.row_bytes)

    @property
    def writable_from(self) -> int:
        """The first row that no other tensor maps, as far as it lies in shared pages."""
        if self._shared_bytes:  # those it was shared with may have ended since
            self._shared_bytes = min(self._shared_bytes, self._range.exclusive_from())
        return -(-self._shared_bytes // self.row_bytes)

    def common_prefixes(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """Strips whose first rows are the same memory, and how many rows: rows that none of them can have written."""
        range_ = self._range
        key = range_, range_.head_bytes  # what a range begins with changes in no other way
        if self._common is None or self._common[0] != key:
            heads = [] if range_.head_bytes else range_.common_heads()
            self._common = key, tuple((tuple(strips), nbytes // self.row_bytes) for strips, nbytes in heads)
        return self._common[1]

    def whole_pages(self, num_rows: int) -> PageRun:
        """The pages that hold only the first ``num_rows`` rows of each strip; none once the front was given back."""
        range_ = self._range
        return range_.run(range(range_.num_strips)).whole_until(0 if range_.head_bytes else num_rows * self.row_bytes)

    @property
    def head_bytes(self) -> int:
        """Where ``storage()`` starts in the first strip: the bytes that ``drop_head`` gave back."""
        return self._range.head_bytes

    @property
    def num_pages(self) -> int:
        """How many mappings this tensor consists of; a page that two of its slots share counts twice."""
        return len(self._range.pages)

    @property
    def committed_bytes(self) -> int:
        """Physical bytes behind this tensor, shared pages included; one that its slots share counts once.

        Those that were offloaded count as well; what was discarded has none.
        """
        return sum(page.nbytes for page in set(self._range.pages) if page.tier is not Tier.DISCARDED)

    @property
    def offloaded_bytes(self) -> int:
        """Those of the committed bytes that lie outside the device."""
        return self._range.outside_bytes

    @property
    def is_asleep(self) -> bool:
        """True from ``sleep`` to ``wake``: nothing is mapped, and neither the tensor nor a view may be used."""
        return self._range.is_asleep

    @property
    def is_idle(self) -> bool:
        """True from ``offload`` until the tensor is used again: its memory may be outside the device."""
        return self._range.is_idle

    @property
    def shared_bytes(self) -> int:
        """Those of the committed bytes that another tensor maps as well."""
        return sum(page.nbytes for page, num_own in Counter(self._range.pages).items() if page.num_refs > num_own)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of addresses behind this tensor."""
        return self._range.reserved_bytes

    @property
    def data_ptr(self) -> int:
        """The address of row 0 of the first strip; another one only after rows that others can see were overwritten."""
        return self._range.base_ptr

    def tensor(self) -> torch.Tensor:
        """The written rows [*outer, length - first_row, *row] as an ordinary strided torch tensor.

        It stays valid, and its memory stays mapped, however long it lives; later rows never change it.
        """
        self.retain_in_capture()
        self._seen_rows = max(self._seen_rows, self.length)
        return self._rows(self.first_row, self.length)

    def storage(self) -> torch.Tensor:
        """A uint8 tensor [bytes] over everything from ``first_row`` to the last strip's committed end.

        Each call makes a torch storage of its own, so a caller can tell its own views from others'.
        Strips' uncommitted tails lie in between where there are several: index it by strides, never read it whole.
        """
        self.retain_in_capture()
        hold = self._awake()
        head, end = hold.range.head_bytes, hold.range.committed_bytes
        nbytes = (hold.range.num_strips - 1) * hold.range.strip_bytes + end - head if end > head else 0
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            return hold.range.pool.driver.tensor(hold.range.base_ptr + head, nbytes, hold)

    def retain_in_capture(self) -> None:
        """Keep the memory alive as long as the graph that the current stream is being captured into, if it is."""
        hold = self._awake()
        hold.range.pool.driver.retain_in_capture(hold)

    def num_storages(self) -> int:
        """How many torch storages over this tensor's present range are alive, each with one or more views."""
        self._open()
        with self.scheduler.pool.lock:  # the scheduler's thread holds a reference only under this lock
            # One reference is ours, one is the argument's; every storage's owner is one more.
            return sys.getrefcount(self._hold) - 2

    def strides(self) -> tuple[int, ...]:
        """Strides, in elements, of [*outer, row, *row_shape]; from the capacity, so they never change."""
        row = _contiguous_strides(self.row_shape)
        row_elements = math.prod(self.row_shape)
        strip_elements = self._range.strip_bytes // self.dtype.itemsize
        outer = tuple(stride * strip_elements for stride in _contiguous_strides(self.outer_shape))
        return (*outer, row_elements, *row)

    def in_place(self) -> threading.RLock:
        """A lock: while a thread holds it, no other one moves this tensor's pages; they wait, in sleep() too.

            with vtensor.in_place():
                attend(query, vtensor.tensor())

        All that this class does takes it by itself; a view that is read later, while others may move it, needs it.

        Raises: ForkedProcessError in a process that fork() made since, where its holder may not exist.
        """
        self.scheduler.pool.check_process()
        return self._lease

    def stay_with(self, other: VTensor) -> None:
        """Have the same lock ``in_place``; before anybody else can have taken this tensor's."""
        self._lease = self._range.lease = other._lease

    # Growing and shrinking

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Write ``rows`` behind the last row and return the whole tensor.

        Shapes:  rows [*outer, T, *row] in this tensor's dtype and device.
        Effects: length += T. Copies only ``rows``; calls the driver only if fewer than T committed rows are left.
            After ``truncate``, rows that another tensor or a live view can see are not overwritten: the kept rows
            move to fresh pages first (whole pages are shared, the last part is copied).
        Raises:  ValueError for a shape, dtype or device that does not fit, or for rows through which gradients would
            flow; CapacityError past the reservation;
            OutOfPagesError; in each case with the tensor unchanged.
        """
        axis = len(self.outer_shape)
        expected = (*self.outer_shape, rows.shape[axis] if rows.dim() > axis else 0, *self.row_shape)
        if tuple(rows.shape) != expected or rows.dtype != self.dtype or rows.device != self.device:
            raise ValueError(
                f"append got {tuple(rows.shape)} {rows.dtype} on {rows.device}; this tensor takes "
                f"[*{self.outer_shape}, T, *{self.row_shape}] {self.dtype} on {self.device}: convert the rows first"
            )
        if rows.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "append got rows that require gradients; rows are overwritten in place, which autograd would have to "
                "remember for good: append rows.detach(), or under torch.no_grad()"
            )
        with self.in_place():
            start, stop = self.length, self.length + expected[axis]
            self.prepare_write(start, stop)
            self._rows(start, stop).copy_(rows)
            self.length = stop
            return self.tensor()

    def commit(self, num_rows: int) -> None:
        """Make sure that rows [first_row, num_rows) have memory; does not change the length.

        Raises: CapacityError or OutOfPagesError, with the tensor unchanged.
        """
        if num_rows > self.capacity:
            raise CapacityError(num_rows, self.capacity)
        if num_rows > self.committed:
            range_ = self._awake().range
            nbytes = num_rows * self.row_bytes
            own_bytes = range_.committed_bytes - max(range_.head_bytes, self._shared_bytes)
            page_bytes = range_.pool.page_bytes
            extra_bytes = int(own_bytes * range_.pool.driver.growth_fraction) // page_bytes * page_bytes
            if extra_bytes:
                with suppress(OutOfPagesError):  # what is asked for may fit where memory ahead of need does not
                    range_.commit(nbytes + extra_bytes)
            self._commit(range_, nbytes)

    def commit_ahead(self, num_rows: int) -> None:
        """As ``commit``, but on the scheduler's thread, and without an error if there is no memory."""
        self.scheduler.commit_soon(self._open(), min(num_rows, self.capacity) * self.row_bytes)

    def prepare_write(self, start: int, stop: int) -> None:
        """Make rows [start, stop) writable without disturbing what others see, committing what is missing.

        Raises: CapacityError or OutOfPagesError, with the tensor unchanged; ForkedProcessError in a process made by
            fork() since, where writing would change the parent's rows.
        """
        self.scheduler.pool.check_process()
        if stop > self.capacity:
            raise CapacityError(stop, self.capacity)
        self.use()
        overwrites = start * self.row_bytes < self._shared_bytes and start < self.writable_from
        if not overwrites and start < self._seen_rows:
            overwrites = self._has_live_views()
            if not overwrites:
                self._seen_rows = start
        if overwrites:
            self._move(self._fork(None, None, start, commit_rows=stop))
        else:
            self.commit(stop)

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on. Their memory stays for the rows to come; ``close`` gives it back.

        Raises: ValueError unless first_row <= length <= self.length.
        """
        if not self.first_row <= length <= self.length:
            raise ValueError(f"truncate to {length} rows: it must lie in [{self.first_row}, {self.length}]")
        self.length = length

    def drop_head(self, first_row: int) -> None:
        """Give back the whole pages that hold only rows before ``first_row``, behind the device's pending work.

        Effects: those rows are gone; ``tensor()`` starts at the first row that is still whole. A live view keeps
            the pages that it could read until it is gone.
        """
        hold = self._open()
        self._hold = self.scheduler.drop_head(hold, min(first_row, self.length) * self.row_bytes)
        if self._hold is not hold:
            self._base = None
            del hold  # the last reference, unless there are views
            self.scheduler.reap()

    # Sharing

    def fork(
        self, select: Sequence[int] | None = None, *, capacity: int | None = None, share_rows: int | None = None
    ) -> VTensor:
        """A new tensor with the same rows that shares this one's whole pages.

        Args:
            select: indices into the first outer dimension, repeats allowed: the new tensor's slots. Default: all.
            capacity: the new tensor's; default: this one's.
            share_rows: share only pages that end before this row, so that the rows from it on can be overwritten;
                default: every whole page.

        Effects: whole pages are mapped twice, not copied; of the last, partly written page only the written rows are
            copied, so both tensors can go on appending. Never waits for the device.
        Raises:  OutOfPagesError, with this tensor unchanged.
        Source:  vTensor (arXiv 2407.15309) section 4.3, prefix sharing; the paper shares whole chunks only.
        """
        return self._fork(select, capacity, self.length if share_rows is None else min(share_rows, self.length))

    def lend(self, slot: int, length: int) -> PageRun:
        """The pages that hold the first ``length`` rows of one slot, for somebody who keeps them.

        Effects: those rows are never overwritten in place any more; the rows behind them, in the last page too, may be.
        Raises:  ValueError for rows that are not written, or were given back by ``drop_head``.
        """
        if self.first_row > 0 or not 0 < length <= self.length:
            raise ValueError(f"lend {length} rows: this tensor holds rows [{self.first_row}, {self.length})")
        range_ = self._awake().range
        strips_per_slot = range_.num_strips // math.prod(self.outer_shape[:1])
        run = range_.run(range(slot * strips_per_slot, (slot + 1) * strips_per_slot))
        self._shared_bytes = max(self._shared_bytes, length * self.row_bytes)
        return run.covering(length * self.row_bytes)

    def borrow(self, run: PageRun, own_slots: Sequence[bool], length: int) -> None:
        """Begin this empty tensor with pages that somebody keeps, and be ``length`` rows long.

        Args:
            run: pages for the strips of every slot but those that are to have ``own_slots``, of the same sizes.

        Effects: what ``run`` does not cover has memory, and is for the caller to write.
        Raises:  OutOfPagesError or DriverError, or VTensorError where pages sleep and a graph is being captured, with
            the tensor to be closed.
        """
        strips_per_slot = self._range.num_strips // len(own_slots)
        lent = iter(run.strips)
        strips = [None if own else next(lent) for own in own_slots for _ in range(strips_per_slot)]
        pool = self.scheduler.pool
        with pool.lock:
            if pool.is_tiered:
                tiers.make_mappable(self.scheduler, run.pages())
            self._range.commit_run(run.bounds, strips)
        self._shared_bytes = self._range.committed_bytes
        self._commit(self._range, length * self.row_bytes)
        if pool.is_tiered:
            self._bring_back()
        self.length = length

    def copy_slot(self, slot: int, source: VTensor, start_bytes: int, padding: int) -> None:
        """Give a slot the rows of a tensor of one slot from offset ``start_bytes`` on, behind ``padding`` zero rows.

        Rows that others can see must not be among those written.
        """
        with source.in_place(), self.in_place():
            if padding == 0:
                self._bytes(start_bytes)[slot].copy_(source._bytes(start_bytes)[0])
                return
            self._rows(0, padding)[slot].zero_()
            if source.length:
                self._rows(padding, padding + source.length)[slot].copy_(source._rows(0, source.length)[0])

    # Leaving the device

    def offload(self, *, when_needed: bool = False) -> int:
        """Let the device have this tensor's memory for others while nobody uses it; returns the bytes that left it.

        The rows move to outside the device, at the same addresses: they can still be read, only slower, and graphs stay
        valid. The next append, fork or ``prefetch`` brings them back, and ends it; one in another thread waits until
        all are outside, as this waits for one that has begun, and for who holds ``in_place``.

        Args:
            when_needed: move nothing now, but when another tensor would find no page otherwise; of several tensors, the
                one that is idle the longest moves first. Do not read such a tensor from another thread.

        Effects: waits for the device. Pages that another tensor uses stay; so does what cannot be mapped at once.
        Raises:  OffloadLimitError, or DriverError, with all rows as they were; AsleepError.
        """
        pool = self.scheduler.pool
        with self.in_place():
            hold = self._awake()
            if when_needed:
                self.scheduler.mark_idle(hold)
                return 0
            with outside_captures(pool.driver, pool.lock):
                return self.scheduler.offload(hold)

    def prefetch(self) -> int:
        """Bring the rows back to the device, at the same addresses, and end ``offload``; returns the bytes that came.

        Effects: waits for the device. Pages that another tensor uses, which is not idle, stay where they are.
        Raises:  OutOfPagesError, with all rows where they were; AsleepError.
        """
        pool = self.scheduler.pool
        with self.in_place(), outside_captures(pool.driver, pool.lock):
            return self.scheduler.prefetch(self._awake())

    def use(self) -> None:
        """What every use but reading begins with: end ``offload``, bringing back the rows if there is room for them.

        Where there is none, they are used outside the device, and come when the tensor has grown and there is room.

        Raises: AsleepError between ``sleep`` and ``wake``.
        """
        self._open()
        pool = self.scheduler.pool
        if not pool.is_tiered:
            return
        with self.in_place(), pool.lock:  # who moves it holds the lock, and what is not idle does not move
            range_ = self._awake().range
            if range_.is_idle:
                range_.is_idle = False
                self._bring_back()
            elif range_.away_at not in (None, range_.committed_bytes):
                if pool.has_room(range_.outside_bytes):
                    self._bring_back()
                else:
                    range_.note_away()

    def close(self) -> None:
        """Give the memory back as soon as no view uses it. Closing twice is fine."""
        if self._hold is not None:
            self._hold = self._base = None
            self.scheduler.reap()

    def __enter__(self) -> VTensor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._hold is None:
            return "VTensor(closed)"
        shape = [*self.outer_shape, self.length, *self.row_shape]
        return (
            f"VTensor({shape}, {self.dtype}, {self.device}, committed={self.committed} of capacity={self.capacity} "
            f"rows, {self.committed_bytes / 2**20:.2f} MiB)"
        )

    # Inside

    @property
    def _range(self) -> AddressRange:
        return self._open().range

    def _open(self) -> RangeHold:
        if self._hold is None:
            raise ClosedError("this VTensor is closed: make a new one (its still living views stay readable)")
        return self._hold

    def _awake(self) -> RangeHold:
        hold = self._open()
        if hold.range.is_asleep:
            raise AsleepError(
                f"this VTensor sleeps (tag {self.tag!r}): torch_vtensor.wake() brings its rows back to {self.device}"
            )
        return hold

    def _commit(self, range_: AddressRange, nbytes: int) -> None:
        """Nothing is taken back for others while a graph is captured: if another thread does, again afterwards."""
        try:
            range_.commit(nbytes)
        except OutOfPagesError:
            if not outlast_captures(self.scheduler.pool.driver):
                raise
            range_.commit(nbytes)

    def _bring_back(self) -> None:
        pool = self.scheduler.pool
        with pool.lock, ExitStack() as held:
            if not no_captures(pool.driver, held):
                self._range.note_away()
                return
            try:
                self.scheduler.prefetch(self._awake())
            except OutOfPagesError:
                pass  # rows outside the device can be used as well
            except VTensorError as error:
                if isinstance(error, DriverError) or not pool.driver.is_capturing():
                    raise
                self._range.note_away()  # somebody who does not say so here began a capture meanwhile

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of every strip, which have memory, as a view of the cached storage."""
        if self._base is None or stop > self._base_rows:
            base_rows = self.committed  # asked first: the scheduler's thread may commit more meanwhile
            with torch.inference_mode(False):  # as in storage()
                self._base, self._base_rows = self.storage().view(self.dtype), base_rows
        head_elements = self._range.head_bytes // self.dtype.itemsize
        offset = start * math.prod(self.row_shape) - head_elements
        return self._base.as_strided((*self.outer_shape, stop - start, *self.row_shape), self.strides(), offset)

    def _has_live_views(self) -> bool:
        num_own_storages = int(self._base is not None)
        if self.num_storages() > num_own_storages:
            return True
        return self._base is not None and num_storage_users(self._base) > 1

    def _move(self, moved: VTensor) -> None:
        """Go on in the range of ``moved``, which holds the same rows."""
        moved._range.lease = self._lease
        self._hold, self._base = moved._hold, None
        self._shared_bytes, self._seen_rows = moved._shared_bytes, 0

    def _fork(
        self, select: Sequence[int] | None, capacity: int | None, share_rows: int, commit_rows: int = 0
    ) -> VTensor:
        """A new tensor that maps the whole pages below ``share_rows`` and copies the rows behind them."""
        with self.in_place():
            return self._fork_in_place(select, capacity, share_rows, commit_rows)

    def _fork_in_place(
        self, select: Sequence[int] | None, capacity: int | None, share_rows: int, commit_rows: int
    ) -> VTensor:
        self.use()
        source, slots = self._range, self._slots(select)
        capacity = self.capacity if capacity is None else capacity
        if capacity < self.length:
            raise CapacityError(self.length, capacity)
        strips_per_slot = math.prod(self.outer_shape[1:])
        strips = [slot * strips_per_slot + i for slot in slots for i in range(strips_per_slot)]
        forked = VTensor(
            self.row_shape,
            capacity=capacity,
            dtype=self.dtype,
            outer_shape=(len(slots), *self.outer_shape[1:]) if self.outer_shape else (),
            scheduler=self.scheduler,
            adopt=False,
            salt=self.salt,
            tag=self.tag,
        )
        try:
            with self.scheduler.pool.lock:
                shared_bytes = forked._range.commit_shared(source, strips, share_rows * self.row_bytes)
                self._shared_bytes = max(self._shared_bytes, shared_bytes)
            forked._shared_bytes = shared_bytes
            self._commit(forked._range, max(self.length, commit_rows) * self.row_bytes)
            forked.length = self.length
            source_ESB, target_ESB = self._bytes(shared_bytes), forked._bytes(shared_bytes)
            for target, slot in enumerate(slots):
                target_ESB[target].copy_(source_ESB[slot])
        except BaseException:
            forked.close()  # now, and not when the traceback that holds it is gone
            raise
        return forked

    def _slots(self, select: Sequence[int] | None) -> list[int]:
        """The indices into the first outer dimension that ``select`` stands for; [0] without such a dimension."""
        if select is None:
            return list(range(math.prod(self.outer_shape[:1])))
        if not self.outer_shape:
            raise ValueError(
                f"select is {list(select)}: this tensor has no outer dimension to select from, leave it out"
            )
        if not select or not all(0 <= slot < self.outer_shape[0] for slot in select):
            raise ValueError(
                f"select is {list(select)}: it takes at least one index, each in [0, {self.outer_shape[0]})"
            )
        return list(select)

    def _bytes(self, start: int) -> torch.Tensor:
        """The written bytes from offset ``start`` on: [slot, strips a slot, bytes]."""
        range_ = self._range
        num_slots = self.outer_shape[0] if self.outer_shape else 1
        per_slot = range_.num_strips // num_slots
        nbytes = max(self.length * self.row_bytes - start, 0)
        unit = torch.int64 if nbytes % 8 == 0 else torch.uint8
        shape = (num_slots, per_slot, nbytes // unit.itemsize)
        strides = (per_slot * range_.strip_bytes // unit.itemsize, range_.strip_bytes // unit.itemsize, 1)
        base = self.storage().view(unit)
        return base.as_strided(shape, strides, (start - range_.head_bytes) // unit.itemsize if nbytes else 0)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
