"""How fast memory leaves a device and comes back: sleep, wake, offload and prefetch against a plain pinned copy.

    python benchmarks/bench_sleep.py [--device cuda] [--gib 8] [--quick]

Checks that contents are equal before it times anything, and writes benchmarks/results/sleep_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import memory
import report
import torch

import torch_vtensor
from torch_vtensor import VTensor

GIB = 2**30
MIB = 2**20
ROW_BYTES = MIB


def main() -> None:
    """Run all parts and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gib", type=float, default=8.0, help="memory that moves")
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device, nbytes = torch.device(arguments.device), int(arguments.gib * GIB) // ROW_BYTES * ROW_BYTES
    repeats = 2 if arguments.quick else 7
    out_link, in_link = link(device, nbytes, repeats)
    rows = [("a plain copy to and from pinned memory", f"{out_link:.1f}", f"{in_link:.1f}", "", "")]
    makers: list[tuple[str, Callable[[], list[object]]]] = [
        ("sleep, wake: one VTensor made at once", lambda: [make(device, nbytes, nbytes // ROW_BYTES)]),
        (
            "sleep, wake: VTensors that grew by 1 MiB at a time",
            lambda: [make(device, nbytes // 8, 1) for _ in range(8)],
        ),
    ]
    if device.type == "cuda":
        makers.append(("sleep, wake: tensors in memory_pool()", lambda: weights(device, nbytes)))
    for name, maker in makers:
        rows.append(
            (name, *cycle(maker, torch_vtensor.sleep, torch_vtensor.wake, device, repeats, (out_link, in_link)))
        )
    kept: list[VTensor] = []

    def one() -> list[object]:
        kept[:] = [make(device, nbytes, nbytes // ROW_BYTES)]
        return list(kept)

    rows.append(
        (
            "offload, prefetch: one VTensor made at once",
            *cycle(one, lambda: kept[0].offload(), lambda: kept[0].prefetch(), device, repeats, (out_link, in_link)),
        )
    )
    kept.clear()
    header = ("what", "out, GB/s", "back, GB/s", "part of the plain copy's, out and back", "first time out, GB/s")
    title = f"## {nbytes / GIB:.1f} GiB leave the device and come back; medians of {repeats}, contents checked"
    text = f"{title}\n\n{report.table(header, rows)}\n\n{drift(device)}"
    print(report.write("sleep", device, text, arguments.out).read_text())


def link(device: torch.device, nbytes: int, repeats: int) -> tuple[float, float]:
    """GB/s of cudaMemcpy from a tensor of torch's own to pinned memory, and back."""
    nbytes = min(nbytes, 2 * GIB)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host.zero_()
    tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    out = report.measure(lambda: host.copy_(tensor, non_blocking=True), device, repeats)
    back = report.measure(lambda: tensor.copy_(host, non_blocking=True), device, repeats)
    return nbytes / out.median / 1e9, nbytes / back.median / 1e9


def make(device: torch.device, nbytes: int, rows_at_once: int) -> VTensor:
    """A VTensor of so many bytes of random rows."""
    num_rows = nbytes // ROW_BYTES
    vtensor = VTensor((ROW_BYTES // 4,), capacity=num_rows, dtype=torch.int32, device=device)
    for _ in range(0, num_rows, rows_at_once):
        vtensor.append(torch.randint(2**31 - 1, (rows_at_once, ROW_BYTES // 4), dtype=torch.int32, device=device))
    return vtensor


def weights(device: torch.device, nbytes: int) -> list[object]:
    """Tensors of 128 MiB in memory_pool()."""
    with torch_vtensor.memory_pool(device):
        return [
            torch.randint(2**31 - 1, (32 * MIB,), dtype=torch.int32, device=device)
            for _ in range(nbytes // (128 * MIB))
        ]


def cycle(
    maker: Callable[[], list[object]],
    away: Callable[[], object],
    back: Callable[[], object],
    device: torch.device,
    repeats: int,
    links: tuple[float, float],
) -> tuple[str, str, str, str]:
    """GB/s of leaving and of coming back, what that is of the plain copy's, and GB/s of leaving for the first time."""
    torch_vtensor.trim()
    made = maker()
    tensors = [it.tensor() if isinstance(it, VTensor) else it for it in made]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    before = [checksum(tensor) for tensor in tensors]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        seconds = []
        for move in (away, back):
            report.synchronize(device)
            start = time.perf_counter()
            move()
            report.synchronize(device)
            seconds.append(time.perf_counter() - start)
        times.append((seconds[0], seconds[1]))
    assert [checksum(tensor) for tensor in tensors] == before, "memory came back with other contents"
    out, into = (nbytes / report.timing([it[i] for it in times[1:]]).median / 1e9 for i in range(2))
    del tensors, made
    torch_vtensor.trim()
    return (
        f"{out:.1f}",
        f"{into:.1f}",
        f"{out / links[0]:.0%}, {into / links[1]:.0%}",
        f"{nbytes / times[0][0] / 1e9:.1f}",
    )


def checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """Of every word and its place."""
    flat = tensor.reshape(-1)
    parts = flat.split(64 * MIB)
    return (
        sum(int(part.sum(dtype=torch.int64)) for part in parts),
        sum(
            int((part ^ torch.arange(len(part), device=part.device, dtype=part.dtype)).sum(dtype=torch.int64))
            for part in parts
        ),
    )


def drift(device: torch.device) -> str:
    """The device's free memory before and after 100 cycles."""
    vtensor = make(device, 256 * MIB, 16)
    before = checksum(vtensor.tensor())
    cycles, found = 100, []
    for index in range(cycles + 1):
        torch_vtensor.sleep()
        torch_vtensor.wake()
        if index in (0, cycles):
            report.synchronize(device)
            found.append(memory.used_bytes(device))
    assert checksum(vtensor.tensor()) == before
    vtensor.close()
    torch_vtensor.trim()
    return f"{cycles} cycles of 256 MiB change the device's free memory by {found[0] - found[1]} bytes."


if __name__ == "__main__":
    main()
