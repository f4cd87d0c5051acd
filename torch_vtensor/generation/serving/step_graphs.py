"""StepGraphs: steps of a running batch, captured for a few numbers of sequences, or run as they are.

A captured step serves every number of sequences up to its size: seats that nobody has go on with a scratch row. Where
sequences share what they begin with, there is another step for each size, which reads that once; which sequences share
what is data, so it serves whatever they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torch_vtensor.generation.decode import graphs
from torch_vtensor.generation.decode.graphs import Captures, Graph, LatestGraphs
from torch_vtensor.generation.decode.program import Traced
from torch_vtensor.generation.decode.step import LayerRows, Step, step_forward
from torch_vtensor.generation.serving.choice import Choice
from torch_vtensor.generation.serving.seats import Seats
from torch_vtensor.generation.serving.support import counters, is_out_of_memory, log
from torch_vtensor.generation.shared_reads import MOST_GROUPS, SharedPrefix, SharedTables, shares_reads, tables_of

__all__ = ["StepGraphs", "size_of"]

_MAX_CHOICES = 32


class StepGraphs:
    """The steps of the sequences that have ``seats``.

    Args:
        traced: the model, of which its tensors alone are kept.
        layers, workspace: of attention.
        captures: how steps are captured; its generator is what tokens are drawn by.
    """

    def __init__(
        self,
        traced: Traced,
        layers: tuple[LayerRows, ...],
        workspace: tuple[torch.Tensor, torch.Tensor],
        seats: Seats,
        captures: Captures,
    ) -> None:
        assert captures.generator is not None
        self._twin, self._twin_for_many = traced.twin, traced.twin_for_many
        self._layers, self._workspace = layers, workspace
        self._seats = seats
        self._captures, self._generator = captures, captures.generator
        self._mask = torch.ones(seats.num_seats, 1, 1, 1, dtype=torch.bool, device=seats.device)
        self._logits: dict[int, torch.Tensor] = {}
        self._steps: dict[tuple[int, tuple[bool, ...]], Graph] = {}
        self._choices = LatestGraphs(_MAX_CHOICES)
        self._plain = step_forward(traced.twin_for_many)
        self._several: Callable[..., torch.Tensor] | None = None  # compiled for all batches but single ones
        self._shared: Sequence[Sequence[SharedPrefix]] = ()
        self._tables: dict[int, tuple[SharedTables, ...]] = {}  # on the device, by size
        self._told_size: int | None = None  # whose tables say what is shared now
        self._reads_apart = False

    @property
    def sizes(self) -> set[int]:
        """For how many sequences steps are captured."""
        return {size for size, _ in self._steps}

    def share(self, prefixes: Sequence[Sequence[SharedPrefix]]) -> None:
        """From now on the seats of each of these read once what they share, for each group of layers."""
        self._shared, self._told_size = prefixes, None

    def warm_up(self, size: int, choice: Choice) -> None:
        """Compile and capture the next step of up to ``size`` sequences, if not done before.

        Effects: the row behind each sequence is written to.
        """
        shares = self._shares
        if (size, shares) not in self._steps:
            if any(shares):
                self._tell(size)  # rehearsing reads what the tables say
            try:
                self._steps[size, shares] = self._capture(size, shares)
            except Exception as error:
                if not any(shares) or is_out_of_memory(error):
                    raise
                self._read_apart(error)
                self.warm_up(size, choice)
                return
        self._choice(size, choice)

    def run(self, size: int, choice: Choice, is_captured: bool) -> torch.Tensor:
        """The next token of every taken seat [taken], on the device; the seats go on with them.

        Args:
            is_captured: run what was captured for this size, if it was.

        Effects: writes a row behind each sequence, which must have memory.
        """
        batch, shares = self._seats.num_taken, self._shares
        graph = self._steps.get((size, shares)) if is_captured else None
        if any(shares):
            self._tell(size)
        if graph is not None:
            graph()
            self._choice(size, choice)()
        else:
            self._choose(self._run_plainly(batch, size), choice)
        return self._seats.tokens[:batch, 0]

    @property
    def _shares(self) -> tuple[bool, ...]:
        """In which groups of layers something is read once."""
        return tuple(bool(prefixes) and not self._reads_apart for prefixes in self._shared)

    def _tell(self, size: int) -> None:
        """Have the tables for this size say what is shared."""
        if self._told_size == size:
            return
        device = self._seats.device
        tables = [tables_of(prefixes, size, (MOST_GROUPS, size)) for prefixes in self._shared]
        for told, found in zip(self._tables_for(size), tables, strict=True):
            for on_device, numbers in zip(told, found, strict=True):
                pinned = numbers.pin_memory() if device.type == "cuda" else numbers
                on_device.copy_(pinned, non_blocking=True)
        self._told_size = size

    def _tables_for(self, size: int) -> tuple[SharedTables, ...]:
        if size not in self._tables:
            nothing = tables_of((), size, (MOST_GROUPS, size))
            self._tables[size] = tuple(
                SharedTables(*(table.to(self._seats.device, copy=True) for table in nothing)) for _ in self._shared
            )
        return self._tables[size]

    def _read_apart(self, error: Exception) -> None:
        """From now on every sequence reads all of its tokens."""
        self._reads_apart = True
        counters["read apart: the step cannot be made to read once what is shared"] += 1
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        log.info("what sequences share is read for each of them: %s", reason, exc_info=error)

    def _capture(self, size: int, shares: tuple[bool, ...]) -> Graph:
        try:
            return self._capture_forward(size, shares)
        except Exception as error:
            if size == 1 or self._twin_for_many is self._twin or is_out_of_memory(error):
                raise
            # Experts' kernels for many tokens may ask the host how many each has; those for few copy weights instead.
            log.info("experts are run as for few tokens: %s", type(error).__name__, exc_info=error)
            self._twin_for_many, self._several = self._twin, None
            return self._capture_forward(size, shares)

    def _capture_forward(self, size: int, shares: tuple[bool, ...]) -> Graph:
        if size == 1:
            forward = graphs.compile_step(step_forward(self._twin))
        else:
            forward = self._several or graphs.compile_step(step_forward(self._twin_for_many), of_any_batch=True)
            self._several = forward

        def run() -> None:
            logits = self._run_forward(size, size, shares, forward)
            if size not in self._logits:
                self._logits[size] = torch.empty_like(logits)  # while rehearsing: no part of a graph's memory
            self._logits[size].copy_(logits)

        return self._captures(run)

    def _run_plainly(self, batch: int, size: int) -> torch.Tensor:
        try:
            return self._run_forward(batch, size, self._shares, self._plain)
        except Exception as error:
            if not any(self._shares) or is_out_of_memory(error):
                raise
            self._read_apart(error)
            return self._run_forward(batch, size, self._shares, self._plain)

    def _run_forward(
        self, batch: int, size: int, shares: tuple[bool, ...], forward: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        seats, shared = self._seats, None
        if shares_reads(seats.device) and size > 1:
            # Of no groups where nothing is shared: one compiled step serves both.
            shared = [
                SharedTables(tables.groups[: MOST_GROUPS * is_shared], tables.num_shared[:batch])
                for tables, is_shared in zip(self._tables_for(size), shares, strict=True)
            ]
        step = Step(self._layers, seats.groups(batch, shared), *self._workspace)
        return forward(seats.tokens[:batch], seats.positions[:batch], self._mask[:batch], step)

    def _choice(self, size: int, choice: Choice) -> Graph:
        def rehearse() -> None:
            choice.choose(self._logits[size], self._seats.arguments[:, :size], self._generator)

        what = None if choice.signature is None else (size, choice.signature)
        return self._choices.get(
            what, lambda: self._captures(lambda: self._choose(self._logits[size], choice), rehearse)
        )

    def _choose(self, logits: torch.Tensor, choice: Choice) -> None:
        arguments = self._seats.arguments[:, : len(logits)]
        self._seats.advance(choice.choose(logits, arguments, self._generator))


def size_of(batch: int) -> int:
    """The size of the captured step that serves so many sequences."""
    return 1 << (batch - 1).bit_length()
