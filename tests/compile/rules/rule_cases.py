"""Calls of every family of operators: small odd shapes, broadcasting, negative dims, composites, sizes of 1."""

from typing import Any

import torch
from brute_force import Case, case
from torch import Tensor

aten = torch.ops.aten
_generator = torch.Generator().manual_seed(0)


def x(*shape: int) -> Tensor:
    return c(*shape).requires_grad_()


def c(*shape: int) -> Tensor:
    """A tensor without a gradient."""
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def i(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def b(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_generator) < 0.5


def cases() -> list[Case]:
    return [*elementwise(), *shape(), *matmul(), *attention(), *reduce(), *index(), *create()]


def elementwise() -> list[Case]:
    return [
        case(aten.add.Tensor, x(3, 5), x(3, 5)),
        case(aten.add.Tensor, x(3, 5), x(5), alpha=0.5),
        case(aten.add.Tensor, x(2, 1, 4), x(3, 1)),
        case(aten.add.Tensor, x(3, 5), 2.0),
        case(aten.sub.Tensor, x(4), x(3, 1)),
        case(aten.mul.Tensor, x(2, 3, 4), x(3, 1)),
        case(aten.mul.Tensor, x(), x(3)),
        case(aten.mul.Scalar, x(3), 2.0),
        case(aten.div.Tensor, x(3, 4), x(3, 1).abs() + 1),
        case(aten.div.Tensor, x(3, 4), x()),
        case(aten.div.Tensor_mode, x(3, 4), x(4), rounding_mode="floor"),
        case(aten.pow.Tensor_Scalar, x(3, 4), 2),
        case(aten.gelu.default, x(3, 4), approximate="tanh"),
        case(aten.silu.default, x(5)),
        case(aten.rsqrt.default, x(5).abs() + 1),
        case(aten.neg.default, x(2, 3)),
        case(aten.where.self, b(3, 4), x(3, 1), x(4)),
        case(aten.where.ScalarOther, b(3, 4), x(3, 4), 0.0),
        case(aten.masked_fill.Scalar, x(2, 3, 4), b(3, 1), 0.0),
        case(aten.masked_fill.Scalar, x(2, 3, 4), b(3, 1), 7.0),
        case(aten.where.default, b(3, 4)),
        case(aten.masked_fill.Tensor, x(2, 3), b(2, 3), x()),
        case(aten.clone.default, x(2, 3), memory_format=torch.contiguous_format),
        case(aten.contiguous.default, x(2, 3)),
        case(aten._to_copy.default, x(2, 3), dtype=torch.float32),
        case(aten._to_copy.default, i(5, 2, 3), dtype=torch.float64),
        case(aten.type_as.default, x(2, 3), x(7, 7, 7)),
        case(aten.dropout.default, x(3, 4), 0.0, True),
        case(aten.native_dropout.default, x(3, 4), 0.0, True),
        case(aten.clamp.default, x(3, 4), -1.0, 1.0),
        case(aten.eq.Tensor, i(3, 4, 1), i(3, 5)),
        case(aten.broadcast_tensors.default, [x(3, 1), x(4)]),
        case(aten.minimum.default, x(3), x(2, 1)),
        case(aten.lerp.Scalar, x(3), x(3), 0.3),
        case(aten.addcmul.default, x(3, 2), x(2), x(3, 1)),
        case(aten.copy.default, c(3, 4), c(4)),
        case(aten.zeros_like.default, x(3, 2)),
        case(aten.mul.Tensor, x(0, 3), x(3)),
    ]


def shape() -> list[Case]:
    return [
        case(aten.view.default, x(2, 6, 12), [2, 6, -1, 4]),
        case(aten.view.default, x(2, 6, 3, 4), [2, 6, 12]),
        case(aten.view.default, x(2, 3, 4), [6, 4]),
        case(aten.view.default, x(6, 4), [8, 3]),
        case(aten.view.default, x(12, 2), [2, 3, 1, 4]),
        case(aten.view.default, x(4, 6, 5), [3, 8, 5]),
        case(aten.view.default, x(2, 3, 5), [3, 2, 5]),
        case(aten.view.default, x(1, 6, 1), [2, 1, 3]),
        case(aten.view.default, x(6), [1, 6]),
        case(aten.view.default, x(1), []),
        case(aten.view.default, x(2, 2, 2, 3), [4, 6]),
        case(aten.view.default, x(15, 4), [6, 10]),
        case(aten._unsafe_view.default, x(2, 2, 3), [4, 3]),
        case(aten.reshape.default, x(2, 4, 3), [2, 2, 2, 3]),
        case(aten.flatten.using_ints, x(2, 3, 4), 1, -1),
        case(aten.unflatten.int, x(2, 6), -1, [3, 2]),
        case(aten.unsqueeze.default, x(2, 3), -1),
        case(aten.squeeze.dim, x(2, 1, 3), 1),
        case(aten.squeeze.default, x(2, 1, 3)),
        case(aten.view_as.default, x(6), x(2, 3)),
        case(aten.expand.default, x(2, 1, 3), [4, 2, 5, -1]),
        case(aten.expand.default, x(3), [3]),
        case(aten.expand_as.default, x(3, 1), x(3, 4)),
        case(aten.permute.default, x(2, 3, 4), [2, 0, -2]),
        case(aten.transpose.int, x(2, 3, 4), -1, 1),
        case(aten.t.default, x(3, 4)),
        case(aten.movedim.int, x(3, 4, 2), 0, -1),
        case(aten.slice.Tensor, x(4, 6), 1, 2, 5),
        case(aten.slice.Tensor, x(4, 6), 1, 0, 9223372036854775807),
        case(aten.slice.Tensor, x(4, 6), -2, 0, 4),
        case(aten.slice.Tensor, x(4, 6), 1, 0, 6, 2),
        case(aten.narrow.default, x(4, 6), 1, 0, 6),
        case(aten.narrow.default, x(4, 6), 1, 2, 3),
        case(aten.select.int, x(4, 3), 0, -1),
        case(aten.split.Tensor, x(4, 6), 4, -1),
        case(aten.split_with_sizes.default, x(4, 6), [1, 5], 1),
        case(aten.chunk.default, x(4, 6), 3, 1),
        case(aten.tensor_split.tensor_indices_or_sections, x(4, 3), torch.tensor([1, 3])),
        case(aten.unbind.int, x(3, 4), 0),
        case(aten.unfold.default, x(3, 8), 1, 4, 2),
        case(aten.diff.default, x(3, 5), 1, -1, x(3, 1)),
        case(aten.flip.default, x(3, 4), [1]),
        case(aten.cat.default, [x(3, 2), x(3, 4)], -1),
        case(aten.slice_scatter.default, x(3, 5), x(3, 2), 1, 1, 5, 2),
        case(aten.select_scatter.default, x(3, 5), x(3), -1, 2),
        case(aten.stack.default, [x(3, 2), x(3, 2)], 1),
        case(aten.roll.default, x(2, 4, 4, 3), [-1, 2], [1, 2]),
        case(aten.roll.default, x(4, 3), [1]),
        case(aten.pad.default, x(2, 3, 4), [1, 2]),
        case(aten.pad.default, x(2, 3, 4), [0, 0, 1, 0], "constant", 3.0),
        case(aten.constant_pad_nd.default, x(3, 4), [0, 1], 0.0),
        case(aten.repeat.default, x(3, 2), [2, 1, 3]),
        case(aten.repeat_interleave.self_int, x(3, 2), 3, 0),
        case(aten.tril.default, x(2, 4, 5), 1),
        case(aten.triu.default, x(4, 4)),
        case(aten.cumsum.default, x(3, 4), -1),
        case(aten.sort.default, x(3, 4), 1),
        case(aten.topk.default, x(3, 4), 2),
        case(aten.glu.default, x(3, 4), -1),
    ]


def matmul() -> list[Case]:
    return [
        case(aten.linear.default, x(2, 3, 4), x(5, 4), x(5)),
        case(aten.linear.default, x(3, 4), x(5, 4)),
        case(aten.linear.default, x(4), x(3, 4), x(3)),
        case(aten.linear.default, x(3, 4), x(1, 4), x(1)),
        case(aten.mm.default, x(3, 4), x(4, 5)),
        case(aten.bmm.default, x(2, 3, 4), x(2, 4, 3)),
        case(aten.mv.default, x(3, 4), x(4)),
        case(aten.dot.default, x(4), x(4)),
        case(aten.matmul.default, x(2, 1, 3, 4), x(5, 4, 2)),
        case(aten.matmul.default, x(3), x(2, 3, 4)),
        case(aten.matmul.default, x(2, 3, 4), x(4)),
        case(aten.matmul.default, x(4), x(4)),
        case(aten.matmul.default, x(1, 4, 1), x(1, 1, 6)),
        case(aten.addmm.default, x(4), x(3, 5), x(5, 4)),
        case(aten.addmm.default, x(3, 1), x(3, 5), x(5, 4), beta=0.5, alpha=2.0),
        case(aten.baddbmm.default, x(2, 3, 4), x(2, 3, 5), x(2, 5, 4)),
        case(aten.addmv.default, x(3), x(3, 4), x(4)),
        case(aten.einsum.default, "bikc,bjkc->bijc", [x(2, 3, 4, 2), x(2, 3, 4, 2)]),
        case(aten.einsum.default, "...i,ij->...j", [x(2, 3, 4), x(4, 5)]),
        case(aten.einsum.default, "ab,bc", [x(3, 4), x(4, 2)]),
        case(aten.einsum.default, "sic,sjd->ijcd", [x(2, 3, 2), x(2, 3, 4)]),
        case(aten.einsum.default, "ii->i", [x(3, 3)]),
        case(aten.einsum.default, "ab,ab->", [x(3, 4), x(1, 4)]),
        case(aten.conv2d.default, x(2, 3, 6, 4), x(5, 3, 2, 2), x(5), [2, 2]),
        case(aten.conv2d.default, x(2, 3, 5, 5), x(4, 3, 3, 3), x(4), [1, 1], [1, 1]),
        case(aten.conv2d.default, x(2, 4, 5, 5), x(6, 2, 3, 3), x(6), [1, 1], [0, 0], [1, 1], 2),
        case(aten.conv1d.default, x(2, 4, 6), x(4, 1, 3), x(4), [1], [1], [1], 4),
        case(aten.conv1d.default, x(4, 6), x(2, 4, 3)),
        case(aten.conv2d.padding, x(2, 3, 5, 5), x(4, 3, 3, 3), None, [1, 1], "same"),
        case(aten.convolution.default, x(2, 3, 4, 4), x(4, 3, 2, 2), None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
        case(aten.conv_transpose2d.input, x(2, 4, 3, 3), x(4, 3, 2, 2), x(6), [2, 2], [0, 0], [0, 0], 2, [1, 1]),
        case(aten.convolution.default, x(2, 3, 4), x(3, 2, 2), x(2), [2], [0], [1], True, [0], 1),
    ]


def attention() -> list[Case]:
    sdpa = aten.scaled_dot_product_attention.default
    return [
        case(sdpa, x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 4)),
        case(sdpa, x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 4), b(2, 1, 3, 5) | (torch.arange(5) == 0)),
        case(sdpa, x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 4), x(3, 5), scale=0.3),
        case(sdpa, x(2, 2, 5, 4), x(2, 2, 5, 4), x(2, 2, 5, 4), None, 0.0, True),
        case(sdpa, x(1, 2, 6, 4), x(1, 2, 3, 4), x(1, 2, 3, 4), is_causal=True),
        case(sdpa, x(1, 2, 3, 4), x(1, 2, 6, 4), x(1, 2, 6, 2), is_causal=True),
        case(sdpa, x(2, 6, 3, 4), x(2, 2, 3, 4), x(2, 2, 3, 4), is_causal=True, enable_gqa=True),
        case(sdpa, x(1, 4, 3, 4), x(1, 1, 3, 4), x(1, 1, 3, 4), x(1, 4, 3, 3), enable_gqa=True),
        case(sdpa, x(3, 4, 2), x(3, 5, 2), x(3, 5, 2)),
        case(sdpa, x(4, 2), x(5, 2), x(5, 2)),
    ]


