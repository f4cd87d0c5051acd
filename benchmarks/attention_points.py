"""What bench_attention measures: points by name, their tensors in both layouts, what is right, and what is possible.

A name says it all: ``ext-L3-b8-R16k+512`` is the kind (``dec`` one new token a sequence, ``ext`` new tokens over a
prefix, ``pre`` new tokens alone), the heads, the batch and the tokens (``ext``: prefix + new). ``R`` stands for lengths
from a sixteenth up to that, ``S`` for one sequence of it among others of a 64th, ``P`` for a batch whose sequences all
have their tokens in the same memory.

Shape suffixes: B sequences, H key/value heads, G query heads each, R rows, N tokens, D dim.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import torch

__all__ = ["DIM", "Expected", "Point", "Tensors", "error_of", "interleaved", "make", "parse", "reference"]

DIM = 128
HEADS = {"L3": (32, 8), "MHA": (32, 32), "YI": (32, 4)}
"""Query and key/value heads of Llama-3-8B, Llama-2-7B and Yi-6B."""
_NAME = re.compile(r"(dec|ext|pre)-(\w+)-b(\d+)-([RSP]?)(\d+k?)(?:\+(\d+k?))?")
_CHECKED_ROWS = 32


class Point(NamedTuple):
    """One measured case: the tokens of each sequence, and how many of them are new."""

    name: str
    kind: str
    query_heads: int
    heads: int
    lengths: tuple[int, ...]
    num_new: tuple[int, ...]
    is_shared: bool

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences are as long."""
        return len(set(self.lengths)) == 1

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in 16 bits."""
        return 2 * self.heads * DIM * 2

    @property
    def nbytes(self) -> int:
        """What has to be read and written at least: keys and values once, a shared prefix once, queries and outputs."""
        num_tokens = max(self.lengths) if self.is_shared else sum(self.lengths)
        return num_tokens * self.token_bytes + sum(self.num_new) * 2 * self.query_heads * DIM * 2

    @property
    def flops(self) -> int:
        """Multiplications and additions of what the rows see: row i of n new ones sees length - n + i + 1 tokens."""
        seen = sum(new * (length - new) + new * (new + 1) // 2 for length, new in self._lengths_and_new())
        return 4 * self.query_heads * DIM * seen

    def _lengths_and_new(self) -> list[tuple[int, int]]:
        return list(zip(self.lengths, self.num_new, strict=True))


class Tensors(NamedTuple):
    """A point's arguments: query [B, Hq, T, D], keys and values [B, H, C, D], token-major in memory."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    num_new: torch.Tensor


def parse(name: str) -> Point:
    """The point of this name.

    Raises: ValueError for a name that says nothing.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in HEADS or (match[1] == "ext") != (match[6] is not None):
        raise ValueError(
            f"{name!r} is no point; write kind-heads-batch-tokens, such as dec-L3-b32-R16k or ext-YI-b8-16k+128, with "
            f"heads one of {', '.join(HEADS)}"
        )
    kind, heads, spread = match[1], match[2], match[4]
    batch, tokens, new = int(match[3]), _tokens(match[5]), _tokens(match[6] or "0")
    lengths = [tokens] * batch
    if spread == "R":
        draw = random.Random(0)
        lengths = [tokens, *(draw.randint(max(1, tokens // 16), tokens) for _ in range(batch - 1))]
    elif spread == "S":
        lengths = [tokens, *[max(1, tokens // 64)] * (batch - 1)]
    lengths = [length + new for length in lengths]
    counts = {"dec": [1] * batch, "ext": [new] * batch, "pre": lengths}[kind]
    return Point(name, kind, *HEADS[heads], tuple(lengths), tuple(counts), spread == "P")


def _tokens(text: str) -> int:
    return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def make(point: Point, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Random tensors, a slab for the keys of all sequences and one for the values: [slot, token, head, dim]."""
    generator = torch.Generator(device).manual_seed(0)

    def rows(slots: int, tokens: int, heads: int) -> torch.Tensor:
        shape = slots, tokens, heads, DIM
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    batch = len(point.lengths)
    slots = 1 if point.is_shared else batch
    keys, values = (rows(slots, max(point.lengths), point.heads).expand(batch, -1, -1, -1) for _ in range(2))
    query = rows(batch, max(point.num_new), point.query_heads)
    counts = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (point.lengths, point.num_new))
    return Tensors(query, keys, values, *counts)


def interleaved(point: Point, tensors: Tensors, layers: int) -> Tensors:
    """The same with all layers of a token side by side, as our caches have it: [slot, token, layer, K/V, head, dim]."""
    slots = slice(0, 1) if point.is_shared else slice(None)
    rows = tensors.keys[slots].transpose(1, 2)
    both = torch.empty(*rows.shape[:2], layers, 2, *rows.shape[2:], device=rows.device, dtype=rows.dtype)
    views = [both[:, :, layers // 2, index].transpose(1, 2) for index in range(2)]
    for view, source in zip(views, (tensors.keys, tensors.values), strict=True):
        view.copy_(source[slots])
    keys, values = (view.expand_as(tensors.keys) for view in views)
    return tensors._replace(keys=keys, values=values)


class Expected(NamedTuple):
    """Some rows of one sequence, exactly, and how far rounding may take a result from them: both [Hq, R, D]."""

    slot: int
    rows: torch.Tensor
    exact: torch.Tensor
    allowed: torch.Tensor


def reference(point: Point, tensors: Tensors) -> list[Expected]:
    """Some rows of the longest, the shortest and a middle sequence in float64.

    Allowed is what rounding explains: with r the dtype's unit roundoff and A = sum of w |v| / sum of w, the weights are
    rounded once and scores, exponentials and sums in float32 add less than as much again, and the output is rounded
    twice where parts are merged: 2 r A + 2 r |o|.
    """
    unit = torch.finfo(tensors.query.dtype).eps / 2
    slots = sorted(range(len(point.lengths)), key=lambda slot: -point.lengths[slot])
    expected = []
    for slot in {slots[0], slots[-1], slots[len(slots) // 2]}:
        length, new = point.lengths[slot], point.num_new[slot]
        rows = sorted({*range(0, new, -(-new // _CHECKED_ROWS)), new - 1})
        row_R = torch.tensor(rows, device=tensors.query.device)
        hidden_RN = torch.arange(length, device=row_R.device) > length - new + row_R[:, None]
        query_HGRD = tensors.query[slot][:, row_R].double().unflatten(0, (point.heads, -1))
        keys_HND, values_HND = (rows[slot, :, :length].double() for rows in (tensors.keys, tensors.values))
        scores_HGRN = torch.einsum("hgrd,hnd->hgrn", query_HGRD, keys_HND).mul_(DIM**-0.5)
        weights_HGRN = scores_HGRN.masked_fill_(hidden_RN, float("-inf")).softmax(3)
        exact_HGRD = torch.einsum("hgrn,hnd->hgrd", weights_HGRN, values_HND)
        size_HGRD = torch.einsum("hgrn,hnd->hgrd", weights_HGRN, values_HND.abs_())
        allowed_HGRD = 2 * unit * (size_HGRD + exact_HGRD.abs())
        expected.append(Expected(slot, row_R, exact_HGRD.flatten(0, 1), allowed_HGRD.flatten(0, 1)))
    return expected


def error_of(out: torch.Tensor, expected: list[Expected]) -> float:
    """The largest error of ``out`` in parts of what is allowed."""
    parts = [((out[e.slot][:, e.rows].double() - e.exact).abs() / e.allowed).amax() for e in expected]
    return float(torch.stack(parts).nan_to_num(nan=float("inf")).max())
