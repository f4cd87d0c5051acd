"""What is asked of any communication."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from interpreter import run
from layouts import Tensor, have_values

from torch_vtensor.compile.communication import Communication, Placed
from torch_vtensor.compile.tensor_view import Mask, cells, tiling


class WrongResultError(Exception):
    """A need that did not get its value."""


def check(shape: Sequence[int], have: Sequence[Placed], need: Sequence[Placed], communication: Communication) -> None:
    """Run it: each need gets the value there; needs of addends get, together, addends of it, replicas equal ones."""
    tensor = Tensor.of(shape)
    assert set(communication.have) == set(have)
    assert set(communication.need) == set(need)
    got = run(communication, have_values(tensor, have))
    of_mask: dict[Mask, torch.Tensor] = {}
    for placed, value in got.items():
        expected = (
            tensor.at(placed.mask) if placed.mask == placed.mask.region else of_mask.setdefault(placed.mask, value)
        )
        if not torch.equal(value, expected):
            raise WrongResultError(f"{placed} got {value}, not {expected}")
    addends = [mask for mask in of_mask if mask != mask.region]
    for cell in cells(Mask.of(shape), addends):
        there = [mask for mask in addends if mask.overlap(cell)]
        of_chunk = defaultdict(list)
        for mask in there:
            of_chunk[mask.chunk].append(of_mask[mask][cell.within(mask)])
        while (tiles := tiling(of_chunk)) is not None:
            total = sum(of_chunk[chunk][0] for chunk in tiles)
            if not torch.equal(total, tensor.at(cell)):
                raise WrongResultError(f"{', '.join(map(str, tiles))} of {cell} add up to {total}")
            for chunk in tiles:
                of_chunk[chunk].pop()
                if not of_chunk[chunk]:
                    del of_chunk[chunk]
