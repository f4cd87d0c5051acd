"""check: every way of breaking a schedule is refused, with the job, the rank and the reason."""

import random
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from job_cases import Interpreter, Program, contents, make_program, pipeline, programs

from torch_vtensor.compile.schedules import Action, Job, PlanError, Result, Schedule, Value, check
from torch_vtensor.compile.schedules.pipelines import one_f_one_b, zero_bubble

Rows = dict[int, list[Action]]


def rows_of(schedule: Schedule) -> Rows:
    return {rank: list(row) for rank, row in schedule.actions.items()}


def places(rows: Rows, *kinds: str) -> list[tuple[int, int]]:
    """Rank and number of all actions of these kinds; of none given, of all but FREE."""
    return [
        (rank, number)
        for rank, row in rows.items()
        for number, action in enumerate(row)
        if action.kind in kinds or (not kinds and action.kind != "FREE")
    ]


def drop(rows: Rows, rng: random.Random) -> bool:
    where = places(rows)
    if where:
        rank, number = rng.choice(where)
        del rows[rank][number]
    return bool(where)


def duplicate(rows: Rows, rng: random.Random) -> bool:
    where = places(rows)
    if where:
        rank, number = rng.choice(where)
        rows[rank].insert(rng.randint(0, len(rows[rank])), rows[rank][number])
    return bool(where)


def drop_on_all_ranks(rows: Rows, rng: random.Random) -> bool:
    where = places(rows)
    if where:
        rank, number = rng.choice(where)
        name = rows[rank][number].name
        for member in rows:
            rows[member] = [action for action in rows[member] if action.kind == "FREE" or action.name != name]
    return bool(where)


def drop_weight_gradients(rows: Rows, rng: random.Random) -> bool:
    where = places(rows, "dW")
    if where:
        rank, number = rng.choice(where)
        del rows[rank][number]
    return bool(where)


def swap_alike(rows: Rows, rng: random.Random, *kinds: str) -> bool:
    """Swap two actions of one kind with equal peers, on one rank."""
    pairs = [
        (rank, one, other)
        for rank, one in places(rows, *kinds)
        for _, other in places({rank: rows[rank]}, rows[rank][one].kind)
        if one < other and set(rows[rank][one].peers) == set(rows[rank][other].peers)
    ]
    if pairs:
        rank, one, other = rng.choice(pairs)
        rows[rank][one], rows[rank][other] = rows[rank][other], rows[rank][one]
    return bool(pairs)


def swap_sends(rows: Rows, rng: random.Random) -> bool:
    return swap_alike(rows, rng, "SEND", "RECV")


def swap_collectives(rows: Rows, rng: random.Random) -> bool:
    return swap_alike(rows, rng, "COLLECTIVE")


def free_too_early(schedule: Schedule, rows: Rows, rng: random.Random) -> bool:
    """Move a FREE in front of the last action that needs the value."""
    found = []
    for rank, number in places(rows, "FREE"):
        key = rows[rank][number].name
        needs = [
            earlier
            for earlier, action in enumerate(rows[rank][:number])
            if action.kind != "FREE"
            and key
            in (*schedule.jobs[action.name].reads.get(rank, ()), *schedule.jobs[action.name].writes.get(rank, ()))
        ]
        found.append((rank, number, rng.randint(0, needs[-1])))
    if found:
        rank, number, earlier = rng.choice(found)
        rows[rank].insert(earlier, rows[rank].pop(number))
    return bool(found)


MUTATIONS: list[Callable[[Rows, random.Random], bool]] = [
    drop,
    duplicate,
    drop_on_all_ranks,
    drop_weight_gradients,
    swap_sends,
    swap_collectives,
]


@pytest.mark.parametrize("mutate", MUTATIONS)
@settings(max_examples=40)
@given(program=programs(40), seed=st.integers(0, 1000))
def test_a_broken_schedule_is_refused(
    mutate: Callable[[Rows, random.Random], bool], program: Program, seed: int
) -> None:
    schedule = program.ordered()
    rows = rows_of(schedule)
    assume(mutate(rows, random.Random(seed)))
    with pytest.raises(PlanError):
        check(schedule.with_actions(rows))


