"""Programs and schedules with one thing wrong are found out: by `check`, by running them, or by what they compute."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from plan_models import find_case
from plan_strategies import RandomPlan
from plan_worlds import Planned, interpret, parts_at_start, plan_case, run_once, run_steps

from torch_vtensor.compile.buckets import Bucket
from torch_vtensor.compile.communication import Assemble, Collective, Transfer
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.primitives import Graph, op_assign, op_trans, store
from torch_vtensor.compile.program import Add, Backward, Move, Program, Work
from torch_vtensor.compile.schedules import Job, PlanError, Schedule, check, order_jobs
from torch_vtensor.compile.schedules.action import Action
from torch_vtensor.compile.tensor_view import Interval, Mask

Mutation = Callable[[Planned, random.Random], Planned | None]
SEEDS = range(16)


@cache
def plans() -> tuple[Planned, ...]:
    """Plans that move things, on two ranks or more."""
    return tuple(_plans())


def _plans() -> Iterator[Planned]:
    for seed in SEEDS:
        choose = random.Random(seed)
        plan = RandomPlan(choose)
        if plan.num_ranks < 2:
            continue
        try:
            planned = plan_case(find_case(seed % 8 + 2), plan, plan.num_ranks)
        except ValueError:
            continue
        if any(job.communicates for job in planned.program.jobs):
            yield planned
    for seed in range(8, 14):
        yield plan_case(find_case(seed), sharded, 2)
    for seed in range(8, 20):
        yield plan_case(find_case(seed), in_two, 2)


def in_two(graph: Graph, mesh: Mesh) -> None:
    """Data parallel."""
    op_assign(op_trans(graph.tasks, "batch", 2), mesh.ranks)


def sharded(graph: Graph, mesh: Mesh) -> None:
    """Parameters in shards, which are gathered for every sample and get their gradients back as shards."""
    store(graph, mesh.ranks)
    op_assign(op_trans(graph.tasks, "batch", 2), mesh.ranks)


def pick(planned: Planned, choose: random.Random, matches: Callable[[Job], bool]) -> Job | None:
    """A job that matters: some result depends on it."""
    alive = live_jobs(planned.program)
    found = [job for job in planned.program.jobs if job.name in alive and matches(job)]
    return choose.choice(found) if found else None


def live_jobs(program: Program) -> set[str]:
    """The jobs that some result depends on; replicas that nobody reads are none."""
    writer = {place: job for job in program.jobs for place in job.written_places()}
    ahead = [result.place for result in program.results]
    alive: set[str] = set()
    while ahead:
        job = writer.get(ahead.pop())
        if job is not None and job.name not in alive:
            alive.add(job.name)
            ahead += job.read_places()
    return alive


def with_actions(planned: Planned, change: Callable[[list[Action]], list[Action]]) -> Planned:
    rows = {rank: change(list(row)) for rank, row in planned.schedule.actions.items()}
    return replace(planned, schedule=planned.schedule.with_actions(rows))


def with_work(planned: Planned, name: str, work: Work) -> Planned:
    return replace(planned, program=replace(planned.program, work={**planned.program.work, name: work}))


def with_changed(
    planned: Planned, choose: random.Random, matches: Callable[[Work], bool], change: Callable[[Any], Any]
) -> Planned | None:
    """The same with the work of one job changed, of those whose work matches; None if there is none."""
    job = pick(planned, choose, lambda job: matches(planned.program.work[job.name]))
    return job and with_work(planned, job.name, change(planned.program.work[job.name]))


def is_sum(work: Work) -> bool:
    return isinstance(work, Add)


def ordered_anew(planned: Planned, program: Program) -> Planned:
    schedule: Schedule = order_jobs(program.jobs, program.values, (), {}, program.results)
    return Planned(planned.case, program, schedule)


# ---------------------------------------------------------------------- schedules


def drop_a_communication(planned: Planned, choose: random.Random) -> Planned | None:
    job = pick(planned, choose, lambda job: job.communicates)
    return job and with_actions(planned, lambda row: [action for action in row if action.name != job.name])


def drop_one_end_of_a_communication(planned: Planned, choose: random.Random) -> Planned | None:
    job = pick(planned, choose, lambda job: job.communicates)
    rank = choose.choice(job.ranks) if job else None
    return job and with_actions(planned, lambda row: [a for a in row if (a.name, a.rank) != (job.name, rank)])


def run_a_communication_twice(planned: Planned, choose: random.Random) -> Planned | None:
    job = pick(planned, choose, lambda job: job.communicates)
    return job and with_actions(
        planned, lambda row: [a for action in row for a in [action] * (1 + (action.name == job.name))]
    )


def swap_two_sends(planned: Planned, choose: random.Random) -> Planned | None:
    """The sender sends in another order than the receiver receives."""
    transfers = [job for job in planned.program.jobs if job.kind == "transfer"]
    pairs = [(a, b) for a in transfers for b in transfers if a.name < b.name and a.ranks == b.ranks]
    if not pairs:
        return None
    one, other = choose.choice(pairs)
    names = {one.name: other.name, other.name: one.name}
    of = planned.schedule.jobs

    def swapped(row: list[Action]) -> list[Action]:
        return [Action.of(of[names[a.name]], a.rank) if a.name in names and a.kind == "SEND" else a for a in row]

    return with_actions(planned, swapped)


def free_too_early(planned: Planned, choose: random.Random) -> Planned | None:
    """Some FREE comes before the last reader."""
    rank = choose.choice([rank for rank, row in planned.schedule.actions.items() if row])
    row = list(planned.schedule.actions[rank])
    frees = [index for index, action in enumerate(row) if action.kind == "FREE"]
    if not frees:
        return None
    index = choose.choice(frees)
    key = row[index].name
    readers = [
        n
        for n in range(index)
        if row[n].kind != "FREE" and key in planned.schedule.jobs[row[n].name].reads.get(rank, ())
    ]
    if not readers:
        return None
    free = row.pop(index)
    row.insert(readers[-1], free)
    return replace(planned, schedule=planned.schedule.with_actions({**planned.schedule.actions, rank: row}))


# ---------------------------------------------------------------------- programs


def drop_an_addend_of_a_sum(planned: Planned, choose: random.Random) -> Planned | None:
    """The sum is its first addend; whoever gives the other works for nothing."""
    job = pick(planned, choose, lambda job: is_sum(planned.program.work[job.name]))
    if job is None:
        return None
    work = planned.program.work[job.name]
    assert isinstance(work, Add)
    first = work.inputs[:1]
    reads = {rank: tuple(key for key in keys if key in first) for rank, keys in job.reads.items()}
    jobs = tuple(replace(job, reads=reads) if other is job else other for other in planned.program.jobs)
    program = replace(planned.program, jobs=jobs, work={**planned.program.work, job.name: work._replace(inputs=first)})
    return ordered_anew(planned, program)


def add_an_addend_twice(planned: Planned, choose: random.Random) -> Planned | None:
    return with_changed(planned, choose, is_sum, lambda work: work._replace(inputs=(*work.inputs, work.inputs[-1])))


def drop_a_tangent(planned: Planned, choose: random.Random) -> Planned | None:
    """A backward pass forgets the gradient of one of its departures."""

    def without_one(work: Backward) -> Backward:
        index = choose.choice([index for index, key in enumerate(work.tangents) if key])
        return work._replace(tangents=(*work.tangents[:index], None, *work.tangents[index + 1 :]))

    return with_changed(planned, choose, lambda work: isinstance(work, Backward) and any(work.tangents), without_one)


def forget_a_part(planned: Planned, choose: random.Random) -> Planned | None:
    """What is put together lacks one part."""

    def puts_together(work: Work) -> bool:
        return isinstance(work, Move) and isinstance(work.step, Assemble) and len(work.step.parts) > 1

    return with_changed(
        planned, choose, puts_together, lambda work: work._replace(step=work.step._replace(parts=work.step.parts[1:]))
    )


def shift_a_message_by_one(planned: Planned, choose: random.Random) -> Planned | None:
    """A message brings the indices next to those that it should."""
    return with_changed(planned, choose, lambda work: shifted(work) is not None, shifted)


def shifted(work: Work) -> Move | None:
    if not isinstance(work, Move) or not isinstance(work.step, Transfer):
        return None
    source, destination = work.step.source.mask, work.step.destination.mask
    for dim, (outer, (start, stop)) in enumerate(zip(source.intervals, destination.intervals, strict=True)):
        for moved in (Interval(start + 1, stop + 1), Interval(start - 1, stop - 1)):
            if outer.start <= moved.start and moved.stop <= outer.stop:
                mask: Mask = destination.with_interval(dim, moved)
                buffer = work.step.destination._replace(mask=mask)
                keys = {**work.keys, buffer: work.keys[work.step.destination]}
                return work._replace(step=work.step._replace(destination=buffer), keys=keys)
    return None


def gather_in_reverse(planned: Planned, choose: random.Random) -> Planned | None:
    """A collective takes one rank's part for another's."""

    def gathers(work: Work) -> bool:
        return isinstance(work, Move) and isinstance(work.step, Collective) and work.step.kind == "all_gather"

    return with_changed(
        planned, choose, gathers, lambda work: work._replace(step=work.step._replace(inputs=work.step.inputs[::-1]))
    )


def mix_up_a_bucket(planned: Planned, choose: random.Random) -> Planned | None:
    """Two gradients of a shape that move together change places."""

    def pairs(work: Bucket) -> list[tuple[int, int]]:
        shapes = [move.step.outputs[0].mask.shape for move in work.moves]
        numbers = range(len(shapes))
        return [(a, b) for a in numbers for b in numbers if a < b and shapes[a] == shapes[b]]

    def mixed_up(work: Bucket) -> Bucket:
        a, b = choose.choice(pairs(work))
        moves = list(work.moves)
        for one, other in ((a, b), (b, a)):
            theirs = zip(work.moves[one].step.outputs, work.moves[other].step.outputs, strict=True)
            keys = {mine: work.moves[other].keys[other_] for mine, other_ in theirs}
            moves[one] = work.moves[one]._replace(keys={**work.moves[one].keys, **keys})
        return work._replace(moves=tuple(moves))

    return with_changed(planned, choose, lambda work: isinstance(work, Bucket) and bool(pairs(work)), mixed_up)


def is_caught(planned: Planned) -> str | None:
    """How the mistake shows: None if it does not."""
    try:
        check(planned.schedule)
    except PlanError:
        return "check"
    try:
        run_steps(planned, num_steps=1)
    except AssertionError:
        return "equality"
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        return type(error).__name__
    return None


def has_effect(planned: Planned, mutant: Planned) -> bool:
    """Whether some result is another. A gradient may be read by nobody, or meet nothing but zeros: see below."""
    codes = {segment: interpret(segment) for segment in planned.program.segments}
    before, after = (run_once(one, parts_at_start(one), codes) for one in (planned, mutant))
    places = [result.place for result in planned.program.results]
    return not all(torch.equal(before[rank][key], after[rank][key]) for rank, key in places)


OF_SCHEDULES = [
    drop_a_communication,
    drop_one_end_of_a_communication,
    run_a_communication_twice,
    swap_two_sends,
    free_too_early,
]
OF_PROGRAMS = [
    drop_an_addend_of_a_sum,
    add_an_addend_twice,
    drop_a_tangent,
    forget_a_part,
    shift_a_message_by_one,
    gather_in_reverse,
    mix_up_a_bucket,
]


@pytest.mark.parametrize("mutate", OF_SCHEDULES)
def test_check_refuses_a_schedule_with_a_mistake(mutate: Mutation) -> None:
    num_tried = 0
    for planned in plans():
        mutant = mutate(planned, random.Random(num_tried))
        if mutant is not None:
            num_tried += 1
            with pytest.raises(PlanError):
                check(mutant.schedule)
    assert num_tried >= 3


@pytest.mark.parametrize("mutate", OF_PROGRAMS)
def test_a_program_with_a_mistake_is_found_out(mutate: Mutation) -> None:
    num_tried = num_caught = 0
    for planned in plans():
        mutant = mutate(planned, random.Random(num_tried))
        if mutant is not None:
            num_tried += 1
            caught = is_caught(mutant)
            num_caught += caught is not None
            assert caught or not has_effect(planned, mutant)
    assert num_tried >= 3
    assert num_caught >= 2


# Found by trying `drop_a_tangent` on 900 random plans: seeds of a plan, its model and the mutation, with the reason.
HARMLESS = {
    "a replica computes a gradient of a weight that another one gives": (112, 16, 2),
    "the tangent of a microbatch whose targets are all ignored": (138, 18, 1),
}


@pytest.mark.parametrize(("seed", "model", "number"), HARMLESS.values(), ids=HARMLESS)
def test_a_forgotten_gradient_that_no_result_depends_on_is_no_mistake(seed: int, model: int, number: int) -> None:
    plan = RandomPlan(random.Random(seed))
    planned = plan_case(find_case(model), plan, plan.num_ranks)
    mutant = drop_a_tangent(planned, random.Random(number))
    assert mutant is not None
    assert not is_caught(mutant)
    assert not has_effect(planned, mutant)
    assert is_caught(scaled_result(planned))


def scaled_result(planned: Planned) -> Planned:
    """Every sum counts its first addend twice: the same plan with a mistake that does show."""
    work = planned.program.work
    doubled = {name: w._replace(inputs=(*w.inputs, w.inputs[0])) for name, w in work.items() if isinstance(w, Add)}
    return replace(planned, program=replace(planned.program, work={**work, **doubled}))
