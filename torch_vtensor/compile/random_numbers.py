"""Random numbers under a plan: which operators draw them, and from which stream on which rank.

On one rank they come from torch's generators, as without a plan. On several, each call draws a seed from the generator
of rank 0, and a segment that draws begins a stream of that seed and of what it draws: operators, and which part of
each. What several ranks compute alike they draw alike, parts differ from each other, and `torch.manual_seed` decides::

    dropout of x, whole, on ranks 0 and 1      stream a on rank 0        stream a on rank 1
    dropout of x[0:4] and of x[4:8]            stream b on rank 0        stream c on rank 1
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.task_graph import Operator, Task

if TYPE_CHECKING:
    from torch_vtensor.compile.plan import Plan
    from torch_vtensor.compile.segment import Segment

Drawn = tuple[tuple[int, tuple[tuple[str, int, int], ...]], ...]
"""What a segment draws, in order: of each operator by number, which part along which dimensions."""


def draws_random_numbers(operator: Operator) -> bool:
    """Whether a call draws random numbers: dropout does not with a probability of 0, nor outside of training."""
    name = str(operator.target)
    if "dropout" in name or "scaled_dot_product_attention" in name:
        given = _arguments(operator)
        probability = given.get("dropout_p", given.get("p", 0.0))
        return bool(given.get("train", True)) and probability != 0
    return torch.Tag.nondeterministic_seeded in getattr(operator.target, "tags", ())


def find_random(plan: Plan) -> Mapping[Operator, int]:
    """The operators that draw random numbers, with their numbers in the program; none where there is one rank."""
    if len(plan.mesh) == 1:
        return {}
    return {operator: n for n, operator in enumerate(plan.graph.operators) if draws_random_numbers(operator)}


def find_drawn(segments: Sequence[Segment], random: Mapping[Operator, int]) -> Mapping[Segment, Drawn]:
    """What each segment draws; those that draw nothing are left out."""
    drawn = (
        {
            segment: tuple(_part(task, random) for task in segment.tasks if task.operator in random)
            for segment in segments
        }
        if random
        else {}
    )
    return {segment: parts for segment, parts in drawn.items() if parts}


def find_unlike(segments: Sequence[Segment], random: Mapping[Operator, int]) -> frozenset[Operator]:
    """The operators of which ranks draw the same part between other draws than each other.

    A stream is the same for as long as all that it is drawn for is: these have to be drawn in segments of their own.
    """
    among: defaultdict[tuple[int, Any], set[Drawn]] = defaultdict(set)
    for parts in find_drawn(segments, random).values():
        for part in parts:
            among[part].add(parts)
    unlike = {number for (number, _), drawn in among.items() if len(drawn) > 1}
    return frozenset(operator for operator, number in random.items() if number in unlike)


def find_streams(plan: Plan, segments: Sequence[Segment]) -> Mapping[Segment, int]:
    """A number for what each segment draws, the same in every process."""
    return {
        segment: int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
        for segment, parts in find_drawn(segments, find_random(plan)).items()
    }


def draw_seed() -> int:
    """A seed from torch's generator of the CPU, which `torch.manual_seed` sets."""
    return int(torch.randint(2**62, (), device="cpu"))


def begin_stream(seed: int, stream: int, device: torch.device) -> None:
    """Have the generators of the CPU and of a device draw what belongs to a stream, from here on."""
    _torch_compat.seed_generators(seed ^ stream, device)


@contextlib.contextmanager
def apart_from_the_caller(device: torch.device) -> Iterator[None]:
    """Leave the caller's generators as they are."""
    state = _torch_compat.random_state([torch.empty(0, device=device)])
    try:
        yield
    finally:
        _torch_compat.set_random_state(state, device)


def _part(task: Task, random: Mapping[Operator, int]) -> tuple[int, tuple[tuple[str, int, int], ...]]:
    cuts = sorted((str(name), interval.start, interval.stop) for name, interval in task.cuts.items())
    return random[task.operator], tuple(cuts)


def _arguments(operator: Operator) -> dict[str, Any]:
    """The arguments of a call by name."""
    schema = getattr(operator.target, "_schema", None)
    if schema is not None:
        names = [argument.name for argument in schema.arguments]
    else:
        names = list(inspect.signature(operator.target).parameters)
    return {**dict(zip(names, operator.args, strict=False)), **operator.kwargs}
