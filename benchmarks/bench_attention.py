"""Our attention operators against torch's cuDNN and flash kernels and FlashAttention-3: decode, extend and prefill.

    python benchmarks/bench_attention.py [--device cuda] [--quick] [--points 'dec-*,ext-L3-b8-4k+2k'] [--repeats 15]

Every result is compared with float64 before anything is timed; a wrong or failing contender is named and not timed.
Contenders read contiguous slabs, and ours and torch's also the layout that our caches have. A point's roof is the time
in which the device could read its bytes, or do its operations, whichever is longer, at the speeds measured in the same
run. Writes benchmarks/results/attention_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import report
import torch
import torch.nn.functional as F
from attention_points import Point, Tensors, error_of, interleaved, make, parse, reference
from device_limits import Stopwatch, matmul_flops, read_bandwidth
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

from torch_vtensor.ops import decode_attention, prefill_attention

POINTS = """
dec-L3-b1-4k dec-L3-b1-32k dec-L3-b8-1k dec-L3-b8-8k dec-L3-b8-32k dec-L3-b32-4k dec-L3-b32-32k dec-L3-b128-1k
dec-L3-b128-16k dec-MHA-b1-16k dec-MHA-b32-4k dec-MHA-b128-2k dec-YI-b1-32k dec-YI-b32-4k dec-YI-b32-32k
dec-L3-b32-R16k dec-L3-b128-R8k dec-MHA-b32-R4k dec-L3-b32-S32k dec-YI-b32-S32k dec-L3-b32-P16k
ext-L3-b1-4k+16 ext-L3-b1-16k+128 ext-L3-b1-16k+2k ext-L3-b8-4k+2k ext-L3-b16-4k+128 ext-L3-b16-16k+128
ext-YI-b8-16k+128 ext-L3-b32-4k+16 ext-L3-b8-R16k+512 ext-L3-b32-P16k+16
pre-L3-b1-512 pre-L3-b1-2k pre-L3-b1-8k pre-L3-b1-32k pre-MHA-b1-8k pre-L3-b8-2k pre-L3-b16-R2k
"""
QUICK_POINTS = "dec-L3-b8-1k dec-L3-b32-R4k ext-L3-b1-4k+16 pre-L3-b1-2k pre-L3-b4-R1k"
CPU_POINTS = "dec-L3-b1-1k dec-L3-b4-R1k dec-YI-b4-P512 ext-L3-b1-512+16 ext-YI-b2-R256+32 pre-L3-b1-256 pre-L3-b2-R64"
HOST_POINTS = ("dec-L3-b8-1k", "pre-L3-b1-2k")
KINDS = {"dec": "Decode", "ext": "Extend", "pre": "Prefill"}
LAYERS = 32
INTERLEAVED_BYTES = 24 * 2**30
"""Where 32 layers of a point take more, their layout is made of fewer."""

Action = Callable[[], torch.Tensor]


class Contender(NamedTuple):
    """Who takes part: ``prepare`` gives the call to time for a point, or None where it cannot do it."""

    name: str
    is_ours: bool
    layouts: tuple[str, ...]
    prepare: Callable[[Point, Tensors], Action | None]


class Result(NamedTuple):
    """One contender at one point, over one layout."""

    contender: Contender
    layout: str
    time: report.Timing | None
    error: float
    failure: str

    @property
    def name(self) -> str:
        return f"{self.contender.name}, {self.layout}"


def main() -> None:
    """Measure all points and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few points, to see that it runs")
    parser.add_argument("--points", help="names or patterns of points, with commas between")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    points = [parse(name) for name in select(device, arguments.points, arguments.quick)]
    bandwidth, flops = read_bandwidth(device), matmul_flops(device, torch.bfloat16)
    stopwatch = Stopwatch(device, 3 if arguments.quick else arguments.repeats)
    results: dict[Point, list[Result]] = {}
    with torch.inference_mode():
        idle = stopwatch.time(lambda: torch.empty(1, device=device).zero_())
        for point in tqdm(points, desc="points", file=sys.stderr):
            results[point] = list(measured(point, device, stopwatch))
        host = new_lengths(device) if arguments.points is None else ""
    roofs = {point: max(point.nbytes / bandwidth, point.flops / flops) for point in points}
    head = (
        f"Read ceiling {bandwidth / 1e9:,.0f} GB/s, bfloat16 matmul {flops / 1e9:,.0f} GFLOP/s, smallest timed kernel "
        f"{idle.median * 1e6:.1f} us, all measured in this run. bfloat16, head dim 128, causal. Times: median of "
        f"{stopwatch.repeats}, on a GPU with the L2 cache emptied before each, us. Of roof: the part of the time that "
        "reading the point's bytes once, or its operations, would take at these speeds. Ratio: time over the fastest "
        "correct other contender on any layout; below 1 ours is faster."
    )
    parts = [head, *(section(kind, results, roofs) for kind in KINDS), host, left_out(results)]
    path = report.write("attention", device, "\n\n".join(filter(None, parts)), arguments.out)
    print(path.read_text())


