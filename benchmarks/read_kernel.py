"""A kernel that reads and does nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["SHAPES", "read"]

SHAPES = [(4096, 4, 8), (4096, 8, 8), (8192, 8, 4), (2048, 4, 16), (16384, 8, 2)]
"""Numbers a step, warps, and programs a multiprocessor."""


@triton.jit
def _read(source, out, num_steps, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(tl.program_id(0), num_steps, tl.num_programs(0)):
        total += tl.load(source + step.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    if tl.sum(total, 0) == 1:  # never, but the compiler cannot know
        tl.store(out, 1)


def read(source: torch.Tensor, block: int, num_warps: int, programs_per_sm: int) -> None:
    """Read ``source``, int32 zeros, but for what is left of a block at its end."""
    num_sms = torch.cuda.get_device_properties(source.device).multi_processor_count
    _read[(num_sms * programs_per_sm,)](source, source, source.numel() // block, BLOCK=block, num_warps=num_warps)
