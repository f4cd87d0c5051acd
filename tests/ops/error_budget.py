"""How far attention in a given dtype may be from its value in exact arithmetic: derived, not tuned.

The arguments are taken as they are (the reference gets them exactly), so what is left is the arithmetic:

- ``u``: one accumulating operation in float32 (float64 for float64). Twice the unit roundoff, because tensor cores cut
  off where others round. A sum of n terms in any order is off by at most n u times the sum of the terms' sizes.
- ``r``: the unit roundoff of the arguments' dtype.

Scores. s = scale * sum of D products, products of 16-bit numbers being exact in float32, is off by
(D + 3) u * scale * sum |q k|: the sum, the scale itself, its product and, on a GPU, the change to base 2. A soft-cap is
a contraction (|tanh'| <= 1) that adds a few operations on numbers up to softcap: 8 u * softcap.

Weights. exp(s - m) is off by a factor exp(ds) with ds the score's error, plus u (|s| + |m|) for the subtraction and as
much for the base, plus 4 u for exp itself. That m is itself rounded does not matter: it cancels. A block's weights are
scaled again for every later block, at most once a token. So every weight is relatively off by at most
e = max over visible tokens of ds + 2 u (|s| + |m|) + 4 u, and n u. In 16-bit dtypes the weights are rounded once more,
by r, before they multiply the values.

Output. o = sum w v / sum w. Errors of numerator and denominator both count: with A = sum of w |v| / sum of w,
|do| <= A (2 e + r + 2 (2 n + 4) u) + 2 r |o|: both sums, both rescalings, the division, and the output's rounding,
twice where partial results are merged or a sink is taken in after the fact. Numbers below the dtype's smallest are
lost: at most n + 1 of them, times the largest |v|. Terms of second order are covered by 5%.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_vtensor.ops.attention_reference import attention


def error_budget(
    exact: dict[str, Any], visible: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The largest error [B, Hq, T, Dv] that arithmetic in ``dtype`` explains. ``exact``: arguments in float64."""
    u = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    info = torch.finfo(dtype)
    r, lost = info.eps / 2, info.smallest_normal * info.eps
    rounds_weights = dtype.itemsize == 2
    query, scale, sinks, softcap = (exact[name] for name in ("query", "scale", "sinks", "softcap"))
    seen = visible.any(1)[:, None, :, None]
    group = query.shape[1] // exact["keys"].shape[1]
    keys = torch.where(seen, exact["keys"], 0.0)
    values = torch.where(seen, exact["values"], 0.0)
    dim = query.shape[3]
    scale = dim**-0.5 if scale is None else scale

    keys_per_head = keys.repeat_interleave(group, 1)
    scores = scale * (query @ keys_per_head.mT)
    score_error = (dim + 3) * u * scale * (query.abs() @ keys_per_head.abs().mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
        score_error = score_error + 8 * u * softcap
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    highest = scores.amax(3, keepdim=True)
    if sinks is not None:
        highest = torch.maximum(highest, sinks[None, :, None, None])
    per_weight = score_error + 2 * u * (scores.abs() + highest.abs()) + 4 * u
    weight_error = torch.where(visible[:, None], per_weight, 0.0).amax(3, keepdim=True)

    num_visible = visible.sum(2)[:, None, :, None]
    magnitude = attention(query, keys, values.abs(), visible, scale, sinks, softcap)
    relative = 2 * weight_error + (r if rounds_weights else 0.0) + 2 * (2 * num_visible + 4) * u
    largest = values.abs().amax((2, 3)).repeat_interleave(group, 1)[:, :, None, None]
    lost_terms = (num_visible + 1) * lost * (1 + largest)
    budget = 1.05 * (magnitude * relative + 2 * r * expected.abs() + lost_terms)
    return torch.where(num_visible > 0, budget, 0.0)