def select(device: torch.device, patterns: str | None, quick: bool) -> list[str]:
    """The names of the points to measure."""
    names = (CPU_POINTS if device.type == "cpu" else QUICK_POINTS if quick else POINTS).split()
    if patterns is None:
        return names
    chosen = []
    for pattern in patterns.split(","):
        chosen += fnmatch.filter(names, pattern) or [pattern]
    return list(dict.fromkeys(chosen))


def measured(point: Point, device: torch.device, stopwatch: Stopwatch) -> Iterator[Result]:
    """Every contender's result, layout after layout."""
    slab = make(point, device, torch.bfloat16)
    num_slots = 1 if point.is_shared else len(point.lengths)
    layer_bytes = num_slots * max(point.lengths) * point.token_bytes
    layers = max(2, min(LAYERS, INTERLEAVED_BYTES // layer_bytes))
    expected = reference(point, slab)
    for layout in ("slab", "interleaved"):
        tensors = slab if layout == "slab" else interleaved(point, slab, layers)
        for contender in CONTENDERS:
            if layout not in contender.layouts:
                continue
            time, error, failure = None, math.nan, ""
            try:
                action = contender.prepare(point, tensors)
                if action is None:
                    continue
                error = error_of(action(), expected)
                if error <= 1:
                    time = stopwatch.time(action)
                else:
                    failure = f"wrong: {error:.3g} times the allowed error"
            except (RuntimeError, ValueError, TypeError) as problem:
                failure = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
            yield Result(contender, layout, time, error, failure)


def section(kind: str, results: dict[Point, list[Result]], roofs: dict[Point, float]) -> str:
    """The table of one kind of points, and geometric means."""
    chosen = {point: results[point] for point in results if point.kind == kind}
    if not chosen:
        return ""
    names = list(dict.fromkeys(result.name for row in chosen.values() for result in row if result.time))
    rows, ratios = [], {"slab": [], "interleaved": []}
    for point, row in chosen.items():
        times = {result.name: result.time for result in row if result.time}
        ours = {result.layout: result.time.median for result in row if result.time and result.contender.is_ours}
        theirs = [result.time.median for result in row if result.time and not result.contender.is_ours]
        of_roof = ", ".join(f"{roofs[point] / seconds:.0%}" for seconds in ours.values())
        ratio = ", ".join(f"{seconds / min(theirs):.2f}" for seconds in ours.values()) if theirs else "–"
        for layout, seconds in ours.items() if theirs else ():
            ratios[layout].append(seconds / min(theirs))
        cells = [f"{times[name].median * 1e6:.1f}" if name in times else "–" for name in names]
        spread = max((time.high / time.low for time in times.values()), default=1)
        size = f"{point.nbytes / 1e9:.3f}"
        rows.append((point.name, size, *cells, of_roof or "–", ratio, f"{spread:.2f}"))
    header = ("point", "GB", *names, "ours: of roof (slab, interleaved)", "ours: ratio", "widest 90th/10th")
    means = [
        f"{layout} {math.exp(sum(map(math.log, them)) / len(them)):.3f} over {len(them)} points"
        for layout, them in ratios.items()
        if them
    ]
    text = f"## {KINDS[kind]}\n\n{report.table(header, rows)}"
    return f"{text}\n\nGeometric mean of the ratios: {'; '.join(means)}." if means else text


def new_lengths(device: torch.device) -> str:
    """What a call costs from the host to the device's end when its length is new, as every step of a loop's is.

    Some kernels are planned anew for every length: what they win on the device they lose on the host.
    """
    rows = []
    for name in HOST_POINTS if device.type == "cuda" else CPU_POINTS.split()[:1]:
        point = parse(name)
        whole = make(point, device, torch.bfloat16)
        for contender in CONTENDERS:
            seconds: dict[bool, list[float]] = {True: [], False: []}
            try:
                for shorter in range(9):
                    length = point.lengths[0] - shorter
                    new = length if point.kind == "pre" else 1
                    lengths = (length,) * len(point.lengths)
                    cut = point._replace(lengths=lengths, num_new=(new,) * len(lengths))
                    keys, values = (tensor[:, :, :length] for tensor in (whole.keys, whole.values))
                    tensors = Tensors(whole.query[:, :, :new], keys, values, whole.lengths - shorter, whole.num_new)
                    action = contender.prepare(cut, tensors)
                    if action is None:
                        break
                    for is_new in (True, False):
                        report.synchronize(device)
                        start = time.perf_counter()
                        action()
                        report.synchronize(device)
                        seconds[is_new].append(time.perf_counter() - start)
            except (RuntimeError, ValueError, TypeError):
                continue  # said at the point itself
            if seconds[True]:
                new_time, known_time = (report.timing(seconds[is_new][1:]) for is_new in (True, False))
                rows.append((name, contender.name, f"{new_time:us}", f"{known_time:us}"))
    header = ("point", "contender", "a length not seen before, us", "the same length again, us")
    title = "## Host and device time of one call (10th-90th), lengths from the point's downwards"
    return f"{title}\n\n{report.table(header, rows)}"


def left_out(results: dict[Point, list[Result]]) -> str:
    """Who was wrong or failed, who is missing, and the largest error of the others."""
    lines = [
        f"- {point.name}: {result.name}: {result.failure}"
        for point, row in results.items()
        for result in row
        if result.failure
    ]
    if importlib.util.find_spec("flash_attn_interface") is None:
        lines.append("- FlashAttention-3 (flash_attn_interface) is not installed here.")
    errors = [result.error for row in results.values() for result in row if result.time]
    worst = f"Largest error of a timed result: {max(errors):.2f} of what rounding to bfloat16 allows." if errors else ""
    return "\n\n".join(filter(None, [worst, "## Left out\n\n" + "\n".join(lines) if lines else ""]))


def ours(point: Point, tensors: Tensors) -> Action:
    """torch_vtensor's operators."""
    query, keys, values, lengths, num_new = tensors
    if point.kind == "dec" and point.is_shared:
        slots = torch.arange(len(point.lengths), dtype=torch.int32, device=query.device)
        return lambda: decode_attention(query, keys, values, lengths, groups=slots[None], num_shared=lengths - 1)
    if point.kind == "dec":
        return lambda: decode_attention(query, keys, values, lengths)
    if len(set(point.num_new)) > 1:
        return lambda: prefill_attention(query, keys, values, lengths, num_new=num_new)
    return lambda: prefill_attention(query, keys, values, lengths)


def sdpa(backend: SDPBackend) -> Callable[[Point, Tensors], Action | None]:
    """torch's scaled_dot_product_attention by one of its kernels; only flash aligns several rows to a prefix's end."""

    def prepare(point: Point, tensors: Tensors) -> Action | None:
        query, keys, values, *_ = tensors
        if not point.is_uniform:
            return None
        if backend is SDPBackend.CUDNN_ATTENTION and (point.kind == "ext" or query.device.type == "cpu"):
            return None
        bias = causal_lower_right(query.shape[2], keys.shape[2]) if point.kind == "ext" else None

        def action() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, keys, values, attn_mask=bias, is_causal=point.kind == "pre", enable_gqa=True
                )

        return action

    return prepare


def fa3(point: Point, tensors: Tensors) -> Action | None:
    """FlashAttention-3: by uniform lengths, or over slabs with lengths; its arguments are [B, T, H, D]."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return None
    from flash_attn_interface import flash_attn_func, flash_attn_with_kvcache

    query, keys, values = (tensor.transpose(1, 2) for tensor in tensors[:3])
    if point.is_uniform:

        def uniform() -> torch.Tensor:
            out = flash_attn_func(query, keys, values, causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return uniform
    if len(set(point.num_new)) > 1:
        return None

    def ragged() -> torch.Tensor:
        out = flash_attn_with_kvcache(query, keys, values, cache_seqlens=tensors.lengths, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return ragged


def one_by_one(point: Point, tensors: Tensors) -> Action | None:
    """torch's flash kernel for every sequence by itself: all that torch has for ragged batches as they lie."""
    if point.is_uniform or point.kind == "dec":
        return None
    query, keys, values, *_ = tensors
    bias = [causal_lower_right(new, length) for new, length in zip(point.num_new, point.lengths, strict=True)]

    def action() -> torch.Tensor:
        out = torch.zeros_like(query)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for slot, (new, length) in enumerate(zip(point.num_new, point.lengths, strict=True)):
                one = slice(slot, slot + 1)
                out[one, :, :new] = F.scaled_dot_product_attention(
                    query[one, :, :new], keys[one, :, :length], values[one, :, :length], bias[slot], enable_gqa=True
                )
        return out

    return action


BOTH = ("slab", "interleaved")
CONTENDERS = (
    Contender("ours", True, BOTH, ours),
    Contender("SDPA cuDNN", False, BOTH, sdpa(SDPBackend.CUDNN_ATTENTION)),
    Contender("SDPA flash", False, BOTH, sdpa(SDPBackend.FLASH_ATTENTION)),
    Contender("SDPA flash one by one", False, ("slab",), one_by_one),
    Contender("FlashAttention-3", False, BOTH, fa3),
)


if __name__ == "__main__":
    main()
