"""The part of the memory map that shows what a device's pool held over time: an SVG picture, and its figures as text.

committed   a staircase: in use ▇ torch's ▇ pooled ▇, one upon the other, under the budget if there is one
beside it   shared and offloaded as lines; reserved addresses, which are another order of size, below for themselves
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch_vtensor.allocator.recorder import Sample

__all__ = ["STYLE", "legend", "timeline"]

_WIDTH, _LEFT, _RIGHT = 640, 72, 12
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_Value = Callable[[Sample], float]


class _Layer(NamedTuple):
    """What is filled from the layer below up to the value."""

    name: str
    top: _Value


_LAYERS = (
    _Layer("in use", lambda it: it.committed_bytes - it.pooled_bytes - it.torch_bytes),
    _Layer("torch", lambda it: it.committed_bytes - it.pooled_bytes),
    _Layer("pooled", lambda it: it.committed_bytes),
)
_LINES: tuple[tuple[str, _Value], ...] = (
    ("shared", lambda it: it.shared_bytes),
    ("offloaded", lambda it: it.offloaded_bytes),
)
_FIGURES: tuple[tuple[str, _Value], ...] = (
    ("committed", lambda it: it.committed_bytes),
    ("of it pooled", lambda it: it.pooled_bytes),
    ("of it torch's", lambda it: it.torch_bytes),
    *_LINES,
    ("reserved addresses", lambda it: it.reserved_bytes),
)
STYLE = """
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--quiet); } .grid { stroke: var(--line); } .axis { stroke: var(--quiet); }
.in-use { fill: var(--own); } .torch { fill: var(--torch); } .pooled { fill: var(--pooled); }
.reserved { fill: var(--reserved); stroke: var(--quiet); }
.halo { fill: none; stroke-width: 5; stroke: var(--ground); }
.line { fill: none; stroke-width: 2; } .line.shared { stroke: var(--shared); }
.line.offloaded { stroke: var(--offloaded); stroke-dasharray: 6 3; }
.line.budget { stroke: var(--budget); stroke-dasharray: 2 3; }
"""
_KEY = {"in use": "own", "torch": "torch", "pooled": "pooled", "shared": "shared", "offloaded": "offloaded"}


def legend() -> str:
    """The HTML that says which color is what."""
    names = [*_KEY.items(), ("budget", "budget")]
    return "".join(f'<span><i style="background:var(--{color})"></i>{name}</span>' for name, color in names)


def timeline(samples: Sequence[Sample], name: str) -> str:
    """The HTML of a device's picture and figures.

    Args:
        samples: at least one, by time.
        name: the device's, in the picture's title.
    """
    words = _in_words(samples)
    most = max(max(it.committed_bytes, it.shared_bytes, it.offloaded_bytes) for it in samples)
    budgets = [it.budget_bytes for it in samples if it.budget_bytes is not None]
    if budgets and max(budgets) <= 4 * most:  # otherwise it would flatten everything else
        most = max(most, *budgets)
    held = _Plot(samples, most, 220)
    parts = [held.axes(has_times=False)]
    below: _Value = lambda it: 0  # noqa: E731
    for layer in _LAYERS:
        parts.append(held.area(layer.name.replace(" ", "-"), below, layer.top))
        below = layer.top
    parts += [held.line(kind, value) for kind, value in _LINES if any(value(it) for it in samples)]
    if budgets and max(budgets) <= most:
        parts.append(held.line("budget", lambda it: it.budget_bytes))
    reserved = _Plot(samples, max(it.reserved_bytes for it in samples), 56)
    addresses = reserved.axes(has_times=True) + reserved.area("reserved", lambda it: 0, lambda it: it.reserved_bytes)
    return (
        f"<figure>{_svg(held, parts, f'Physical memory of {name} over time', words)}"
        f"<figcaption>Reserved addresses, no memory</figcaption>"
        f"{_svg(reserved, [addresses], f'Reserved addresses of {name} over time', '')}"
        f"<p>{words}</p>{_table(samples)}</figure>"
    )


class _Plot:
    """Where times and sizes lie in a picture of its own."""

    def __init__(self, samples: Sequence[Sample], most: float, height: int) -> None:
        self.samples = samples
        self.height = height
        self.start, self.end = samples[0].time_s, samples[-1].time_s
        self.unit, self.unit_name = next((it for it in _UNITS if most >= it[0]), _UNITS[-1])
        self.step = _round_step(most / self.unit, max(height // 45, 2)) * self.unit
        self.most = self.step * max(math.ceil(most / self.step), 1)

    def x(self, time_s: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (time_s - self.start) / max(self.end - self.start, 1e-9)

    def y(self, nbytes: float) -> float:
        return 8 + (self.height - 8) * (1 - nbytes / self.most)

    def axes(self, *, has_times: bool) -> str:
        lines = []
        for index in range(round(self.most / self.step) + 1):
            y, label = self.y(index * self.step), f"{index * self.step / self.unit:g} {self.unit_name}"
            lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        if has_times:
            seconds = self.end - self.start
            step = _round_step(seconds, 6) if seconds > 0 else 1.0
            for index in range(math.floor(seconds / step) + 1):
                x = self.x(self.start + index * step)
                anchor = "end" if x > _WIDTH - 40 else "middle"
                lines.append(
                    f'<text x="{x:.1f}" y="{self.height + 16}" text-anchor="{anchor}">{index * step:g} s</text>'
                )
        return "".join(lines)

    def area(self, kind: str, below: _Value, top: _Value) -> str:
        if not any(top(it) > below(it) for it in self.samples):
            return ""
        upper, lower = self._stairs(top), self._stairs(below)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
        return f'<polygon class="{kind}" points="{points}"/>'

    def line(self, kind: str, value: Callable[[Sample], float | None]) -> str:
        """A line with gaps where there is no value."""
        path, y = "", None
        for it in self.samples:
            x, size = self.x(it.time_s), value(it)
            path += f"H{x:.1f}" if y is not None else ""
            if size is not None:
                path += f"V{self.y(size):.1f}" if y is not None else f"M{x:.1f},{self.y(size):.1f}"
            y = size
        return f'<path class="halo" d="{path}"/><path class="line {kind}" d="{path}"/>'

    def _stairs(self, value: _Value) -> list[tuple[float, float]]:
        """A size holds until the next sample."""
        points: list[tuple[float, float]] = []
        for it in self.samples:
            x, y = self.x(it.time_s), self.y(value(it))
            if points:
                points.append((x, points[-1][1]))
            points.append((x, y))
        return points


def _svg(plot: _Plot, parts: Sequence[str], title: str, words: str) -> str:
    """A picture that a screen reader can tell."""
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {plot.height + 22}" aria-label="{title}. {words}">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def _in_words(samples: Sequence[Sample]) -> str:
    first, last = samples[0], samples[-1]
    peak = max(samples, key=lambda it: it.committed_bytes)
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.time_s))
    return (
        f"{last.time_s - first.time_s:,.1f} s from {began} on: {_size(first.committed_bytes)} were committed at first, "
        f"at most {_size(peak.committed_bytes)} after {peak.time_s - first.time_s:,.1f} s, and "
        f"{_size(last.committed_bytes)} in the end."
    )


def _table(samples: Sequence[Sample]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(
            f"<td>{_size(size)}</td>" for size in (value(samples[0]), max(map(value, samples)), value(samples[-1]))
        )
        + "</tr>"
        for name, value in _FIGURES
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "at first", "at most", "now"))
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _size(nbytes: float) -> str:
    unit, name = next((it for it in _UNITS if nbytes >= it[0]), _UNITS[-1])
    return f"{nbytes / unit:,.1f} {name}" if unit > 1 else f"{nbytes:.0f} {name}"


def _round_step(span: float, num_steps: int) -> float:
    """A round size of which about ``num_steps`` make up the span."""
    if span <= 0:
        return 1.0
    rough = span / num_steps
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= rough)
