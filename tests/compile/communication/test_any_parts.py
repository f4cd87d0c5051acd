"""Any parts to any parts: every rank gets exactly what it needs, from what exists."""

from checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHAPES, grids, scattered, wanted

from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.topology import Topology

TOPOLOGIES = st.sampled_from([Topology(), Topology(ranks_per_node=2), Topology(ranks_per_node=4, launch_seconds=1e-12)])


@given(st.data(), TOPOLOGIES)
@settings(max_examples=300)
def test_scattered_parts(data: st.DataObject, topology: Topology) -> None:
    shape = data.draw(SHAPES)
    have, need = data.draw(scattered(shape)), data.draw(wanted(shape))
    check(shape, have, need, find_communication(shape, 4, have, need, topology))


@given(st.data(), TOPOLOGIES)
@settings(max_examples=350)
def test_grids_of_any_ranks(data: st.DataObject, topology: Topology) -> None:
    shape = data.draw(SHAPES)
    ranks = data.draw(st.permutations(range(8)))
    have = data.draw(grids(shape, ranks[: data.draw(st.integers(1, 8))]))
    need = data.draw(grids(shape, ranks[-data.draw(st.integers(1, 8)) :]))
    check(shape, have, need, find_communication(shape, 4, have, need, topology))


@given(st.data(), TOPOLOGIES)
@settings(max_examples=350)
def test_grids_of_the_same_ranks(data: st.DataObject, topology: Topology) -> None:
    shape = data.draw(st.tuples(*[st.sampled_from([8, 12, 18, 20])] * 2))
    ranks = range(data.draw(st.sampled_from([2, 3, 4, 6, 8, 12, 16])))
    have, need = (data.draw(grids(shape, ranks)) for _ in range(2))
    itemsize = data.draw(st.sampled_from([4, 1 << 16]))
    check(shape, have, need, find_communication(shape, itemsize, have, need, topology))
