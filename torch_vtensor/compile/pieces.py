"""Cuts operators into tasks by their rules: what each piece reads, writes, calls, and adds to a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_vtensor.compile.rules import Call, Rule, find_rule
from torch_vtensor.compile.task_graph import Piece, Task
from torch_vtensor.compile.tensor_view import WHOLE_VALUE, Interval, Mask, ValueChunk

GradientChunk = tuple[tuple[str, Interval | ValueChunk], ...]
"""Which addend of an input's gradient a piece computes: equal keys are the same addend, different ones add up."""


def cuttable(task: Task) -> dict[str, int]:
    """The identifiers that `cut` may cut next, with how many indices of each are left to be cut."""
    rule = find_rule(task.operator)
    return {name: has.size for name in rule.sizes if (has := _can_be_cut(task, rule, name)) is not None}


def cut(task: Task, identifier: str, intervals: Sequence[Interval]) -> tuple[Task, ...]:
    """Pieces of a task, one for each interval of an identifier of its operator's rule, in order.

    `intervals` may differ in size, and tile what the task has of the identifier. Cutting a summed identifier makes the
    pieces write value chunks.

    Raises:  ValueError if the rule does not let this identifier be cut, or the intervals do not tile it.
    """
    operator, piece, replica = task.operator, task.piece, task.replica
    rule = find_rule(operator)
    asked = ("cut", rule, identifier, tuple(intervals))
    pieces = piece.found.get(asked)
    if pieces is None:
        pieces = piece.found[asked] = _cut(task, rule, identifier, intervals)
    return tuple([Task(operator, one, replica) for one in pieces]) if len(pieces) > 1 else (task,)


def _cut(task: Task, rule: Rule, identifier: str, intervals: Sequence[Interval]) -> tuple[Piece, ...]:
    has = _can_be_cut(task, rule, identifier)
    if has is None:
        _refuse(task, rule, identifier)
    assert has is not None
    bounds = [has.start, *(interval.stop for interval in intervals)]
    if bounds[-1] != has.stop or any(
        interval.start != start or interval.size < 1 for interval, start in zip(intervals, bounds, strict=False)
    ):
        given = ", ".join(str(Interval(*interval)) for interval in intervals)
        raise ValueError(f"{task} has {identifier} {has}: intervals {given or 'none'} do not tile it in order.")
    if len(intervals) == 1:
        return (task.piece,)
    return tuple(
        _part(task.piece, rule, identifier, Interval(*interval), has, ValueChunk(number, len(intervals)))
        for number, interval in enumerate(intervals)
    )


def split_value(task: Task, inputs: Sequence[int], count: int) -> tuple[Task, ...]:
    """Pieces of a task that read, of these inputs, `count` value chunks, and write as many of the outputs.

    Raises:  ValueError if the operator is not jointly linear in the inputs, or the task is split in others already.
    """
    rule = find_rule(task.operator)
    asked, before = tuple(sorted(inputs)), split_inputs(task)
    known = ("split", rule, asked, count)
    if known not in task.piece.found:
        task.piece.found[known] = _split(task, rule, asked, before, count)
    return tuple([Task(task.operator, piece, task.replica) for piece in task.piece.found[known]])


def _split(task: Task, rule: Rule, asked: tuple[int, ...], before: tuple[int, ...], count: int) -> tuple[Piece, ...]:
    allowed = [tuple(sorted(slots)) for slots in rule.linear] if not before else [before]
    if count < 1 or asked not in allowed:
        sets = ", ".join(str(list(slots)) for slots in allowed) or "no inputs"
        raise ValueError(
            f"{task} cannot be split into {count} by the values of inputs {list(asked)}: {task.operator.target}"
            f" may be split by {sets}."
        )
    piece = task.piece
    pieces = []
    for number in range(count):
        inputs = tuple(
            _chunked(mask, number, count) if slot in asked else mask for slot, mask in enumerate(piece.inputs)
        )
        outputs = tuple(None if mask is None else _chunked(mask, number, count) for mask in piece.outputs)
        pieces.append(Piece(inputs, outputs, piece.cuts, piece.chunk.split(number, count)))
    return tuple(pieces)


def split_inputs(task: Task) -> tuple[int, ...]:
    """The inputs of which a value-split task reads chunks for that reason; none if it is not split."""
    if task.chunk == WHOLE_VALUE:
        return ()
    rule = find_rule(task.operator)
    # An input that is taken once may be a chunk without a split; one in each set is not, which tells the sets apart.
    return next(
        tuple(sorted(slots)) for slots in rule.linear if all(task.piece.inputs[s].chunk != WHOLE_VALUE for s in slots)
    )


