"""What a plan says, and the record of what it said."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch_vtensor.compile.capture import Task, TaskGraph
from torch_vtensor.compile.mesh import Mesh


class Graph:
    """A captured graph as a plan sees it: tasks to select, and a record of what is decided about them."""

    def __init__(self, graph: TaskGraph, mesh: Mesh) -> None:
        self._task_graph = graph
        self._mesh = mesh
        self._rank_of: dict[str, int] = {}

    @property
    def tasks(self) -> Tasks:
        """Every task, forward and backward."""
        return Tasks(self, self._task_graph.tasks)

    def select(self, pattern: str) -> Tasks:
        """The tasks, forward and backward, of every module whose path matches a shell pattern, and of those inside it.

        ``select("layers.*")`` takes all layers, ``select("*.mlp")`` every mlp; ``""`` is what runs in no module.

        Raises:  ValueError if no module matches, naming the closest.
        """
        return self.tasks.select(pattern)

    def __str__(self) -> str:
        """Print the captured graph."""
        return str(self._task_graph)


class Tasks:
    """Some tasks of a graph: what the primitives take."""

    def __init__(self, graph: Graph, tasks: tuple[Task, ...]) -> None:
        self.graph = graph
        self._tasks = tasks

    def select(self, pattern: str) -> Tasks:
        """Those of these tasks that `Graph.select` would take."""
        chosen = tuple(task for task in self._tasks if _is_inside(task.module, pattern))
        if not chosen:
            modules = sorted({task.module for task in self._tasks})
            closest = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.3) or modules[:3]
            raise ValueError(
                f"no module matches {pattern!r} among {len(modules)}; the closest are {', '.join(map(repr, closest))}. "
                f"Patterns match whole module paths, as in '*.mlp' or 'layers.*'."
            )
        return Tasks(self.graph, chosen)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


PlanFunction = Callable[[Graph, Mesh], None]
"""A plan: decides about a graph by calling primitives."""


@dataclass(frozen=True)
class Plan:
    """What a plan decided: the rank of every task."""

    graph: TaskGraph
    mesh: Mesh
    rank_of: Mapping[str, int]

    def __str__(self) -> str:
        """Count the tasks on each rank."""
        num_tasks = Counter(self.rank_of.values())
        return "\n".join(["Plan", *(f"  rank {rank}: {num_tasks[rank]} tasks" for rank in self.mesh.ranks)])


def op_assign(tasks: Tasks, rank: int) -> None:
    """Place tasks on a rank of the mesh; a task placed again moves.

    Raises:  ValueError for a rank that the mesh does not have.
    Source:  SuperScaler (arXiv 2301.08984) section 3.2; backward tasks are placed here rather than following forward.
    """
    mesh = tasks.graph._mesh
    if rank not in mesh.ranks:
        raise ValueError(f"op_assign got rank {rank}, which is not in the {mesh}. Use a rank of mesh.ranks.")
    tasks.graph._rank_of.update((task.name, rank) for task in tasks)


def record(plan: PlanFunction, graph: TaskGraph, mesh: Mesh) -> Plan:
    """Run a plan over a graph and keep what it decides.

    Raises:  ValueError if it leaves a task without a rank.
    """
    view = Graph(graph, mesh)
    plan(view, mesh)
    missing = [task for task in graph.tasks if task.name not in view._rank_of]
    if missing:
        first = missing[0]
        where = f"in module {first.module!r}" if first.module else "outside any module"
        raise ValueError(
            f"the plan {getattr(plan, '__name__', plan)!r} leaves {len(missing)} of {len(graph.tasks)} tasks without a "
            f"rank, the first being {first.op} {first.name!r} ({first.direction}, {where}). "
            f"Every task needs one: begin with op_assign(graph.tasks, rank)."
        )
    return Plan(graph, mesh, MappingProxyType(dict(view._rank_of)))


def _is_inside(module: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(module, pattern) or (pattern != "" and fnmatch.fnmatchcase(module, f"{pattern}.*"))
