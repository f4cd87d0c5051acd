"""Random cases for the attention operators: arguments, what is in memory, and what the result may be off by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from error_budget import error_budget
from hypothesis import strategies as st

from torch_vtensor.ops.attention_reference import visible_tokens
from torch_vtensor.ops.prefill_attention.reference import prefill_attention as reference

NAN = float("nan")
LOW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*LOW_DTYPES, torch.float64)
DIMS = ((16, 16), (24, 24), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 32), (576, 512))
GROUPS = (1, 3, 5, 6, 7, 8, 16)
LAYOUTS = ("head_major", "token_major", "interleaved")


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of one call; for decode_attention every row is new and ``causal`` is True."""

    lengths: tuple[int, ...]
    heads: int = 2
    group: int = 3
    num_rows: int = 1
    dims: tuple[int, int] = (64, 64)
    room: int = 0  # tokens of capacity beyond the longest sequence
    num_new: tuple[int, ...] | None = None
    first: tuple[int, ...] | None = None
    scale: float | None = None
    window: int | None = None
    has_sinks: bool = False
    softcap: float | None = None
    causal: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "head_major"
    counts_dtype: torch.dtype = torch.int64
    magnitude: float = 1.0

    @property
    def capacity(self) -> int:
        return max((*self.lengths, 1)) + self.room

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Tensors of the case, with NaN in every token that no row sees and in every row that is not new."""
        random = torch.Generator().manual_seed(hash(self.lengths) % 2**31)
        batch, (dim, value_dim) = len(self.lengths), self.dims

        def randn(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=random) * self.magnitude).to(self.dtype)

        counts = {"lengths": self.lengths, "num_new": self.num_new, "first": self.first}
        arguments: dict[str, Any] = {
            name: None if numbers is None else torch.tensor(numbers, dtype=self.counts_dtype)
            for name, numbers in counts.items()
        }
        visible = self.visible(arguments)
        unseen = ~visible.any(1)[:, None, :, None]
        keys = randn(batch, self.heads, self.capacity, dim).masked_fill(unseen, NAN)
        values = randn(batch, self.heads, self.capacity, value_dim).masked_fill(unseen, NAN)
        query = randn(batch, self.heads * self.group, self.num_rows, dim)
        query = query.masked_fill(~visible.any(2)[:, None, :, None], NAN)
        sinks = randn(self.heads * self.group) * 2 if self.has_sinks else None
        keys, values = _laid_out(keys, values, self.layout)
        if self.layout != "head_major":
            query = query.transpose(1, 2).contiguous().transpose(1, 2)
        arguments |= {"query": query, "keys": keys, "values": values, "sinks": sinks}
        placed = {name: None if tensor is None else _moved(tensor, device) for name, tensor in arguments.items()}
        return placed | {"scale": self.scale, "window": self.window, "softcap": self.softcap}

    def visible(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Which tokens [B, T, C] the rows see."""
        lengths, num_new = arguments["lengths"], arguments["num_new"]
        row = torch.arange(self.num_rows)
        counts = torch.full_like(lengths, self.num_rows) if num_new is None else num_new
        positions = (lengths - counts)[:, None] + row
        visible = visible_tokens(positions, self.capacity, lengths, arguments["first"], self.window, self.causal)
        return visible & (row < counts[:, None])[:, :, None]

    def check(self, out: torch.Tensor) -> None:
        """``out`` is the reference's result within the error budget of the dtype, and 0 where a row sees nothing."""
        arguments = self.arguments()
        batch, query_heads = len(self.lengths), self.heads * self.group
        assert out.shape == (batch, query_heads, self.num_rows, self.dims[1])
        assert out.dtype == self.dtype
        visible = self.visible(arguments)
        exact = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
        exact["query"] = torch.where(visible.any(2)[:, None, :, None], exact["query"], 0.0)
        expected = reference(**exact, causal=self.causal)
        budget = error_budget(exact, visible, expected, self.dtype)
        error = (out.cpu().double() - expected).abs()
        worst = (error / budget.clamp(min=1e-300)).nan_to_num(nan=float("inf")).amax() if error.numel() else 0.0
        assert bool((error <= budget).all()), f"{worst:.3g} times the error budget: {self}"


def _laid_out(keys: torch.Tensor, values: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same keys and values [B, H, C, D] with other strides, and NaN in whatever lies in between."""
    if layout == "head_major":
        return keys, values
    batch, heads, capacity, dim = keys.shape
    if layout == "token_major":
        return tuple(rows.transpose(1, 2).contiguous().transpose(1, 2) for rows in (keys, values))  # type: ignore[return-value]
    # two layers' keys and values of all heads side by side in one token's row; these are the second layer's
    both = torch.full((batch, capacity, 2, heads, dim + values.shape[3]), NAN, dtype=keys.dtype)
    strided = both[:, :, 1].transpose(1, 2)
    strided[..., :dim], strided[..., dim:] = keys, values
    return strided[..., :dim], strided[..., dim:]


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On the device, with the same strides, over storage as large."""
    if device == "cpu":
        return tensor
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).to(device)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@st.composite
def attention_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], prefill: bool) -> AttentionCase:
    """Cases of every combination, lengths 0 and 1 and ragged ones among them."""
    batch = draw(st.integers(1, 4))
    longest = draw(st.sampled_from((1, 2, 17, 64, 65, 130, 300)))
    lengths = st.sampled_from(sorted({0, 1, longest // 2, longest - 1, longest}))
    num_rows = draw(st.sampled_from((1, 2, 7, 33, 70))) if prefill else draw(st.integers(1, 8))
    num_new = st.lists(st.integers(0, num_rows), min_size=batch, max_size=batch).map(tuple)
    first = st.lists(st.sampled_from((0, 0, 1, longest // 3)), min_size=batch, max_size=batch).map(tuple)
    causal = draw(st.sampled_from((True, True, False))) if prefill else True
    return AttentionCase(
        lengths=tuple(draw(st.lists(lengths, min_size=batch, max_size=batch))),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from(GROUPS)),
        num_rows=num_rows,
        dims=draw(st.sampled_from(DIMS)),
        room=draw(st.sampled_from((0, 1, 40))),
        num_new=draw(st.none() | num_new) if prefill else None,
        first=draw(st.none() | first),
        scale=draw(st.sampled_from((None, None, 0.3))),
        window=draw(st.sampled_from((None, None, 1, 16, 100))) if causal else None,
        has_sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from((None, None, 2.0, 50.0))),
        causal=causal,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        counts_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        magnitude=draw(st.sampled_from((1.0, 1.0, 3.0))),
    )
