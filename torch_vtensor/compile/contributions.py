"""Which backward passes compute which addends of a parameter's gradient, for the check that every one is counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch_vtensor.compile.schedules.job import Job, Result
from torch_vtensor.compile.tensor_view import LogicalTensor, Mask

_Part = tuple[str, Mask]
"""An addend: the name of the group of readers whose gradients move together, and the part of it."""


class Contributions:
    """What is noted down while backward passes are, independent of the communication that brings addends together."""

    def __init__(self) -> None:
        self._jobs: defaultdict[LogicalTensor, defaultdict[_Part, dict[int, list[str]]]] = defaultdict(
            lambda: defaultdict(dict)
        )

    def add(self, tensor: LogicalTensor, group: str, mask: Mask, rank: int, jobs: Sequence[str]) -> None:
        """Note the jobs that together compute an addend on a rank; replicas are those of other ranks."""
        if jobs:
            self._jobs[tensor][group, mask][rank] = list(jobs)

    def results(
        self,
        gradients: Mapping[tuple[int, LogicalTensor], tuple[str, Mask]],
        names: Mapping[LogicalTensor, str],
        jobs: Sequence[Job],
    ) -> tuple[list[Result], list[Job]]:
        """A result for each gradient, with the number of its addends, and the jobs with what they contribute."""
        results: list[Result] = []
        contributed: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        noted: dict[str, int] = {}
        for (rank, tensor), (key, mask) in gradients.items():
            name = f"d {names[tensor]}{mask}"
            if name not in noted:
                noted[name] = self._note(tensor, mask, contributed, name)
            results.append(Result(name, rank, key, noted[name]))
        filled = [
            replace(job, contributes=tuple(mine), addends={name: tuple(addends) for name, addends in mine.items()})
            if (mine := contributed.get(job.name))
            else job
            for job in jobs
        ]
        return results, filled

    def _note(
        self,
        tensor: LogicalTensor,
        mask: Mask,
        contributed: defaultdict[str, defaultdict[str, list[str]]],
        name: str,
    ) -> int:
        count = 0
        for (group, part), by_rank in self._jobs.get(tensor, {}).items():
            if not part.overlaps(mask):
                continue
            # Ranks may compute one addend in different numbers of passes; then any of these stands for all of it.
            alike = len({len(jobs) for jobs in by_rank.values()}) == 1
            count += len(next(iter(by_rank.values()))) if alike else 1
            for jobs in by_rank.values():
                for number, job in enumerate(jobs):
                    contributed[job][name].append(f"{group} {part} {number if alike else 0}")
        return count