def reduce() -> list[Case]:
    loss: Any = {"reduction": 1}
    return [
        case(aten.sum.default, x(3, 4)),
        case(aten.sum.dim_IntList, x(2, 3, 4), [1, -1], True),
        case(aten.sum.dim_IntList, x(2, 3), []),
        case(aten.sum.default, b(7)),
        case(aten.mean.default, x(3, 4)),
        case(aten.mean.dim, x(), [0]),
        case(aten.mean.dim, x(2, 3, 4), [-1], True),
        case(aten.mean.dim, x(2, 3, 4), [0, 2]),
        case(aten.amax.default, x(3, 4), [-1]),
        case(aten.max.default, x(3, 4)),
        case(aten.max.dim, x(3, 4), 1, True),
        case(aten.argmax.default, x(3, 4), -1),
        case(aten.any.dim, b(3, 4), 0),
        case(aten.var.correction, x(3, 4), [1], keepdim=True),
        case(aten.var_mean.correction, x(3, 4), [1]),
        case(aten.logsumexp.default, x(3, 4), [0]),
        case(aten.prod.dim_int, x(3, 4), 1),
        case(aten.linalg_vector_norm.default, x(3, 4), 2, [1]),
        case(aten.softmax.int, x(2, 3, 4), 1),
        case(aten._softmax.default, x(3, 4), -1, False),
        case(aten.log_softmax.int, x(3, 4), -1),
        case(aten.layer_norm.default, x(2, 3, 4), [4], x(4), x(4)),
        case(aten.layer_norm.default, x(2, 3, 4), [3, 4]),
        case(aten.native_layer_norm.default, x(2, 3, 4), [4], x(4), None, 1e-5),
        case(aten.rms_norm.default, x(2, 3, 4), [4], x(4)),
        case(aten.group_norm.default, x(2, 6, 3), 3, x(6), x(6)),
        case(aten.group_norm.default, x(2, 4, 3, 2), 1),
        case(aten.batch_norm.default, x(4, 3, 2), x(3), x(3), c(3), c(3).abs(), False, 0.1, 1e-5, False),
        case(aten.batch_norm.default, x(4, 3, 2), x(3), None, None, None, True, 0.1, 1e-5, False),
        case(aten._native_batch_norm_legit_functional.default, x(4, 3), x(3), x(3), c(3), c(3).abs(), True, 0.1, 1e-5),
        case(aten.avg_pool2d.default, x(2, 3, 4, 4), [2, 2]),
        case(aten.max_pool2d.default, x(3, 4, 4), [2, 2]),
        case(aten.adaptive_avg_pool1d.default, x(2, 3, 4), [2]),
        case(aten.mse_loss.default, x(3, 4), x(3, 4)),
        case(aten.mse_loss.default, x(3, 4), x(3, 4), 0),
        case(aten.l1_loss.default, x(3, 4), x(3, 4), 2),
        case(aten.binary_cross_entropy_with_logits.default, x(3, 4), x(3, 4).sigmoid()),
        case(aten.kl_div.default, x(3, 4), x(3, 4).sigmoid(), **loss),
    ]


