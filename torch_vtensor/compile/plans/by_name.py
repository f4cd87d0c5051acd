"""Plans by name: ``"dp2+tp2+1f1b/8"``.

::

    name     = part {"+" part}                    parts in any order, each once
    part     = axis [ranks]                       over how many ranks; what is left over where that is not said
             | pipeline ["*" stages] ["/" microbatches]
             | "accumulate" [microbatches] | "recompute" [layers]
             | "coshard" [pieces] | "chunked_loss" [pieces] | "layerwise" | "single"
    axis     = "dp" | "tp" | "sp" | "pp"          batch; heads, hidden, vocabulary; those and the sequence; stages
             | zero [ranks] ["/" microbatches]    batch, with parameters in shards, in place of "dp"
    zero     = "zero1" | "zero2" | "zero3"
    pipeline = "gpipe" | "1f1b" | "interleaved" | "interlaced" | "zb" | "zbh2" | "3f1b"

A pipeline's axis "pp" need not be named. "*" is for interleaved only: how many stages each rank has. Microbatches are
a pipeline's, or, without one, run one after the other.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.accumulate import accumulate
from torch_vtensor.compile.plans.chunked_loss import chunked_loss
from torch_vtensor.compile.plans.coshard import coshard
from torch_vtensor.compile.plans.data_parallel import data_parallel
from torch_vtensor.compile.plans.gpipe import gpipe
from torch_vtensor.compile.plans.interlaced import interlaced
from torch_vtensor.compile.plans.interleaved import interleaved
from torch_vtensor.compile.plans.layerwise import layerwise
from torch_vtensor.compile.plans.one_f_one_b import one_f_one_b
from torch_vtensor.compile.plans.recompute import recompute
from torch_vtensor.compile.plans.recycling import three_f_one_b
from torch_vtensor.compile.plans.sequence_parallel import sequence_parallel
from torch_vtensor.compile.plans.single_device import single_device
from torch_vtensor.compile.plans.tensor_parallel import tensor_parallel
from torch_vtensor.compile.plans.zero import zero1, zero2, zero3
from torch_vtensor.compile.plans.zero_bubble import zero_bubble, zero_bubble_h2
from torch_vtensor.compile.primitives import Graph, PlanFunction

_PIPELINES: Mapping[str, Any] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "interlaced": interlaced,
    "zb": zero_bubble,
    "zbh2": zero_bubble_h2,
    "3f1b": three_f_one_b,
}
_ZERO: Mapping[str, Any] = {"zero1": zero1, "zero2": zero2, "zero3": zero3}
_OVER_RANKS: Mapping[str, PlanFunction] = {
    "dp": data_parallel,
    **_ZERO,
    "tp": tensor_parallel,
    "sp": sequence_parallel,
}
# By name: the plan, and which of its arguments the number is. Microbatches come before what cuts each further.
_ON_A_RANK: Mapping[str, tuple[Any, str]] = {
    "accumulate": (accumulate, "num_microbatches"),
    "recompute": (recompute, "num_layers"),
    "coshard": (coshard, "num_pieces"),
    "chunked_loss": (chunked_loss, "num_pieces"),
}
_AXES = ("pp", "dp", "tp")
"""Slowest first: tensor parallel, which sends the most, has neighbouring ranks."""

_KNOWN = ("single", "pp", *_OVER_RANKS, *_PIPELINES, *_ON_A_RANK, "layerwise")
_PART = re.compile(
    r"(?P<name>[13]f1b|zero[123]|zbh2|[a-z_]+)(?P<count>\d+)?(?:\*(?P<stages>\d+))?(?:/(?P<microbatches>\d+))?"
)


@dataclass(frozen=True)
class NamedPlan:
    """A plan put together by name: a function of (graph, mesh) for a mesh of these ``axes``."""

    name: str
    axes: Mapping[str, int]
    parts: tuple[PlanFunction, ...]

    @property
    def __name__(self) -> str:
        """The name, as messages about plans show it."""
        return self.name

    def __call__(self, graph: Graph, mesh: Mesh) -> None:
        """Decide about a graph, part after part: first the pipeline, last what stays on a rank."""
        for part in self.parts:
            part(graph, mesh)

    def __str__(self) -> str:
        """Name it and its axes: ``dp2+1f1b over pp 2 × dp 2``."""
        return f"{self.name} over {' × '.join(f'{name} {size}' for name, size in self.axes.items()) or 'one rank'}"


def cuts_classes(plan: PlanFunction) -> bool:
    """Whether a ready plan cuts a vocabulary, so that capture has to take losses apart along their classes."""
    if isinstance(plan, NamedPlan):
        return any(map(cuts_classes, plan.parts))
    function = plan.func if isinstance(plan, partial) else plan
    return function in (tensor_parallel, sequence_parallel, interlaced)


def named(name: str, world_size: int) -> NamedPlan:
    """The plan of a name, in the grammar above, for a world of that many ranks.

    Raises:  ValueError for a name that does not follow the grammar or does not fill the world.
    """
    given: dict[str, re.Match[str]] = {}
    for text in name.split("+"):
        part = _parse(name, text)
        if part["name"] in given:
            raise ValueError(f"the plan {name!r} has {part['name']!r} twice; say each part once.")
        given[part["name"]] = part
    pipelines = [given[part] for part in _PIPELINES if part in given]
    over = [given[part] for part in _OVER_RANKS if part in given]
    axes = [_axis(part["name"]) for part in over]
    if (
        len(pipelines) > 1
        or ("accumulate" in given and (pipelines or any(part["microbatches"] for part in over)))
        or len(set(axes)) < len(axes)
        or (len(given) > 1 and "single" in given)
    ):
        raise ValueError(
            f"the plan {name!r} has parts that exclude each other: choose one pipeline of {', '.join(_PIPELINES)}, or "
            f"accumulate, or microbatches as in 'zero2/8'; one of tp and sp, one of dp, {', '.join(_ZERO)}; 'single' "
            f"alone."
        )
    if pipelines and any(part["microbatches"] for part in over):
        raise ValueError(
            f"the plan {name!r} has a pipeline, whose microbatches are all there are. Say them there, as in "
            f"'zero1+1f1b/8'."
        )
    if "chunked_loss" in given and not given.keys().isdisjoint(("tp", "sp", "interlaced")):
        raise ValueError(
            f"the plan {name!r} cuts the loss along the vocabulary, over ranks, and along the batch, in turn: a sum "
            f"over the vocabulary would wait for all of the batch. Leave out 'chunked_loss'."
        )
    if "pp" in given and not pipelines:
        raise ValueError(f"the plan {name!r} has stages, 'pp', in no order; add one of {', '.join(_PIPELINES)}.")
    counts = {_axis(part["name"]): _number(part["count"]) for part in over}
    if pipelines:
        counts["pp"] = _number(given["pp"]["count"]) if "pp" in given else None
    parts: list[PlanFunction] = [_pipeline(name, part) for part in pipelines]
    parts += [_over_ranks(part) for part in over]
    for part in (given[part] for part in _ON_A_RANK if part in given):
        plan, argument = _ON_A_RANK[part["name"]]
        parts.append(partial(plan, **({argument: int(part["count"])} if part["count"] else {})))
    parts += [layerwise] if "layerwise" in given else []
    return NamedPlan(name, _fill(name, counts, world_size), tuple(parts) or (single_device,))


def _parse(name: str, text: str) -> re.Match[str]:
    part = _PART.fullmatch(text)
    if part is None or part["name"] not in _KNOWN:
        word = part["name"] if part else text
        closest = difflib.get_close_matches(word, _KNOWN, n=1, cutoff=0.5)
        hint = f" Did you mean {closest[0]!r}?" if closest else ""
        raise ValueError(
            f"the plan {name!r} has the unknown part {text!r}.{hint} Parts are {', '.join(_KNOWN)}, "
            f"joined by '+', as in 'dp2+tp2+1f1b/8'."
        )
    word = part["name"]
    wrong = (
        (part["count"] is not None and (word in _PIPELINES or word in ("single", "layerwise")))
        or (part["stages"] is not None and word != "interleaved")
        or (part["microbatches"] is not None and word not in _PIPELINES and word not in _ZERO)
        or any(number is not None and int(number) == 0 for number in part.group("count", "stages", "microbatches"))
    )
    if wrong:
        raise ValueError(
            f"the plan {name!r} has {text!r}, whose numbers mean nothing. Say dp2, tp2, sp2 or pp2 for ranks, "
            f"1f1b/8 or zero2/8 for microbatches, interleaved*2 for stages on each rank, coshard4 or chunked_loss4 for "
            f"pieces, accumulate4 for microbatches, recompute4 for layers; all from 1."
        )
    return part


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _axis(part: str) -> str:
    return {"sp": "tp", **dict.fromkeys(_ZERO, "dp")}.get(part, part)


def _over_ranks(part: re.Match[str]) -> PlanFunction:
    function: Any = _OVER_RANKS[part["name"]]
    return partial(function, num_microbatches=int(part["microbatches"])) if part["microbatches"] else function


def _pipeline(name: str, part: re.Match[str]) -> PlanFunction:
    asked = {"num_microbatches": part["microbatches"], "stages_per_rank": part["stages"]}
    return partial(_PIPELINES[part["name"]], **{key: int(value) for key, value in asked.items() if value})


def _fill(name: str, counts: Mapping[str, int | None], world_size: int) -> Mapping[str, int]:
    """The size of every axis; those of no number take what the others leave."""
    known = math.prod(count for count in counts.values() if count is not None)
    open_axes = [axis for axis, count in counts.items() if count is None]
    if len(open_axes) > 1:
        raise ValueError(
            f"the plan {name!r} leaves the sizes of {' and '.join(open_axes)} open, so that {world_size} ranks could "
            f"be shared out in several ways; say all but one, as in 'dp2'."
        )
    rest = world_size // known
    if known * (rest if open_axes else 1) != world_size:
        shape = " × ".join(f"{axis} {'?' if count is None else count}" for axis, count in counts.items()) or "one rank"
        raise ValueError(
            f"the plan {name!r} is for {shape}, and the world has {world_size} rank{'s' if world_size != 1 else ''}: "
            f"the product has to be {world_size}. Change the numbers, or start {known} processes."
        )
    sizes = {axis: rest if count is None else count for axis, count in counts.items()}
    return MappingProxyType({axis: sizes[axis] for axis in _AXES if axis in sizes})
