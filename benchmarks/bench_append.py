"""What one appended token, a fork and a returned byte cost: VTensor against torch.cat.

    python benchmarks/bench_append.py [--device cuda] [--quick]

Checks that contents are equal before it times anything, and writes benchmarks/results/append_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import report
import torch
from bench_generate import EagerProbe, Probe, make_model
from memory import used_bytes
from transformers import DynamicCache, LlamaConfig, LogitsProcessorList, StaticCache

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.row_copy import NOT_COPIED, row_copier
from torch_vtensor.settings import IDLE_SECONDS

GIB = 2**30


def main() -> None:
    """Run all parts and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    repeats = 5 if arguments.quick else 30
    with torch.inference_mode():
        parts = [
            append(device, repeats),
            host(device, repeats),
            capacity(device),
            growth(device, quick=arguments.quick),
            fork(device, quick=arguments.quick),
            idle(device),
            give_back(device),
        ]
    path = report.write("append", device, "\n\n".join(parts), arguments.out)
    print(path.read_text())


def append(device: torch.device, repeats: int) -> str:
    """One token for every layer of a model, at several lengths."""
    layers, heads, dim = (32, 8, 128) if device.type == "cuda" else (8, 8, 64)
    dtype = torch.bfloat16
    rows = []
    for length in (1024, 4096, 8192, 16384):
        prompt = torch.randn(1, heads, length, dim, device=device, dtype=dtype)
        token = torch.randn(1, heads, 1, dim, device=device, dtype=dtype)
        times, views = [], []
        for cache in (DynamicCache(), torch_vtensor.VTensorCache()):
            cache.layer_class_to_replicate = None
            cache.layers = [_layer(cache) for _ in range(layers)]
            for layer in range(layers):
                cache.update(prompt, prompt, layer)
            default_scheduler(device).settle()  # on CUDA the kernel is compiled
            times.append(report.measure(partial(step, cache, token), device, repeats))
            views.append(cache.layers[layers - 1].keys.clone())
            del cache
        assert torch.equal(*views), "VTensorCache and DynamicCache hold different keys"
        cat, ours = times
        rows.append((length, f"{cat:ms}", f"{ours:ms}", f"{cat.median / ours.median:.1f}x"))
    title = f"## Append one token: {layers} layers, batch 1, {heads} heads of {dim}, bfloat16; ms a step (10th-90th)"
    return f"{title}\n\n" + report.table(("context", "DynamicCache (torch.cat)", "torch_vtensor", "ratio"), rows)


def host(device: torch.device, repeats: int) -> str:
    """What one layer's append occupies of the host, whatever the device then takes for it."""
    layers, heads, dim = (32, 8, 128) if device.type == "cuda" else (8, 8, 64)
    # As a model makes them: [B, T, H, D] in memory.
    prompt, token = (
        torch.randn(1, length, heads, dim, device=device).bfloat16().transpose(1, 2) for length in (1024, 1)
    )
    by_torch = mock.patch.object(row_copier(token.device), "write", _leave)
    contenders: list[tuple[str, type[DynamicCache], AbstractContextManager[object]]] = [
        ("DynamicCache (torch.cat)", DynamicCache, nullcontext()),
        ("torch_vtensor, copied by torch", torch_vtensor.VTensorCache, by_torch),
        ("torch_vtensor, one call", torch_vtensor.VTensorCache, nullcontext()),
    ]
    rows = []
    for name, make, patched in contenders:
        cache = make()
        with patched:
            for layer in range(layers):
                cache.update(prompt, prompt, layer)
            default_scheduler(device).settle()
            seconds = []
            for _ in range(10 * repeats):
                report.synchronize(device)
                start = time.perf_counter()
                step(cache, token)
                seconds.append((time.perf_counter() - start) / layers)
        rows.append((name, f"{report.timing(seconds[repeats:]):us}"))
    title = f"## Host time of one append: batch 1, {heads} heads of {dim}, bfloat16, 1k tokens; us a layer (10th-90th)"
    return f"{title}\n\n" + report.table(("cache", "us"), rows)


def _leave(*arguments: object) -> int:
    return NOT_COPIED


def step(cache: DynamicCache, token: torch.Tensor) -> None:
    """Append one token to every layer."""
    for layer in range(len(cache.layers)):
        cache.update(token, token, layer)


def _layer(cache: DynamicCache) -> object:
    from transformers.cache_utils import DynamicLayer

    from torch_vtensor.generation.cache import VTensorLayer

    return VTensorLayer() if isinstance(cache, torch_vtensor.VTensorCache) else DynamicLayer()


def capacity(device: torch.device) -> str:
    """What 1k tokens cost in a cache that may grow to 128k."""
    layers, heads, dim, most = (32, 8, 128, 128 * 1024) if device.type == "cuda" else (2, 2, 64, 128 * 1024)
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * dim
    )
    tokens = torch.randn(1, heads, 1024, dim, device=device, dtype=torch.bfloat16)
    static = StaticCache(config=config, max_cache_len=most)
    ours = torch_vtensor.VTensorCache(config=config)
    for layer in range(layers):
        ours.update(tokens, tokens, layer)
        static.layers[layer].lazy_initialization(tokens, tokens)
    static_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in static.layers)
    memory = ours.memory()
    our_bytes = memory.committed_bytes + memory.ordinary_bytes
    return (
        f"## 1,024 tokens in a cache for {most:,}: {layers} layers, {heads} heads of {dim}, bfloat16\n\n"
        f"StaticCache {static_bytes / 2**20:,.0f} MiB, torch_vtensor {our_bytes / 2**20:,.0f} MiB "
        f"({our_bytes / static_bytes:.2%}), of which {memory.written_bytes / 2**20:,.0f} MiB are written."
    )


