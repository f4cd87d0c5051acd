"""The algebra of masks against arrays of booleans: one for each index and finest addend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_vtensor.compile.tensor_view import (
    Interval,
    Mask,
    ValueChunk,
    cells,
    covers,
    cut_evenly,
    merge,
    missing,
    tiling,
)

SHAPE = (4, 5)
FINEST = 12
COUNTS = [1, 2, 3, 4, 6, 12]


def intervals(size: int) -> st.SearchStrategy[Interval]:
    return st.sampled_from([Interval(start, stop) for start in range(size) for stop in range(start + 1, size + 1)])


CHUNKS = st.sampled_from([ValueChunk(number, of) for of in COUNTS for number in range(of)])
BOXES = st.tuples(*map(intervals, SHAPE)).map(Mask)
MASKS = st.builds(Mask, st.tuples(*map(intervals, SHAPE)), CHUNKS)


def elements(mask: Mask | None) -> torch.Tensor:
    """Which indices and finest addends a mask has."""
    array = torch.zeros(*SHAPE, FINEST, dtype=torch.bool)
    if mask is not None:
        width = FINEST // mask.chunk.of
        array[(*mask.within(Mask.of(SHAPE)), slice(mask.chunk.number * width, (mask.chunk.number + 1) * width))] = True
    return array


def union(masks: list[Mask]) -> torch.Tensor:
    return sum((elements(mask) for mask in masks), elements(None))


@given(MASKS, MASKS)
def test_intersection(a: Mask, b: Mask) -> None:
    both = elements(a) & elements(b)
    if a.chunk.of % b.chunk.of and b.chunk.of % a.chunk.of:
        with pytest.raises(ValueError, match="have no addend in common"):
            a.intersection(b)
    else:
        assert torch.equal(elements(a.intersection(b)), both)
    assert torch.equal(elements(a.overlap(b)), elements(a.region) & elements(b.region))


@given(MASKS, MASKS)
def test_contains(a: Mask, b: Mask) -> None:
    if b.chunk.of % a.chunk.of:  # no chunk of so many is one of the other's chunks, or in one
        assert not a.contains(b)
    else:
        assert a.contains(b) == torch.equal(elements(a) | elements(b), elements(a))


@given(BOXES, BOXES)
def test_difference(a: Mask, b: Mask) -> None:
    rest = a.difference(b)
    assert torch.equal(union(list(rest)), elements(a) & ~elements(b))
    assert sum(box.num_elements for box in rest) * FINEST == (elements(a) & ~elements(b)).sum()


@given(MASKS, MASKS)
def test_union(a: Mask, b: Mask) -> None:
    both = a.union(b)
    assert both == b.union(a)
    if both is not None:
        assert torch.equal(elements(both), elements(a) | elements(b))


@given(BOXES, BOXES)
def test_union_of_boxes_is_found_if_there_is_one(a: Mask, b: Mask) -> None:
    array = elements(a) | elements(b)
    hull = Mask(
        tuple(
            Interval(min(x.start, y.start), max(x.stop, y.stop)) for x, y in zip(a.intervals, b.intervals, strict=True)
        )
    )
    assert (a.union(b) is not None) == torch.equal(array, elements(hull))


@given(MASKS)
def test_shape_and_subscript(mask: Mask) -> None:
    part = torch.arange(20).reshape(SHAPE)[mask.within(Mask.of(SHAPE))]
    assert tuple(part.shape) == mask.shape
    assert part.numel() == mask.num_elements


@given(st.lists(BOXES, max_size=6), BOXES)
def test_missing_of_whole_values(parts: list[Mask], whole: Mask) -> None:
    left = list(missing(parts, whole))
    assert torch.equal(union(left), elements(whole) & ~union(parts))
    assert sum(box.num_elements for box in left) * FINEST == union(left).sum()
    assert covers(parts, whole) == (not left)


@given(st.lists(MASKS, max_size=8), BOXES)
def test_missing_where_addends_have_to_add_up(parts: list[Mask], whole: Mask) -> None:
    left = union(list(missing(parts, whole)))
    for index in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist():
        there = [part.chunk for part in parts if elements(part)[(*index, slice(None))].any()]
        is_missing = bool(elements(whole)[(*index, 0)]) and not adds_up(there)
        assert left[(*index, slice(None))].tolist() == [is_missing] * FINEST


def adds_up(chunks: list[ValueChunk]) -> bool:
    """By trying all ways to go from chunk to chunk."""
    reached = {0}
    for start in range(FINEST):
        if start in reached:
            reached |= {start + FINEST // chunk.of for chunk in chunks if chunk.number * (FINEST // chunk.of) == start}
    return FINEST in reached


@given(st.lists(CHUNKS, max_size=10))
def test_tiling(chunks: list[ValueChunk]) -> None:
    tiles = tiling(chunks)
    assert (tiles is not None) == adds_up(chunks)
    if tiles is not None:
        assert set(tiles) <= set(chunks)
        assert sum(FINEST // chunk.of for chunk in tiles) == FINEST
        assert [chunk.number * FINEST // chunk.of for chunk in tiles] == sorted(
            chunk.number * FINEST // chunk.of for chunk in tiles
        )


def test_chunks_that_overlap_do_not_add_up() -> None:
    assert tiling([ValueChunk(0, 2), ValueChunk(1, 3), ValueChunk(2, 3)]) is None
    assert tiling([ValueChunk(0, 2), ValueChunk(1, 2), ValueChunk(0, 1)]) == (ValueChunk(0, 1),)


@given(st.lists(BOXES, max_size=5), BOXES)
def test_cells(masks: list[Mask], box: Mask) -> None:
    found = list(cells(box, masks))
    assert torch.equal(union(found), elements(box))
    assert sum(cell.num_elements for cell in found) == box.num_elements
    for cell in found:
        assert all(mask.contains(cell) or mask.overlap(cell) is None for mask in masks)


@given(st.lists(BOXES, max_size=5))
def test_merge(boxes: list[Mask]) -> None:
    merged = merge(boxes)
    assert len(merged) <= len(boxes)
    assert torch.equal(union(merged), union(boxes))
    assert all(a.union(b) is None for a in merged for b in merged if a is not b)


@given(st.integers(1, 40), st.integers(1, 40))
def test_cut_evenly(size: int, num_parts: int) -> None:
    if num_parts > size:
        with pytest.raises(ValueError, match="cannot be cut into"):
            cut_evenly(size, num_parts)
        return
    parts = cut_evenly(size, num_parts)
    assert [index for part in parts for index in range(*part)] == list(range(size))
    sizes = [part.size for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
