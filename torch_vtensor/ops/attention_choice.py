"""Which implementation an attention operator takes: who can do a call, how fast each was measured, who is chosen.

    triton   our kernels: every call on a GPU          cudnn, flash  torch's, through scaled_dot_product_attention
    gluon    ours for many rows, on Hopper             fa3           FlashAttention-3, where flash_attn_interface is
    cpu      ours on a CPU

Those that are not ours know no lengths on the device: they serve calls whose sequences are all as long as keys and
values are, which the host knows when ``lengths`` is None. A call with lengths is never made to wait for the device to
find out.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

__all__ = [
    "MEASURED",
    "NAMES",
    "Case",
    "Implementation",
    "Implementations",
    "Regime",
    "are_aligned",
    "choose",
    "implementations",
]

NAMES = ("triton", "gluon", "cudnn", "flash", "fa3", "cpu")
_16_BITS = (torch.bfloat16, torch.float16)
_BLOCKS_THAT_FILL = 96
"""Fewer leave a GPU with some 130 multiprocessors idle: what splits the tokens too is faster."""
_GLUON_TRITON = "3.6"
"""The release of Triton that the Gluon kernel ran with; Gluon changes with every one."""


class Case(NamedTuple):
    """All of a call that decides who can do it and who is fastest; known on the host."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dim: int
    value_dim: int
    batch: int
    query_heads: int
    heads: int
    num_rows: int
    num_tokens: int
    """At most, where the device has the numbers."""
    causal: bool
    has_counts: bool
    """Whether numbers on the device say which tokens and rows count."""
    options: tuple[str, ...]
    """What is asked for beyond a softmax over all tokens before."""
    is_aligned: bool = True
    """Whether rows of keys and of values lie apart, each at a multiple of 16 bytes: what can be copied by TMA."""

    @classmethod
    def of(
        cls,
        op: str,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        num_new: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
        split_tokens: int | None = None,
        causal: bool = True,
    ) -> Case:
        """The case of a call with these arguments."""
        options = ("window", window), ("sinks", sinks), ("softcap", softcap), ("split_tokens", split_tokens)
        return cls(
            op,
            query.device,
            query.dtype,
            query.shape[3],
            values.shape[3],
            query.shape[0],
            query.shape[1],
            keys.shape[1],
            query.shape[2],
            keys.shape[2],
            causal,
            any(counts is not None for counts in (lengths, num_new, first)),
            tuple(name for name, option in options if option is not None),
            _is_aligned(keys) and _is_aligned(values),
        )

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.batch * self.heads * self.num_tokens * (self.dim + self.value_dim) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Multiplications and additions of what the rows see."""
        hidden = self.num_rows * (self.num_rows - 1) // 2 if self.causal else 0
        seen = self.num_rows * self.num_tokens - hidden
        return 2 * self.batch * self.query_heads * (self.dim + self.value_dim) * seen

    @property
    def num_blocks(self) -> int:
        """Blocks of 128 rows of queries, those of the query heads that share a head of keys and values together."""
        return self.batch * self.heads * -(-self.num_rows * self.query_heads // max(128 * self.heads, 1))


def _is_aligned(rows: torch.Tensor) -> bool:
    return are_aligned(rows.itemsize, rows.data_ptr() // rows.itemsize, rows.stride()[:3])


def are_aligned(itemsize: int, offset: int, strides: Sequence[int]) -> bool:
    """Whether rows at this offset, with these strides of slots, heads and tokens, can be copied by TMA.

    Units: elements.
    """
    return min(strides[1:]) > 0 and all(number * itemsize % 16 == 0 for number in (offset, *strides))


class Regime(NamedTuple):
    """Calls of one kind: how long each implementation took over the fastest of torch's and ours, and who is chosen.

    ``order`` is that of choice: the first that can do a call does it. ``example`` is such a call's rows and tokens.
    """

    name: str
    covers: Callable[[Case], bool]
    ratios: dict[str, float]
    order: tuple[str, ...]
    example: tuple[int, int]


# Times on the device: geometric means over the uniform points, in the layout of our caches, of decode in
# benchmarks/results/attention_h100-80gb-hbm3_2026-11-26.md, whose times of triton are taken for prompts as well, and of
# extend and prefill in attention_h100-80gb-hbm3_2026-11-27.md. FlashAttention-3's: by its times on an H200, 2026-11-22,
# over cuDNN's (decode) and over gluon's there. On the host a call of flash takes 60 us and of triton 140, more than a
# small decode takes on the device; cuDNN plans 40 ms for every length that it has not seen.
MEASURED = (
    Regime(
        "decode below 0.5 GB",
        lambda case: case.num_rows == 1 and case.nbytes < 0.5e9,
        {"cudnn": 1.0, "fa3": 1.09, "flash": 1.15, "triton": 1.22},
        ("flash", "triton"),
        (1, 8192),
    ),
    Regime(
        "decode from 0.5 GB",
        lambda case: case.num_rows == 1,
        {"cudnn": 1.0, "triton": 1.03, "fa3": 1.09, "flash": 1.11},
        ("triton",),
        (1, 65536),
    ),
    Regime(
        "extend: few rows over a prefix",
        lambda case: case.num_rows < case.num_tokens and case.num_blocks < _BLOCKS_THAT_FILL,
        {"fa3": 0.63, "triton": 1.0, "flash": 1.29},
        ("fa3", "triton"),
        (16, 8192),
    ),
    Regime(
        "extend: rows over a prefix",
        lambda case: case.num_rows < case.num_tokens,
        {"fa3": 0.92, "gluon": 1.0, "triton": 1.46, "flash": 2.22},
        ("fa3", "gluon", "triton"),
        (128, 8192),
    ),
    Regime(
        "prefill below 2 TFLOP",
        lambda case: case.flops < 2e12,
        {"fa3": 0.92, "gluon": 1.0, "cudnn": 1.03, "triton": 1.43, "flash": 1.84},
        ("fa3", "gluon", "triton"),
        (2048, 2048),
    ),
    Regime(
        "prefill from 2 TFLOP",
        lambda case: True,
        {"fa3": 0.92, "gluon": 1.0, "cudnn": 1.05, "triton": 1.47, "flash": 1.88},
        ("fa3", "gluon", "cudnn", "triton"),
        (32768, 32768),
    ),
)


class Implementation(NamedTuple):
    """One implementation's standing for a call: why it cannot do it (or None), its measured ratio, and the choice."""

    name: str
    why_not: str | None
    ratio: float | None
    is_chosen: bool


