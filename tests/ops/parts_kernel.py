"""What prefill_attention's programs come to by themselves, the parts of blocks, written where a test can see it."""

import triton
import triton.language as tl

from torch_vtensor.ops.prefill_attention.parts_triton import share_out


@triton.jit
def keep_parts(
    lengths, out, num_slots, num_query, num_blocks, num_at_once, num_programs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    parts, ends = share_out(
        lengths, lengths, lengths, num_slots, num_query, num_blocks, 0, num_at_once, num_programs,
        HEADS, GROUP, BLOCK_M, BLOCK_T, LINES, True, False, False, False, False,
    )  # fmt: skip
    tl.store(out + tl.arange(0, LINES), parts)
    tl.store(out + LINES + tl.arange(0, LINES), ends)
