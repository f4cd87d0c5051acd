"""What well-known plans communicate: found, not written down anywhere."""

from collections import Counter
from collections.abc import Sequence

import pytest
from checks import check
from layouts import grid

from torch_vtensor.compile.communication import Assemble, Collective, Communication, Placed, Transfer
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.tensor_view import Mask, ValueChunk
from torch_vtensor.compile.topology import Link, Topology

SHAPE = (16, 24)
ONE_NODE = Topology()


def find(
    have: Sequence[tuple[int, str | int]],
    need: Sequence[tuple[int, str | int]],
    have_ranks: Sequence[int] = (),
    need_ranks: Sequence[int] = (),
    topology: Topology = ONE_NODE,
    itemsize: int = 1 << 20,
) -> Communication:
    """What is found for two grids, by default of the first ranks, of a tensor large enough for bytes to matter."""

    def placed(axes: Sequence[tuple[int, str | int]], ranks: Sequence[int]):
        num_ranks = 1
        for size, _ in axes:
            num_ranks *= size
        return grid(SHAPE, ranks or range(num_ranks), axes)

    parts = placed(have, have_ranks), placed(need, need_ranks)
    found = find_communication(SHAPE, itemsize, *parts, topology)
    check(SHAPE, *parts, found)
    return found


def summary(found: Communication) -> list[tuple]:
    """Kind, ranks and dimensions of everything that is not local."""
    return [
        (step.kind, step.ranks, *(dim for dim in (step.scatter_dim, step.gather_dim) if dim is not None))
        if isinstance(step, Collective)
        else ("transfer", step.ranks)
        for step in found.steps
        if not isinstance(step, Assemble)
    ]


ALL4 = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("have", "need", "expected"),
    [
        pytest.param([(4, "V")], [(4, "R")], [("all_reduce", ALL4)], id="row-parallel output"),
        pytest.param([(4, "V")], [(4, 0)], [("reduce_scatter", ALL4, 0)], id="to sequence parallel, ZeRO gradients"),
        pytest.param([(4, "V")], [(4, 1)], [("reduce_scatter", ALL4, 1)], id="along the last dimension"),
        pytest.param([(4, 0)], [(4, "R")], [("all_gather", ALL4, 0)], id="ZeRO-3 parameters"),
        pytest.param([(4, 0)], [(4, 1)], [("all_to_all", ALL4, 1, 0)], id="Ulysses"),
        pytest.param([(4, "R")], [(4, 0)], [], id="cut a replica"),
        pytest.param([(4, "R")], [(4, "V")], [], id="one addend and zeros"),
        pytest.param([(4, "V")], [(4, "V")], [], id="addends as they are"),
        pytest.param([(4, 0)], [(4, 0)], [], id="shards as they are"),
        pytest.param([(2, "R"), (2, 0)], [(2, 1), (2, 0)], [], id="cut one axis more"),
        pytest.param(
            [(2, "R"), (2, "V")], [(4, "R")], [("all_reduce", (0, 1)), ("all_reduce", (2, 3))], id="dp x tp: along tp"
        ),
        pytest.param(
            [(2, "V"), (2, "R")], [(4, "R")], [("all_reduce", (0, 2)), ("all_reduce", (1, 3))], id="dp x tp: along dp"
        ),
        pytest.param(
            [(2, "V"), (2, 1)],
            [(2, 0), (2, 1)],
            [("reduce_scatter", (0, 2), 0), ("reduce_scatter", (1, 3), 0)],
            id="dp x tp: gradients of column shards to ZeRO",
        ),
        pytest.param(
            [(2, 0), (2, 1)],
            [(2, 0), (2, "R")],
            [("all_gather", (0, 1), 1), ("all_gather", (2, 3), 1)],
            id="dp x tp: gather columns",
        ),
        pytest.param([(2, "V"), (2, "V")], [(4, "R")], [("all_reduce", ALL4)], id="two axes at once"),
    ],
)
def test_one_set_of_ranks(have, need, expected) -> None:
    assert summary(find(have, need)) == expected


def test_axes_of_a_grid_need_not_be_in_the_order_of_ranks() -> None:
    found = find([(2, 0), (4, "R")], [(8, "R")], have_ranks=(0, 2, 4, 6, 1, 3, 5, 7), need_ranks=range(8))
    assert [step.kind for step in found.steps] == ["all_gather"] * 4
    for step in found.steps:
        even, odd = step.ranks
        assert even % 2 == 0
        assert odd % 2 == 1


def test_shards_stay_in_order_when_ranks_do_not() -> None:
    found = find([(4, 0)], [(4, "R")], have_ranks=(2, 0, 3, 1), need_ranks=range(4))
    assert summary(found) == [("all_gather", (2, 0, 3, 1), 0)]


