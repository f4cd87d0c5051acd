"""Which addends of a tensor's gradient the readers of one operator's input hold: what adds up, and what is a copy.

A piece computes a box of its operator's identifiers. The gradient of an index of an input is a sum over the identifiers
that the input does not have, at any one place of those under which it is taken once::

    y[m n] = x[m k+] w[n k+] + b[n] taken once under k

    of x  pieces of n add up
    of b  pieces of m add up; pieces of k, each with a value chunk of b, all have the whole gradient
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from torch_vtensor.compile.communication import Placed
from torch_vtensor.compile.pieces import gradient_chunk, split_inputs
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, Mask, ValueChunk


class Reader(NamedTuple):
    """Who reads a part of a tensor: input `position` of an instance, or the caller on a rank (no task)."""

    task: Task | None
    rank: int
    position: int
    mask: Mask


_Range = tuple[Fraction | int, Fraction | int]
_Key = tuple[tuple[str, Interval | ValueChunk], ...]
_Addend = tuple[Mask, _Key]


def find_addends(readers: Sequence[Reader]) -> dict[Placed, tuple[Reader, ...]]:
    """Which addends of the gradient the readers hold, all of one operator's input.

    Of one part, a rank first adds up what it has: microbatches of a parameter's gradient become one addend. Ranks that
    then hold the same hold replicas. Where they hold some of the same, everything stays apart. Readers whose gradients
    would be counted twice are left out.
    """
    keys: defaultdict[Mask, defaultdict[int, dict[_Key, Reader]]] = defaultdict(lambda: defaultdict(dict))
    for reader in _taken_once(readers):
        # Readers with one key compute the same: a rank that has several counts the first.
        keys[reader.mask.region][reader.rank].setdefault(_key(reader), reader)
    held: dict[Placed, tuple[Reader, ...]] = {}
    for regions in _overlapping(list(keys)):
        by_rank = keys[regions[0]]
        sets = dict.fromkeys(frozenset(addends) for addends in by_rank.values())
        if len(regions) == 1 and sum(map(len, sets)) == len(frozenset[Hashable]().union(*sets)):
            number = {addends: index for index, addends in enumerate(sets)}
            for rank, addends in by_rank.items():
                chunk = ValueChunk(number[frozenset(addends)], len(sets))
                held[Placed(rank, regions[0].with_chunk(chunk))] = tuple(addends.values())
            continue
        names = dict.fromkeys((region, key) for region in regions for some in keys[region].values() for key in some)
        chunk_of = dict(_numbered(list(names), WHOLE_VALUE))
        for region in regions:
            for rank, addends in keys[region].items():
                for key, reader in addends.items():
                    held[Placed(rank, region.with_chunk(chunk_of[region, key]))] = (reader,)
    return held


def _key(reader: Reader) -> _Key:
    return () if reader.task is None else gradient_chunk(reader.task, reader.position)


def _taken_once(readers: Sequence[Reader]) -> list[Reader]:
    """Those readers that have the gradient once, or replicas of it.

    At each place of what the input is taken once under, the pieces there have the whole gradient. Where they are cut
    alike at most places, these count; pieces elsewhere are left out.
    """
    places = [place_under_sums(reader) for reader in readers]
    starts: defaultdict[str, dict[Fraction | int, None]] = defaultdict(dict)
    for place in places:
        for name, (start, _) in place.items():
            starts[name][start] = None
    if not starts:
        return list(readers)
    there: list[tuple[frozenset[_Addend], list[Reader]]] = []
    for point in itertools.product(*starts.values()):
        at = dict(zip(starts, point, strict=True))
        members = [
            reader
            for reader, place in zip(readers, places, strict=True)
            if all(start <= at[name] < stop for name, (start, stop) in place.items())
        ]
        there.append((frozenset((reader.mask.region, _key(reader)) for reader in members), members))
    ((most, _),) = Counter(addends for addends, _ in there).most_common(1)
    chosen = {reader for addends, members in there if addends == most for reader in members}
    return [reader for reader in readers if reader in chosen]


def place_under_sums(reader: Reader) -> dict[str, _Range]:
    """Where a reader is along what its input is taken once under: summed identifiers, and a split of values."""
    if reader.task is None:
        return {}
    task, position = reader.task, reader.position
    once = find_rule(task.operator).taken_once[position]
    place: dict[str, _Range] = {name: part for name, part in task.cuts.items() if name in once}
    if task.chunk != WHOLE_VALUE and position in split_inputs(task):
        place[""] = _range(task.chunk)
    return place


def _range(part: Interval | ValueChunk) -> _Range:
    if isinstance(part, Interval):
        return part
    return Fraction(part.number, part.of), Fraction(part.number + 1, part.of)


def _numbered(addends: Sequence[_Addend], chunk: ValueChunk) -> Iterator[tuple[_Addend, ValueChunk]]:
    """Number addends such that those of each index make up the chunk.

    Pieces come of cutting again and again, so that of pieces of one region some cut lies between two groups of them.
    """
    for regions in _overlapping(list(dict.fromkeys(region for region, _ in addends))):
        inside = [addend for addend in addends if addend[0] in regions]
        groups = _apart(inside)
        if len(groups) == 1:
            yield from ((addend, chunk) for addend in inside)
            continue
        for number, group in enumerate(groups):
            yield from _numbered(group, chunk.split(number, len(groups)))


def _apart(addends: Sequence[_Addend]) -> list[list[_Addend]]:
    """Addends in groups between which some cut lies; one group if all have the same key."""
    if len({key for _, key in addends}) == 1:
        return [list(addends)]
    ranges: list[Mapping[str, _Range]] = [{name: _range(part) for name, part in key} for _, key in addends]
    for name in ranges[0]:
        if not all(name in range_ for range_ in ranges):
            continue
        in_order = sorted(range(len(addends)), key=lambda index: ranges[index][name])
        groups: list[list[_Addend]] = []
        end: Fraction | int = -1
        for index in in_order:
            start, stop = ranges[index][name]
            if start >= end:
                groups.append([])
            groups[-1].append(addends[index])
            end = max(end, stop)
        if len(groups) > 1:
            return groups
    raise AssertionError(f"no cut lies between {', '.join(str(region) for region, _ in addends)}")


def _overlapping(regions: Iterable[Mask]) -> list[list[Mask]]:
    """Regions in groups, such that those of different groups have nothing in common."""
    groups: list[list[Mask]] = []
    for region in regions:
        touched = [group for group in groups if any(region.overlaps(other) for other in group)]
        groups = [group for group in groups if group not in touched]
        groups.append([*(other for group in touched for other in group), region])
    return groups
