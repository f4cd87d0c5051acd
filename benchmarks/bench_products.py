"""The products of a decoding step, a few rows times the weights of many transformer blocks, against torch's own.

    python benchmarks/bench_products.py [--device cuda] [--rows 1 2 8 32 64] [--blocks N] [--quick]

A block of Llama-3-8B's shape without its attention: norm, q, k and v, output and residual, norm, gate, up and down,
residual. Contenders: our operators, the same functions of torch called one by one, and those compiled by inductor. All
blocks have weights of their own, so that none is in the cache when it is read, and are captured as one CUDA graph.
Results are compared with float64 first. Writes benchmarks/results/products_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import report
import torch
from device_limits import Stopwatch, read_bandwidth
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from torch_vtensor.ops.skinny_linear import skinny_gated_linear, skinny_linear, skinny_linear_normed

EPS = 1e-5


class Block(NamedTuple):
    """Weights of one block."""

    attention_norm: Tensor
    qkv: list[Tensor]
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        """Of all its weights."""
        return sum(weight.nbytes for weight in (*self.qkv, self.output, self.gate, self.up, self.down))


Forward = Callable[[Tensor, list[Block]], list[Tensor]]
"""The result, and all keys and values: what is not returned, inductor leaves out."""


def main() -> None:
    """Compare, time, and write the result file after each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="small weights, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    hidden, kv, inner = (256, 64, 512) if arguments.quick else (4096, 1024, 14336)
    blocks = [make_block(hidden, kv, inner, device, seed) for seed in range(2 if arguments.quick else arguments.blocks)]
    speed, stopwatch = read_bandwidth(device), Stopwatch(device, repeats=3 if arguments.quick else 15)
    floor = blocks[0].nbytes / speed
    compiled: Forward = torch.compile(plain, dynamic=False)
    contenders: dict[str, Forward] = {"ours": ours, "torch": plain, "torch, compiled": compiled}
    rows, worst = [], 0.0
    for num_rows in tqdm(arguments.rows, desc="rows"):
        x = torch.randn(num_rows, 1, hidden, device=device, dtype=torch.bfloat16)
        errors = {name: error_of(forward, x, blocks) for name, forward in contenders.items()}
        assert errors["ours"] <= 1.5 * errors["torch"], f"{num_rows} rows: off by {errors}"
        worst = max(worst, errors["ours"] / errors["torch"])
        times = {
            name: stopwatch.time(lambda forward=forward, x=x: forward(x, blocks))
            for name, forward in contenders.items()
        }
        of_block = [f"{times[name].median / len(blocks) * 1e6:.1f}" for name in contenders]
        others = min(timing.median for name, timing in times.items() if name != "ours")
        share = floor * len(blocks) / times["ours"].median
        rows.append((num_rows, *of_block, f"{share:.0%}", f"{times['ours'].median / others:.2f}"))
        header = ("rows", *(f"{name}, us a block" for name in contenders), "ours: of the floor", "ours: ratio")
        body = (
            f"{len(blocks)} blocks of {hidden} x ({hidden}, {kv}, {kv}), {hidden} x {hidden} and three of {hidden} x "
            f"{inner}, bfloat16. The floor reads a block's weights at {speed / 1e9:,.0f} GB/s, measured in this run: "
            f"{floor * 1e6:.1f} us. Ratio: time over that of torch's faster way; below 1 ours is faster.\n\n"
            f"{report.table(header, rows)}\n\nLargest error against float64: {worst:.2f} of torch's own."
        )
        path = report.write("products", device, body, arguments.out)
    print(path.read_text())


def make_block(hidden: int, kv: int, inner: int, device: torch.device, seed: int) -> Block:
    """Random weights that keep the size of what they are multiplied with."""
    random = torch.Generator(device).manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        made = torch.randn(rows, columns, generator=random, device=device) * columns**-0.5
        return made.to(torch.bfloat16)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(hidden, generator=random, device=device)).to(torch.bfloat16)

    return Block(
        norm(),
        [weight(rows, hidden) for rows in (hidden, kv, kv)],
        weight(hidden, hidden),
        norm(),
        weight(inner, hidden),
        weight(inner, hidden),
        weight(hidden, inner),
    )


def ours(x: Tensor, blocks: list[Block]) -> list[Tensor]:
    """By our operators, as a step is rewritten: several rows are normed where they are summed, one row in products."""
    one_row = x.numel() == x.shape[-1]
    normed, kept = None, []
    for index, block in enumerate(blocks):
        following = blocks[(index + 1) % len(blocks)].attention_norm
        given = (x, block.attention_norm) if normed is None else (normed, None)
        q, *kv = skinny_linear(given[0], block.qkv, [None] * 3, given[1], EPS, None)
        kept += kv
        if one_row:
            (x,) = skinny_linear(q, [block.output], [None], None, EPS, x)
            gated = skinny_gated_linear(x, block.gate, block.up, block.mlp_norm, EPS)
            (x,) = skinny_linear(gated, [block.down], [None], None, EPS, x)
        else:
            x, normed = skinny_linear_normed(q, block.output, None, x, block.mlp_norm, EPS)
            gated = skinny_gated_linear(normed, block.gate, block.up, None, EPS)
            x, normed = skinny_linear_normed(gated, block.down, None, x, following, EPS)
    return [x, *kept]


def plain(x: Tensor, blocks: list[Block]) -> list[Tensor]:
    """By torch's functions."""
    kept: list[Tensor] = []
    for block in blocks:
        normed = functional.rms_norm(x, x.shape[-1:], block.attention_norm, EPS)
        q, *kv = [functional.linear(normed, weight) for weight in block.qkv]
        kept += kv
        x = x + functional.linear(q, block.output)
        normed = functional.rms_norm(x, x.shape[-1:], block.mlp_norm, EPS)
        gated = functional.silu(functional.linear(normed, block.gate)) * functional.linear(normed, block.up)
        x = x + functional.linear(gated, block.down)
    return [x, *kept]


def error_of(forward: Forward, x: Tensor, blocks: list[Block]) -> float:
    """How far the result of one block is from float64's, in its norm."""
    block = blocks[0]
    wide = Block(*([w.double() for w in part] if isinstance(part, list) else part.double() for part in block))
    exact = plain(x.double(), [wide])[0]
    return float((forward(x, [block])[0].double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    with torch.inference_mode():
        main()
