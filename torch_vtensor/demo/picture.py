"""Virtual against physical memory over the steps of a generation, and what branches share, as PNGs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import TICKUP

from torch_vtensor.demo.branches import Branches
from torch_vtensor.demo.compare import Run
from torch_vtensor.settings import MIB

__all__ = ["draw", "draw_branches"]

_OURS, _WRITTEN, _CALLS, _DYNAMIC, _STATIC = "#5b9bd5", "#1f4e79", "#ffb000", "#c8442e", "#6b6b6b"


def draw(path: Path, title: str, dynamic: Run, vtensor: Run, static: Run) -> None:
    """Write the picture: above, addresses; below, the physical memory behind them, and what the stock caches held."""
    figure = Figure(figsize=(9, 6.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    virtual, physical = figure.subplots(2, 1, sharex=True, height_ratios=(2, 5))
    _draw_virtual(virtual, vtensor)
    _draw_physical(physical, dynamic, vtensor, static)
    for axes in (virtual, physical):
        axes.set_ylim(0, 1.55 * (axes.dataLim.y1 or 1.0))  # room for the legend; a short text reserves nothing
        axes.margins(x=0)
        axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def draw_branches(path: Path, title: str, branches: Branches) -> None:
    """Write the picture: a bar a session, of shared and own memory, and what they take together against copies."""
    sessions = branches.sessions
    shared = [held.shared_bytes / MIB for held in sessions]
    own = [(held.committed_bytes - held.shared_bytes) / MIB for held in sessions]
    figure = Figure(figsize=(9, 1.6 + 0.38 * (len(sessions) + 2)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots()
    names = [held.name for held in sessions]
    axes.barh(names, shared, color=_OURS, alpha=0.45, label="shared with other branches")
    axes.barh(names, own, left=shared, color=_WRITTEN, label="its own")
    axes.barh(["together"], [branches.together_bytes / MIB], color=_OURS, label="all of them, as they are")
    axes.barh(["as copies"], [branches.apart_bytes / MIB], color=_DYNAMIC, label="all of them, as copies")
    axes.invert_yaxis()
    axes.set_xlabel("physical, MiB")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_virtual(axes: Axes, run: Run) -> None:
    tokens, reserved, held = _tokens(run), _mib(run, "reserved_bytes"), _mib(run, "held_bytes")
    backed = [min(pair) for pair in zip(held, reserved, strict=True)]
    axes.fill_between(tokens, reserved, step="post", color=_OURS, alpha=0.25, label="addresses reserved")
    axes.fill_between(tokens, backed, step="post", color=_OURS, label="backed by pages")
    axes.set_ylabel("virtual, MiB")


def _draw_physical(axes: Axes, dynamic: Run, vtensor: Run, static: Run) -> None:
    tokens = _tokens(vtensor)
    axes.fill_between(tokens, _mib(vtensor, "held_bytes"), step="post", color=_OURS, label="torch_vtensor: committed")
    axes.fill_between(tokens, _mib(vtensor, "written_bytes"), color=_WRITTEN, label="torch_vtensor: written")
    calling = [after for (_, after), calls in zip(pairwise(tokens), vtensor.num_driver_calls, strict=True) if calls]
    label = f"driver calls ({len(calling)} of {len(tokens) - 1} steps)"
    axes.plot(calling, [0] * len(calling), marker=TICKUP, ls="", color=_CALLS, ms=11, mew=2, label=label)
    label = "StaticCache, made for this length"
    axes.plot(_tokens(static), _mib(static, "held_bytes"), color=_STATIC, linewidth=1.8, label=label)
    axes.plot(tokens, _mib(dynamic, "peak_bytes"), "--", color=_DYNAMIC, label="DynamicCache during torch.cat")
    axes.plot(tokens, _mib(dynamic, "held_bytes"), color=_DYNAMIC, label="DynamicCache between steps")
    axes.set_ylabel("physical, MiB")
    axes.set_xlabel("tokens in the cache")


def _tokens(run: Run) -> list[int]:
    return [step.num_tokens for step in run.steps]


def _mib(run: Run, field: str) -> list[float]:
    return [getattr(step.memory, field) / MIB for step in run.steps]
