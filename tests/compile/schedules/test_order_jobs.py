"""order_jobs: schedules of random programs pass the checks, run with blocking communication, and compute the same."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_cases import Interpreter, Program, contents, make_program, programs

from torch_vtensor.compile.schedules import Job, PlanError, check


@given(programs())
def test_schedules_pass_the_checks_and_compute_the_program(program: Program) -> None:
    schedule = program.ordered()
    check(schedule)
    ran = Interpreter(program, schedule.actions).run()
    assert sorted(ran.done) == sorted(job.name for job in program.jobs)
    expected = contents(program)
    for rank, there in ran.there.items():
        for key, content in there.items():
            assert content == expected.get((rank, key), (rank, key))


@given(programs())
def test_what_is_left_is_what_must_be_kept(program: Program) -> None:
    left = Interpreter(program, program.ordered().actions).run().there
    kept = {result.place for result in program.results} | {value.place for value in program.values if value.pinned}
    touched = {place for job in program.jobs for place in (*job.read_places(), *job.written_places())}
    untouched = {value.place for value in program.values} - touched
    assert {(rank, key) for rank, there in left.items() for key in there} == kept | untouched


@given(programs())
def test_explicit_orders_and_constraints_are_followed(program: Program) -> None:
    actions = program.ordered().actions
    turn = {(rank, action.name): number for rank, row in actions.items() for number, action in enumerate(row)}
    for rank, names in program.explicit.items():
        for before, after in pairwise(names):
            assert turn[rank, before] < turn[rank, after]
    for before, after in program.constraints:
        for rank in actions:
            if (rank, before) in turn and (rank, after) in turn:
                assert turn[rank, before] < turn[rank, after]


@given(programs(), st.integers(0, 100))
def test_every_list_follows_one_global_order(program: Program, seed: int) -> None:
    """Ranks may be served in any order: nobody gets stuck, whoever goes first."""
    actions = program.ordered().actions
    ranks = list(actions)
    random.Random(seed).shuffle(ranks)
    Interpreter(program, {rank: actions[rank] for rank in ranks}).run()


def test_equal_input_gives_equal_output() -> None:
    one, other = (make_program(random.Random(5), 200).ordered() for _ in range(2))
    assert one.actions == other.actions


def chain(*names: str, rank: int = 0) -> Program:
    """Jobs on one rank that have no data in common."""
    return Program([Job(name, "F", (rank,)) for name in names])


def test_a_circle_names_its_jobs_ranks_and_the_constraint_that_closes_it() -> None:
    program = Program()
    x, y = program.value(0, "x"), program.value(1, "x")
    program.jobs = [
        Job("first", "F", (0,), {}, {0: (x,)}),
        Job("send", "transfer", (0, 1), {0: (x,)}, {1: (y,)}),
        Job("second", "F", (1,), {1: (y,)}),
        Job("bystander", "F", (1,)),
    ]
    program.constraints = [("second", "bystander"), ("second", "first")]
    with pytest.raises(PlanError) as caught:
        program.ordered()
    message = str(caught.value)
    assert "F 'first' (rank 0)" in message
    assert "transfer 'send' (ranks 0, 1)" in message
    assert "F 'second' (rank 1)" in message
    assert "bystander" not in message
    assert "constraint ('second', 'first') closes the circle" in message


def test_a_circle_through_an_explicit_order_names_the_rank() -> None:
    program = chain("a", "b", rank=3)
    program.constraints, program.explicit = [("b", "a")], {3: ["a", "b"]}
    with pytest.raises(PlanError, match="explicit order of rank 3"):
        program.ordered()


def test_a_circle_of_data_says_that_no_order_helps() -> None:
    program = Program()
    x, y = program.value(0, "x"), program.value(0, "y")
    program.jobs = [Job("a", "F", (0,), {0: (x,)}, {0: (y,)}), Job("b", "F", (0,), {0: (y,)}, {0: (x,)})]
    with pytest.raises(PlanError, match="no order can help"):
        program.ordered()


def test_a_long_circle_is_told_in_a_few_lines() -> None:
    names = [f"job{number}" for number in range(1000)]
    program = chain(*names)
    program.constraints = [*pairwise(names), (names[-1], names[0])]
    with pytest.raises(PlanError, match="1000 jobs wait for each other") as caught:
        program.ordered()
    assert len(str(caught.value).splitlines()) < 25


@pytest.mark.parametrize(
    ("constraints", "explicit", "message"),
    [
        ([("a", "nobody")], {}, r"constraint \('a', 'nobody'\) names job 'nobody'"),
        ([], {0: ["a", "nobody"]}, "explicit order of rank 0 names job 'nobody'"),
        ([], {1: ["a"]}, r"names F 'a' \(rank 0\), which does not run there"),
    ],
)
def test_names_that_do_not_fit_are_refused(constraints: list, explicit: dict, message: str) -> None:
    program = chain("a", "b")
    program.constraints, program.explicit = constraints, explicit
    with pytest.raises(PlanError, match=message):
        program.ordered()


def three_layers_of_gathered_weights() -> Program:
    """Forward of three layers whose weights are gathered from two ranks."""
    program = Program()
    for rank in (0, 1):
        program.value(rank, "h0", 4, "input")
        for layer in range(3):
            program.value(rank, f"shard{layer}", 50, "parameter", pinned=True)
            program.value(rank, f"w{layer}", 100)
            program.value(rank, f"h{layer + 1}", 4)
            reads = {rank: (f"w{layer}", f"h{layer}")}
            program.jobs.append(Job(f"F{layer}.{rank}", "F", (rank,), reads, {rank: (f"h{layer + 1}",)}, seconds=2.0))
    for layer in range(3):
        shards, whole = (dict.fromkeys((0, 1), (f"{key}{layer}",)) for key in ("shard", "w"))
        program.jobs.append(Job(f"gather{layer}", "collective", (0, 1), shards, whole, seconds=1.0))
    return program


def test_weights_are_gathered_one_layer_ahead_and_no_more() -> None:
    schedule = three_layers_of_gathered_weights().ordered()
    names = [action.name for action in schedule.actions[0] if action.kind != "FREE"]
    assert names == ["gather0", "gather1", "F0.0", "gather2", "F1.0", "F2.0"]
    shards, whole, hidden = 150, 100, 4
    assert check(schedule).peak_bytes == dict.fromkeys((0, 1), shards + 2 * whole + 2 * hidden)


def test_values_that_only_change_sides_are_sent_at_once() -> None:
    program = Program()
    program.value(0, "x", 8, "input")
    for number in range(3):
        for rank in (0, 1):
            program.value(rank, f"h{number}")
        program.jobs += [
            Job(f"F{number}", "F", (0,), {0: ("x",)}, {0: (f"h{number}",)}, seconds=1.0),
            Job(f"send{number}", "transfer", (0, 1), {0: (f"h{number}",)}, {1: (f"h{number}",)}),
            Job(f"G{number}", "F", (1,), {1: (f"h{number}",)}, seconds=5.0),
        ]
    actions = program.ordered().actions
    assert [a.name for a in actions[0] if a.kind != "FREE"] == ["F0", "send0", "F1", "send1", "F2", "send2"]
    assert [a.name for a in actions[1] if a.kind != "FREE"] == ["send0", "G0", "send1", "send2", "G1", "G2"]


def gradients_of_layers(num_layers: int) -> Program:
    """Backward of layers, each of which sends its gradient away as a shard."""
    program = Program()
    for layer in range(num_layers):
        program.value(0, f"d{layer}", 100)
        program.value(1, f"d{layer}", 100)
        for rank in (0, 1):
            program.value(rank, f"shard{layer}", 50, "gradient", pinned=True)
            before = (f"h{layer - 1}",) if layer else ()
            program.value(rank, f"h{layer}", 4)
            reads, writes = {rank: before} if before else {}, {rank: (f"d{layer}", f"h{layer}")}
            program.jobs.append(Job(f"B{layer}.{rank}", "B", (rank,), reads, writes, seconds=2.0))
        whole, shards = (dict.fromkeys((0, 1), (f"{key}{layer}",)) for key in ("d", "shard"))
        program.jobs.append(Job(f"reduce{layer}", "collective", (0, 1), whole, shards, seconds=1.0))
    return program


def test_what_a_collective_reads_is_freed_once_the_next_pass_runs() -> None:
    schedule = gradients_of_layers(3).ordered()
    names = [str(action) for action in schedule.actions[0] if not action.name.startswith("h")]
    words = [name.split("'")[0] + name.split("'")[1] for name in names]
    assert words == [
        *("B B0.0", "COLLECTIVE reduce0", "B B1.0", "FREE d0"),
        *("COLLECTIVE reduce1", "B B2.0", "FREE d1", "COLLECTIVE reduce2", "FREE d2"),
    ]


def test_what_collectives_read_goes_one_by_one_where_no_pass_follows() -> None:
    program = Program()
    for rank in (0, 1):
        keys = [program.value(rank, f"d{number}", 100) for number in range(3)]
        program.jobs.append(Job(f"B.{rank}", "B", (rank,), {}, {rank: tuple(keys)}))
        for number in range(3):
            program.value(rank, f"shard{number}", 50, "gradient", pinned=True)
    for number in range(3):
        whole, shards = (dict.fromkeys((0, 1), (f"{key}{number}",)) for key in ("d", "shard"))
        program.jobs.append(Job(f"reduce{number}", "collective", (0, 1), whole, shards, seconds=1.0))
    row = program.ordered().actions[0]
    assert [(action.kind, action.name) for action in row[2:]] == [
        *(("COLLECTIVE", "reduce1"), ("FREE", "d0"), ("COLLECTIVE", "reduce2"), ("FREE", "d1"), ("FREE", "d2")),
    ]


def test_what_a_collective_reads_is_freed_before_what_it_brings_is_read() -> None:
    program = Program()
    for rank in (0, 1):
        program.value(rank, "x", 100)
        program.value(rank, "y", 100)
        program.jobs += [
            Job(f"F.{rank}", "F", (rank,), {}, {rank: ("x",)}),
            Job(f"G.{rank}", "F", (rank,), {rank: ("y",)}),
        ]
    program.jobs.append(Job("sum", "collective", (0, 1), *(dict.fromkeys((0, 1), (key,)) for key in "xy")))
    assert [action.name for action in program.ordered().actions[0]] == ["F.0", "sum", "x", "G.0", "y"]
