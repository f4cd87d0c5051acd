"""Keys and values whose last committed page ends where the tokens end: one read too far is a fault."""

from collections.abc import Callable

import pytest

# Holes of a host range read as zeros; here they fault, as they do on a GPU.
STRICT_HOST = """
import ctypes, mmap, os, signal
from torch_vtensor.allocator.host_driver import HostDriver

class StrictDriver(HostDriver):
    def reserve(self, nbytes):
        ptr = super().reserve(nbytes)
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(ptr), ctypes.c_size_t(nbytes), 0) == 0
        return ptr

driver, device = StrictDriver(mmap.PAGESIZE), "cpu"
"""
CUDA = """
from torch_vtensor.allocator.cuda_driver import CudaDriver

driver, device = CudaDriver("cuda"), "cuda"
"""
MAKE = """
import torch
import torch_vtensor.ops as ops
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.vtensor import VTensor

scheduler = GrowthScheduler(PagePool(driver))
dim, heads = 128, 2
tokens = driver.page_sizes[0] // (dim * torch.bfloat16.itemsize)  # exactly a page for every head

def cache(num_tokens):
    vtensor = VTensor((dim,), outer_shape=(2, heads), capacity=4 * tokens, dtype=torch.bfloat16, scheduler=scheduler)
    vtensor.append(torch.randn(2, heads, num_tokens, dim, dtype=torch.bfloat16).to(device))
    return vtensor
"""
ATTEND = """
vtensors = cache(tokens), cache(tokens)
assert [vtensor.committed for vtensor in vtensors] == [tokens, tokens]
keys, values = (vtensor.tensor() for vtensor in vtensors)
for lengths in ([tokens, tokens], [tokens, tokens - 3], [tokens, 0], [1, tokens]):
    lengths = torch.tensor(lengths, device=device)
    for rows in (1, 5, min(tokens, 100)):
        query = torch.randn(2, 3 * heads, rows, dim, dtype=torch.bfloat16, device=device)
        for options in ({}, {"window": 7}, {"softcap": 20.0}):
            ways = ops.implementations("prefill", query, keys, values, lengths, **options)
            results = [
                ops.prefill_attention(query, keys, values, lengths, implementation=way.name, **options)
                for way in ways
                if way.why_not is None
            ]
            assert results
            if rows < 10:
                results.append(ops.decode_attention(query, keys, values, lengths, **options))
                results.append(ops.decode_attention(query, keys, values, lengths, split_tokens=32, **options))
            assert not any(result.isnan().any() for result in results)
print("attended")
"""
APPEND = """
vtensors = cache(tokens), cache(tokens)
keys, values = (vtensor.tensor() for vtensor in vtensors)
new = torch.ones(2, heads, 3, dim, dtype=torch.bfloat16, device=device)
lengths, num_new = torch.tensor([tokens - 3, 0], device=device), torch.tensor([0, 1], device=device)
ops.kv_append(keys, values, new, new, lengths)
ops.kv_append(keys, values, new, new, lengths + 3, num_new=num_new)
assert keys[0, :, -3:].eq(1).all() and values[1, :, :4].eq(1).all()
print("appended")
"""
READ_TOO_FAR = """
vtensor = cache(tokens)
child = os.fork()
if child == 0:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(vtensor.data_ptr + vtensor.committed * dim * 2, 1)
    os._exit(0)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
print("the next byte faults")
"""
DEVICES = [pytest.param(STRICT_HOST, id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("driver", DEVICES)
def test_nothing_reads_or_writes_past_the_committed_tokens(driver: str, run_python: Callable[..., str]) -> None:
    printed = run_python(driver + MAKE + ATTEND + APPEND + ("torch.cuda.synchronize()" if driver is CUDA else ""))
    assert printed.split() == ["attended", "appended"]


def test_a_read_past_the_committed_tokens_would_be_noticed(run_python: Callable[..., str]) -> None:
    assert "the next byte faults" in run_python(STRICT_HOST + MAKE + READ_TOO_FAR)
