"""What the other tests rely on: one thing wrong in a communication, and its check fails."""

from collections.abc import Iterator

import pytest
from checks import WrongResultError, check
from interpreter import WrongStepError
from layouts import grid

from torch_vtensor.compile.communication import Assemble, Buffer, Collective, Communication, Part, Step, Transfer
from torch_vtensor.compile.moves import find_communication
from torch_vtensor.compile.tensor_view import Interval, Mask
from torch_vtensor.compile.topology import Topology

SHAPE = (8, 12)
CASES = {
    "all_reduce": (grid(SHAPE, range(4), [(2, 0), (2, "V")]), grid(SHAPE, range(4), [(2, 0), (2, "R")])),
    "reduce_scatter": (grid(SHAPE, range(4), [(4, "V")]), grid(SHAPE, range(4), [(4, 0)])),
    "all_gather": (grid(SHAPE, range(4), [(4, 1)]), grid(SHAPE, range(4), [(4, "R")])),
    "all_to_all": (grid(SHAPE, range(4), [(4, 0)]), grid(SHAPE, range(4), [(4, 1)])),
    "broadcast": (grid(SHAPE, (0,), []), grid(SHAPE, (1, 2, 3), [(3, "R")])),
    "transfer": (grid(SHAPE, range(3), [(3, 1)]), grid(SHAPE, range(2, 4), [(2, 0)])),
    "sum": (grid(SHAPE, range(3), [(3, "V")]), grid(SHAPE, (3, 4), [(2, 0)])),
    "addend": (grid(SHAPE, (0, 1), [(2, 1)]), grid(SHAPE, (2, 3), [(2, "V")])),
}


def shifted(mask: Mask) -> Iterator[Mask]:
    for dim, (start, stop) in enumerate(mask.intervals):
        for by in (-1, 1):
            if start + by >= 0 and stop + by <= SHAPE[dim]:
                yield mask.with_interval(dim, Interval(start + by, stop + by))


def mutants(step: Step) -> Iterator[tuple[Step, ...]]:
    """What may stand in a step's place, all of it wrong."""
    yield ()
    yield step, step
    match step:
        case Transfer(source, destination):
            for mask in shifted(destination.mask):
                yield (Transfer(source, destination._replace(mask=mask)),)
        case Assemble(parts, output):
            for index, part in enumerate(parts):
                before, after = parts[:index], parts[index + 1 :]
                yield (Assemble(before + after, output),)
                yield (Assemble((*parts, part), output),)
                for mask in shifted(part.region):
                    yield (Assemble((*before, Part(part.buffer, mask), *after), output),)
        case Collective("all_reduce" | "broadcast"):
            pass
        case Collective():
            first, second, *rest = step.inputs
            reordered = step._replace(
                inputs=(second, first, *rest), outputs=(step.outputs[1], step.outputs[0], *step.outputs[2:])
            )
            yield (reordered,)


@pytest.mark.parametrize("name", CASES)
def test_every_mutant_is_caught(name: str) -> None:
    have, need = CASES[name]
    found = find_communication(SHAPE, 4, have, need, Topology())
    check(SHAPE, have, need, found)
    num_mutants = 0
    for index, step in enumerate(found.steps):
        for mutant in mutants(step):
            steps = (*found.steps[:index], *mutant, *found.steps[index + 1 :])
            with pytest.raises((WrongResultError, WrongStepError)):
                check(SHAPE, have, need, Communication(found.have, found.need, steps))
            num_mutants += 1
    assert num_mutants


@pytest.mark.parametrize("name", CASES)
def test_a_step_before_what_it_reads_is_caught(name: str) -> None:
    have, need = CASES[name]
    found = find_communication(SHAPE, 4, have, need, Topology())
    backwards = Communication(found.have, found.need, found.steps[::-1])
    written: set[Buffer] = {buffer for step in found.steps for rank in step.ranks for buffer in step.writes(rank)}
    if any(buffer in written for step in found.steps for rank in step.ranks for buffer in step.reads(rank)):
        with pytest.raises(WrongStepError):
            check(SHAPE, have, need, backwards)
    else:
        check(SHAPE, have, need, backwards)
