"""What the passes of a segment take, estimated from the shapes of its tasks: seconds, and bytes kept between them.

What backward reads is taken to be everything made inside, and what enters, which is a value of its own. Of that, dW
reads what products with weights read, and it needs the gradients of what these make::

    F ── saved: all that is made inside ──► dI ── kept: gradients of what products with weights make ──► dW
                                                  and, saved, what these read
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch_vtensor.compile.addends import Reader
from torch_vtensor.compile.cost import task_seconds
from torch_vtensor.compile.schedules.job import JobKind
from torch_vtensor.compile.segment import Segment
from torch_vtensor.compile.task_graph import Task
from torch_vtensor.compile.tensor_view import TensorView

Number = TypeVar("Number", int, float)


def saved_bytes(segment: Segment) -> tuple[int, ...]:
    """Bytes kept for each backward pass: what dI and dW both read is kept for dW; nothing if it is computed again."""
    if segment.recomputes:
        return (0,) * len(segment.parts)
    everything = _made_bytes(segment)
    if len(segment.parts) == 1:
        return (everything,)
    late = _num_bytes(_read_by_weights(segment))
    return everything - late, late


def is_saved_for(segment: Segment, part: JobKind, number: int, readers: Iterable[Reader]) -> bool:
    """Whether a backward pass reads arrival ``number``: dW those that products with weights read, and no weight."""
    if part != "dW":
        return True
    tasks = set(_weight_tasks(segment))
    return number not in segment.parts["dW"] and any(reader.task in tasks for reader in readers)


def kept_bytes(segment: Segment) -> int:
    """Bytes that dI leaves for dW, with what dW reads where that was computed again."""
    gradients = _num_bytes(view for task in _weight_tasks(segment) for view in task.outputs if view is not None)
    return gradients + (_num_bytes(_read_by_weights(segment)) if segment.recomputes else 0)


def pass_seconds(segment: Segment, kind: JobKind) -> float:
    """Time of a pass, estimated from the multiplications and the bytes of its tasks."""
    forward = _forward_seconds(segment)
    if kind == "F":
        return forward
    of_weights = sum(task_seconds(task) for task in _weight_tasks(segment)) if len(segment.parts) > 1 else 0.0
    if kind == "dW":
        return of_weights
    return forward * (3 if segment.recomputes else 2) - of_weights


def _forward_seconds(segment: Segment) -> float:
    return _known(segment, "forward seconds", lambda: sum(map(task_seconds, segment.tasks)))


def _made_bytes(segment: Segment) -> int:
    """Bytes that tasks make."""

    def count() -> int:
        return _num_bytes(view for task in segment.tasks for view in task.outputs if view is not None)

    # Pieces of one operator may make the same, others never do.
    operators = {task.operator for task in segment.tasks}
    return count() if len(operators) < len(segment.tasks) else _known(segment, "made bytes", count)


def _known(segment: Segment, what: str, find: Callable[[], Number]) -> Number:
    """Something found out once for all segments of the same pieces, as those of equal layers are."""
    pieces = tuple([task.piece for task in segment.tasks])
    asked, known = (what, pieces), pieces[0].found
    if asked not in known:
        known[asked] = find()
    found: Number = known[asked]
    return found


def _weight_tasks(segment: Segment) -> list[Task]:
    """The tasks that read a weight whose gradient dW computes."""
    arrivals = list(segment.arrivals.values())
    readers = {reader.task for index in segment.parts.get("dW", ()) for reader in arrivals[index]}
    return [task for task in segment.tasks if task in readers]


def _read_by_weights(segment: Segment) -> Iterable[TensorView]:
    """What is made inside and read by these tasks."""
    return (
        view
        for task in _weight_tasks(segment)
        for position, view in enumerate(task.inputs)
        if (task, position) in segment.internal
    )


def _num_bytes(views: Iterable[TensorView]) -> int:
    """Bytes of numbers with a gradient, each view counted once."""
    different = {(view.tensor, view.mask): view for view in views}
    return sum(view.num_bytes for view in different.values() if view.tensor.dtype.is_floating_point)
