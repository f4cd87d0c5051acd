"""Is a schedule one that can run, and computes what it should? Whoever made it: `order_jobs`, a file, an editor."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch_vtensor.compile.schedules.action import ACTION_KINDS, Action, Schedule
from torch_vtensor.compile.schedules.job import Dataflow, Job, Place, PlanError, Result, Value, readable_bytes
from torch_vtensor.compile.schedules.rendezvous import check_meeting_order, run_blocking


@dataclass(frozen=True)
class RankMemory:
    """The most bytes that a rank holds at once, during which action (-1: before the first), and what they are."""

    peak_bytes: int
    at: int
    workspace_bytes: int
    live: tuple[Value, ...]

    def bytes_by_kind(self) -> dict[str, int]:
        """What the peak consists of."""
        found: dict[str, int] = defaultdict(int)
        for value in self.live:
            found[value.kind] += value.num_bytes
        if self.workspace_bytes:
            found["workspace"] = self.workspace_bytes
        return dict(found)


@dataclass(frozen=True)
class Report:
    """What `check` found out about a schedule that passed: each rank's memory at its peak."""

    memory: Mapping[int, RankMemory]

    @property
    def peak_bytes(self) -> dict[int, int]:
        """The most bytes that each rank holds at once."""
        return {rank: memory.peak_bytes for rank, memory in self.memory.items()}

    def __str__(self) -> str:
        """A line for each rank."""
        return "\n".join(
            f"rank {rank}: peak {readable_bytes(memory.peak_bytes)}"
            + "".join(f", {kind} {readable_bytes(num_bytes)}" for kind, num_bytes in memory.bytes_by_kind().items())
            for rank, memory in self.memory.items()
        )


def check(schedule: Schedule, limit_bytes: int | Mapping[int, int] | None = None) -> Report:
    """Find out whether the schedule can run, computes all results once, and fits.

    - Every job is on each of its ranks once, as the action that its kind asks for.
    - Sends and receives meet, collectives run in one order, and no rank waits for ever although all of them block.
    - What an action reads is there: written before on that rank, and not freed.
    - Every result is there at the end, and all jobs that contribute to it went into it.
    - No rank holds more than `limit_bytes` at once.

    Raises:  PlanError with the job, the rank, the reason and what to do.
    """
    _check_complete(schedule)
    check_meeting_order(schedule)
    deque(run_blocking(schedule), maxlen=0)
    flow = schedule.flow
    there_at_start: dict[int, list[Value]] = defaultdict(list)
    for place, value in schedule.values.items():
        if place not in flow.writer:
            there_at_start[place.rank].append(value)
    memory, live_at_end = {}, {}
    for rank, row in schedule.actions.items():
        replay = _Replay(schedule, rank, there_at_start[rank])
        memory[rank] = replay.peak
        live_at_end[rank] = replay.live_at_end
        limit = limit_bytes.get(rank) if isinstance(limit_bytes, Mapping) else limit_bytes
        if limit is not None and memory[rank].peak_bytes > limit:
            raise _too_large(rank, memory[rank], limit, row)
    _check_results(schedule, flow, live_at_end)
    return Report(memory)


def _check_complete(schedule: Schedule) -> None:
    """Every action is its job's on that rank, and every job is on all its ranks once."""
    jobs, values = schedule.jobs, schedule.values
    num_found = 0
    for rank, row in schedule.actions.items():
        seen: set[str] = set()
        for action in row:
            if action.kind == "FREE":
                if action.rank != rank or action.peers or (rank, action.name) not in values:
                    raise _misplaced(schedule, rank, action)
                continue
            job = jobs.get(action.name)
            if job is None or rank not in job.ranks or action != Action.of(job, rank):
                raise _misplaced(schedule, rank, action)
            if action.name in seen:
                raise PlanError(
                    f"{job} occurs twice on rank {rank}. Remove one of the two {action.kind}.",
                    rank=rank,
                    job=action.name,
                )
            seen.add(action.name)
        num_found += len(seen)
    if num_found < sum([len(job.ranks) for job in jobs.values()]):
        raise _missing(schedule)


