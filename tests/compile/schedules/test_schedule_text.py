"""Schedules as text: the grid to look at, and the form that reads back."""

import pytest
from hypothesis import given, settings
from job_cases import Program, pipeline, programs

from torch_vtensor.compile.schedules import Job, PlanError, Value, check, dumps, parse
from torch_vtensor.compile.schedules.pipelines import gpipe, one_f_one_b

SECONDS = {"F": 1.0, "B": 2.0}


@settings(max_examples=50)
@given(programs())
def test_text_reads_back(program: Program) -> None:
    schedule = program.ordered()
    again = parse(dumps(schedule), program.jobs, program.values, program.results)
    assert again == schedule
    check(again)


@pytest.mark.parametrize(
    "name", ["mm[k 0:4]#1", "a  b", " a", 'say "a"', '"a"', "rank 3", "line\nbreak", "ö", "a\tb", ""]
)
def test_any_name_reads_back(name: str) -> None:
    program = Program([Job(name, "F", (3,), {}, {3: (name,)})], [Value(name, 3, 1)])
    schedule = program.ordered()
    assert parse(dumps(schedule), program.jobs, program.values).actions == schedule.actions


def test_ranks_with_nothing_to_do_are_kept() -> None:
    program = Program([Job("a", "F", (0,))], [Value("x", 2, 1, "input")])
    text = dumps(program.ordered())
    assert text == "rank 0\n  F          a\nrank 2\n"
    assert parse(text, program.jobs, program.values).actions.keys() == {0, 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F a", "line 1 is 'F a'; a schedule begins with 'rank'"),
        ("rank 0\nF a\nrank 0", "line 3 begins rank 0 again"),
        ("rank 0\n\n  JUMP a", "line 3, 'JUMP a', of rank 0: 'JUMP' is no kind of action"),
        ("rank 0\n  F b", "line 2, 'F b', of rank 0: there is no job of that name"),
        ("rank 1\n  F a", r"of rank 1: it runs on ranks \(0,\)"),
        ("rank 0\n  B a", r"what this rank does for F 'a' \(rank 0\) is F"),
        ("rank 0\n  FREE y", "there is no value 'y' on this rank"),
        ('rank 0\n  F "a', "is no quoted name"),
    ],
)
def test_lines_that_are_no_action_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse(text, [Job("a", "F", (0,))], [Value("x", 0, 1, "input")])


def test_the_grid_of_a_pipeline() -> None:
    assert str(pipeline(gpipe(2, 2), SECONDS).ordered()).splitlines() == [
        "rank 0 | F0.0 F0.1           B0.0 B0.1",
        "rank 1 |      F1.0 F1.1 B1.0 B1.1",
    ]


def test_stages_in_a_row_are_one_cell_and_equal_ranks_one_row() -> None:
    jobs = [
        Job(f"{layer}@{rank}", "F", (rank,), stage=str(layer), microbatch=0)
        for rank in (0, 1, 2, 5)
        for layer in range(4)
    ]
    assert str(Program(jobs).ordered()) == "rank 0-2, 5 | F0..3.0"


def test_the_middle_of_a_long_grid_is_left_out() -> None:
    text = str(pipeline(one_f_one_b(2, 200), SECONDS).ordered())
    assert "…" in text
    assert max(map(len, text.splitlines())) < 600
    assert "F0.0" in text
    assert "B0.199" in text


def test_a_schedule_without_jobs_prints_its_ranks() -> None:
    assert str(Program(values=[Value("x", 0, 1, "input")]).ordered()) == "rank 0 |"
