"""Time on paper, and what is made of it: traces and pictures."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from job_cases import Program, make_program, pipeline, programs

from torch_vtensor.compile.schedules import Job, Timeline, check, draw, simulate, trace, write_trace
from torch_vtensor.compile.schedules.pipelines import one_f_one_b, zero_bubble

SECONDS = {"F": 1.0, "B": 2.0, "dI": 1.0, "dW": 1.0}


def three_jobs() -> Program:
    """A second of work on rank 0, half a second on the wire, a second on rank 1."""
    program = Program()
    program.value(0, "x", 10, "input")
    program.value(0, "h", 20)
    program.value(1, "h", 20)
    program.value(1, "y", 5, pinned=True)
    program.jobs = [
        Job("one", "F", (0,), {0: ("x",)}, {0: ("h",)}, seconds=1.0),
        Job("send", "transfer", (0, 1), {0: ("h",)}, {1: ("h",)}, seconds=0.5, wire_bytes=20),
        Job("two", "F", (1,), {1: ("h",)}, {1: ("y",)}, seconds=1.0, workspace_bytes=7),
    ]
    return program


def test_times_bubbles_and_memory_by_hand() -> None:
    timeline = simulate(three_jobs().ordered())
    assert timeline.spans == {"one": (0.0, 1.0), "send": (1.0, 1.5), "two": (1.5, 2.5)}
    assert timeline.makespan == 2.5
    assert timeline.busy_seconds == {0: 1.0, 1: 1.0}
    assert timeline.bubble_fraction == pytest.approx(1 - 2 / 5)
    assert timeline.memory == {0: ((0.0, 30), (1.0, 20), (1.5, 0)), 1: ((0.0, 0), (1.0, 20), (1.5, 32), (2.5, 5))}
    assert timeline.peak_bytes == {0: 30, 1: 32}


def test_sending_overlaps_computing() -> None:
    program = three_jobs()
    program.jobs.append(Job("meanwhile", "F", (0,), seconds=1.0))
    spans = simulate(program.ordered()).spans
    assert spans["meanwhile"] == (1.0, 2.0)
    assert spans["send"] == (1.0, 1.5)


def test_two_messages_to_one_rank_take_turns() -> None:
    program = Program()
    for rank in (0, 1):
        program.value(rank, f"x{rank}", 1, "input")
        program.value(2, f"x{rank}", 1, pinned=True)
        places = ({rank: (f"x{rank}",)}, {2: (f"x{rank}",)})
        program.jobs.append(Job(f"from {rank}", "transfer", (rank, 2), *places, seconds=1.0))
    assert simulate(program.ordered()).makespan == 2.0


def test_a_slow_link_shows_as_bubbles() -> None:
    fast, slow = (
        simulate(pipeline(one_f_one_b(4, 8), SECONDS, transfer_seconds=seconds).ordered()) for seconds in (0.0, 0.5)
    )
    assert slow.bubble_fraction > fast.bubble_fraction


@settings(max_examples=50)
@given(programs())
def test_ranks_do_one_thing_at_a_time_and_after_what_it_reads(program: Program) -> None:
    schedule = program.ordered()
    timeline = simulate(schedule)
    written = {place: timeline.spans[job.name].finish for job in program.jobs for place in job.written_places()}
    for job in program.jobs:
        for place in job.read_places():
            assert written.get(place, 0.0) <= timeline.spans[job.name].start
    for row in schedule.actions.values():
        computing = [timeline.spans[action.name] for action in row if action.computes or action.kind == "MOVE"]
        assert all(one.finish <= other.start for one, other in pairwise(computing))


@settings(max_examples=50)
@given(programs())
def test_memory_ends_at_what_is_kept(program: Program) -> None:
    schedule = program.ordered()
    freed = {(action.rank, action.name) for row in schedule.actions.values() for action in row if action.kind == "FREE"}
    for rank, points in simulate(schedule).memory.items():
        kept = sum(value.num_bytes for value in program.values if value.rank == rank and (rank, value.key) not in freed)
        assert points[-1].num_bytes == kept
        assert all(point.num_bytes >= 0 for point in points)


def timelines() -> list[Timeline]:
    return [
        simulate(pipeline(zero_bubble(3, 4), SECONDS, transfer_seconds=0.2).ordered()),
        simulate(make_program(random.Random(3), 60).ordered()),
    ]


def test_traces_are_json_with_every_job_and_every_arrow_ended(tmp_path: Path) -> None:
    for timeline in timelines():
        write_trace(timeline, tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert events == trace(timeline)["traceEvents"]
        slices = [event for event in events if event["ph"] == "X"]
        assert {event["args"]["job"] for event in slices} == set(timeline.spans)
        by_thread: dict[tuple[int, int], list[dict]] = {}
        for event in slices:
            by_thread.setdefault((event["pid"], event["tid"]), []).append(event)
        for row in by_thread.values():
            for one, other in pairwise(sorted(row, key=lambda event: (event["ts"], event["dur"]))):
                assert one["ts"] + one["dur"] <= other["ts"] + 1e-6
        arrows = {phase: {e["id"]: e for e in events if e["ph"] == phase} for phase in "sf"}
        transfers = [job for job in timeline.schedule.jobs.values() if job.kind == "transfer"]
        assert len(arrows["s"]) == len(arrows["f"]) == len(transfers)
        for number, begin in arrows["s"].items():
            end = arrows["f"][number]
            job = timeline.schedule.jobs[begin["name"]]
            assert (begin["pid"], end["pid"], end["name"]) == (*job.ranks, job.name)


def test_traces_count_the_memory_of_every_rank() -> None:
    timeline = simulate(three_jobs().ordered())
    counted = [e for e in trace(timeline)["traceEvents"] if e["ph"] == "C" and e["pid"] == 1]
    assert [(e["ts"], e["args"]["bytes"]) for e in counted] == [(0, 0), (1e6, 20), (1.5e6, 32), (2.5e6, 5)]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for number, timeline in enumerate(timelines()):
        path = tmp_path / f"{number}.{suffix}"
        draw(timeline, path, title="a schedule")
        assert path.stat().st_size > 5000


def test_a_schedule_without_jobs_takes_no_time(tmp_path: Path) -> None:
    program = Program()
    program.value(0, "x", 3, "input")
    timeline = simulate(program.ordered())
    assert (timeline.makespan, timeline.bubble_fraction, timeline.peak_bytes) == (0.0, 0.0, {0: 3})
    assert trace(timeline)["traceEvents"][-1]["args"] == {"bytes": 3}
    assert check(timeline.schedule).peak_bytes == {0: 3}