def _missing(schedule: Schedule) -> PlanError:
    """Which job is not on one of its ranks."""
    there = {(action.name, rank) for rank, row in schedule.actions.items() for action in row if action.kind != "FREE"}
    job, rank = next(
        (job, rank) for job in schedule.jobs.values() for rank in job.ranks if (job.name, rank) not in there
    )
    return PlanError(
        f"{job} is missing on rank {rank}. Add {Action.of(job, rank)} to its list.", rank=rank, job=job.name
    )


def _misplaced(schedule: Schedule, rank: int, action: Action) -> PlanError:
    """Why an action cannot stand in the list of a rank."""
    if action.kind not in ACTION_KINDS:
        wrong = f"{action.kind!r} is no kind of action; they are {', '.join(ACTION_KINDS)}"
    elif action.rank != rank:
        wrong = f"it says rank {action.rank}"
    elif action.kind == "FREE":
        has = f"names ranks {action.peers}, and every rank frees its own values"
        wrong = has if action.peers else f"there is no value {action.name!r} on rank {rank}"
    elif action.name not in schedule.jobs:
        wrong = f"there is no job {action.name!r}"
    elif rank not in schedule.jobs[action.name].ranks:
        wrong = f"the job runs on ranks {schedule.jobs[action.name].ranks}"
    else:
        wrong = f"the job's part on this rank is {Action.of(schedule.jobs[action.name], rank)!r}"
    return PlanError(
        f"{action} cannot stand in the list of rank {rank}: {wrong}. Remove it.", rank=rank, job=action.name
    )


class _Replay:
    """One rank's list: what is there before and after each action, and how much."""

    def __init__(self, schedule: Schedule, rank: int, there_at_start: Iterable[Value]) -> None:
        self._schedule = schedule
        self._rank = rank
        self._freed: dict[str, int] = {}
        self.live_at_end = {value.key: value for value in there_at_start}
        self.peak = self._replay()

    def _replay(self) -> RankMemory:
        """Go through all actions, and back to what is live at the peak."""
        rank, jobs, values = self._rank, self._schedule.jobs, self._schedule.values
        live, freed = self.live_at_end, self._freed
        made = [(-1, value) for value in live.values()]
        held = sum([value.num_bytes for value in live.values()])
        most, at, workspace = held, -1, 0
        running: dict[str, list[Job]] = {}  # the collectives with a workspace that read or bring a value
        beside = 0  # the workspaces of all of these
        for number, action in enumerate(self._schedule.actions[rank]):
            name = action.name
            if running:
                # What reads a value waits for what brings it; what frees it, for what reads it as well.
                frees = action.kind == "FREE"
                touched = (name,) if frees else jobs[name].reads.get(rank, ())
                several = [(key, one) for key in touched for one in running.get(key, ())]
                done = {one.name: one for key, one in several if frees or key in one.writes.get(rank, ())}
                beside -= sum([one.workspace_bytes for one in done.values()])
                if done:
                    running = {key: [one for one in ones if one.name not in done] for key, ones in running.items()}
            if action.kind == "FREE":
                if name not in live:
                    raise self._absent(number, action, name, "frees")
                value = live.pop(name)
                if value.pinned:
                    raise self._pinned(action)
                held -= value.num_bytes
                freed[name] = number
                continue
            job = jobs[name]
            for key in job.reads.get(rank, ()):
                if key not in live:
                    raise self._absent(number, action, key, "reads")
            for key in job.writes.get(rank, ()):
                value = live[key] = values[rank, key]  # type: ignore[index]  # as good as the Place, quicker made
                made.append((number, value))
                held += value.num_bytes
            if job.workspace_bytes and job.kind == "collective":
                beside += job.workspace_bytes
                for key in (*job.reads.get(rank, ()), *job.writes.get(rank, ())):
                    running.setdefault(key, []).append(job)
                needed = held + beside
            else:
                needed = held + beside + job.workspace_bytes
            if needed > most:
                most, at, workspace = needed, number, needed - held
        never = len(self._schedule.actions[rank])
        there = tuple([value for number, value in made if number <= at < freed.get(value.key, never)])
        return RankMemory(most, at, workspace, there)

    def _absent(self, number: int, action: Action, key: str, verb: str) -> PlanError:
        if key in self._freed:
            why = f"action {self._freed[key]} of this rank has freed"
            remedy = f"Move that FREE behind {action}" if verb == "reads" else "Remove one of the two FREE"
        else:
            writer = self._schedule.flow.writer[Place(self._rank, key)]
            why = f"job {writer!r} writes only later"
            remedy = f"Move {writer!r} before {action}"
        return PlanError(
            f"{action}, action {number} of rank {self._rank}, {verb} {key!r}, which {why}. {remedy}.",
            rank=self._rank,
            job=action.name,
        )

    def _pinned(self, action: Action) -> PlanError:
        return PlanError(
            f"{action} of rank {self._rank} gives up a value that is pinned: it must be there at the end. Remove the "
            f"FREE.",
            rank=self._rank,
            job=action.name,
        )