class Implementations(tuple[Implementation, ...]):
    """One entry for each implementation; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = ["implementation  time over the fastest  for this call"]
        for entry in self:
            ratio = "not measured" if entry.ratio is None else f"{entry.ratio:.2f}"
            standing = "chosen" if entry.is_chosen else entry.why_not or "can do it"
            lines.append(f"{entry.name:<14}  {ratio:<21}  {standing}")
        return "\n".join(lines)


def implementations(
    op: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    num_new: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    split_tokens: int | None = None,
    causal: bool = True,
) -> Implementations:
    """Say who can do a call of an attention operator, how fast each is on the device, and who is chosen.

    Args:
        op: "decode" or "prefill"; the others are those of ``decode_attention`` or ``prefill_attention``.

    Raises: ValueError for another ``op``.
    """
    if op not in ("decode", "prefill"):
        raise ValueError(f"op is {op!r}; it is 'decode' or 'prefill'")
    case = Case.of(
        op, query, keys, values, lengths, num_new=num_new, first=first, window=window, sinks=sinks, softcap=softcap,
        split_tokens=split_tokens, causal=causal,
    )  # fmt: skip
    ratios, chosen = regime_of(case).ratios, choose(case)
    return Implementations(
        Implementation(name, why_not(name, case), ratios.get(name), name == chosen) for name in NAMES
    )


def choose(case: Case, forced: str | None = None) -> str:
    """The implementation of a call: the forced one, or the first in its regime's order that can do it.

    Raises: ValueError if the forced one cannot do it.
    """
    if forced is not None:
        if forced not in NAMES:
            raise ValueError(f"implementation is {forced!r}; it is one of {', '.join(map(repr, NAMES))}, or None")
        if reason := why_not(forced, case):
            raise ValueError(
                f"implementation {forced!r} was asked for and cannot do this call of {case.op}_attention: {reason}; "
                "change that, or leave implementation out"
            )
        return forced
    if case.device.type == "cpu":
        return "cpu"
    return next((name for name in regime_of(case).order if why_not(name, case) is None), "triton")


def regime_of(case: Case) -> Regime:
    """The regime that a case belongs to."""
    return next(regime for regime in MEASURED if regime.covers(case))


def why_not(name: str, case: Case) -> str | None:
    """Why this implementation cannot do the call, or None."""
    if (name == "cpu") != (case.device.type == "cpu"):
        return f"the tensors are on {case.device.type}"
    if name in ("triton", "cpu"):
        return "triton has no float64" if name == "triton" and case.dtype is torch.float64 else None
    if case.has_counts and name != "gluon":
        return "lengths, num_new or first are on the device"
    if missing := [option for option in case.options if name != "gluon" or option not in ("window", "sinks")]:
        return f"{', '.join(missing)} asked for"
    if case.dtype not in _16_BITS:
        return f"{case.dtype} is not of 16 bits"
    if 0 in (case.batch, case.heads, case.num_rows, case.num_tokens):
        return "there is nothing to do"
    why = _why_not_gluon(case) if name == "gluon" else _why_not_foreign(name, case)
    return why or _why_not_here(name, case.device.index or 0)


def _why_not_gluon(case: Case) -> str | None:
    if case.op != "prefill":
        return "it is made for prefill_attention"
    if case.dim != case.value_dim or case.dim not in (64, 128):
        return f"head dims {case.dim} and {case.value_dim}; both must be 64, or both 128"
    return None if case.is_aligned else "rows of keys or values are not aligned to 16 bytes, or not apart"


def _why_not_foreign(name: str, case: Case) -> str | None:
    widest = 128 if name == "cudnn" else 256
    if case.dim != case.value_dim or case.dim % 8 or case.dim > widest:
        return f"head dims {case.dim} and {case.value_dim}; both must be one multiple of 8 up to {widest}"
    if case.causal and case.num_rows > case.num_tokens:
        return f"{case.num_rows} rows and {case.num_tokens} tokens: some rows see nothing"
    if name == "cudnn" and case.causal and 1 < case.num_rows < case.num_tokens:
        return "rows over a prefix: it aligns them with the first token"
    return None


@functools.cache
def _why_not_here(name: str, device_index: int) -> str | None:
    """Why this implementation does not run on this device, or None."""
    if torch.version.hip is not None:
        return "it was not tried on AMD devices"
    capability = torch.cuda.get_device_capability(device_index)
    if name == "fa3" and importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    if name in ("fa3", "gluon") and capability[0] != 9:
        return f"the device has compute capability {capability}, not 9.x"
    if name == "gluon":
        import triton

        if not triton.__version__.startswith(f"{_GLUON_TRITON}."):
            return f"Triton {triton.__version__} is installed, and it was tried with {_GLUON_TRITON} alone"
    return None if capability >= (8, 0) else f"the device has compute capability {capability}, below 8.0"
