"""Attention on the CPU over ragged lengths: what decode_attention and prefill_attention share there.

Lengths are host memory, so every sequence (every run of alike ones) is cut to exactly the tokens that it sees, and
nothing else is read or multiplied. No head is repeated: the query heads of a group become rows of their key/value head
where rows are few, and otherwise read it through a stride of 0.

Shape suffixes: B sequences, H key/value heads, G query heads each, T rows, N tokens, D dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from torch_vtensor.ops._torch_compat import flash_attention_cpu

__all__ = ["Scoring", "attend", "scoring"]

_FEW_ROWS = 32  # up to here folding wins: one pass over a head's tokens serves its whole group
_ROWS_AT_ONCE = 256  # of a masked chunk; fewer where that would make the mask exceed the number of elements below
_MASK_ELEMENTS = 2**21
_SCORE_ELEMENTS = 2**21  # of the matmul path's temporaries, per step over heads


class Scoring(NamedTuple):
    """How a query and a key make a weight."""

    scale: float
    window: int | None
    sinks_HG: torch.Tensor | None
    softcap: float | None
    causal: bool


class _Span(NamedTuple):
    """One sequence: rows [0, num_new) are its last tokens up to length, and tokens below first do not count."""

    length: int
    num_new: int
    first: int


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    num_new: torch.Tensor | None,
    first: torch.Tensor | None,
    scoring: Scoring,
    one_by_one: bool = False,
) -> torch.Tensor:
    """Attention of [B, H*G, T, D] over [B, H, C, D], each sequence by itself or (default) alike neighbours together."""
    heads = keys.shape[1]
    batch, query_heads, num_rows, _ = query.shape
    out = query.new_zeros(batch, num_rows, query_heads, values.shape[3]).transpose(1, 2)
    query_BHGTD, out_BHGTD = query.unflatten(1, (heads, -1)), out.unflatten(1, (heads, -1))
    spans = _spans(batch, num_rows, keys.shape[2], lengths, num_new, first)
    for slots, span in _runs(spans, one_by_one):
        _attend_span(query_BHGTD[slots], keys[slots], values[slots], out_BHGTD[slots], span, scoring)
    return out


def scoring(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
    causal: bool = True,
) -> Scoring:
    """The operators' arguments as one value."""
    return Scoring(
        query.shape[3] ** -0.5 if scale is None else scale,
        window,
        None if sinks is None else sinks.unflatten(0, (keys.shape[1], -1)),
        softcap,
        causal,
    )


def _spans(
    batch: int,
    num_rows: int,
    capacity: int,
    lengths: torch.Tensor | None,
    num_new: torch.Tensor | None,
    first: torch.Tensor | None,
) -> list[_Span]:
    stops = [capacity] * batch if lengths is None else lengths.tolist()
    counts = [num_rows] * batch if num_new is None else num_new.tolist()
    firsts = [0] * batch if first is None else first.tolist()
    spans = [_Span(*numbers) for numbers in zip(stops, counts, firsts, strict=True)]
    for b, span in enumerate(spans):
        if not 0 <= span.length <= capacity:
            raise ValueError(
                f"lengths[{b}] is {span.length}; keys and values have {capacity} tokens: pass at most that"
            )
        if not 0 <= span.num_new <= num_rows:
            raise ValueError(f"num_new[{b}] is {span.num_new}; query holds {num_rows} rows: pass 0 to {num_rows}")
    return spans


def _runs(spans: list[_Span], one_by_one: bool) -> Iterator[tuple[slice, _Span]]:
    """Neighbours with the same span, as one slice of the batch."""
    start = 0
    for span, alike in itertools.groupby(spans):
        stop = start + sum(1 for _ in alike)
        if one_by_one:
            yield from ((slice(b, b + 1), span) for b in range(start, stop))
        else:
            yield slice(start, stop), span
        start = stop


