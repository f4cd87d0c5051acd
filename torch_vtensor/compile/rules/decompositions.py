"""Operators rewritten at capture, so that cutting a loss along its rows, or its classes, is exact.

A mean over the rows that are not ignored is not the sum of its pieces' means. As the sum of the rows' losses over a
count it is: the count is one small sum of its own, and a division is linear in what it divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
_MEAN, _SUM = 1, 2
_PARTS, _LEAST_PARTS = 960, 64  # of classes: as many of the first as divide them, which 2, 3, 4, 5, 6 … ranks share out


def cross_entropy_loss(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """A mean `aten.cross_entropy_loss` as the sum over rows divided by their count."""
    if reduction != _MEAN:
        return cast(Tensor, NotImplemented)
    total = aten.cross_entropy_loss.default(self, target, weight, _SUM, ignore_index, label_smoothing)
    if target.shape == self.shape and target.is_floating_point():
        num_classes = self.shape[0 if self.dim() == 1 else 1]
        return _tensor(aten.div.Scalar(total, self.numel() // num_classes))
    return _mean(total, target, weight, ignore_index, self.dtype)


def nll_loss_nd(
    self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = _MEAN, ignore_index: int = -100
) -> Tensor:
    """A mean `aten.nll_loss_nd` as the sum over rows divided by their count."""
    if reduction != _MEAN:
        return cast(Tensor, NotImplemented)
    total = aten.nll_loss_nd.default(self, target, weight, _SUM, ignore_index)
    return _mean(total, target, weight, ignore_index, self.dtype)


def cross_entropy_over_cut_classes(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`aten.cross_entropy_loss` in operators that let classes be cut (a vocabulary over ranks) as well as rows.

    The logarithm of a sum of exponentials is taken of parts of the classes, and once more of what these gave::

        logits [rows, classes] → [rows, parts, classes / parts] → logsumexp [rows, parts] → logsumexp [rows]

    Parts are cut over ranks, so what moves is a number for each, and all that a rank does with its logits is one
    segment, of which half precision is what backward reads. A loss is rounded as the logits that it is a difference of,
    which matters where these are far from zero. Where classes have too few divisors for that, everything
    over classes is a sum. The usual stabilizer, the largest logit, is not; a smooth maximum takes its place,
    ``4 log(sum(exp(y / 4)))`` of the logits less the target's, ``y``. It lies between ``max(y)`` and that plus
    ``4 log(classes)``, so the exponentials that follow neither overflow nor all vanish, as long as no logit exceeds the
    target's by 350 (float32), where the loss becomes infinite. Its gradient is zero: the loss does not depend on it.

    Half precision is rounded once, in the end. Class weights, smoothed labels and probabilities as targets keep the
    classes whole.
    """
    if weight is not None or label_smoothing or target.is_floating_point() or self.dim() != 2:
        return cross_entropy_loss(self, target, weight, reduction, ignore_index, label_smoothing)
    logits = aten._to_copy.default(self, dtype=torch.float32) if self.dtype.itemsize < 4 else self
    kept = aten.ne.Scalar(target, ignore_index)
    # Ignored rows compute the loss of class 0 before it is dropped: an infinite one would make their gradients NaN.
    chosen = aten.unsqueeze.default(aten.where.ScalarOther(kept, target, 0), 1)
    own = aten.gather.default(logits, 1, chosen)
    parts = math.gcd(self.shape[1], _PARTS)
    if parts >= _LEAST_PARTS:
        # A part of nothing but -inf would have NaN for a gradient.
        finite = aten.clamp_min.default(logits, torch.finfo(logits.dtype).min)
        shape = [self.shape[0], parts, self.shape[1] // parts]
        sums = aten.logsumexp.default(aten.reshape.default(finite, shape), [2])
        rows = aten.sub.Tensor(aten.logsumexp.default(sums, [1], True), own)
    else:
        y = aten.sub.Tensor(logits, own)
        smooth_sum = aten.sum.dim_IntList(aten.exp.default(aten.div.Scalar(aten.detach.default(y), 4)), [1], True)
        smooth_max = aten.mul.Scalar(aten.log.default(smooth_sum), 4)
        exponentials = aten.sum.dim_IntList(aten.exp.default(aten.sub.Tensor(y, smooth_max)), [1], True)
        rows = aten.add.Tensor(aten.log.default(exponentials), smooth_max)
    rows = aten.where.ScalarOther(kept, aten.squeeze.dim(rows, 1), 0)
    if reduction == 0:
        return _in(rows, self.dtype)
    total = aten.sum.default(rows)
    if reduction == _SUM:
        return _in(total, self.dtype)
    return _mean(total, target, None, ignore_index, self.dtype)


def _mean(total: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The rows' losses, added up, as the mean over those that count: half precision has too few numbers to count in."""
    count_dtype = torch.float32 if dtype.itemsize < 4 else dtype
    return _in(aten.div.Tensor(total, _count(target, weight, ignore_index, count_dtype)), dtype)


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _tensor(x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype))


def _count(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How many rows a mean divides by: those not ignored, each counted with its class's weight."""
    kept = aten.ne.Scalar(target, ignore_index)
    if weight is None:
        return _tensor(aten._to_copy.default(aten.sum.default(kept), dtype=dtype))
    safe = aten.where.ScalarOther(kept, target, 0)
    weights = aten.reshape.default(aten.index_select.default(weight, 0, aten.reshape.default(safe, [-1])), target.shape)
    return _tensor(aten.sum.default(aten.where.ScalarOther(kept, weights, 0)))


def full(
    self: Tensor, size: Sequence[int], fill_value: Any, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    """A new tensor as a constant, which reads nothing: not the tensor that only gave a dtype and a device."""
    device = options.get("device") or self.device
    return _tensor(aten.full.default(size, fill_value, dtype=dtype or self.dtype, device=device))


def new_zeros(self: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    """`aten.new_zeros` as a constant."""
    return full(self, size, 0, **options)


def new_ones(self: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    """`aten.new_ones` as a constant."""
    return full(self, size, 1, **options)


def zeros_like(self: Tensor, **options: Any) -> Tensor:
    """`aten.zeros_like` as a constant."""
    return full(self, self.shape, 0, **options)


def ones_like(self: Tensor, **options: Any) -> Tensor:
    """`aten.ones_like` as a constant."""
    return full(self, self.shape, 1, **options)


def full_like(self: Tensor, fill_value: Any, **options: Any) -> Tensor:
    """`aten.full_like` as a constant."""
    return full(self, self.shape, fill_value, **options)


def _tensor(value: Any) -> Tensor:
    """What an operator of torch.ops returned, which has no type."""
    assert isinstance(value, Tensor)
    return value


DECOMPOSITIONS: Mapping[OpOverload, Callable[..., Tensor]] = {
    aten.cross_entropy_loss.default: cross_entropy_loss,
    aten.full_like.default: full_like,
    aten.new_full.default: full,
    aten.new_ones.default: new_ones,
    aten.new_zeros.default: new_zeros,
    aten.nll_loss_nd.default: nll_loss_nd,
    aten.ones_like.default: ones_like,
    aten.zeros_like.default: zeros_like,
}
"""What capture replaces, in the form of a decomposition table: NotImplemented keeps a call as it is.

For classes cut over ranks, put `cross_entropy_over_cut_classes` in place of the first.
"""