@settings(max_examples=60)
@given(program=programs(40), seed=st.integers(0, 1000))
def test_freeing_too_early_twice_or_what_is_kept_is_refused(program: Program, seed: int) -> None:
    schedule, rng = program.ordered(), random.Random(seed)
    rows = rows_of(schedule)
    assume(free_too_early(schedule, rows, rng))
    with pytest.raises(PlanError):
        check(schedule.with_actions(rows))
    rows = rows_of(schedule)
    rank, number = rng.choice(places(rows, "FREE"))
    rows[rank].insert(rng.randint(number, len(rows[rank])), rows[rank][number])
    with pytest.raises(PlanError, match=r"which action .* has freed"):
        check(schedule.with_actions(rows))
    kept = rng.choice([value for value in program.values if value.pinned])
    rows = rows_of(schedule)
    rows[kept.rank].append(Action.free(kept))
    with pytest.raises(PlanError, match=r"pinned|freed|not at"):
        check(schedule.with_actions(rows))


@given(program=programs(), seed=st.integers(0, 1000))
def test_whatever_passes_runs_and_computes_the_program(program: Program, seed: int) -> None:
    """Lists shuffled a little: most are refused; those that are not must be as good as the original."""
    rng = random.Random(seed)
    rows = rows_of(program.ordered())
    for _ in range(rng.randint(1, 4)):
        row = rng.choice(list(rows.values()))
        if len(row) > 1:
            number = rng.randrange(len(row) - 1)
            row[number], row[number + 1] = row[number + 1], row[number]
    changed = program.ordered().with_actions(rows)
    try:
        check(changed)
    except PlanError:
        return
    expected = contents(program)
    for rank, there in Interpreter(program, rows).run().there.items():
        assert there == {key: expected.get((rank, key), (rank, key)) for key in there}


def deadlocked() -> tuple[Program, Rows]:
    """Two ranks that send to each other first, and would receive then."""
    program = Program()
    for rank, key in ((0, "a"), (1, "b")):
        program.value(rank, key, kind="input", pinned=True)
        program.value(1 - rank, key, pinned=True)
        program.jobs.append(Job(key, "transfer", (rank, 1 - rank), {rank: (key,)}, {1 - rank: (key,)}))
    rows = rows_of(program.ordered())
    return program, {0: rows[0], 1: rows[1][::-1]}


def test_a_deadlock_tells_who_waits_for_whom() -> None:
    program, rows = deadlocked()
    with pytest.raises(PlanError) as caught:
        check(program.ordered().with_actions(rows))
    assert "2 ranks wait for each other for ever" in str(caught.value)
    assert "rank 0 is at SEND 'a' to rank 1 and waits for rank 1" in str(caught.value)
    assert "rank 1 is at SEND 'b' to rank 0 and waits for rank 0" in str(caught.value)


def one_step() -> Program:
    """One job that makes a result of 64 bytes out of a parameter of 32 and workspace of 8."""
    program = Program()
    program.value(0, "w", 32, "parameter", pinned=True)
    program.value(0, "y", 64, "gradient")
    job = Job("step", "B", (0,), {0: ("w",)}, {0: ("y",)}, workspace_bytes=8, contributes=("grad w",))
    program.jobs, program.results = [job], [Result("grad w", 0, "y", 1)]
    return program


def test_the_peak_tells_its_bytes_and_what_they_are() -> None:
    report = check(one_step().ordered(), limit_bytes=104)
    assert report.peak_bytes == {0: 104}
    assert [value.key for value in report.memory[0].live] == ["w", "y"]
    assert report.memory[0].bytes_by_kind() == {"parameter": 32, "gradient": 64, "workspace": 8}
    assert str(report) == "rank 0: peak 104 bytes, parameter 32 bytes, gradient 64 bytes, workspace 8 bytes"