def _attend_span(
    query_BHGTD: torch.Tensor,
    keys_BHND: torch.Tensor,
    values_BHND: torch.Tensor,
    out_BHGTD: torch.Tensor,
    span: _Span,
    scoring: Scoring,
) -> None:
    """Rows in chunks; each chunk over the one slice of tokens that any of its rows sees."""
    origin, first = span.length - span.num_new, max(span.first, 0)
    # Causal rows before the first token that counts see nothing, and stay 0.
    begin = max(first - origin, 0) if scoring.causal else 0
    if begin >= span.num_new or first >= span.length:
        return
    window = span.length if scoring.window is None else scoring.window
    flash = scoring.softcap is None and keys_BHND.shape[3] == values_BHND.shape[3]
    triangle = scoring.causal and flash and origin + begin == first and window >= span.length - first
    rows_at_once = max(1, min(_ROWS_AT_ONCE, _MASK_ELEMENTS // (span.length - first)))
    if flash and (triangle or not scoring.causal):
        rows_at_once = span.num_new
    for row in range(begin, span.num_new, rows_at_once):
        end = min(row + rows_at_once, span.num_new)
        start, stop, mask_TN = first, span.length, None
        if scoring.causal:
            start, stop = max(first, origin + row - window + 1), origin + end
            if end - row > 1 and not triangle:
                position_T1, token_N = torch.arange(origin + row, stop)[:, None], torch.arange(start, stop)
                mask_TN = (token_N <= position_T1) & (token_N > position_T1 - window)
        chunk = query_BHGTD[:, :, :, row:end], keys_BHND[:, :, start:stop], values_BHND[:, :, start:stop]
        out = out_BHGTD[:, :, :, row:end]
        if flash:
            _by_flash(*chunk, out, mask_TN, triangle and end - row > 1, scoring)
        else:
            _by_matmul(*chunk, out, mask_TN, scoring)


def _by_flash(
    query_BHGTD: torch.Tensor,
    keys_BHND: torch.Tensor,
    values_BHND: torch.Tensor,
    out_BHGTD: torch.Tensor,
    mask_TN: torch.Tensor | None,
    triangle: bool,
    scoring: Scoring,
) -> None:
    """torch's own kernel: no matrix of scores, and 16-bit keys and values are converted block by block in cache."""
    batch, _, group, num_rows, _ = query_BHGTD.shape
    num_tokens = keys_BHND.shape[2]
    bias_TN = None
    if mask_TN is not None:
        bias_TN = torch.zeros_like(mask_TN, dtype=query_BHGTD.dtype).masked_fill_(~mask_TN, float("-inf"))
    if num_rows <= _FEW_ROWS and not triangle:
        if bias_TN is not None:
            bias_TN = bias_TN.expand(group, -1, -1).reshape(-1, num_tokens)
        part, logsumexp = flash_attention_cpu(
            query_BHGTD.flatten(2, 3), keys_BHND, values_BHND, bias_TN, False, scoring.scale
        )
        shape = (group, num_rows)
        _store(out_BHGTD, part.unflatten(2, shape), logsumexp.unflatten(2, shape), scoring.sinks_HG)
        return
    for b in range(batch):  # the key/value heads take the place of the batch, and the group that of the heads
        keys_HGND, values_HGND = (rows[b].unsqueeze(1).expand(-1, group, -1, -1) for rows in (keys_BHND, values_BHND))
        part, logsumexp = flash_attention_cpu(query_BHGTD[b], keys_HGND, values_HGND, bias_TN, triangle, scoring.scale)
        _store(out_BHGTD[b], part, logsumexp, scoring.sinks_HG)


def _by_matmul(
    query_BHGTD: torch.Tensor,
    keys_BHND: torch.Tensor,
    values_BHND: torch.Tensor,
    out_BHGTD: torch.Tensor,
    mask_TN: torch.Tensor | None,
    scoring: Scoring,
) -> None:
    """What torch's kernel cannot: a soft-cap, and values of another width than keys. As many heads at once as fit."""
    batch, heads, group, num_rows, dim = query_BHGTD.shape
    num_tokens, shape = keys_BHND.shape[2], (group, num_rows)
    accumulate = torch.float64 if query_BHGTD.dtype is torch.float64 else torch.float32
    step = min(heads, max(1, _SCORE_ELEMENTS // (num_tokens * max(group * num_rows, dim))))
    converts = keys_BHND.dtype is not accumulate
    # One buffer for all steps: at this size every new one would be memory that the system has to clear first.
    buffer_elements = step * num_tokens * max(dim, values_BHND.shape[3]) if converts else 0
    buffer = keys_BHND.new_empty(buffer_elements, dtype=accumulate)

    def converted(rows_HND: torch.Tensor) -> torch.Tensor:
        if not converts:
            return rows_HND
        return buffer[: rows_HND.numel()].view(rows_HND.shape).copy_(rows_HND)

    for b, head in itertools.product(range(batch), range(0, heads, step)):
        part = slice(head, head + step)
        query_HRD = query_BHGTD[b, part].flatten(1, 2).to(accumulate) * scoring.scale
        scores_HRN = query_HRD @ converted(keys_BHND[b, part]).mT
        if scoring.softcap is not None:
            scores_HRN.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        if mask_TN is not None:
            scores_HRN.unflatten(1, shape).masked_fill_(~mask_TN, float("-inf"))
        sinks_HG = None if scoring.sinks_HG is None else scoring.sinks_HG[part]
        logsumexp_HR = scores_HRN.logsumexp(2)
        out_HRD = scores_HRN.sub_(logsumexp_HR[:, :, None]).exp_() @ converted(values_BHND[b, part])
        _store(out_BHGTD[b, part], out_HRD.unflatten(1, shape), logsumexp_HR.unflatten(1, shape), sinks_HG)


def _store(out: torch.Tensor, attention: torch.Tensor, logsumexp: torch.Tensor, sinks_HG: torch.Tensor | None) -> None:
    """A sink takes its share of every row's sum: exp(l) / (exp(l) + exp(sink)) is left."""
    if sinks_HG is not None:
        attention = attention * torch.sigmoid(logsumexp - sinks_HG[:, :, None])[..., None]
    out.copy_(attention)
