"""Pipelines as data: for each rank, which stage works on which microbatch, forward or backward, in which order.

In the timelines a column is a unit of time, digits are forward of that microbatch, letters backward of it (a of 0, b of
1 …), twice as long as forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple


class Compute(NamedTuple):
    """Work of one stage on one microbatch."""

    kind: Literal["F", "B", "dI", "dW"]
    stage: int
    microbatch: int

    def __str__(self) -> str:
        """``F0.3``: forward of stage 0 on microbatch 3."""
        return f"{self.kind}{self.stage}.{self.microbatch}"


Orders = Mapping[int, tuple[Compute, ...]]


def gpipe(num_stages: int, num_microbatches: int) -> Orders:
    """All microbatches forward, then all backward: stage s on rank s, activations of all microbatches kept.

    ::

        rank 0   0 1 2 3 . . . . . . . . . a a b b c c d d
        rank 1   . 0 1 2 3 . . . . . . a a b b c c d d . .
        rank 2   . . 0 1 2 3 . . . a a b b c c d d . . . .
        rank 3   . . . 0 1 2 3 a a b b c c d d . . . . . .

    Bubble:  (p - 1) / (m + p - 1) of the time, for p stages and m microbatches.
    Source:  GPipe (arXiv 1811.06965), backward in the order of forward.
    """
    _check(num_stages=num_stages, num_microbatches=num_microbatches)
    return {
        stage: tuple(Compute(kind, stage, microbatch) for kind in ("F", "B") for microbatch in range(num_microbatches))
        for stage in range(num_stages)
    }


def one_f_one_b(num_stages: int, num_microbatches: int) -> Orders:
    """One forward, one backward in turn: rank s keeps activations of p - s microbatches at most.

    ::

        rank 0   0 1 2 3 . . . . . . a a . b b . c c . d d
        rank 1   . 0 1 2 . . . . a a 3 b b . c c . d d . .
        rank 2   . . 0 1 . . a a 2 b b 3 c c . d d . . . .
        rank 3   . . . 0 a a 1 b b 2 c c 3 d d . . . . . .

    Bubble:  (p - 1) / (m + p - 1) of the time, as GPipe.
    Source:  PipeDream-Flush (arXiv 2006.09503).
    """
    _check(num_stages=num_stages, num_microbatches=num_microbatches)
    return {stage: _alternate(stage, num_stages - stage - 1, num_microbatches) for stage in range(num_stages)}


def interleaved_one_f_one_b(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Orders:
    """1F1B with several stages on each rank, stage s on rank s % p: bubbles shrink as stages do, messages multiply.

    Microbatches go through in groups of p: each of a rank's stages in turn takes a group. Two stages on each of two
    ranks::

        rank 0   0 1 0 1 2 . a a 3 b b 2 a a 3 b b . c c . d d c c d d
        rank 1   . 0 1 0 a a 1 b b 2 a a 3 b b 2 c c 3 d d c c d d . .

    Bubble:  (p - 1) / (v m + p - 1) of the time, for v stages a rank.
    Source:  Megatron-LM (arXiv 2104.04473).
    Raises:  ValueError for a number of microbatches that is no multiple of `num_ranks`.
    """
    _check(num_ranks=num_ranks, stages_per_rank=stages_per_rank, num_microbatches=num_microbatches)
    if stages_per_rank == 1:
        return one_f_one_b(num_ranks, num_microbatches)
    if num_microbatches % num_ranks:
        raise ValueError(
            f"interleaved 1F1B sends microbatches through {num_ranks} ranks in groups of {num_ranks}, and "
            f"{num_microbatches} are not whole groups. Use a multiple of {num_ranks}, or one_f_one_b."
        )
    orders = {}
    for rank in range(num_ranks):
        forward, backward = [], []
        for number in range(stages_per_rank * num_microbatches):
            group, turn = divmod(number, num_ranks * stages_per_rank)
            chunk, member = divmod(turn, num_ranks)
            microbatch = group * num_ranks + member
            forward.append(Compute("F", chunk * num_ranks + rank, microbatch))
            backward.append(Compute("B", (stages_per_rank - 1 - chunk) * num_ranks + rank, microbatch))
        num_ahead = min(2 * (num_ranks - rank - 1) + (stages_per_rank - 1) * num_ranks, len(forward))
        orders[rank] = _in_turn(forward, backward, num_ahead)
    return orders


def zero_bubble(num_stages: int, num_microbatches: int) -> Orders:
    """ZB-H1: 1F1B with backward in two; gradients of weights (dW) wait and fill what were bubbles.

    Rank s lets s of them wait, so that gradients of activations (dI, below a b c …) reach rank 0 sooner. No rank keeps
    activations of more than p microbatches, which is what rank 0 keeps with 1F1B. W is dW, of the first one waiting::

        rank 0   0 1 2 3 . . . a W 4 b W 5 c W d W e W f W
        rank 1   . 0 1 2 . . a 3 b W 4 c W 5 d W e W f W W
        rank 2   . . 0 1 . a 2 b 3 c W 4 d W 5 e W f W W W
        rank 3   . . . 0 a 1 b 2 c 3 d W 4 e W 5 f W W W W

    Bubble:  (p - 1) / (3 m + p - 1) of the time, a third of 1F1B's, for m >= p and F, dI, dW equally long.
    Source:  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), schedule ZB-H1.
    """
    _check(num_stages=num_stages, num_microbatches=num_microbatches)
    return {
        stage: _in_three(_alternate(stage, num_stages - stage - 1, num_microbatches), stage)
        for stage in range(num_stages)
    }


def zero_bubble_h2(num_stages: int, num_microbatches: int) -> Orders:
    """ZB-H2: no rank waits between its first and its last work, for activations of up to 2p - 1 microbatches.

    Rank s runs twice as many forward ahead as with `zero_bubble`, and lets twice as many dW wait::

        rank 0   0 1 2 3 4 a W 5 b W 6 c W 7 d W e W f W g W h W . .
        rank 1   . 0 1 2 a 3 b 4 c W 5 d W 6 e W 7 f W g W h W W W .
        rank 2   . . 0 a 1 b 2 c 3 d 4 e W 5 f W 6 g W 7 h W W W W W

    Bubble:  none, for m >= 2p - 1 and F, dI, dW equally long; ranks still begin one after the other.
    Source:  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), schedule ZB-H2.
    """
    _check(num_stages=num_stages, num_microbatches=num_microbatches)
    return {
        stage: _in_three(_alternate(stage, 2 * (num_stages - stage - 1), num_microbatches), 2 * stage)
        for stage in range(num_stages)
    }


def three_f_one_b(num_stages: int, num_microbatches: int, num_passes: int = 3) -> Orders:
    """Recycling: each microbatch goes forward three times, and backward through its last pass only.

    Pass i of rank s is stage i p + s, so stages (num_passes - 1) p and above have a backward; what the earlier passes
    compute is not kept. A rank prefers backward, then the latest pass; it starts a last pass only while fewer than
    p - s of them wait for backward there, and a microbatch only while fewer than p for each pass are under way::

        rank 0   0 1 0 1 0 1 2 3 a a . b b 2 3 2 3 . . c c . d d
        rank 1   . 0 1 0 1 0 a a 1 b b 2 3 . 2 3 2 c c 3 d d . .

    Source:  SuperScaler (arXiv 2301.08984), 3F1B for AlphaFold2; orders are found by simulation, backward two units.
    """
    _check(num_stages=num_stages, num_microbatches=num_microbatches, num_passes=num_passes)
    return _Recycling(num_stages, num_microbatches, num_passes).run()


class _Recycling:
    """Time passes unit by unit; every idle rank takes the first work it finds in its order of preference."""

    def __init__(self, num_ranks: int, num_microbatches: int, num_passes: int) -> None:
        self.num_ranks = num_ranks
        self.num_microbatches = num_microbatches
        self.last = (num_passes - 1) * num_ranks
        self.most_under_way = num_passes * num_ranks
        self.orders: dict[int, list[Compute]] = {rank: [] for rank in range(num_ranks)}
        self.finished: dict[Compute, int] = {}
        # Microbatches go through a stage in order, so the next one tells all that a stage has done.
        self.next_forward = [0] * (num_passes * num_ranks)
        self.next_backward = dict.fromkeys(range(self.last, self.last + num_ranks), 0)

    def run(self) -> Orders:
        """Go on until rank 0 has done all backward work."""
        now, busy_until = 0, [0] * self.num_ranks
        while self.next_backward[self.last] < self.num_microbatches:
            for rank in range(self.num_ranks):
                compute = self._choose(rank, now) if busy_until[rank] <= now else None
                if compute is None:
                    continue
                self.orders[rank].append(compute)
                busy_until[rank] = now + (1 if compute.kind == "F" else 2)
                self.finished[compute] = busy_until[rank]
                if compute.kind == "F":
                    self.next_forward[compute.stage] += 1
                else:
                    self.next_backward[compute.stage] += 1
            now += 1
        return {rank: tuple(order) for rank, order in self.orders.items()}

    def _choose(self, rank: int, now: int) -> Compute | None:
        stage = self.last + rank
        backward = Compute("B", stage, self.next_backward[stage])
        needed = backward._replace(stage=stage + 1) if rank < self.num_ranks - 1 else backward._replace(kind="F")
        if self._is_done(needed, now):
            return backward
        for stage in range(self.last + rank, -1, -self.num_ranks):
            forward = Compute("F", stage, self.next_forward[stage])
            if forward.microbatch < self.num_microbatches and self._may_start(forward, rank, now):
                return forward
        return None

    def _may_start(self, forward: Compute, rank: int, now: int) -> bool:
        if (
            forward.stage >= self.last
            and forward.microbatch - self.next_backward[forward.stage] >= self.num_ranks - rank
        ):
            return False
        if forward.stage == 0:
            return forward.microbatch - self.next_backward[self.last] < self.most_under_way
        return self._is_done(forward._replace(stage=forward.stage - 1), now)

    def _is_done(self, compute: Compute, now: int) -> bool:
        return self.finished.get(compute, now + 1) <= now


def _alternate(stage: int, num_ahead: int, num_microbatches: int) -> tuple[Compute, ...]:
    forward = [Compute("F", stage, microbatch) for microbatch in range(num_microbatches)]
    backward = [Compute("B", stage, microbatch) for microbatch in range(num_microbatches)]
    return _in_turn(forward, backward, min(num_ahead, num_microbatches))


def _in_turn(forward: list[Compute], backward: list[Compute], num_ahead: int) -> tuple[Compute, ...]:
    """Some forwards ahead, then one forward and one backward in turn, then the backwards that are left."""
    order = forward[:num_ahead]
    for one, other in zip(forward[num_ahead:], backward, strict=False):
        order += one, other
    return (*order, *backward[len(forward) - num_ahead :])


def _in_three(order: Sequence[Compute], num_waiting: int) -> tuple[Compute, ...]:
    """Backward in two, with the dW of so many microbatches waiting until those of later ones have had their dI."""
    cut: list[Compute] = []
    waiting: deque[Compute] = deque()
    for compute in order:
        if compute.kind == "F":
            cut.append(compute)
            continue
        cut.append(compute._replace(kind="dI"))
        waiting.append(compute._replace(kind="dW"))
        if len(waiting) > num_waiting:
            cut.append(waiting.popleft())
    return (*cut, *waiting)


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; a pipeline needs at least 1.")