def _check_results(schedule: Schedule, flow: Dataflow, live: Mapping[int, Mapping[str, Value]]) -> None:
    contributors: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for one in schedule.jobs.values():
        for name in one.contributes:
            contributors[name][one.name] = one.addends.get(name, (one.name,))
    checked: set[tuple[str, int, str | None, int]] = set()
    for result in schedule.results:
        if result.key not in live.get(result.rank, {}):
            declared = result.place in schedule.values
            why = "it was freed. Remove that FREE, and pin the value" if declared else "nothing makes it. Add its job"
            raise PlanError(f"result {result.name!r} is not at {result.place} in the end: {why}.", rank=result.rank)
        # Of replicas that one collective writes, what went into one went into all.
        writer = flow.writer.get(result.place)
        job = None if writer is None else flow.jobs[writer]
        number = job.writes[result.rank].index(result.key) if job is not None and job.one_by_one else 0
        sum_of = result.name, result.num_addends, writer, number
        if sum_of not in checked:
            checked.add(sum_of)
            _check_addends(result, flow, contributors[result.name])


def _check_addends(result: Result, flow: Dataflow, contributors: Mapping[str, tuple[str, ...]]) -> None:
    """Follow gradients back from the result, and see which addends went into it."""
    found: set[str] = set()
    seen = {result.place}
    ahead = [result.place]
    while ahead:
        made = ahead.pop()
        name = flow.writer.get(made)
        if name is None:
            continue
        found.update(contributors.get(name, ()))
        job = flow.jobs[name]
        for place in job.sources(made) if job.one_by_one else flow.reads[name]:
            if place not in seen and flow.values[place].kind == "gradient":
                seen.add(place)
                ahead.append(place)
    lost = sorted(name for name, addends in contributors.items() if not found.issuperset(addends))
    if lost:
        num_addends = len({addend for addends in contributors.values() for addend in addends})
        raise PlanError(
            f"{flow.jobs[lost[0]]} contributes to {result.name!r}, and what it computes never reaches {result.place} "
            f"({len(found)} of {num_addends} contributions do). Add it to the sum.",
            rank=result.rank,
            job=lost[0],
        )
    if len(found) != result.num_addends:
        remedy = "Add the missing jobs" if len(found) < result.num_addends else "Drop those that are too many"
        raise PlanError(
            f"result {result.name!r} at {result.place} is the sum of {len(found)} contributions; it needs "
            f"{result.num_addends}. {remedy}.",
            rank=result.rank,
        )


def _too_large(rank: int, memory: RankMemory, limit: int, row: tuple[Action, ...]) -> PlanError:
    where = "before its first action" if memory.at < 0 else f"at action {memory.at}, {row[memory.at]}"
    kinds = sorted(memory.bytes_by_kind().items(), key=lambda item: -item[1])
    held = ", ".join(f"{kind} {readable_bytes(num_bytes)}" for kind, num_bytes in kinds)
    largest = sorted(memory.live, key=lambda value: -value.num_bytes)[:3]
    names = ", ".join(f"{value.key!r} with {readable_bytes(value.num_bytes)}" for value in largest)
    return PlanError(
        f"rank {rank} needs {memory.peak_bytes} bytes {where}; its limit is {limit}. It then holds {held}; the largest "
        f"are {names}. Recompute, have smaller or fewer microbatches under way, cut what is largest, or raise the "
        f"limit.",
        rank=rank,
        job=None if memory.at < 0 else row[memory.at].name,
    )
