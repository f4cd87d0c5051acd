"""Pipelines: complete, free of deadlock, with the bubbles and the memory that they promise."""

import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_cases import Interpreter, pipeline
from torch.distributed.pipelining import schedules as torch_schedules

from torch_vtensor.compile.schedules import Timeline, check, simulate
from torch_vtensor.compile.schedules.pipelines import (
    Orders,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    three_f_one_b,
    zero_bubble,
    zero_bubble_h2,
)

SECONDS = {"F": 1.0, "B": 2.0, "dI": 1.0, "dW": 1.0}
SIZES = [(1, 1), (1, 5), (2, 1), (2, 8), (3, 2), (4, 4), (4, 8), (5, 12)]


def simulated(orders: Orders) -> Timeline:
    schedule = pipeline(orders, SECONDS).ordered()
    check(schedule)
    for rank, order in orders.items():
        assert [action.name for action in schedule.compute_actions(rank)] == [str(compute) for compute in order]
    return simulate(schedule)


@pytest.mark.parametrize("pipeline_of", [gpipe, one_f_one_b])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_gpipe_and_1f1b_idle_for_p_minus_1_microbatches(
    pipeline_of: Callable[[int, int], Orders], p: int, m: int
) -> None:
    assert simulated(pipeline_of(p, m)).bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 2), (2, 8), (4, 4), (4, 12), (5, 10)])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(p: int, v: int, m: int) -> None:
    bubbles = simulated(interleaved_one_f_one_b(p, v, m)).bubble_fraction
    assert bubbles == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 2), (2, 8), (4, 4), (4, 12), (5, 10)])
def test_zero_bubble_idles_a_third_as_long_as_1f1b(p: int, m: int) -> None:
    timeline, ordinary = simulated(zero_bubble(p, m)), simulated(one_f_one_b(p, m))
    assert timeline.makespan == 3 * m + p - 1
    assert ordinary.makespan == 3 * (m + p - 1)


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 3), (2, 8), (3, 8), (4, 7), (5, 10)])
def test_with_more_under_way_no_rank_waits_once_it_has_begun(p: int, m: int) -> None:
    orders = zero_bubble_h2(p, m)
    timeline = simulated(orders)
    spans = [[timeline.spans[str(compute)] for compute in order] for order in orders.values()]
    assert [(rank[0][0], rank[-1][1]) for rank in spans] == [(s, s + 3 * m) for s in range(p)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_activations_kept_are_what_the_pipelines_promise(p: int, m: int) -> None:
    def most_kept(orders: Orders, forward: str, backward: str) -> list[int]:
        counts = []
        for order in orders.values():
            now = most = 0
            for compute in order:
                now += (compute.kind == forward) - (compute.kind == backward)
                most = max(most, now)
            counts.append(most)
        return counts

    assert most_kept(gpipe(p, m), "F", "B") == [m] * p
    assert most_kept(one_f_one_b(p, m), "F", "B") == [min(p - s, m) for s in range(p)]
    assert max(most_kept(zero_bubble(p, m), "F", "dW")) == min(p, m)
    assert max(most_kept(zero_bubble_h2(p, m), "F", "dW")) == min(2 * p - 1, m)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 4))
def test_recycling_goes_forward_in_every_pass_and_backward_in_the_last(p: int, m: int, passes: int) -> None:
    orders = three_f_one_b(p, m, passes)
    for rank, order in orders.items():
        expected = {("F", number * p + rank, k) for number in range(passes) for k in range(m)}
        expected |= {("B", (passes - 1) * p + rank, k) for k in range(m)}
        assert set(order) == expected
        assert len(order) == len(expected)
    simulated(orders)


def test_recycling_keeps_ranks_busy_and_memory_bounded() -> None:
    few, many = (simulated(three_f_one_b(4, m)) for m in (24, 48))
    assert many.bubble_fraction < few.bubble_fraction < 0.15
    saved = [sum(value.kind == "saved" for value in memory.live) for memory in check(many.schedule).memory.values()]
    assert all(count <= 4 - rank for rank, count in enumerate(saved))


