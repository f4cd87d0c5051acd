"""AddressRange: which page backs which address, in every strip, and nothing outside of what was reserved."""

from collections.abc import Iterator

import pytest
import torch
from scripted_drivers import PAGE

from torch_vtensor.allocator.address_range import AddressRange
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.errors import OutOfPagesError

pytestmark = pytest.mark.usefixtures("everything_goes_back")


@pytest.fixture
def pool() -> PagePool:
    return PagePool(HostDriver(PAGE))


@pytest.fixture
def everything_goes_back(pool: PagePool) -> Iterator[None]:
    yield
    pool.check_integrity()
    assert not pool.live_pages()
    pool.trim()
    assert pool.driver.inner.physical_bytes() == 0


def strip(range_: AddressRange, index: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Bytes [start, stop) of one strip; default: all of its addresses, whose holes read as zeros."""
    stop = range_.strip_bytes if stop is None else stop
    address = range_.base_ptr + index * range_.strip_bytes + start
    return range_.pool.driver.tensor(address, stop - start, None)


def end(*ranges: AddressRange) -> None:
    for range_ in ranges:
        range_.check_integrity()
        range_.empty()
        range_.release()


@pytest.mark.parametrize("asked", [1, PAGE, 3 * PAGE + 1, 37 * PAGE])
def test_commit_backs_every_strip_up_to_the_next_page(pool: PagePool, asked: int) -> None:
    range_ = AddressRange(pool, 3, 40 * PAGE)
    assert pool.driver.inner.physical_bytes() == 0
    range_.commit(asked)
    assert 0 <= range_.committed_bytes - asked < PAGE
    assert pool.driver.inner.physical_bytes() == 3 * range_.committed_bytes
    for index in range(3):
        strip(range_, index, stop=range_.committed_bytes).fill_(index + 1)
    for index in range(3):
        assert strip(range_, index).sum() == (index + 1) * range_.committed_bytes
    end(range_)


def test_commit_never_leaves_the_reservation(pool: PagePool) -> None:
    range_, neighbour = AddressRange(pool, 2, 3 * PAGE + 1), AddressRange(pool, 1, PAGE)
    neighbour.commit(PAGE)
    range_.commit(10**9)
    assert range_.strip_bytes == range_.committed_bytes == 4 * PAGE
    assert sum(page.nbytes for page in range_.pages) == range_.reserved_bytes == 8 * PAGE
    calls = pool.driver.stats()["map"].count
    range_.commit(10**9)
    assert pool.driver.stats()["map"].count == calls
    end(range_, neighbour)


def test_commit_goes_on_where_it_stopped(pool: PagePool) -> None:
    range_ = AddressRange(pool, 2, 64 * PAGE)
    for pages in (1, 2, 7, 7, 30):
        before = range_.committed_bytes
        range_.commit(pages * PAGE)
        for index in range(2):
            strip(range_, index, before, range_.committed_bytes).fill_(pages + index)
    for index in range(2):
        values = strip(range_, index, stop=30 * PAGE)[::PAGE]
        assert values.tolist() == [1 + index, 2 + index, *[7 + index] * 5, *[30 + index] * 23]
    end(range_)


def test_without_memory_nothing_changes(pool: PagePool) -> None:
    range_ = AddressRange(pool, 2, 16 * PAGE)
    range_.commit(PAGE)
    strip(range_, 1, stop=PAGE).fill_(3)
    pool.budget_bytes = 7 * PAGE
    with pytest.raises(OutOfPagesError):
        range_.commit(4 * PAGE)
    assert range_.committed_bytes == PAGE
    assert strip(range_, 1).sum() == 3 * PAGE
    range_.commit(3 * PAGE)
    assert range_.committed_bytes == 3 * PAGE
    end(range_)


def test_shared_pages_are_the_same_memory_and_later_ones_are_not(pool: PagePool) -> None:
    source = AddressRange(pool, 3, 8 * PAGE)
    for pages in (1, 2, 3):
        source.commit(pages * PAGE)
    for index in range(3):
        strip(source, index, stop=3 * PAGE).fill_(10 + index)
    sharer = AddressRange(pool, 4, 16 * PAGE)
    assert sharer.commit_shared(source, [2, 0, 2, 1], 3 * PAGE - 1) == 2 * PAGE
    sharer.commit(3 * PAGE)
    for index, origin in enumerate([2, 0, 2, 1]):
        assert strip(sharer, index)[[0, 2 * PAGE - 1, 2 * PAGE]].tolist() == [10 + origin, 10 + origin, 0]
    strip(source, 0, 0, 1).fill_(99)
    assert strip(sharer, 1)[0] == 99
    assert source.exclusive_from() == sharer.exclusive_from() == 2 * PAGE
    assert pool.driver.inner.physical_bytes() == (3 * 3 + 4) * PAGE
    end(source)
    assert strip(sharer, 1)[0] == 99
    assert sharer.exclusive_from() == 2 * PAGE  # its strips 0 and 2 still map the same pages
    end(sharer)


def test_sharing_less_than_a_page_shares_nothing(pool: PagePool) -> None:
    source, sharer = AddressRange(pool, 1, PAGE), AddressRange(pool, 1, PAGE)
    source.commit(PAGE)
    assert sharer.commit_shared(source, [0], PAGE - 1) == 0
    assert source.exclusive_from() == 0
    end(source, sharer)


def test_a_detached_head_stays_readable_until_it_is_emptied(pool: PagePool) -> None:
    range_ = AddressRange(pool, 2, 8 * PAGE)
    for pages in (1, 2, 3):
        range_.commit(pages * PAGE)
    for index in range(2):
        strip(range_, index, stop=3 * PAGE).fill_(5 + index)
    head = range_.detach_head(2 * PAGE + 10)
    assert head is not None
    assert (range_.head_bytes, range_.committed_bytes) == (2 * PAGE, 3 * PAGE)
    assert not range_.is_whole
    assert not head.is_whole
    assert strip(range_, 1).sum() == 6 * 3 * PAGE
    range_.commit(4 * PAGE)
    head.empty()
    assert head.release() == 0
    assert [strip(range_, 1)[i * PAGE].item() for i in range(3)] == [0, 0, 6]
    assert range_.detach_head(2 * PAGE) is None
    end(range_)


def test_a_range_is_not_released_under_its_head(pool: PagePool) -> None:
    range_ = AddressRange(pool, 1, 4 * PAGE)
    range_.commit(PAGE)
    head = range_.detach_head(PAGE)
    assert head is not None
    range_.empty()
    with pytest.raises(AssertionError):
        range_.release()
    head.empty()
    head.release()
    end(range_)


def test_a_range_whose_every_page_was_detached_grows_behind_them(pool: PagePool) -> None:
    range_ = AddressRange(pool, 1, 8 * PAGE)
    range_.commit(PAGE)
    strip(range_, 0, stop=PAGE).fill_(1)
    head = range_.detach_head(PAGE)
    assert head is not None
    assert range_.pages == []
    range_.commit(2 * PAGE)
    strip(range_, 0, PAGE, 2 * PAGE).fill_(2)
    assert strip(range_, 0)[[0, PAGE]].tolist() == [1, 2]
    head.empty()
    head.release()
    end(range_)


def test_heads_can_be_shared_pages(pool: PagePool) -> None:
    source = AddressRange(pool, 1, 8 * PAGE)
    source.commit(4 * PAGE)
    strip(source, 0, stop=4 * PAGE).fill_(8)
    head = source.detach_head(4 * PAGE)
    assert head is not None
    source.commit(5 * PAGE)
    strip(source, 0, 4 * PAGE, 5 * PAGE).fill_(9)
    sharer = AddressRange(pool, 1, 8 * PAGE)
    assert sharer.commit_shared(source, [0], 5 * PAGE) == 5 * PAGE
    assert sharer.head_bytes == 4 * PAGE
    head.empty()
    head.release()
    end(source)
    assert strip(sharer, 0).tolist() == [0] * 4 * PAGE + [9] * PAGE + [0] * 3 * PAGE
    end(sharer)
