"""Cases of skinny_linear, and what a result may be off by: derived from the arithmetic, not tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Widths = tuple[int, ...]


class Arguments(NamedTuple):
    """Of skinny_linear, or, with two weights and nothing else, of skinny_gated_linear."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    norm: torch.Tensor | None
    eps: float
    residual: torch.Tensor | None


@dataclass(frozen=True)
class SkinnyCase:
    """Rows of ``k`` elements, one by default, times matrices of ``widths`` rows."""

    k: int
    widths: Widths
    has_bias: tuple[bool, ...] = (False, False, False)
    has_norm: bool = False
    has_residual: bool = False
    dtype: torch.dtype = torch.float32
    num_rows: int = 1

    def arguments(self, device: str = "cpu") -> Arguments:
        """Random, the same every time."""
        random = torch.Generator().manual_seed(self.k)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random).to(self.dtype).to(device)

        return Arguments(
            randn(self.num_rows, 1, self.k),
            [randn(n, self.k) for n in self.widths],
            [randn(n) if has else None for n, has in zip(self.widths, self.has_bias, strict=False)],
            randn(self.k) if self.has_norm else None,
            1e-5,
            randn(self.num_rows, 1, self.widths[0]) if self.has_residual else None,
        )

    def exact(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Results in float64, before a residual, and the largest errors that arithmetic in ``dtype`` explains.

        A sum of K float32 products is off by at most K u times the sum of their sizes. The norm's own sum, root and
        products add as much again. 16-bit dtypes round the normed input in two places, if an implementation stores it,
        and the result once, and once more with a residual.
        """
        a = self.arguments()
        x = a.x.double()
        if a.norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + a.eps) * a.norm.double()
        u, r = torch.finfo(torch.float32).eps, torch.finfo(self.dtype).eps / 2
        results, budgets = [], []
        for weight, bias in zip(a.weights, a.biases, strict=True):
            result = torch.nn.functional.linear(x, weight.double(), None if bias is None else bias.double())
            size = x.abs() @ weight.double().abs().mT
            rounded_input = 2 * r if self.has_norm and self.dtype.itemsize == 2 else 0.0
            results.append(result)
            budgets.append(1.05 * (size * (2 * (self.k + 8) * u + rounded_input) + 2 * r * result.abs()) + 1e-6)
        return results, budgets

    def check(self, outs: list[torch.Tensor]) -> None:
        """As exact as the dtype allows."""
        a = self.arguments()
        results, budgets = self.exact()
        r = torch.finfo(self.dtype).eps / 2
        assert len(outs) == len(results)
        for out, result, budget in zip(outs, results, budgets, strict=True):
            assert out.dtype is self.dtype
            if a.residual is not None:
                result = result + a.residual.double()
                budget = budget + 2 * r * result.abs()
            error = (out.cpu().double() - result).abs()
            assert bool((error <= budget).all()), f"{(error / budget).max():.3g} times the error budget: {self}"

    def check_normed(self, total: torch.Tensor, normed: torch.Tensor, weight: torch.Tensor) -> None:
        """The sum as exact as `check` wants, and normed: by its own values, rounded in two places."""
        self.check([total])
        wide = total.cpu().double()
        result = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.arguments().eps) * weight.cpu().double()
        r = torch.finfo(self.dtype).eps / 2
        error = (normed.cpu().double() - result).abs()
        budget = result.abs() * (2.1 * r + 4 * (self.k + 8) * torch.finfo(torch.float32).eps) + 1e-9
        assert normed.dtype is self.dtype
        assert bool((error <= budget).all()), f"{(error / budget).max():.3g} times the error budget: {self}"

    def check_gated(self, out: torch.Tensor) -> None:
        """``silu`` grows by at most 1.1 times its argument's error; implementations may round three times more."""
        (gate, up), (gate_budget, up_budget) = self.exact()
        activated = torch.nn.functional.silu(gate)
        r = torch.finfo(self.dtype).eps / 2
        budget = 1.1 * gate_budget * (up.abs() + up_budget) + activated.abs() * up_budget
        budget = budget + 4 * max(r, 4 * torch.finfo(torch.float32).eps) * (activated * up).abs()
        error = (out.cpu().double() - activated * up).abs()
        assert out.dtype is self.dtype
        assert bool((error <= budget).all()), f"{(error / budget).max():.3g} times the error budget: {self}"


CASES = [
    SkinnyCase(64, (48,)),
    SkinnyCase(100, (7, 33, 1), (True, False, True), has_norm=True),
    SkinnyCase(96, (40,), (True,), has_residual=True),
    SkinnyCase(4100, (9,), has_norm=True, has_residual=True),
    SkinnyCase(256, (16, 5), (False, True), has_norm=True, dtype=torch.float16),
    SkinnyCase(512, (33,), has_residual=True, dtype=torch.float16),
]
GATED = [SkinnyCase(64, (48, 48)), SkinnyCase(100, (7, 7), has_norm=True), SkinnyCase(256, (9, 9), dtype=torch.float16)]
SEVERAL = [
    SkinnyCase(64, (48,), num_rows=2),
    SkinnyCase(192, (7, 33, 1), (True, False, True), has_norm=True, num_rows=5),
    SkinnyCase(1024, (40,), (True,), has_residual=True, num_rows=17),
    SkinnyCase(576, (130,), has_norm=True, has_residual=True, num_rows=33),
    SkinnyCase(96, (16, 5), (False, True), has_norm=True, num_rows=4),
    SkinnyCase(512, (6208,), num_rows=64),
    SkinnyCase(128, (24,), (True,), has_norm=True, has_residual=True, num_rows=65),
]
SEVERAL_GATED = [
    SkinnyCase(64, (48, 48), num_rows=3),
    SkinnyCase(256, (70, 70), has_norm=True, num_rows=64),
    SkinnyCase(96, (16, 16), num_rows=66),
]