def growth(device: torch.device, quick: bool) -> str:
    """Driver calls on the decoding thread and behind it, while generate() extends a cache at the pace of a model."""
    model, shape = make_model(device, quick=True)
    num_steps = 128 if quick else 1024
    prompt = torch.randint(model.config.vocab_size, (1, 1024), device=device)
    torch_vtensor.trim()  # otherwise the cache would begin in memory that is mapped still
    probe = Probe(device)
    model.generate(
        prompt,
        past_key_values=torch_vtensor.VTensorCache(config=model.config),
        max_new_tokens=num_steps + 1,
        do_sample=False,
        logits_processor=LogitsProcessorList([EagerProbe(probe)]),
    )
    (main, others), (first_main, first_others) = probe.calls[-1], probe.calls[0]
    steps_with_calls = sum(after[0] != before[0] for before, after in pairwise(probe.calls))
    step = report.timing([after - before for before, after in pairwise(probe.times)])
    return (
        f"## Driver calls while generate() extends a prompt of 1,024 tokens by {num_steps:,}\n\n"
        f"{shape}, eager, {step:ms} ms a step: {main - first_main} calls on the decoding thread, in {steps_with_calls} "
        f"of {num_steps} steps, and {others - first_others} behind it, ahead of need."
    )


def fork(device: torch.device, quick: bool) -> str:
    """Fork a long prefix once, and 64 times with a tail each."""
    scheduler = default_scheduler(device)
    gib = 4 if device.type == "cuda" and not quick else 0.25
    rows_total = int(gib * GIB) // (128 * 1024)
    prefix = torch_vtensor.VTensor((65536,), capacity=2 * rows_total, dtype=torch.bfloat16, device=device)
    for _ in range(8):
        prefix.append(torch.randn(rows_total // 8, 65536, device=device).to(torch.bfloat16))
    prefix_bytes = prefix.length * prefix.row_bytes
    one = report.measure(lambda: prefix.fork().close(), device, 10)
    clone = report.measure(lambda: prefix.tensor().clone(), device, 5)
    tail = torch.randn(40, 65536, device=device).to(torch.bfloat16)
    torch_vtensor.trim()
    forks = [prefix.fork() for _ in range(64)]
    for branch in forks:
        branch.append(tail)
    assert torch.equal(forks[-1].tensor()[-40:], tail)
    assert torch.equal(forks[0].tensor()[: prefix.length : 997], prefix.tensor()[::997])
    live_bytes = scheduler.stats().live_bytes
    tails_bytes = 64 * 40 * prefix.row_bytes
    ratio = live_bytes / (prefix_bytes + tails_bytes)
    for branch in forks:
        branch.close()
    prefix.close()
    return (
        f"## Fork a prefix of {prefix_bytes / GIB:.2f} GiB\n\n"
        + report.table(
            ("what", "ms (10th-90th)"), [("fork and close", f"{one:ms}"), ("clone (copies it)", f"{clone:ms}")]
        )
        + f"\n\n64 forks with a tail of 40 tokens each: {live_bytes / GIB:.3f} GiB live, "
        f"{ratio:.3f} x (prefix + tails); 64 copies would be {64 * (prefix_bytes + tails_bytes / 64) / GIB:.1f} GiB."
    )


def idle(device: torch.device) -> str:
    """What stays of the memory of five sequences that have ended beside a live one, with nothing asked for."""
    torch_vtensor.trim()
    before, gib = used_bytes(device), 1 if device.type == "cuda" else 0.0625
    rows = int(gib * GIB) // (128 * 1024)
    tensors = [
        torch_vtensor.VTensor((65536,), capacity=2 * rows, dtype=torch.bfloat16, device=device) for _ in range(6)
    ]
    for vtensor in tensors:
        vtensor.commit(rows)
    live, *ended = tensors
    taken = used_bytes(device) - before
    for vtensor in ended:
        vtensor.close()
    default_scheduler(device).reap()
    began, most = time.perf_counter(), 1.2 * live.committed_bytes
    while default_scheduler(device).stats().committed_bytes > most and time.perf_counter() - began < 4 * IDLE_SECONDS:
        time.sleep(0.01)
    seconds, left, live_bytes = time.perf_counter() - began, used_bytes(device) - before, live.committed_bytes
    live.close()
    return (
        f"## Idle memory after load has dropped\n\n{taken / GIB:.2f} GiB were in use by six sequences; {seconds:.1f} s "
        f"after five of them had ended {left / GIB:.2f} GiB were, {left / live_bytes:.2f} x what is live."
    )


def give_back(device: torch.device) -> str:
    """Memory that trim() returns to the system, as the system counts it."""
    scheduler = default_scheduler(device)
    torch_vtensor.trim()
    gib = 10 if device.type == "cuda" else 0.5
    before = used_bytes(device)
    vtensor = torch_vtensor.VTensor((65536,), capacity=2**20, dtype=torch.bfloat16, device=device)
    vtensor.commit(int(gib * GIB) // vtensor.row_bytes)
    taken = used_bytes(device) - before
    vtensor.close()
    time_taken = report.measure(torch_vtensor.trim, device, 1, warmup=0)
    returned = before + taken - used_bytes(device)
    calls = [
        (name, call.count, f"{call.p50_us:.1f}", f"{call.p99_us:.1f}")
        for name, call in scheduler.stats().driver_calls.items()
    ]
    return (
        f"## Give memory back\n\ntrim() returned {returned / GIB:.2f} of {taken / GIB:.2f} GiB "
        f"({returned / taken:.1%}) in {time_taken.median * 1e3:.1f} ms.\n\n## Driver calls of this whole run\n\n"
        + report.table(("call", "count", "p50 us", "p99 us"), calls)
    )


if __name__ == "__main__":
    main()