def test_an_all_reduce_scatters_first_where_only_shards_are_sent_on() -> None:
    # Two stages of two ranks, a slow network between: each byte crosses it once.
    topology = Topology(ranks_per_node=2)
    found = find([(2, "V")], [(2, "R")], (0, 1), (2, 3), topology)
    assert sorted(summary(found)) == [
        ("all_gather", (2, 3), 0),
        ("reduce_scatter", (0, 1), 0),
        ("transfer", (0, 2)),
        ("transfer", (1, 3)),
    ]
    assert found.bytes_sent(1)[0] == SHAPE[0] * SHAPE[1] // 2 * 2  # one half to its peer, one to the next stage


@pytest.mark.parametrize("gather", [False, True])
def test_replicas_between_stages_by_what_the_links_can_do(gather: bool) -> None:
    slow, fast = Link(1e-6, 1e9), Link(1e-6, 100e9)
    topology = Topology(2, fast if gather else slow, slow)
    kinds = [step[0] for step in summary(find([(2, "R")], [(2, "R")], (0, 1), (2, 3), topology))]
    assert kinds == ["transfer", "transfer", "all_gather"] if gather else ["transfer", "transfer"]
    sent = find([(2, "R")], [(2, "R")], (0, 1), (2, 3), topology).bytes_sent(1)
    assert sent[0] == SHAPE[0] * SHAPE[1] // (2 if gather else 1)


def test_small_values_are_not_cut_to_be_gathered() -> None:
    topology = Topology(ranks_per_node=2)
    assert [step[0] for step in summary(find([(2, "R")], [(2, "R")], (0, 1), (2, 3), topology, itemsize=2))] == [
        "transfer"
    ] * 2


@pytest.mark.parametrize(("have", "need"), [(2, 4), (4, 2), (3, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("roles", ["RR", "VR", "0R", "R0", "01", "V1"])
def test_stages_of_different_degrees(have: int, need: int, roles: str) -> None:
    one, other = (role if role in "RV" else int(role) for role in roles)
    topology = Topology(ranks_per_node=4)
    found = find([(have, one)], [(need, other)], range(have), range(4, 4 + need), topology)
    # No rank of the second node gets more than once what it needs over the network, addends added up before.
    crossed = sum(
        step.destination.mask.num_elements
        for step in found.steps
        if isinstance(step, Transfer) and topology.node(step.ranks[0]) != topology.node(step.ranks[1])
    ) + sum(
        step.inputs[0].mask.num_elements * (len(step.ranks) - 1)
        for step in found.steps
        if isinstance(step, Collective) and len({*map(topology.node, step.ranks)}) > 1
    )
    assert crossed <= SHAPE[0] * SHAPE[1] * (1 if other != "R" else need)


def test_ranks_that_have_it_send_nothing_to_themselves() -> None:
    found = find([(4, "R")], [(2, "R")], range(4), (2, 3))
    assert found.steps == ()


def test_what_a_rank_has_in_pieces_is_added_up_and_put_together_before_it_is_sent() -> None:
    halves = grid(SHAPE, (0, 0, 1, 1), [(2, "R"), (2, 0)])
    addends = grid(SHAPE, (0, 1, 0, 1), [(4, "V")])
    whole = grid(SHAPE, (0, 1), [(2, "R")])
    for have, expected in (
        ([placed for placed in halves if placed.rank == 0], ["broadcast", "transfer"]),
        (addends, ["all_reduce"]),
    ):
        found = find_communication(SHAPE, 4, have, whole, ONE_NODE)
        check(SHAPE, have, whole, found)
        moved = [step[0] for step in summary(found)]
        assert len(moved) <= len(expected)
        assert set(moved) <= {*expected}


def test_uneven_shards_are_sent_exactly() -> None:
    shape = (10, 3)
    have, need = grid(shape, range(4), [(4, 0)]), grid(shape, range(4), [(4, "R")])
    found = find_communication(shape, 4, have, need, ONE_NODE)
    check(shape, have, need, found)
    received = sum(found.bytes_sent(4).values())
    assert received == 3 * 10 * 3 * 4


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_small_shards_are_gathered_by_one_collective(num_ranks: int) -> None:
    """Messages would take as long on paper, and each rank would have to begin many."""
    found = find([(num_ranks, 0)], [(num_ranks, "R")], itemsize=4)
    assert summary(found) == [("all_gather", tuple(range(num_ranks)), 0)]


def test_a_small_sum_is_reduced_where_its_addends_are_and_sent_on_by_all_who_have_it() -> None:
    """The loss of the last stage: of two microbatches, over data ×2 and tensor ×2, for four stages."""
    last, whole = (12, 13, 14, 15), Mask.of(())
    have = [
        Placed(rank, whole.with_chunk(ValueChunk(2 * microbatch + (rank - 12) // 2, 4)))
        for microbatch in range(2)
        for rank in last
    ]
    need = [Placed(rank, whole) for rank in range(16)]
    found = find_communication((), 4, have, need, ONE_NODE)
    check((), have, need, found)
    assert [step for step in summary(found) if step[0] == "all_reduce"] == [
        ("all_reduce", (12, 14)),
        ("all_reduce", (13, 15)),
    ]
    sent = Counter(step.ranks[0] for step in found.steps if isinstance(step, Transfer))
    assert sent == dict.fromkeys(last, 3)
