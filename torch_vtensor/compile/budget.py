"""A memory budget → a plan for one device: which chunks and what recomputation make a step fit at the least extra time.

Candidates are ready plans by name. From what costs least to what costs most::

    (nothing)            inductor compiles the graph whole
    chunked_loss4        the head and the loss in pieces, each forward and backward at once: nothing is computed twice
    accumulate4          the whole step in pieces of the batch, one after the other: gradients are added up four times
    recompute7           of that many layers only what enters them is kept: their forward pass is computed twice
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_vtensor.compile.plans.layers import find_layers
from torch_vtensor.compile.primitives import Graph
from torch_vtensor.compile.schedules import PlanError, simulate
from torch_vtensor.compile.schedules.job import readable_bytes

if TYPE_CHECKING:
    from torch_vtensor.compile.backend import Compilation

_TAIL_PIECES = 4
_WORTH = 0.02
"""A chunked loss is kept if it lowers the peak by this share."""


@dataclass(frozen=True)
class Candidate:
    """A plan by its name, "" for none, with the predicted peak and time of a step."""

    name: str
    peak_bytes: int
    seconds: float

    def __str__(self) -> str:
        """``accumulate4: 12.3 GiB, 410 ms``."""
        return f"{self.name or 'uncut'}: {readable_bytes(self.peak_bytes)}, {self.seconds * 1e3:.3g} ms"


@dataclass(frozen=True)
class Choice:
    """What fits a budget at the least predicted time, and what else was considered.

    Bytes count what the step itself holds: parameters, gradients, activations, workspace. What else is on the device,
    as the state of optimizers, comes on top.
    """

    budget_bytes: int
    chosen: Candidate
    considered: tuple[Candidate, ...]

    def __str__(self) -> str:
        """The budget, what was chosen, and a line for each candidate."""
        rows = [f"memory budget {readable_bytes(self.budget_bytes)}, chosen {self.chosen}"]
        rows += [f"  {'fits' if c.peak_bytes <= self.budget_bytes else '    '}  {c}" for c in self.considered]
        return "\n".join(rows)


def choose(graph: Graph, budget: float, evaluate: Callable[[str], Compilation]) -> tuple[Choice, Compilation | None]:
    """The plan that fits a budget at the least predicted time; no compilation where nothing has to be cut.

    `budget` is a number of bytes, or, as a float up to 1, a share of what the step takes uncut. `evaluate` plans and
    measures a candidate.

    Raises:  PlanError, with the least that was found, if nothing fits.
    """
    search = _Search(graph, evaluate)
    uncut = search.uncut
    limit = math.floor(budget * uncut.peak_bytes) if isinstance(budget, float) else budget
    if uncut.peak_bytes <= limit:
        return Choice(limit, uncut, (uncut,)), None
    fitting = list(search.fitting(limit))
    considered = tuple(sorted(search.known.values(), key=lambda candidate: candidate.seconds))
    if not fitting:
        least = min(considered, key=lambda candidate: candidate.peak_bytes)
        reports = search.made[least.name].passes.reports
        memory = max((report.memory[0] for report in reports), key=lambda memory: memory.peak_bytes)
        kinds = ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in memory.bytes_by_kind().items())
        raise PlanError(
            f"memory_budget is {readable_bytes(limit)}, and of {len(considered)} ways to cut the step the one that "
            f"takes least, {least.name!r}, takes {readable_bytes(least.peak_bytes)}: {kinds}. Uncut it takes "
            f"{readable_bytes(uncut.peak_bytes)}. Raise the budget to {least.peak_bytes} bytes, or make the batch "
            f"smaller.",
            rank=0,
        )
    chosen = min(fitting, key=lambda candidate: candidate.seconds)
    return Choice(limit, chosen, considered), search.made[chosen.name]


class _Search:
    """Candidates, each planned and measured once."""

    def __init__(self, graph: Graph, evaluate: Callable[[str], Compilation]) -> None:
        self._evaluate = evaluate
        self.known: dict[str, Candidate] = {}
        self.made: dict[str, Compilation] = {}
        try:
            self._num_layers = len(find_layers(graph))
        except ValueError:
            self._num_layers = 0
        try:
            self._batch = graph.dimension("batch", graph.tasks).size
        except ValueError:
            self._batch = 1
        # Layers apart take what they take together, and are measured once where they are equal.
        self._apart = ("layerwise",) if self._num_layers else ()
        self.uncut = self._add("", evaluate(*self._apart or ("single",)))

    def fitting(self, limit: int) -> Iterator[Candidate]:
        """Those that fit, from larger to smaller microbatches, up to the first that recomputes nothing."""
        chunks = self._chunks_pay()
        num_microbatches, before = 1, math.inf
        while num_microbatches <= self._batch:
            parts = [f"accumulate{num_microbatches}"] if num_microbatches > 1 else []
            pieces = min(_TAIL_PIECES, self._batch // num_microbatches)
            parts += [f"chunked_loss{pieces}"] if chunks and pieces > 1 else []
            kept = self._candidate(*parts)
            if kept is not None and kept.peak_bytes <= limit:
                yield kept
                return
            if kept is None or kept.peak_bytes >= before:
                return
            if self._num_layers:
                yield from self._recomputing(parts, kept, limit)
            num_microbatches, before = 2 * num_microbatches, kept.peak_bytes

    def _chunks_pay(self) -> bool:
        if self._batch < 2 or not self._num_layers:
            return False
        chunked = self._candidate(f"chunked_loss{min(_TAIL_PIECES, self._batch)}")
        return chunked is not None and chunked.peak_bytes < (1 - _WORTH) * self.uncut.peak_bytes

    def _recomputing(self, parts: list[str], kept: Candidate, limit: int) -> Iterator[Candidate]:
        """Recompute as few layers as will do: each saves about the same."""
        every = self._candidate("recompute", *parts)
        if every is None or every.peak_bytes > limit:
            return
        yield every
        saved = (kept.peak_bytes - every.peak_bytes) / self._num_layers
        count = math.ceil((kept.peak_bytes - limit) / saved)
        while count < self._num_layers:
            found = self._candidate(f"recompute{count}", *parts)
            if found is not None and found.peak_bytes <= limit:
                yield found
                return
            count += max(1, self._num_layers // 8)

    def _candidate(self, *parts: str) -> Candidate | None:
        """A candidate by the parts of its name, uncut for none; None for one that cannot run."""
        name = "+".join((*parts, *self._apart)) if parts else ""
        if name not in self.known:
            try:
                self._add(name, self._evaluate(name))
            except ValueError:
                return None
        return self.known[name]

    def _add(self, name: str, compilation: Compilation) -> Candidate:
        peak = compilation.predicted_peak_bytes
        seconds = sum(simulate(schedule).makespan for schedule in compilation.passes.schedules)
        self.made[name], self.known[name] = compilation, Candidate(name, peak, seconds)
        return self.known[name]
