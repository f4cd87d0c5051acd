"""The running batch in device memory: a column of numbers for each sequence, which is all that steps read of it.

    seat          0      1      2      3
    token        17     40      5      0
    position     91    130      8      0         lengths are the same numbers
    addresses     …      …      …   scratch      of every group of layers
    active        1      1      1      0

Sequences fill the seats from 0 on without gaps, so a step for a few sizes of batches serves any number of them. Seats
that nobody has point at a scratch row and stay at length 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torch_vtensor.generation.decode.step import GroupRows
from torch_vtensor.generation.shared_reads import SharedTables

__all__ = ["Column", "Seats"]


class Column(NamedTuple):
    """What a seat is told of its sequence: where its rows lie, how many there are, and its request's own numbers."""

    addresses: Sequence[int]
    num_rows: int
    arguments: Sequence[int]


class Seats:
    """Numbers of up to ``num_seats`` sequences, of which the first ``num_taken`` seats are taken.

    Args:
        num_groups: groups of layers with addresses of their own.
        num_arguments: numbers that each request brings for the choice of its tokens.

    Effects: everything is done in the order of the current stream, and waits for nothing.
    """

    def __init__(self, num_seats: int, num_groups: int, num_arguments: int, device: torch.device) -> None:
        self.num_seats = num_seats
        self.num_taken = 0
        self.device = device
        ints: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(num_seats, 1, **ints)
        self.positions = torch.zeros(num_seats, 1, **ints)
        self.active = torch.zeros(num_seats, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(num_seats, dtype=torch.int32, device=device)
        self.addresses = torch.zeros(2 * num_groups, num_seats, **ints)
        self.arguments = torch.zeros(num_arguments, num_seats, dtype=torch.int32, device=device)
        self._firsts = torch.zeros(num_seats, dtype=torch.int32, device=device)
        self._scratch = torch.zeros(2 * num_groups, 1, **ints)

    def use_scratch(self, scratch: Sequence[int]) -> None:
        """Free all seats, which point at these addresses from now on."""
        self.num_taken = 0
        self._scratch = self.on_device(scratch, torch.int64)[:, None]
        self._empty(0, self.num_seats)

    def groups(self, num_seats: int, shared: Sequence[SharedTables | None] | None = None) -> tuple[GroupRows, ...]:
        """What the attention of the first ``num_seats`` seats reads, by group.

        Args:
            shared: what of each group's tokens is to be read once for several seats.
        """
        return tuple(
            GroupRows(
                self.addresses[2 * group, :num_seats],
                self.addresses[2 * group + 1, :num_seats],
                self.lengths[:num_seats],
                self._firsts[:num_seats],
                shared[group] if shared is not None else None,
            )
            for group in range(len(self.addresses) // 2)
        )

    def take(self, columns: Sequence[Column], tokens: torch.Tensor | None = None) -> None:
        """Give the next seats to these sequences, whose newest ``tokens`` [len(columns)] are on the device."""
        taken = slice(self.num_taken, self.num_taken + len(columns))
        self.num_taken = taken.stop
        addresses = list(zip(*(column.addresses for column in columns), strict=True))
        num_rows = self.on_device([column.num_rows for column in columns], torch.int64)
        self.addresses[:, taken].copy_(self.on_device(addresses, torch.int64))
        self.lengths[taken].copy_(num_rows)
        self.positions[taken, 0].copy_(num_rows)
        self.active[taken].fill_(1)
        if tokens is not None:
            self.tokens[taken, 0].copy_(tokens)
        if len(self.arguments):
            arguments = list(zip(*(column.arguments for column in columns), strict=True))
            self.arguments[:, taken].copy_(self.on_device(arguments, torch.int32))

    def keep(self, seats: Sequence[int]) -> None:
        """Let only the sequences of these seats stay, which move to the front in this order."""
        before, self.num_taken = self.num_taken, len(seats)
        if list(seats) != list(range(len(seats))):
            index = self.on_device(seats, torch.int64)
            for numbers in (self.tokens, self.positions, self.lengths):
                numbers[: len(seats)] = numbers.index_select(0, index)
            for columns in (self.addresses, self.arguments):
                columns[:, : len(seats)] = columns.index_select(1, index)
        self._empty(len(seats), before)

    def advance(self, tokens: torch.Tensor) -> None:
        """Continue the first sequences by these tokens [B]."""
        batch = len(tokens)
        self.tokens[:batch].copy_(tokens[:, None])
        self.positions[:batch].add_(self.active[:batch, None])
        self.lengths[:batch].add_(self.active[:batch])

    def on_device(self, numbers: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """These numbers on the device, copied behind the work that was launched."""
        tensor = torch.tensor(list(numbers), dtype=dtype, device="cpu")
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _empty(self, start: int, stop: int) -> None:
        if start < stop:
            for numbers in (self.tokens, self.positions, self.active, self.lengths):
                numbers[start:stop].zero_()
            self.addresses[:, start:stop] = self._scratch