@pytest.mark.parametrize(
    ("order", "peak_bytes"),
    [
        (["reduce", "pass", "read", "free"], 4 + 64 + 32 + 16 + 8),
        (["pass", "reduce", "read", "free"], 4 + 64 + 32 + 16 + 8),
        (["reduce", "read", "pass", "free"], 4 + 64 + 32 + 16),
        (["reduce", "free", "pass", "read"], 4 + 64 + 32 + 16),
    ],
)
def test_what_a_collective_needs_besides_is_there_until_it_is_waited_for(order: list[str], peak_bytes: int) -> None:
    """A gradient of 64 bytes is reduced to 32, with a workspace of 16, and a pass makes 8 bytes of 4."""
    program = Program()
    program.value(0, "x", 4, "input", pinned=True)
    program.value(0, "gradient", 64, "input")
    for key, num_bytes in (("shard", 32), ("y", 8), ("norm", 1)):
        program.value(0, key, num_bytes, pinned=True)
    program.jobs = [
        Job("reduce", "collective", (0,), {0: ("gradient",)}, {0: ("shard",)}, workspace_bytes=16),
        Job("pass", "B", (0,), {0: ("x",)}, {0: ("y",)}),
        Job("read", "F", (0,), {0: ("shard",)}, {0: ("norm",)}),
    ]
    actions = {job.name: Action.of(job, 0) for job in program.jobs} | {"free": Action("FREE", 0, "gradient")}
    memory = check(program.ordered().with_actions({0: [actions[name] for name in order]})).memory[0]
    assert (memory.peak_bytes, memory.workspace_bytes) == (peak_bytes, 16)
    assert sum(memory.bytes_by_kind().values()) == peak_bytes


def test_what_reads_what_a_collective_sends_waits_for_nothing() -> None:
    """Two collectives read a gradient of 64 bytes, with workspaces of 16 and 4, and a pass that reads it makes 8."""
    program = Program()
    program.value(0, "gradient", 64, "input")
    for key, num_bytes in (("shard", 32), ("total", 2), ("y", 8), ("norm", 1)):
        program.value(0, key, num_bytes, pinned=True)
    program.jobs = [
        Job("reduce", "collective", (0,), {0: ("gradient",)}, {0: ("shard",)}, workspace_bytes=16),
        Job("sum", "collective", (0,), {0: ("gradient",)}, {0: ("total",)}, workspace_bytes=4),
        Job("pass", "B", (0,), {0: ("gradient",)}, {0: ("y",)}),
        Job("read", "F", (0,), {0: ("shard", "total")}, {0: ("norm",)}),
    ]
    actions = {0: [Action.of(job, 0) for job in program.jobs] + [Action("FREE", 0, "gradient")]}
    memory = check(program.ordered().with_actions(actions)).memory[0]
    assert (memory.peak_bytes, memory.workspace_bytes) == (64 + 32 + 2 + 8 + 16 + 4, 16 + 4)


@pytest.mark.parametrize("limit", [103, {0: 103}])
def test_a_schedule_that_does_not_fit_is_refused_with_what_is_largest(limit: int | dict[int, int]) -> None:
    with pytest.raises(PlanError, match=r"rank 0 needs 104 bytes at action 0, B 'step'; its limit is 103.*'y'"):
        check(one_step().ordered(), limit_bytes=limit)


def test_limits_of_other_ranks_do_not_matter() -> None:
    check(one_step().ordered(), limit_bytes={1: 0})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Result("grad w", 0, "y", 2), "'grad w' at 'y' on rank 0 is the sum of 1 contributions; it needs 2"),
        (Result("grad w", 0, "y", 0), "is the sum of 1 contributions; it needs 0"),
        (Result("grad w", 0, "z", 1), "result 'grad w' is not at 'z' on rank 0 in the end: nothing makes it"),
        (Result("grad w", 0, "w", 1), "B 'step' .* contributes to 'grad w', and what it computes never reaches 'w'"),
        (Result("grad w", 7, "y", 1), "result 'grad w' is not at 'y' on rank 7"),
    ],
)
def test_results_that_are_not_what_they_should_be(result: Result, message: str) -> None:
    program = one_step()
    program.results = [result]
    with pytest.raises(PlanError, match=message):
        check(program.ordered())


