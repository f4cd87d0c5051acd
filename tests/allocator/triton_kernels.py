"""A kernel that reads as many rows as device memory says, anywhere in a reservation; imported only where triton is."""

import triton
import triton.language as tl


@triton.jit
def sum_rows_kernel(rows_ptr, length_ptr, out_ptr, ROW: tl.constexpr):
    columns = tl.arange(0, ROW)
    total = tl.zeros([ROW], dtype=tl.float32)
    num_rows = tl.load(length_ptr)
    for row in range(num_rows):
        total += tl.load(rows_ptr + row.to(tl.int64) * ROW + columns)
    tl.store(out_ptr + columns, total)
