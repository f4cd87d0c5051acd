"""Copies to and from pages, a chunk at a time, so that what the host does for one is hidden behind another's copies.

    host      begin 0 | begin 1 |       end 0 | begin 2 |      end 1 | begin 3 | ...
    device        |== 0 ==========|== 1 ==============|== 2 ============== ...

To map 2 MiB takes the host 30 us, to unmap and destroy them 45, and a GPU's link to copy them 38.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.allocator.driver import Fence
from torch_vtensor.allocator.page_pool import Page

if TYPE_CHECKING:
    from torch_vtensor.allocator.growth import GrowthScheduler

__all__ = ["Piece", "Transfer", "copy_pieces"]

_CHUNK_BYTES = 64 * 2**20
_MOST_CHUNKS = 2  # that are begun and not ended


class Transfer(NamedTuple):
    """One copy of ``nbytes``, each side of which is a whole page or a mapped address; of nothing, zeros are written.

    A page without an address, as memory outside a GPU has one, is mapped somewhere meanwhile.
    """

    source: Page | int | None
    target: Page | int
    nbytes: int


class Piece(NamedTuple):
    """What moves at once: ``begin`` comes before its copies and says which they are, ``end`` when they are done.

    ``nbytes`` are copied. Both may fail.
    """

    nbytes: int
    begin: Callable[[], Iterable[Transfer]]
    end: Callable[[], object] = lambda: None


class _Chunk(NamedTuple):
    pieces: Sequence[Piece]
    mapped: ExitStack
    copied: Fence

    def finish(self) -> None:
        self.copied.wait()
        self.mapped.close()
        for piece in self.pieces:
            piece.end()


def copy_pieces(scheduler: GrowthScheduler, pieces: Iterable[Piece]) -> None:
    """Begin, copy and end all of the pieces in their order, behind the current stream's work.

    Effects: waits for the copies.
    Raises:  DriverError, or what a piece raises, with no copy under way: some pieces have ended, others have begun.
        What was mapped meanwhile is unmapped when the scheduler comes by again.
    """
    running: deque[_Chunk] = deque()
    try:
        for several in _in_chunks(pieces):
            running.append(_start(scheduler, several))
            if len(running) == _MOST_CHUNKS:
                running[0].finish()
                running.popleft()
        while running:
            running[0].finish()
            running.popleft()
    except BaseException:
        scheduler.pool.driver.copied().wait()
        for chunk in running:
            chunk.mapped.__exit__(*sys.exc_info())
        raise


def _start(scheduler: GrowthScheduler, pieces: Sequence[Piece]) -> _Chunk:
    pool, mapped = scheduler.pool, ExitStack()
    try:
        transfers = [transfer for piece in pieces for transfer in piece.begin()]
        pages = [side for it in transfers for side in (it.source, it.target) if isinstance(side, Page)]
        ptrs = {page: pool.offloads.ptr_of(page.handle) for page in pages if page.is_outside}
        ptrs |= mapped.enter_context(_mapped(scheduler, [page for page in pages if ptrs.get(page) is None]))
        for it in transfers:
            source, target = (ptrs[side] if isinstance(side, Page) else side for side in (it.source, it.target))
            assert target is not None
            if source is None:
                pool.driver.tensor(target, it.nbytes, None).zero_()
            else:
                pool.driver.copy(target, source, it.nbytes)
        return _Chunk(pieces, mapped, pool.driver.copied())
    except BaseException:
        pool.driver.copied().wait()
        mapped.__exit__(*sys.exc_info())
        raise


def _in_chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    chunk_bytes = 0
    for piece in pieces:
        if chunk and chunk_bytes + piece.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(piece)
        chunk_bytes += piece.nbytes
    if chunk:
        yield chunk


@contextmanager
def _mapped(scheduler: GrowthScheduler, pages: Sequence[Page]) -> Iterator[dict[Page, int]]:
    """The addresses at which pages are mapped inside the block; the device must be done with them at its end."""
    bounds = [0]
    for page in pages:
        bounds.append(bounds[-1] + page.nbytes)
    if not pages:
        yield {}
        return
    hold = scheduler.reserve(1, bounds[-1], None)
    try:
        hold.range.commit_run(bounds, [pages])
        base_ptr = hold.range.base_ptr
        yield {page: base_ptr + offset for page, offset in zip(pages, bounds, strict=False)}
        hold.range.empty()
    finally:
        del hold
        scheduler.reap()
