"""A schedule on paper as a picture: what each rank computes when, what it sends, how much memory it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch_vtensor.compile.schedules.job import BYTE_UNITS
from torch_vtensor.compile.schedules.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_FILL = {"F": "#bcd6f0", "B": "#f6c8a2", "dI": "#f6c8a2", "dW": "#c3e0b4", "move": "#dcdcdc"}
_LABELS = {"F": "forward", "B": "backward", "dI": "backward of inputs", "dW": "gradients of weights", "move": "moves"}
_SENT, _COLLECTIVE, _INK = "#7a4fa3", "#b0418f", "#303030"
_OTHERS = "#d4d4d4"  # lines of ranks that are too many to tell apart
_LINES = (("transfer", _SENT, "transfers"), ("collective", _COLLECTIVE, "collectives"))
_RANK_LINES = ("#1f5fa8", "#c8642a", "#3d8b3d", "#8a5fb5", "#a8455c", "#7a6a52", "#4a9aa5", "#8f8f2e")
_LEAST_WIDTH_OF_TEXT = 1 / 110  # of the picture's width, for a digit


class _Bar(NamedTuple):
    """Computations without a gap between them, of one kind on one microbatch."""

    kind: str
    text: str
    start: float
    finish: float


def draw(timeline: Timeline, path: Path, title: str = "") -> None:
    """Write the picture, as PNG, SVG or whatever the path's suffix says.

    A row for each rank with its computations and their microbatches; thin lines from sender to receiver and, for a
    collective, on all its members; below, the bytes that each rank holds. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    num_ranks = len(timeline.schedule.actions)
    rows_height = min(0.42, 16 / max(num_ranks, 1)) * num_ranks + 0.4
    figure = Figure(figsize=(13, rows_height + 3.1), dpi=120, layout="constrained")
    rows, memory = figure.subplots(2, 1, sharex=True, height_ratios=(rows_height, 1.8))
    about = f"{timeline.makespan:.4g} s, {timeline.bubble_fraction:.1%} of it idle"
    figure.suptitle(f"{title}: {about}" if title else about, fontsize=11, color=_INK)
    _draw_rows(rows, timeline)
    _draw_memory(memory, timeline)
    memory.set_xlabel("seconds")
    memory.set_xlim(0, timeline.makespan or 1.0)
    figure.savefig(path)


def _draw_rows(axes: Axes, timeline: Timeline) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = {rank: row for row, rank in enumerate(timeline.schedule.actions)}
    for rank, row in rows.items():
        bars = list(_bars(timeline, rank))
        axes.broken_barh(
            [(bar.start, bar.finish - bar.start) for bar in bars],
            (row - 0.36, 0.72),
            facecolors=[_FILL[bar.kind] for bar in bars],
            edgecolors="white",
            linewidth=0.6,
        )
        for bar in bars:
            if bar.finish - bar.start >= len(bar.text) * _LEAST_WIDTH_OF_TEXT * timeline.makespan:
                middle = (bar.start + bar.finish) / 2
                axes.text(middle, row, bar.text, ha="center", va="center", fontsize=8, color=_INK)
    _draw_communication(axes, timeline, rows)
    axes.set_yticks(list(rows.values()), [f"rank {rank}" for rank in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    used = {job.kind for job in timeline.schedule.jobs.values()}
    marks: list[Artist] = [Patch(color=_FILL[kind], label=_LABELS[kind]) for kind in _FILL if kind in used]
    marks += [Line2D([], [], color=color, label=label) for kind, color, label in _LINES if kind in used]
    axes.legend(handles=marks, loc="lower right", bbox_to_anchor=(1, 1), ncols=7, frameon=False, fontsize=8)


def _bars(timeline: Timeline, rank: int) -> Iterator[_Bar]:
    """The rank's computations and moves, those that follow each other at once drawn as one."""
    last: _Bar | None = None
    for action in timeline.schedule.actions[rank]:
        if not action.computes and action.kind != "MOVE":
            continue
        job, span = timeline.schedule.jobs[action.name], timeline.spans[action.name]
        text = "" if job.microbatch is None or job.kind == "move" else str(job.microbatch)
        if last is not None and (last.kind, last.text, last.finish) == (job.kind, text, span.start):
            last = last._replace(finish=span.finish)
            continue
        if last is not None:
            yield last
        last = _Bar(job.kind, text, *span)
    if last is not None:
        yield last


def _draw_communication(axes: Axes, timeline: Timeline, rows: dict[int, int]) -> None:
    for job in timeline.schedule.jobs.values():
        if not job.communicates:
            continue
        start, finish = timeline.spans[job.name]
        if job.kind == "transfer":
            source, destination = (rows[rank] for rank in job.ranks)
            down = 0.36 if destination > source else -0.36
            ends = (source + down, destination - down)
            axes.plot((start, finish), ends, color=_SENT, linewidth=0.7, alpha=0.75, solid_capstyle="round")
        else:
            lines = [rows[rank] + 0.42 for rank in job.ranks]
            axes.hlines(lines, start, finish, color=_COLLECTIVE, linewidth=1.8)


def _draw_memory(axes: Axes, timeline: Timeline) -> None:
    most = max(timeline.peak_bytes.values(), default=0)
    unit, name = next(((unit, name) for unit, name in BYTE_UNITS if most >= unit), (1, "bytes"))
    fullest = max(timeline.peak_bytes, key=timeline.peak_bytes.__getitem__, default=None)
    for number, (rank, points) in enumerate(timeline.memory.items()):
        color, label, order = _RANK_LINES[number % len(_RANK_LINES)], f"rank {rank}", 2.0
        if len(timeline.memory) > len(_RANK_LINES):  # too many to tell apart
            is_fullest = rank == fullest
            color, label, order = (color, f"{label}, the fullest", 3.0) if is_fullest else (_OTHERS, "", 2.0)
        seconds = [*(point.seconds for point in points), timeline.makespan]
        held = [point.num_bytes / unit for point in points]
        axes.plot(
            seconds, [*held, held[-1]], drawstyle="steps-post", color=color, linewidth=1.1, label=label, zorder=order
        )
    axes.set_ylabel(f"held, {name}")
    axes.set_ylim(0, 1.08 * most / unit or 1.0)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=8, frameon=False, fontsize=8)
