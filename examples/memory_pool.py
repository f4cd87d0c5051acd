"""Torch tensors from the same pages, and within the same budget, as KV caches: `with torch_vtensor.memory_pool():`."""

import torch

import torch_vtensor
from torch_vtensor.allocator.torch_pool import torch_pool_stats
from torch_vtensor.settings import MIB

if not torch.cuda.is_available():
    print("This example needs a CUDA GPU. There, inside `with torch_vtensor.memory_pool(budget_bytes=...):`")
    print("- torch.empty, matmul and every other operator allocate from the device's page pool,")
    print("- KV caches and these tensors share its budget, and its pages once one of them lets go,")
    print("- running out raises torch_vtensor.OutOfPagesError, also a torch.OutOfMemoryError, and loses nothing.")
    print("On a CPU, torch's own allocator serves tensors, and KV caches grow on pages as they do on a GPU.")
    raise SystemExit


def show(moment: str) -> None:
    stats = torch_pool_stats()
    free, _ = torch.cuda.mem_get_info()
    print(f"{moment:34} {stats.live_bytes // MIB:5} MiB under torch, {free // MIB:7} MiB free on the device")


torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # cuBLAS keeps a workspace from its first call on

with torch_vtensor.memory_pool(budget_bytes=1024 * MIB) as pool:
    show("at first")
    activations = torch.randn(4096, 8192, device="cuda")
    scores = activations @ activations.T
    show("two tensors")

    pages = pool.acquire(pool.page_plan(512 * MIB))  # what a KV cache does when it grows
    try:
        torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        print(f"budget of {pool.budget_bytes // MIB} MiB is kept; sum of the scores: {scores.sum().item():.3g}")
    pool.drop(pages)  # the cache is gone; torch gets its pages
    large = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    show("and a large one, on those pages")

del activations, scores, large
show("tensors gone, memory still cached")
torch_vtensor.trim()
show("returned to the device")