def test_a_microbatch_that_is_not_added_to_the_gradient_is_named() -> None:
    program = pipeline(one_f_one_b(2, 3), {"F": 1.0, "B": 2.0})
    for number, job in enumerate(program.jobs):
        if job.name == "B1.1":  # forgets what microbatch 0 gave
            reads = {1: tuple(key for key in job.reads[1] if key != "G1.0")}
            program.jobs[number] = Job("B1.1", "B", (1,), reads, job.writes, contributes=job.contributes)
    with pytest.raises(PlanError, match=r"B 'B1.0' \(rank 1\) contributes to 'G1'.*2 of 3 contributions"):
        check(program.ordered())


def test_a_dropped_weight_gradient_of_a_pipeline_is_named() -> None:
    schedule = pipeline(zero_bubble(2, 3), {"F": 1.0, "dI": 1.0, "dW": 1.0}).ordered()
    rows = rows_of(schedule)
    rows[1] = [action for action in rows[1] if action.name != "dW1.1"]
    with pytest.raises(PlanError, match=r"dW 'dW1.1' \(rank 1\) is missing on rank 1") as caught:
        check(schedule.with_actions(rows))
    assert (caught.value.rank, caught.value.job) == (1, "dW1.1")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action("JUMP", 0, "step"), "'JUMP' is no kind of action"),
        (Action("B", 1, "step"), "it says rank 1"),
        (Action("F", 0, "step"), "the job's part on this rank is"),
        (Action("F", 0, "other"), "there is no job 'other'"),
        (Action("FREE", 0, "other"), "there is no value 'other' on rank 0"),
        (Action("FREE", 0, "step", peers=(1,)), r"names ranks \(1,\), and every rank frees its own values"),
    ],
)
def test_actions_that_are_not_of_the_program_are_refused(action: Action, message: str) -> None:
    schedule = one_step().ordered()
    with pytest.raises(PlanError, match=message):
        check(schedule.with_actions({0: [action, *schedule.actions[0]]}))


def job(name: str = "a", kind: str = "F", ranks: tuple[int, ...] = (0,), **more: object) -> Job:
    return Job(name, kind, ranks, **more)


@pytest.mark.parametrize(
    ("jobs", "values", "message"),
    [
        ([job(), job()], [], "Job a occurs twice"),
        ([], [Value("x", 0, 1, "input")] * 2, "Value 'x' on rank 0 occurs twice"),
        ([job(ranks=(0, 1))], [], "a F job has one rank"),
        ([job(kind="transfer", ranks=(1, 1))], [], "a transfer job has \\(source, destination\\)"),
        ([job(kind="collective", ranks=(0, 1, 0))], [], "a collective job has different members"),
        ([job(reads={0: ("x",)})], [], "reads 'x' on rank 0, which is not declared"),
        ([job(reads={1: ("x",)})], [Value("x", 1, 1, "input")], "which is not one of its ranks"),
        ([], [Value("x", 0, 1)], "no job writes the activation 'x' on rank 0"),
        ([job(name, writes={0: ("x",)}) for name in "ab"], [Value("x", 0, 1)], "which job 'a' writes too"),
        (
            [job(kind="transfer", ranks=(0, 1), reads={1: ("x",)})],
            [Value("x", 1, 1, "input")],
            "reads on its source, rank 0",
        ),
    ],
)
def test_jobs_that_do_not_fit_together_are_refused(jobs: list[Job], values: list[Value], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Program(jobs, values).ordered()


def test_large_random_programs_pass() -> None:
    for seed in range(5):
        check(make_program(random.Random(seed), 400).ordered())
