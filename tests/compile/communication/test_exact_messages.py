"""Exact point-to-point: what is there is not sent, what is sent comes from nearby, what is impossible is refused."""

import itertools
import re

import pytest
from checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHAPES, grid, scattered, wanted

from torch_vtensor.compile.communication import (
    Assemble,
    Buffer,
    Collective,
    Communication,
    Placed,
    Transfer,
    seconds_of,
)
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.point_to_point import find_point_to_point
from torch_vtensor.compile.tensor_view import Interval, Mask, ValueChunk
from torch_vtensor.compile.topology import Topology

SHAPE = (8, 6)
WHOLE = Mask.of(SHAPE)
TWO_A_NODE = Topology(ranks_per_node=2)


def rows(start: int, stop: int) -> Mask:
    return WHOLE.with_interval(0, Interval(start, stop))


def exactly(have: list[Placed], need: list[Placed], topology: Topology = TWO_A_NODE) -> Communication:
    buffers = {placed: Buffer(*placed) for placed in have}
    found = Communication(buffers, *find_point_to_point(buffers.values(), need, 4, topology, itertools.count(1)))
    check(SHAPE, have, need, found)
    return found


@given(st.data())
@settings(max_examples=200)
def test_regular_parts_by_messages_alone(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    have, need = data.draw(scattered(shape)), data.draw(wanted(shape))
    buffers = {placed: Buffer(*placed) for placed in have}
    # Small and large elements: sums on one rank, or in pieces on several.
    itemsize = data.draw(st.sampled_from([1, 1 << 22]))
    found, steps = find_point_to_point(buffers.values(), need, itemsize, Topology(3), itertools.count(1))
    check(shape, have, need, Communication(buffers, found, steps))


def test_what_is_here_is_the_buffer_or_a_view_of_it() -> None:
    have = [Placed(0, WHOLE), Placed(1, rows(0, 4))]
    found = exactly(have, [Placed(0, WHOLE), Placed(0, rows(2, 5)), Placed(1, rows(0, 4))])
    assert found.need[Placed(0, WHOLE)] == found.have[have[0]]
    assert found.need[Placed(1, rows(0, 4))] == found.have[have[1]]
    (step,) = found.steps
    assert isinstance(step, Assemble)
    assert step.is_view


def test_only_what_is_missing_is_sent() -> None:
    found = exactly([Placed(0, WHOLE), Placed(1, rows(1, 4))], [Placed(1, WHOLE)])
    assert found.bytes_sent(4) == {0: (8 - 3) * 6 * 4}


def test_the_same_node_is_asked_first() -> None:
    found = exactly([Placed(0, WHOLE), Placed(2, WHOLE)], [Placed(3, WHOLE)])
    assert [step.ranks for step in found.steps] == [(2, 3)]


def test_replicas_take_turns() -> None:
    found = exactly([Placed(0, WHOLE), Placed(1, WHOLE)], [Placed(rank, rows(0, rank)) for rank in (2, 3, 4, 5)])
    assert {step.ranks[0] for step in found.steps} == {0, 1}


def test_what_one_rank_needs_twice_is_sent_once() -> None:
    found = exactly([Placed(0, WHOLE)], [Placed(1, rows(0, 6)), Placed(1, rows(2, 8)), Placed(1, rows(3, 5))])
    assert found.bytes_sent(4) == {0: 8 * 6 * 4}


def test_addends_of_one_rank_are_added_up_before_they_are_sent() -> None:
    have = [Placed(rank, WHOLE.with_chunk(ValueChunk(number, 4))) for rank, number in ((0, 0), (0, 3), (1, 1), (1, 2))]
    found = exactly(have, [Placed(2, WHOLE)])
    assert found.bytes_sent(4) == {0: 8 * 6 * 4, 1: 8 * 6 * 4}


def test_addends_that_exist_are_passed_on_as_they_are() -> None:
    have = grid(SHAPE, (0, 1), [(2, "V")])
    found = exactly(have, grid(SHAPE, (3, 2), [(2, "V")]))
    assert {step.ranks for step in found.steps} == {(0, 3), (1, 2)}


def test_of_a_whole_value_the_first_addend_is_all_and_the_others_are_zeros() -> None:
    found = exactly([Placed(0, WHOLE)], grid(SHAPE, (0, 1), [(2, "V")]))
    (step,) = found.steps
    assert isinstance(step, Assemble)
    assert (step.parts, step.output.rank) == ((), 1)
    assert found.need[Placed(0, WHOLE.with_chunk(ValueChunk(0, 2)))] == found.have[Placed(0, WHOLE)]


def test_a_sum_that_several_need_is_made_once() -> None:
    have, need = grid(SHAPE, (0, 1, 2), [(3, "V")]), grid(SHAPE, (4, 5), [(2, "R")])
    found = exactly(have, need)
    sums = [step for step in found.steps if isinstance(step, Assemble) and len(step.parts) == 3]
    assert len(sums) == 1


def test_one_that_many_need_is_broadcast() -> None:
    (step,) = exactly([Placed(2, WHOLE)], grid(SHAPE, (0, 1, 4, 5), [(4, "R")])).steps
    assert isinstance(step, Collective)
    assert step.kind == "broadcast"
    assert step.ranks[0] == 2
    assert step.bytes_sent(step.ranks[-1], 4) == 0


@pytest.mark.parametrize(
    ("have", "message"),
    [
        ([], "rank 7 needs [0:8, 0:6], but nobody has [0:8, 0:6]: what exists is nothing"),
        ([Placed(5, rows(0, 3))], "nobody has [3:8, 0:6]: what exists is [0:3, 0:6]"),
        (
            [Placed(5, WHOLE.with_chunk(ValueChunk(0, 2)))],
            "nobody has [0:8, 0:6]: of it rank 5 has [0:8, 0:6] 0 of 2, and these do not add up to it",
        ),
        (
            [Placed(5, WHOLE.with_chunk(ValueChunk(0, 2))), Placed(5, WHOLE.with_chunk(ValueChunk(2, 3)))],
            "these do not add up to it",
        ),
    ],
)
def test_what_nobody_has_is_refused(have: list[Placed], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_communication(SHAPE, 4, have, [Placed(7, WHOLE)], TWO_A_NODE)


def test_what_is_outside_of_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("rank 0 [0:9, 0:6] is no part of a tensor of shape [8, 6]")):
        find_communication(SHAPE, 4, [Placed(0, WHOLE)], [Placed(0, rows(0, 9))], TWO_A_NODE)


@given(st.data())
@settings(max_examples=100)
def test_ranks_that_wait_for_every_step_all_end(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    have, need = data.draw(scattered(shape)), data.draw(wanted(shape))
    found = find_communication(shape, 4, have, need, TWO_A_NODE)
    left = {rank: list(found.of_rank(rank)) for rank in {rank for step in found.steps for rank in step.ranks}}
    while any(left.values()):
        step = next(
            step for steps in left.values() for step in steps[:1] if all(left[r][0] is step for r in step.ranks)
        )
        for rank in step.ranks:
            del left[rank][0]


def test_equal_plans_on_other_ranks_are_equal() -> None:
    def on(first: int) -> Communication:
        ranks = range(first, first + 4)
        return find_communication(
            SHAPE, 4, grid(SHAPE, ranks, [(2, "V"), (2, 1)]), grid(SHAPE, ranks, [(2, 0), (2, 1)]), Topology()
        )

    assert on(8) == on(0).renamed({rank: rank + 8 for rank in range(4)}, (0,))
    check(SHAPE, tuple(on(8).have), tuple(on(8).need), on(8))
    # Ranks 6 to 9 lie on two nodes: the time is another.
    assert seconds_of(on(6).steps, 4, Topology()) > seconds_of(on(0).steps, 4, Topology())


def test_it_reads_well() -> None:
    found = find_communication(SHAPE, 4, grid(SHAPE, (0, 1), [(2, "V")]), grid(SHAPE, (0, 1), [(2, 0)]), Topology())
    assert str(found) == (
        "reduce_scatter scatters dim 0 of ranks 0, 1: 0:[0:8, 0:6] 0 of 2, 1:[0:8, 0:6] 1 of 2"
        " -> 0:[0:4, 0:6]'1, 1:[4:8, 0:6]'2"
    )
    assert str(Transfer(Buffer(0, WHOLE), Buffer(1, rows(0, 2), 3))) == "transfer 0:[0:8, 0:6] -> 1:[0:2, 0:6]'3"
    assert str(Communication({}, {}, ())) == "no communication"
