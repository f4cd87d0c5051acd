"""When parameters that are gathered anew for each pass begin to move: one pass ahead, so that few are there at a time.

::

    rank 0 computes   F layer 0      F layer 1      F layer 2      B layer 2       B layer 1 …
    rank 0 gathers    layer 1        layer 2                       again layer 1   again layer 0
                      once layer 0   once layer 0                  once layer 2
                      has its own    is done                       is there
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch_vtensor.compile.program import Program, moves_of
from torch_vtensor.compile.schedules.job import Job, Place


def find_gathers(program: Program, turns: Mapping[int, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Pairs of jobs, the first to run before the second: passes, and gathers that would otherwise begin too soon.

    A gather moves while the last pass that needs another one runs, and those between: it waits for the pass before. So
    small passes, as of a loss, hold up none. ``turns`` has passes of each rank in their order. Passes that it leaves
    out, those that op_order puts in turn, count as running right behind what they read from.
    """
    anew = {exchange.tensor for exchange in program.flow.exchanges if exchange.anew}
    if not anew:
        return
    writer = {place: job for job in program.jobs for place in job.written_places()}
    gathers = {job.name for job in program.jobs if any(m.tensor in anew for m in moves_of(program.work[job.name]))}
    number_of = {name: number for names in turns.values() for number, name in enumerate(names)}
    passes: defaultdict[int, list[Job]] = defaultdict(list)
    for job in program.jobs:
        if job.computes:
            passes[job.ranks[0]].append(job)
    for rank, names in turns.items():
        first: dict[str, int] = {}
        reading: set[int] = set()
        for job in passes[rank]:
            read = _upstream(job, rank, writer, gathers)
            if read:
                number = number_of[job.name] if job.name in number_of else _number(job, rank, writer, number_of)
                first.update({name: min(number, first.get(name, number)) for name in read})
                reading.add(number)
        in_order = sorted(reading)
        for name, number in first.items():
            before = in_order[bisect_left(in_order, number) - 1]
            if 0 < before < number:
                yield names[before - 1], name


def _upstream(job: Job, rank: int, writer: Mapping[Place, Job], gathers: set[str]) -> dict[str, None]:
    """The gathers that a pass waits for, one behind the other."""
    found: dict[str, None] = {}
    ahead = [Place(rank, key) for key in job.reads.get(rank, ())]
    while ahead:
        before = writer.get(ahead.pop())
        if before is not None and before.name in gathers and before.name not in found:
            found[before.name] = None
            ahead += before.read_places()
    return found


def _number(job: Job, rank: int, writer: Mapping[Place, Job], number_of: Mapping[str, int]) -> int:
    """The place of a pass right behind the last of those that have one and that it waits for on its rank."""
    last, seen = -1, {job.name}
    ahead = list(job.read_places())
    while ahead:
        before = writer.get(ahead.pop())
        if before is None or before.name in seen:
            continue
        seen.add(before.name)
        if before.name not in number_of:
            ahead += before.read_places()
        elif rank in before.ranks:
            last = max(last, number_of[before.name])
    return last + 1
