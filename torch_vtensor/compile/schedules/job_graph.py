"""Which job waits for which: for data, for a constraint, for its turn in an explicit order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch_vtensor.compile.schedules.job import Dataflow, PlanError

_MOST_LINES = 16


class JobGraph:
    """Jobs by number, in the order given, and who waits for whom.

    Raises:  PlanError for jobs that wait for each other in a circle, and for names of jobs that there are not.
    """

    def __init__(
        self, flow: Dataflow, constraints: Sequence[tuple[str, str]], explicit: Mapping[int, Sequence[str]]
    ) -> None:
        self.flow = flow
        self.jobs = tuple(flow.jobs.values())
        self.successors: list[list[int]] = [[] for _ in self.jobs]
        self.num_predecessors = [0] * len(self.jobs)
        self._number = {job.name: number for number, job in enumerate(self.jobs)}
        self._constraints = constraints
        self._explicit = explicit
        self._add_data()
        for before, after in constraints:
            where = f"constraint ({before!r}, {after!r})"
            self._add(self._find(before, where), self._find(after, where))
        for rank, names in explicit.items():
            self._add_turns(rank, names)
        self.topological = self._sort()

    def longest_paths(self) -> list[float]:
        """Seconds of the longest chain of jobs that starts with each job."""
        longest = [0.0] * len(self.jobs)
        for number in reversed(self.topological):
            after = max((longest[after] for after in self.successors[number]), default=0.0)
            longest[number] = self.jobs[number].seconds + after
        return longest

    def _add(self, before: int, after: int) -> None:
        self.successors[before].append(after)
        self.num_predecessors[after] += 1

    def _add_data(self) -> None:
        writer, number = self.flow.writer, self._number
        for after, job in enumerate(self.jobs):
            for before in {number[writer[place]] for place in self.flow.reads[job.name] if place in writer}:
                self._add(before, after)

    def _add_turns(self, rank: int, names: Sequence[str]) -> None:
        numbers = [self._find(name, f"explicit order of rank {rank}") for name in names]
        for number in numbers:
            if rank not in self.jobs[number].ranks:
                raise PlanError(
                    f"the explicit order of rank {rank} names {self.jobs[number]}, which does not run there. Name it "
                    f"in the order of its own rank.",
                    rank=rank,
                    job=self.jobs[number].name,
                )
        for before, after in pairwise(numbers):
            self._add(before, after)

    def _find(self, name: str, where: str) -> int:
        if name not in self._number:
            raise PlanError(f"the {where} names job {name!r}, which is none of the {len(self.jobs)} jobs.", job=name)
        return self._number[name]

    def _sort(self) -> list[int]:
        """Jobs in an order in which each comes after what it waits for."""
        missing = list(self.num_predecessors)
        done = [number for number, count in enumerate(missing) if not count]
        for number in done:  # grows as it goes
            for after in self.successors[number]:
                missing[after] -= 1
                if not missing[after]:
                    done.append(after)
        if len(done) < len(self.jobs):
            raise self._circle({number for number, count in enumerate(missing) if count})
        return done

    def _circle(self, stuck: set[int]) -> PlanError:
        """Walk from a stuck job to one that it waits for, and on, until the walk comes back to where it was."""
        waits_for = {after: before for before in sorted(stuck) for after in self.successors[before]}
        walk: dict[int, None] = {}
        number = min(stuck)
        while number not in walk:
            walk[number] = None
            number = waits_for[number]
        circle = list(walk)[list(walk).index(number) :][::-1]
        steps = [(before, after, self._reason(before, after)) for before, after in pairwise([*circle, circle[0]])]
        lines = [f"  {self.jobs[before]} → {self.jobs[after]}: {reason}" for before, after, reason in steps]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES // 2 : -_MOST_LINES // 2] = [f"  … {len(lines) - _MOST_LINES} more"]
        asked = [reason for _, _, reason in steps if not reason.startswith("data")]
        remedy = (
            f"The {asked[-1]} closes the circle: drop it, or turn it around."
            if asked
            else "Data alone closes the circle, so no order can help: one of these jobs has to read something else."
        )
        what = f"{len(circle)} jobs wait for each other" if len(circle) > 1 else "a job waits for itself"
        first = self.jobs[circle[0]]
        return PlanError("\n".join([f"{what}:", *lines, remedy]), rank=first.ranks[0], job=first.name)

    def _reason(self, before: int, after: int) -> str:
        names = self.jobs[before].name, self.jobs[after].name
        written = set(self.jobs[before].written_places())
        for place in self.jobs[after].read_places():
            if place in written:
                return f"data {place}"
        if names in self._constraints:
            return f"constraint {names}"
        rank = next(rank for rank, turns in self._explicit.items() if names in pairwise(turns))
        return f"explicit order of rank {rank}"
