"""What a user may give as a plan: a function, a name, or a function in a file."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path

from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.plans.by_name import named
from torch_vtensor.compile.primitives import PlanFunction


def resolve(plan: PlanFunction | str, axes: Mapping[str, int] | None, num_ranks: int) -> tuple[PlanFunction, Mesh]:
    """The plan as a function, and the mesh of so many ranks that it runs on.

    ``"dp2+tp2"`` is a ready plan, which knows its axes; ``"plans/mine.py:plan"`` the function `plan` of a file.

    Raises:  ValueError for a name or a file that gives no plan, and for axes that do not fit it or the ranks.
    """
    ranks = tuple(range(num_ranks))
    if not isinstance(plan, str):
        return plan, Mesh(ranks, axes or {})
    path, colon, function = plan.rpartition(":")
    if colon:
        return _from_file(Path(path), function), Mesh(ranks, axes or {})
    ready = named(plan, num_ranks)
    if axes is not None and dict(axes) != dict(ready.axes):
        raise ValueError(f"the plan {plan!r} is for the mesh {dict(ready.axes)}, got {dict(axes)}; leave the mesh out.")
    return ready, Mesh(ranks, ready.axes)


def _from_file(path: Path, name: str) -> PlanFunction:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} to take the plan {name!r} from.")
    found = runpy.run_path(str(path)).get(name)
    if not callable(found):
        raise ValueError(f"the file {str(path)!r} has no function {name!r}; a plan is a function of (graph, mesh).")
    plan: PlanFunction = found
    return plan
