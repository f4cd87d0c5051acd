"""A schedule as a grid to look at: a row for each rank, time from left to right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

from torch_vtensor.compile.schedules.action import Schedule
from torch_vtensor.compile.schedules.simulate import Span, simulate

_MOST_COLUMNS = 64


class _Cell(NamedTuple):
    """Computations of one kind on one microbatch that a rank does without another between them."""

    text: str
    start: float
    finish: float


_Row = tuple[tuple[int, str], ...]  # which cell is in which column


def grid(schedule: Schedule, spans: Mapping[str, Span] | None = None, like: Mapping[int, int] | None = None) -> str:
    """A row for each rank: its computations, those that start together on paper below each other.

    ``F0.3`` is forward of stage 0 on microbatch 3, ``F0..7.3`` of stages 0 to 7 one after the other. Ranks that do the
    same at the same time share a row. Of a long schedule the middle is left out. `spans` are those of a simulation, if
    there has been one; `like` has, for each rank to show, the one of the schedule that does the same.

    Raises:  PlanError for a schedule that gets stuck on paper.
    """
    spans = simulate(schedule).spans if spans is None else spans
    cells = {rank: _cells(schedule, rank, spans) for rank in schedule.actions}
    unit = _unit([row for row in cells.values() if row])
    rows = {rank: tuple(_columns(row, unit)) for rank, row in cells.items()}
    ranks_of: dict[_Row, list[int]] = {}
    for rank, one in (like or {rank: rank for rank in rows}).items():
        ranks_of.setdefault(rows[one], []).append(rank)
    labels = [f"rank {_ranges(ranks)}" for ranks in ranks_of.values()]
    width = max(map(len, labels), default=0)
    return "\n".join(
        f"{label.ljust(width)} | {line}".rstrip() for label, line in zip(labels, _lines(list(ranks_of)), strict=True)
    )


def _cells(schedule: Schedule, rank: int, spans: Mapping[str, Span]) -> list[_Cell]:
    cells = []
    for (kind, microbatch), group in groupby(schedule.compute_actions(rank), lambda a: (a.kind, a.microbatch)):
        actions = list(group)
        stages = list(dict.fromkeys(action.stage for action in actions))
        stage = stages[0] if len(stages) == 1 else f"{stages[0]}..{stages[-1]}"
        text = f"{kind}{stage}" if microbatch is None else f"{kind}{stage}.{microbatch}"
        cells.append(_Cell(text, spans[actions[0].name].start, spans[actions[-1].name].finish))
    return cells


def _unit(rows: list[list[_Cell]]) -> float:
    """Seconds of a column: the shortest cell, unless the longest row would then be mostly empty."""
    durations = [cell.finish - cell.start for row in rows for cell in row if cell.finish > cell.start]
    if not durations:
        return 1.0
    makespan = max(row[-1].finish for row in rows)
    return max(min(durations), makespan / (3 * max(map(len, rows))))


def _columns(row: list[_Cell], unit: float) -> Iterator[tuple[int, str]]:
    free = 0
    for cell in row:
        free = max(free, round(cell.start / unit))
        yield free, cell.text
        free += 1


def _lines(rows: list[_Row]) -> Iterator[str]:
    """Columns in which some rank starts something, each as wide as its longest cell."""
    used = sorted({column for row in rows for column, _ in row})
    half = _MOST_COLUMNS // 2
    shown = used if len(used) <= _MOST_COLUMNS else used[:half] + used[-half:]
    texts = [dict(row) for row in rows]
    widths = {column: max(len(text.get(column, "")) for text in texts) for column in shown}
    for text in texts:
        line = [text.get(column, "").ljust(widths[column]) for column in shown]
        if len(shown) < len(used):
            line.insert(half, "…")
        yield " ".join(line)


def _ranges(numbers: list[int]) -> str:
    """``0-3, 6``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
