"""Hypothesis strategies, and the plain models that the state machines compare with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64)

# Row sizes that divide a page, that do not, and that are larger than one.
ROW_SHAPES = ((), (1,), (3,), (8,), (5, 7), (512,), (1000,), (2, 700))
OUTER_SHAPES = ((), (1,), (3,), (2, 2))

_STRIP_BYTES = 200_000  # bounds what a test has to compare, and lets the largest pages occur


@dataclass(frozen=True)
class TensorSpec:
    """What a VTensor is made with."""

    row_shape: tuple[int, ...]
    outer_shape: tuple[int, ...]
    dtype: torch.dtype
    capacity: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    def rows(self, num_rows: int, seed: int) -> torch.Tensor:
        """Rows [*outer, num_rows, *row] that differ from those of other seeds."""
        shape = (*self.outer_shape, num_rows, *self.row_shape)
        values = (torch.arange(math.prod(shape)) * 31 + seed * 17) % 113
        return (values % 2 == seed % 2 if self.dtype is torch.bool else values.to(self.dtype)).reshape(shape)


@st.composite
def tensor_specs(draw: st.DrawFn) -> TensorSpec:
    """Shapes and dtypes of VTensors, from less than a page a strip to many pages of every size."""
    row_shape, outer_shape = draw(st.sampled_from(ROW_SHAPES)), draw(st.sampled_from(OUTER_SHAPES))
    dtype = draw(st.sampled_from(DTYPES))
    most_rows = max(_STRIP_BYTES // (math.prod(row_shape) * dtype.itemsize), 1)
    return TensorSpec(row_shape, outer_shape, dtype, max(draw(row_counts(most_rows)), 1))


def row_counts(most: int) -> st.SearchStrategy[int]:
    """Numbers of rows up to ``most``, spread evenly: integers alone would nearly always be small."""
    return st.sampled_from(sorted({0, min(1, most), *(most * part // 16 for part in range(1, 17)), max(most - 1, 0)}))


def page_requests(page_sizes: Sequence[int]) -> st.SearchStrategy[list[int]]:
    """Sizes to acquire at once."""
    return st.lists(st.sampled_from(page_sizes), max_size=6)


def budgets(page_bytes: int) -> st.SearchStrategy[int | None]:
    """Budgets that are whole pages, are not, are nothing at all, or are no limit."""
    return st.sampled_from([None, None, None, 0, 10 * page_bytes, 100 * page_bytes + 1, 400 * page_bytes])
