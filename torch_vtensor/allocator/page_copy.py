"""Copies to and from pages, which are mapped at addresses of their own: always, or meanwhile, a chunk at a time.

    host      map 0 | copy 0 | map 1 | copy 1 | unmap 0 | map 2 | copy 2 | unmap 1 | ...
    device             |== 0 ==========|== 1 ==============|== 2 ====== ...

so that mapping, which takes the host 40 us a page, is hidden behind the copies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.allocator.driver import Fence
from torch_vtensor.allocator.page_pool import Page

if TYPE_CHECKING:
    from torch_vtensor.allocator.growth import GrowthScheduler

__all__ = ["Transfer", "copy_pages"]

_CHUNK_BYTES = 256 * 2**20


class Transfer(NamedTuple):
    """One copy of ``nbytes``, each side of which is a whole page or a mapped address; of nothing, zeros are written."""

    source: Page | int | None
    target: Page | int
    nbytes: int


def copy_pages(scheduler: GrowthScheduler, transfers: Sequence[Transfer]) -> None:
    """Do all of the copies, behind the current stream's work, and wait for the device.

    Raises: DriverError; what was mapped then is unmapped when the scheduler comes by again.
    """
    driver = scheduler.pool.driver
    running: list[ExitStack] = []  # a chunk each
    fences: list[Fence] = []
    try:
        for chunk in _chunks(transfers):
            stack = ExitStack()
            running.append(stack)
            pages = [side for it in chunk for side in (it.source, it.target) if isinstance(side, Page)]
            ptrs = {page: scheduler.pool.offloads.ptr_of(page.handle) for page in pages if page.is_outside}
            ptrs |= stack.enter_context(_mapped(scheduler, [page for page in pages if ptrs.get(page) is None]))
            for it in chunk:
                source, target = (ptrs[side] if isinstance(side, Page) else side for side in (it.source, it.target))
                assert target is not None
                if source is None:
                    driver.tensor(target, it.nbytes, None).zero_()
                else:
                    driver.copy(target, source, it.nbytes)
            fences.append(driver.fence())
            if len(running) > 1:
                fences.pop(0).wait()
                running.pop(0).close()
        while running:
            fences.pop(0).wait()
            running.pop(0).close()
    except BaseException:
        driver.fence().wait()
        for stack in running:
            stack.__exit__(*sys.exc_info())
        raise


def _chunks(transfers: Iterable[Transfer]) -> Iterator[list[Transfer]]:
    chunk: list[Transfer] = []
    for transfer in transfers:
        if chunk and sum(it.nbytes for it in chunk) + transfer.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(transfer)
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
