"""From parts of a tensor that ranks have to parts that ranks need: the one entry to finding communication."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch_vtensor.compile.communication import (
    Assemble,
    Buffer,
    Collective,
    Communication,
    Part,
    Placed,
    Step,
    seconds_of,
)
from torch_vtensor.compile.point_to_point import find_point_to_point
from torch_vtensor.compile.rvd import find_grid
from torch_vtensor.compile.rvd_search import Exchange, Search
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Mask, ValueChunk, merge, tiling
from torch_vtensor.compile.topology import Topology

# Of more pairs of parts that are had and needed, exact messages are not tried where the search finds another way.
_MOST_COMPARED = 1024


def find_communication(
    shape: Sequence[int], itemsize: int, have: Sequence[Placed], need: Sequence[Placed], topology: Topology
) -> Communication:
    """The cheapest communication found that makes what ranks need of a tensor from what ranks have of it.

    Equal masks on several ranks hold equal values; different value chunks of one region are addends. What is needed of
    a value chunk is an addend: all needed chunks of a region together add up to its value, whatever addends exist.

    Collectives take even shards; uneven ones move by exact messages, which cost as many bytes.

    Raises:  ValueError for a need of what nobody has, and for a part outside of the tensor.
    """
    return _find_for_ranks(tuple(shape), itemsize, tuple(have), tuple(need), topology)


@functools.lru_cache(maxsize=4096)
def _find_for_ranks(
    shape: tuple[int, ...], itemsize: int, have: tuple[Placed, ...], need: tuple[Placed, ...], topology: Topology
) -> Communication:
    whole = Mask.of(shape)
    first_with: dict[Mask, Placed] = {}  # replicas have the same
    for placed in (*have, *need):
        first_with.setdefault(placed.mask, placed)
    for mask, placed in first_with.items():
        if len(mask.intervals) != len(shape) or not whole.contains(mask):
            raise ValueError(f"{placed} is no part of a tensor of shape {list(shape)}; cut masks out of {whole}.")
    # Plans repeat themselves on other ranks and for other microbatches: ranks that share nodes in the same way and
    # parts that lie to each other in the same way are searched once.
    starts = tuple(min(starts) for starts in zip(*map(_starts, first_with), strict=True))
    to_origin = tuple(-start for start in starts)
    at_origin = {mask: mask.moved(to_origin) for mask in first_with}
    number_of = _number_ranks((placed.rank for placed in (*have, *need)), topology)
    numbered_have, numbered_need = (
        tuple([Placed(number_of[rank], at_origin[mask]) for rank, mask in parts]) for parts in (have, need)
    )
    try:
        found = _find(itemsize, numbered_have, numbered_need, topology)
    except ValueError:
        # Say it with the caller's ranks.
        find_point_to_point(itertools.starmap(Buffer, have), need, itemsize, topology, itertools.count(1))
        raise
    if not any(starts) and all(rank == number for rank, number in number_of.items()):
        return found
    return found.renamed({number: rank for rank, number in number_of.items()}, starts)


def _starts(mask: Mask) -> tuple[int, ...]:
    return tuple(interval.start for interval in mask.intervals)


def _number_ranks(ranks: Iterable[int], topology: Topology) -> dict[int, int]:
    """Ranks numbered as they appear, in nodes numbered as they appear."""
    number_of: dict[int, int] = {}
    node_of: dict[int, int] = {}
    num_on: Counter[int] = Counter()
    for rank in ranks:
        if rank not in number_of:
            node = node_of.setdefault(topology.node(rank), len(node_of))
            number_of[rank] = node * topology.ranks_per_node + num_on[node]
            num_on[node] += 1
    return number_of


@functools.lru_cache(maxsize=4096)
def _find(itemsize: int, have: tuple[Placed, ...], need: tuple[Placed, ...], topology: Topology) -> Communication:
    buffers = {placed: Buffer(*placed) for placed in have}
    tags = itertools.count(1)
    regular = None if _is_here(have, need) else _find_regular(buffers, need, itemsize, topology, tags)
    if regular is not None:
        # One round of collectives is as good as it gets.
        kinds = {step.kind if isinstance(step, Collective) else "" for step in regular[1] if len(step.ranks) > 1}
        if len(have) * len(need) > _MOST_COMPARED or (len(kinds) < 2 and "" not in kinds):
            return Communication(buffers, *regular)
    exact = find_point_to_point(buffers.values(), need, itemsize, topology, tags)
    if regular is not None:
        collective, messages = (seconds_of(steps, itemsize, topology) for _, steps in (regular, exact))
        # The prediction is no better than that, and fewer, larger steps are easier on everyone.
        if collective <= 1.1 * messages:
            return Communication(buffers, *regular)
    return Communication(buffers, *exact)


def _is_here(have: Sequence[Placed], need: Sequence[Placed]) -> bool:
    """Whether every rank has what it needs."""
    on_rank: defaultdict[int, list[Mask]] = defaultdict(list)
    for rank, mask in have:
        on_rank[rank].append(mask)
    return all(
        any(one.chunk == mask.chunk == WHOLE_VALUE and one.contains(mask) for one in on_rank[rank])
        for rank, mask in need
    )


def _find_regular(
    have: Mapping[Placed, Buffer], need: Sequence[Placed], itemsize: int, topology: Topology, tags: Iterator[int]
) -> tuple[dict[Placed, Buffer], tuple[Step, ...]] | None:
    """By search over layouts; None if parts are irregular or nothing is better than exact messages."""
    held, wanted = _one_part_each(have), _one_region_each(need)
    if not held or not wanted:
        return None
    masks = {rank: mask for rank, (mask, _) in held.items()}
    both = find_grid(masks, wanted) if masks.keys() == wanted.keys() else None
    if both is not None:
        grid, (start, goal) = both
        search = Search((grid, grid), start, goal, itemsize, topology)
    else:
        of_have, of_need = find_grid(masks), find_grid(wanted)
        if of_have is None or of_need is None or not of_have[0].hull.contains(of_need[0].hull):
            return None
        (first, (start,)), (last, (goal,)) = of_have, of_need
        search = Search((first, last), start, goal, itemsize, topology)
    path = search.path()
    if len(path) == 1 and isinstance(path[0], Exchange):
        return None
    put_together: list[Step] = []
    buffers: dict[int, Buffer] = {}
    for rank, (mask, parts) in held.items():
        buffers[rank] = have[parts[0]]
        if len(parts) > 1 or buffers[rank].mask != mask:
            buffers[rank] = Buffer(rank, mask, next(tags))
            regions = tuple(Part(have[part], part.mask.region) for part in parts)
            put_together.append(Assemble(regions, buffers[rank]))
    buffers, steps = search.steps(path, buffers, tags)
    taken_out: list[Step] = []
    found: dict[Placed, Buffer] = {}
    for placed in need:
        buffer = found[placed] = buffers[placed.rank]
        if buffer.mask.intervals != placed.mask.intervals:
            found[placed] = Buffer(*placed, next(tags))
            taken_out.append(Assemble((Part(buffer, placed.mask.region),), found[placed]))
    return found, (*put_together, *steps, *taken_out)


def _one_part_each(have: Iterable[Placed]) -> dict[int, tuple[Mask, list[Placed]]] | None:
    """One part of each rank, made of all that it has side by side and added up; None if that makes no part."""
    on_rank: defaultdict[int, list[Placed]] = defaultdict(list)
    for placed in have:
        on_rank[placed.rank].append(placed)
    regions: dict[int, Mask] = {}
    addends: dict[int, frozenset[ValueChunk]] = {}
    for rank, parts in on_rank.items():
        chunks_of: defaultdict[Mask, set[ValueChunk]] = defaultdict(set)
        for placed in parts:
            chunks_of[placed.mask.region].add(placed.mask.chunk)
        region = _together(chunks_of)
        # Every region there with the same addends, and no index in two.
        if region is None or len({frozenset(chunks) for chunks in chunks_of.values()}) > 1:
            return None
        if sum(box.num_elements for box in chunks_of) != region.num_elements:
            return None
        regions[rank], addends[rank] = region, frozenset(chunks_of[parts[0].mask.region])
    if all(len(chunks) == 1 for chunks in addends.values()):
        return {rank: (region.with_chunk(*addends[rank]), on_rank[rank]) for rank, region in regions.items()}
    sets = dict.fromkeys(addends.values())
    chunks = list(itertools.chain(*sets))
    tiles = tiling(chunks)
    if tiles is None or not len(tiles) == len(chunks) == len(set(chunks)):
        return None
    number = {some: index for index, some in enumerate(sets)}
    return {
        rank: (region.with_chunk(ValueChunk(number[addends[rank]], len(sets))), on_rank[rank])
        for rank, region in regions.items()
    }


def _one_region_each(need: Iterable[Placed]) -> dict[int, Mask] | None:
    """One mask for each rank that has all in it that the rank needs, and no more; None if there is none."""
    on_rank: defaultdict[int, list[Mask]] = defaultdict(list)
    for rank, mask in need:
        on_rank[rank].append(mask)
    found: dict[int, Mask] = {}
    for rank, masks in on_rank.items():
        region = _together(mask.region for mask in masks)
        if region is None or len({mask.chunk for mask in masks}) > 1:
            return None
        found[rank] = region.with_chunk(masks[0].chunk)
    return found


def _together(boxes: Iterable[Mask]) -> Mask | None:
    """The one box that all of these make, overlapping or not."""
    merged = merge(boxes)
    return merged[0] if len(merged) == 1 and merged[0].num_elements else None
