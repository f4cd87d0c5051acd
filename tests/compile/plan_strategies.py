"""Random plans: what of a program is cut, where the pieces run and in which order, and where parameters lie."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch_vtensor.compile import order
from torch_vtensor.compile.dimensions import find_dimensions
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.pieces import cut, cuttable, replicate, split_inputs, split_value
from torch_vtensor.compile.primitives import Graph, Tasks, op_assign, op_order, op_trans, store
from torch_vtensor.compile.rules import find_rule
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import Interval

_T = TypeVar("_T")

# Why a plan out of random calls may be refused: it asks for an order that cannot be, or for more pieces than there are.
REFUSALS = re.compile(
    r"indices cannot be cut into|are cut differently|closes the circle: drop it"
    r"|lies inside|no (?:gpipe|1f1b|zb) order fits|have no addend in common"
)


class RandomPlan:
    """A plan that decides at random, and remembers what it decided; `in_units`: also how stored parameters move."""

    def __init__(self, choose: random.Random, *, in_units: bool = False) -> None:
        self._choose = choose
        self._in_units = in_units
        self.num_ranks = choose.choice([1, 2, 2, 3, 4])
        self.log: list[str] = []

    def __str__(self) -> str:
        return "\n".join([f"{self.num_ranks} ranks", *self.log])

    def __call__(self, graph: Graph, mesh: Mesh) -> None:
        choose = self._choose
        micro = None
        if choose.random() < 0.4 and (count := choose.randint(2, 3)) <= self._batch(graph):
            micro = graph.microbatch(count)
            self.log.append(f"microbatch {count}")
        if choose.random() < 0.3:
            self._store(graph, mesh)
        place = choose.choice([self._stages, self._scatter, self._together])
        early = choose.random() < 0.5
        if early:
            place(graph, mesh)
        for _ in range(choose.choice([0, 1, 2, 4, 8])):
            choose.choice([self._cut, self._cut, self._cut, self._trans, self._replicate, self._split])(graph, mesh)
        if choose.random() < 0.4:
            self._recompute(graph, mesh)
        if not early:
            place(graph, mesh)
        if not graph.ranks:
            op_assign(graph.tasks, self._ranks(mesh))
        if micro is not None and place == self._stages and choose.random() < 0.7:
            kind = choose.choice(["gpipe", "one_f_one_b", "zero_bubble"])
            self.log.append(kind)
            getattr(order, kind)(micro)

    # ------------------------------------------------------------------ where

    def _stages(self, graph: Graph, mesh: Mesh) -> None:
        """The program in a row of stretches, each on a rank or several."""
        tasks = list(graph.tasks)
        count = self._choose.randint(1, min(len(mesh), len(tasks)))
        operators = list(dict.fromkeys(task.operator for task in tasks))
        bounds = sorted(self._choose.randrange(len(operators)) for _ in range(count - 1))
        ranks = list(mesh.ranks)
        self._choose.shuffle(ranks)
        for index, (start, stop) in enumerate(zip([0, *bounds], [*bounds, len(operators)], strict=True)):
            place = ranks[index : index + 1] if self._choose.random() < 0.7 else self._ranks(mesh)
            chosen = set(operators[start:stop])
            self.log.append(f"operators {start} to {stop} on {place}")
            op_assign(Tasks(graph, [task for task in tasks if task.operator in chosen]), place)

    def _scatter(self, graph: Graph, mesh: Mesh) -> None:
        """Every task somewhere, some nowhere."""
        for task in graph.tasks:
            if self._choose.random() < 0.8:
                self._assign(graph, task, self._ranks(mesh))

    def _together(self, graph: Graph, mesh: Mesh) -> None:
        """Nearly all on the same ranks, pieces of one operator by turns."""
        ranks = self._ranks(mesh)
        by_turns = self._choose.random() < 0.6
        self.log.append(f"all on {ranks}{' by turns' if by_turns else ''}")
        op_assign(graph.tasks, ranks)
        seen: dict[object, int] = {}
        num_pieces = Counter(task.operator for task in graph.tasks)
        for task in graph.tasks:
            number = seen[task.operator] = seen.get(task.operator, -1) + 1
            if by_turns and num_pieces[task.operator] > 1:
                op_assign(Tasks(graph, [task]), ranks[number % len(ranks)])
            if self._choose.random() < 0.05:
                self._assign(graph, task, self._ranks(mesh))

    def _assign(self, graph: Graph, task: Task, ranks: Sequence[int]) -> None:
        self.log.append(f"{task} on {ranks}")
        op_assign(Tasks(graph, [task]), ranks)

    def _ranks(self, mesh: Mesh) -> list[int]:
        count = self._choose.choice([1, 1, 1, 2, len(mesh)])
        ranks = list(mesh.ranks)
        self._choose.shuffle(ranks)
        return ranks[:count]

    def _store(self, graph: Graph, mesh: Mesh) -> None:
        ranks: list[int] | None = self._ranks(mesh)
        pattern = self._choose.choice(["*", "*weight*", "*head*", "*embedding*", "*layers*"])
        units: Sequence[Tasks] = ()
        how: dict[str, bool] = {}
        if self._in_units:
            ranks = ranks if self._choose.random() < 0.6 else None
            units = self._units(graph) if self._choose.random() < 0.5 else ()
            how = {"each_microbatch": self._choose.random() < 0.5, "anew": self._choose.random() < 0.5}
        self.log.append(f"store {pattern} on {ranks}, {len(units)} units, {how}")
        store(graph, ranks, pattern, units=units, **how)

    def _units(self, graph: Graph) -> list[Tasks]:
        """The program in a row of stretches, some tasks in none."""
        operators = list(dict.fromkeys(task.operator for task in graph.tasks))
        bounds = sorted(self._choose.randrange(len(operators)) for _ in range(self._choose.randint(2, 4)))
        stretches = [set(operators[start:stop]) for start, stop in itertools.pairwise(bounds)]
        return [Tasks(graph, [task for task in graph.tasks if task.operator in some]) for some in stretches]

    # ------------------------------------------------------------------ what

    def _cut(self, graph: Graph, mesh: Mesh) -> None:
        """One task along one of its rule's identifiers, at uneven places."""
        task = self._task(graph)
        names = {name: size for name, size in cuttable(task).items() if size > 1}
        if not names:
            return
        name = self._choose.choice(sorted(names))
        count = self._choose.randint(2, min(3, names[name]))
        start = task.cuts[name].start if name in task.cuts else 0
        inner = list(range(1, names[name]))
        self._choose.shuffle(inner)
        bounds = [0, *sorted(inner[: count - 1]), names[name]]
        intervals = [Interval(start + a, start + b) for a, b in itertools.pairwise(bounds)]
        self.log.append(f"cut {task} along {name} into {', '.join(map(str, intervals))}")
        graph.replace(task, cut(task, name, intervals))

    def _replicate(self, graph: Graph, mesh: Mesh) -> None:
        task = self._task(graph)
        self.log.append(f"replicate {task}")
        graph.replace(task, replicate(task, 2))

    def _split(self, graph: Graph, mesh: Mesh) -> None:
        """One task by the values of what it is linear in."""
        candidates = [task for task in graph.tasks if find_rule(task.operator).linear]
        if not candidates:
            return
        task = self._choose.choice(candidates)
        inputs = split_inputs(task) or self._choose.choice(find_rule(task.operator).linear)
        self.log.append(f"split {task} by inputs {inputs}")
        graph.replace(task, split_value(task, inputs, 2))

    def _trans(self, graph: Graph, mesh: Mesh) -> None:
        """Some tasks that follow each other along one dimension of theirs, or as replicas."""
        tasks = self._some(graph)
        operators = list(dict.fromkeys(task.operator for task in tasks))
        dimensions = [found for found in find_dimensions(operators) if found.size > 1 and found.tensor_dims]
        recompute = self._choose.random() < 0.3
        if not dimensions or self._choose.random() < 0.1:
            name, count = None, 2
        else:
            dimension = self._choose.choice(dimensions)
            tensor, dim = min(dimension.tensor_dims, key=lambda tied: (tied[0].name, tied[1]))
            name, count = f"{tensor.name}:{dim}", self._choose.randint(2, min(3, dimension.size))
        self.log.append(f"op_trans {', '.join(map(str, tasks))} along {name}, n={count}{', recompute' * recompute}")
        groups = op_trans(tasks, name, count, recompute=recompute)
        for group in groups:
            if self._choose.random() < 0.6:
                ranks = self._ranks(mesh)
                self.log.append(f"  {', '.join(map(str, group))} on {ranks}")
                op_assign(group, ranks)
        if self._choose.random() < 0.3:
            self.log.append("  in order")
            op_order(*groups)

    def _recompute(self, graph: Graph, mesh: Mesh) -> None:
        tasks = self._some(graph)
        self.log.append(f"recompute {', '.join(map(str, tasks))}")
        op_trans(tasks, recompute=True)

    def _task(self, graph: Graph) -> Task:
        return self._choose.choice(list(graph.tasks))

    def _some(self, graph: Graph) -> Tasks:
        tasks = list(graph.tasks)
        start = self._choose.randrange(len(tasks))
        return Tasks(graph, tasks[start : start + self._choose.randint(1, 12)])

    @staticmethod
    def _batch(graph: Graph) -> int:
        try:
            return graph._batch_dimension().size
        except ValueError:
            return 0


def random_order(choose: random.Random, before: dict[str, set[str]]) -> list[str]:
    """Jobs, each after those that it waits for, otherwise in any order."""
    waiting = {name: len(names) for name, names in before.items()}
    after: dict[str, list[str]] = {name: [] for name in before}
    for name, names in before.items():
        for other in names:
            after[other].append(name)
    ready = [name for name, count in waiting.items() if not count]
    ordered = []
    while ready:
        index = choose.randrange(len(ready))
        ready[index], ready[-1] = ready[-1], ready[index]
        ordered.append(ready.pop())
        for name in after[ordered[-1]]:
            waiting[name] -= 1
            if not waiting[name]:
                ready.append(name)
    return ordered


Plan = Callable[[Graph, Mesh], None]