def drawn(orders: Orders) -> str:
    """The timeline as docstrings draw it."""
    timeline = simulated(orders)
    lines = []
    for rank, order in orders.items():
        cells = ["."] * round(timeline.makespan)
        for compute in order:
            letters = {"F": str(compute.microbatch), "dW": "W"}
            start, finish = map(round, timeline.spans[str(compute)])
            cells[start:finish] = letters.get(compute.kind, chr(ord("a") + compute.microbatch)) * (finish - start)
        lines.append(f"rank {rank}   {' '.join(cells)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("pipeline_of", "sizes"),
    [
        (gpipe, (4, 4)),
        (one_f_one_b, (4, 4)),
        (interleaved_one_f_one_b, (2, 2, 4)),
        (zero_bubble, (4, 6)),
        (zero_bubble_h2, (3, 8)),
        (three_f_one_b, (2, 4)),
    ],
)
def test_docstrings_draw_the_timeline(pipeline_of: Callable[..., Orders], sizes: tuple[int, ...]) -> None:
    told = re.findall(r"rank \d   .*", inspect.getdoc(pipeline_of) or "")
    assert "\n".join(told) == drawn(pipeline_of(*sizes))


def torch_order(name: str, p: int, v: int, m: int) -> Mapping[int, list[tuple[str, int, int]]]:
    """The computations that torch's schedule of this name has for each rank."""
    stages = [
        SimpleNamespace(group_size=p, group_rank=0, num_stages=p * v, stage_index=p * chunk, has_backward=True)
        for chunk in range(v)
    ]
    schedule = getattr(torch_schedules, name).__new__(getattr(torch_schedules, name))
    schedule.__dict__.update(
        n_local_stages=v,
        pp_group_size=p,
        _n_microbatches=m,
        _num_stages=p * v,
        _stages=stages,
        _stage=stages[0],
        number_of_rounds=m // p,
        microbatches_per_round=p,
    )
    if v == 1:
        order = schedule._get_pipeline_order()
    else:
        order = {rank: schedule._calculate_single_rank_operations(rank) for rank in range(p)}
    letters = {"FORWARD": "F", "FULL_BACKWARD": "B"}
    orders: dict[int, list[tuple[str, int, int]]] = {}
    for rank, row in order.items():
        orders[rank] = [
            (letters[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in row
            if action is not None and action.computation_type.name in letters
        ]
        if v == 1:  # of 1F1B's last rank torch numbers the forwards from 1; each kind takes microbatches in order
            count = {"F": itertools.count(), "B": itertools.count()}
            orders[rank] = [(kind, stage, next(count[kind])) for kind, stage, _ in orders[rank]]
    return orders


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (2, 8), (4, 4), (4, 8)])
@pytest.mark.parametrize(
    ("name", "v", "ours"),
    [
        ("ScheduleGPipe", 1, lambda p, m: gpipe(p, m)),
        ("Schedule1F1B", 1, lambda p, m: one_f_one_b(p, m)),
        ("ScheduleInterleaved1F1B", 2, lambda p, m: interleaved_one_f_one_b(p, 2, m)),
    ],
)
def test_torchs_schedules_take_as_long(name: str, v: int, ours: Callable[[int, int], Orders], p: int, m: int) -> None:
    theirs = torch_order(name, p, v, m)
    assert {rank: sorted(order) for rank, order in theirs.items()} == {
        rank: sorted(map(tuple, order)) for rank, order in ours(p, m).items()
    }
    program = pipeline(ours(p, m), SECONDS)
    program.explicit = {rank: [f"{kind}{s}.{k}" for kind, s, k in order] for rank, order in theirs.items()}
    schedule = program.ordered()
    check(schedule)
    assert simulate(schedule).bubble_fraction == pytest.approx(simulated(ours(p, m)).bubble_fraction)


def test_pipelines_run_with_blocking_sends() -> None:
    for orders in (
        one_f_one_b(4, 8),
        interleaved_one_f_one_b(2, 3, 6),
        zero_bubble(4, 6),
        zero_bubble_h2(3, 4),
        three_f_one_b(3, 5),
    ):
        program = pipeline(orders, SECONDS, transfer_seconds=0.3)
        ran = Interpreter(program, program.ordered().actions).run()
        assert len(ran.done) == len(program.jobs)


@pytest.mark.parametrize("pipeline_of", [gpipe, one_f_one_b, zero_bubble, zero_bubble_h2, three_f_one_b])
@pytest.mark.parametrize(("sizes", "message"), [((0, 1), "num_stages is 0"), ((2, -1), "num_microbatches is -1")])
def test_sizes_below_one_are_refused(
    pipeline_of: Callable[[int, int], Orders], sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_of(*sizes)


def test_microbatches_that_are_not_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups of 4, and 6 are not whole groups\. Use a multiple of 4"):
        interleaved_one_f_one_b(4, 2, 6)