def replicate(task: Task, count: int) -> tuple[Task, ...]:
    """`count` tasks that compute the same.

    Raises:  ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"{task} cannot be replicated {count} times; choose 1 or more.")
    return tuple([Task(task.operator, task.piece, task.replica * count + number) for number in range(count)])


def local_call(task: Task) -> Call:
    """The call that computes a task on the parts of its tensors, with a `Slot` for each."""
    operator = task.operator
    localize = find_rule(operator).localize
    return Call(operator.target, operator.args, operator.kwargs) if localize is None else localize(task)


def gradient_chunk(task: Task, position: int) -> GradientChunk:
    """Which addend of the gradient of an input this piece computes.

    The pieces of one operator that read the same indices of the input give gradients that add up if their keys differ,
    and that are copies of each other if their keys are equal. A key holds the cuts that the input does not follow:
    neither a dimension of it is cut by them nor its value (taken once, or split).
    """
    rule = find_rule(task.operator)
    asked = ("gradient", rule, position)
    if asked not in task.piece.found:
        followed = rule.input_identifiers[position] | rule.taken_once[position]
        key: list[tuple[str, Any]] = sorted(pair for pair in task.cuts.items() if pair[0] not in followed)
        if task.chunk != WHOLE_VALUE and position not in split_inputs(task):
            key.append(("", task.chunk))
        task.piece.found[asked] = tuple(key)
    chunk: GradientChunk = task.piece.found[asked]
    return chunk


def backward_reads(task: Task, position: int) -> bool:
    """Whether backward of a task needs the value of an input.

    It does not where the operator is linear in that input together with any others that have gradients: the bias of a
    linear layer, the table of an embedding.
    """
    sets = [set(slots) for slots in find_rule(task.operator).linear]
    with_gradients = {slot for slot, tensor in enumerate(task.operator.inputs) if tensor.dtype.is_floating_point}
    is_linear = bool(sets) and all(position in slots for slots in sets) and with_gradients <= set[int]().union(*sets)
    return not is_linear


def _can_be_cut(task: Task, rule: Rule, identifier: str) -> Interval | None:
    """The interval that a task has of an identifier; None if that cannot be cut further."""
    if identifier not in rule.sizes or identifier in rule.whole:
        return None
    has = _has(task, rule, identifier)
    outer_is_single = all(_has(task, rule, name).size == 1 for name in rule.outer(identifier))
    return has if has.size > 1 and outer_is_single else None


def _has(task: Task, rule: Rule, identifier: str) -> Interval:
    return task.cuts.get(identifier) or Interval(0, rule.sizes[identifier])


def _part(piece: Piece, rule: Rule, identifier: str, interval: Interval, has: Interval, chunk: ValueChunk) -> Piece:
    inputs, outputs = list(piece.inputs), list(piece.outputs)
    first = interval.start - has.start
    for places, masks in ((rule.input_places, inputs), (rule.output_places, outputs)):
        for slot, dim, stride, _ in places[identifier]:
            mask = masks[slot]
            assert mask is not None
            start = mask.intervals[dim].start + first * stride
            masks[slot] = mask.with_interval(dim, Interval(start, start + interval.size * stride))
    if identifier in rule.summed:
        for slot, once in enumerate(rule.taken_once):
            if identifier in once:
                inputs[slot] = _chunked(inputs[slot], *chunk)
        outputs = [None if mask is None else _chunked(mask, *chunk) for mask in outputs]
    return Piece(tuple(inputs), tuple(outputs), {**piece.cuts, identifier: interval}, piece.chunk)


def _chunked(mask: Mask, number: int, count: int) -> Mask:
    return mask.with_chunk(mask.chunk.split(number, count))


def _refuse(task: Task, rule: Rule, identifier: str) -> None:
    sizes = ", ".join(f"{name} ({size})" for name, size in cuttable(task).items())
    remedy = f"what can be cut is {sizes}" if sizes else "it can only be replicated"
    if identifier not in rule.sizes:
        reason = "its rule has no such identifier"
    elif identifier in rule.whole:
        reason = "its rule keeps that whole"
    elif _has(task, rule, identifier).size <= 1:
        reason = "one index of it is left"
    else:
        outer = [name for name in rule.outer(identifier) if _has(task, rule, name).size > 1]
        reason = f"it lies inside {', '.join(dict.fromkeys(outer))}, which has to be cut to single indices first"
    raise ValueError(
        f"{task} ({task.operator.target}) cannot be cut along {identifier}: {reason}. Rule: {rule}; {remedy}."
    )