def index() -> list[Case]:
    return [
        case(aten.embedding.default, x(7, 3), i(7, 2, 4)),
        case(aten.embedding.default, x(7, 3), i(7, 8), 2),
        case(aten.embedding.default, x(7, 3), i(7, 8), -1, True),
        case(aten.index_select.default, x(3, 5, 2), 1, i(5, 4)),
        case(aten.gather.default, x(3, 5), 1, i(5, 3, 2)),
        case(aten.gather.default, x(3, 5, 2), 1, i(5, 3, 1, 2)),
        case(aten.gather.default, x(3, 5, 2), -2, i(5, 2, 4, 2)),
        case(aten.index.Tensor, x(5, 3), [i(5, 4)]),
        case(aten.index.Tensor, x(5, 3), [i(5, 4) - 3]),
        case(aten.index.Tensor, x(5, 3, 2), [None, i(3, 2, 2) - 1]),
        case(aten.index.Tensor, x(5, 3, 2), [i(5, 4, 1), i(3, 2)]),
        case(aten.index.Tensor, x(5, 3, 2), [i(5, 4), None, i(2, 4)]),
        case(aten.index.Tensor, x(5, 3), [torch.tensor([True, False, True, True, False])]),
        case(aten.one_hot.default, i(5, 3, 2), 5),
        case(aten.cross_entropy_loss.default, x(6, 4), i(4, 6), None, 2),
        case(aten.cross_entropy_loss.default, x(2, 4, 3), i(4, 2, 3), c(4).abs(), 2, 1),
        case(aten.cross_entropy_loss.default, x(6, 4), i(4, 6), None, 1, 1),
        case(aten.cross_entropy_loss.default, x(6, 4), x(6, 4).softmax(1), None, 2, -100, 0.1),
        case(aten.cross_entropy_loss.default, x(6, 4), i(4, 6), None, 0, 1),
        case(aten.nll_loss_nd.default, x(6, 4), i(4, 6), None, 2, 1),
    ]


def create() -> list[Case]:
    return [
        case(aten.full.default, [3, 4], 2.5, dtype=torch.float64),
        case(aten.zeros.default, [3]),
        case(aten.new_ones.default, x(2), [3, 2]),
        case(aten.arange.default, 5),
        case(aten.arange.start, 2, 7),
        case(aten.arange.start_step, 9, 2, -3),
        case(aten.arange.default, 2.5),
        case(aten.eye.default, 3),
        case(aten.scalar_tensor.default, 3.0),
    ]
