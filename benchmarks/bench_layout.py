"""Which layout of keys and values decodes fastest and wastes least, on this device.

    python benchmarks/bench_layout.py [--device cuda] [--quick]

Times attention of one new token over every layer's views, through torch's own scaled_dot_product_attention, in the
two layouts that generation.kv_store knows, after checking that both hold the same numbers. Writes
benchmarks/results/layout_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from tqdm import tqdm

import torch_vtensor
from torch_vtensor.generation import kv_store
from torch_vtensor.generation.kv_store import KVShape, KVStore

LAYOUTS = {"heads apart, a layer a store": False, "all layers of a token side by side": True}


def main() -> None:
    """Time both layouts at several sizes and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    layers, heads, queries, dim = (32, 8, 32, 128) if device.type == "cuda" else (8, 8, 8, 64)
    sizes = [(1, 1024), (1, 16384), (8, 8192)] if device.type == "cuda" else [(1, 1024), (1, 8192), (4, 2048)]
    rows = []
    for batch, context in tqdm(sizes[: 1 if arguments.quick else None], desc="sizes"):
        shape = KVShape(batch, heads, dim, dim, torch.bfloat16, device)
        outputs = []
        for name, token_major in LAYOUTS.items():
            views, stores = fill(shape, layers, context, token_major)
            query = torch.ones(batch, queries, 1, dim, device=device, dtype=torch.bfloat16)
            outputs.append(decode(query, views))
            time_taken = report.measure(lambda q=query, v=views: decode(q, v), device, 20)
            live_bytes = layers * batch * context * shape.token_bytes
            committed_bytes = sum(store.committed_bytes for store in stores)
            speed = live_bytes / time_taken.median / 1e9
            waste = committed_bytes / live_bytes - 1
            rows.append((f"{batch}x{context}", name, f"{time_taken:ms}", f"{speed:,.0f}", f"{waste:.1%}"))
            for store in stores:
                store.close()
            del views
            torch_vtensor.trim()
        torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-3)  # sums of bfloat16 in two orders
    title = f"{layers} layers, {queries} query and {heads} key-value heads of {dim}, bfloat16"
    header = ("batch x context", "layout", "ms for all layers (10th-90th)", "GB/s", "committed beyond written")
    used = "all layers of a token side by side" if kv_store.is_token_major(device) else "heads apart, a layer a store"
    body = f"{title}.\n\n{report.table(header, rows)}\n\nUsed on this device: {used}."
    print(report.write("layout", device, body, arguments.out).read_text())


def fill(
    shape: KVShape, layers: int, context: int, token_major: bool
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[KVStore]]:
    """Stores of one layout with the same numbers for the same layer and context, and each layer's views."""
    kept = set(kv_store.TOKEN_MAJOR_DEVICES)
    (kv_store.TOKEN_MAJOR_DEVICES.add if token_major else kv_store.TOKEN_MAJOR_DEVICES.discard)(shape.device.type)
    try:
        stores = (
            [KVStore(shape, layers, context)] if token_major else [KVStore(shape, 1, context) for _ in range(layers)]
        )
        views = []
        for layer in range(layers):
            store, index = (stores[0], layer) if token_major else (stores[layer], 0)
            store.commit(context)
            generator = torch.Generator(shape.device).manual_seed(layer)
            keys, values = (view.narrow(2, 0, context) for view in store.views(index))
            keys.copy_(torch.randn(keys.shape, generator=generator, device=keys.device, dtype=keys.dtype))
            values.copy_(keys.flip(2))
            views.append((keys, values))
    finally:
        kv_store.TOKEN_MAJOR_DEVICES.clear()
        kv_store.TOKEN_MAJOR_DEVICES.update(kept)
    return views, stores


def decode(query: torch.Tensor, views: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention of one token over every layer, summed so that nothing can be skipped."""
    total = torch.zeros_like(query, dtype=torch.float32)
    with torch.inference_mode():
        for keys, values in views:
            total += F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    return total


if __name__ == "__main__":
    main()
