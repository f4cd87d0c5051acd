"""When parameters that are gathered anew for each pass begin to move: one pass ahead, so that few are there at a time.

::

    rank 0 computes   F layer 0      F layer 1      F layer 2      B layer 2 …
    rank 0 gathers    layer 1        layer 2        again layer 2  again layer 1
                      once layer 0   once layer 1
                      has its own    starts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch_vtensor.compile.program import Move, Program
from torch_vtensor.compile.schedules.job import Place

_PASSES_AHEAD = 2
"""A gather waits for the pass before the one that runs while it moves."""


def find_gathers(program: Program, turns: Mapping[int, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Pairs of jobs, the first to run before the second: passes, and gathers that would otherwise begin too soon.

    ``turns`` has the passes of each rank in their order.
    """
    anew = {exchange.tensor for exchange in program.flow.exchanges if exchange.anew}
    if not anew:
        return
    jobs = {job.name: job for job in program.jobs}
    writer = {place: job for job in program.jobs for place in job.written_places()}
    for rank, names in turns.items():
        seen: set[str] = set()
        for number, name in enumerate(names):
            ahead = [Place(rank, key) for key in jobs[name].reads.get(rank, ())]
            while ahead:
                job = writer.get(ahead.pop())
                work = None if job is None else program.work[job.name]
                if job is None or not isinstance(work, Move) or work.tensor not in anew or job.name in seen:
                    continue
                seen.add(job.name)
                ahead += job.read_places()
                if number >= _PASSES_AHEAD:
                    yield names[number - _PASSES_AHEAD], job.name
