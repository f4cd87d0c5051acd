"""What moves together: gradients that the same passes make, and parameters that the same passes read."""

from collections.abc import Sequence
from typing import Any

import torch

from torch_vtensor.compile.buckets import Bucket, fill_buckets
from torch_vtensor.compile.communication import Buffer, Collective
from torch_vtensor.compile.program import Add, Move
from torch_vtensor.compile.schedules.job import Job
from torch_vtensor.compile.tensor_view import Interval, LogicalTensor, Mask
from torch_vtensor.compile.topology import Topology

RANKS, ROWS = (0, 1), 8


class Program:
    """Jobs on two ranks that do the same."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.work: dict[str, Any] = {}

    def compute(self, name: str, kind: Any, reads: Sequence[str], writes: Sequence[str]) -> None:
        for rank in RANKS:
            places = {rank: tuple(reads)} if reads else {}
            self.jobs.append(Job(f"{name}.{rank}", kind, (rank,), places, {rank: tuple(writes)}))
            self.work[f"{name}.{rank}"] = Add(rank, tuple(reads), writes[0])

    def collective(self, kind: Any, read: str, written: str) -> str:
        tensor = LogicalTensor(read, (ROWS,), torch.float32, "parameter")
        whole = Mask.of((ROWS,))
        halves = [whole.with_interval(0, Interval(4 * rank, 4 * rank + 4)) for rank in RANKS]
        inputs, outputs = ([whole, whole], halves) if kind == "reduce_scatter" else (halves, [whole, whole])
        dims = {"scatter_dim": 0} if kind == "reduce_scatter" else {"gather_dim": 0}
        given, got = (
            tuple(Buffer(rank, mask, tag) for rank, mask in zip(RANKS, masks, strict=True))
            for tag, masks in enumerate((inputs, outputs))
        )
        keys = {**dict.fromkeys(given, read), **dict.fromkeys(got, written)}
        name = f"{kind} {read}"
        self.work[name] = Move(tensor, Collective(kind, given, got, **dims), keys)
        reads, writes = (dict.fromkeys(RANKS, (key,)) for key in (read, written))
        self.jobs.append(Job(name, "collective", RANKS, reads, writes, workspace_bytes=ROWS))
        return name

    def buckets(self) -> list[set[str]]:
        """The tensors of each bucket."""
        _, work = fill_buckets(self.jobs, self.work, Topology())
        return [{move.tensor.name for move in one.moves} for one in work.values() if isinstance(one, Bucket)]


def test_a_bucket_needs_at_once_what_its_members_need() -> None:
    program = Program()
    program.compute("B0", "B", [], ["x", "y", "z"])
    for key in "xyz":
        program.collective("reduce_scatter", key, f"shard {key}")
    jobs, _ = fill_buckets(program.jobs, program.work, Topology())
    assert [job.workspace_bytes for job in jobs if job.kind == "collective"] == [3 * ROWS]


def test_a_sum_waits_for_all_its_addends_and_holds_up_no_gradient_of_the_last() -> None:
    program = Program()
    program.compute("B0", "B", [], ["x0", "z0"])
    program.compute("B1", "B", [], ["x1", "y1", "z1"])
    program.compute("add x", "move", ["x0", "x1"], ["x"])
    program.compute("add z", "move", ["z0", "z1"], ["z"])
    for key in ("x", "y1", "z"):
        program.collective("reduce_scatter", key, f"shard {key}")
    assert program.buckets() == [{"x", "z"}]


def test_what_the_same_passes_read_is_gathered_as_one() -> None:
    program = Program()
    for key in "vwxyz":
        program.collective("all_gather", f"shard {key}", key)
    program.compute("F0", "F", ["v", "w"], ["h0"])
    program.compute("slice", "move", ["x"], ["part of x"])
    program.compute("F1", "F", ["h0", "part of x", "y"], ["h1"])
    program.compute("B1", "B", ["h1", "y"], ["d"])
    program.compute("F2", "F", ["h1", "z"], ["h2"])
    assert program.buckets() == [{"shard v", "shard w"}]
    program = Program()
    for key in "xy":
        program.collective("all_gather", f"shard {key}", key)
    program.compute("slice", "move", ["x"], ["part of x"])
    program.compute("F1", "F", ["part of x", "y"], ["h1"])
    assert program.buckets() == [{"shard x", "shard y"}], "through what else moves it"
