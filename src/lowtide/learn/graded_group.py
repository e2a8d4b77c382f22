"""One group of the graded model: what its layers are, and their product under masks; `graded` says which gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowtide.compress.products import EXACT, product_type, products
from lowtide.learn.always import Always
from lowtide.learn.clusters import Clusters
from lowtide.learn.slices import Slices, chunks


@dataclass
class GradedGroup:
    """One group: what slices add, and what is always read.

    clusters: of its inputs, if it has any: then a token's mean and bias are those of its cluster;
    slices: what they add, D_k / (r_i c_j), which depends on the digits only;
    rows, cols: the scales r f32 [out] and c f32 [in]; always: outliers and exact columns;
    bias: f32 [out]; mean: f32 [in]; side_bits: read whatever the mask; outs: rows of each linear layer.
    learned, under training: weight z f32 [out, in] in units of r_i c_j, or, of low rank, `up` f32 [out, R] and `down`
    f32 [R, in] whose product is added to a z that stays; log_rows f32 [out] and log_cols f32 [in], the learned parts of
    the scales' natural logarithms; and the bias.
    """

    name: str
    slices: Slices
    rows: torch.Tensor
    cols: torch.Tensor
    always: Always
    stored_bias: torch.Tensor
    mean: torch.Tensor
    side_bits: int
    outs: list[int]
    learned: nn.ParameterDict | None = None
    clusters: Clusters | None = None
    thin = False
    """Whether digits must be made from the parameters at every use."""

    @property
    def out(self) -> int:
        """Rows of all member layers."""
        return len(self.stored_bias)

    def members(self, theta: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        """(rows, thresholds f32 [S]) of what reads alike: all of it under theta f32 [S], each layer under [M, S]."""
        if theta.ndim == 1:
            return [(slice(0, self.out), theta)]
        ends = [sum(self.outs[: i + 1]) for i in range(len(self.outs))]
        rows = [slice(end - out, end) for end, out in zip(ends, self.outs, strict=True)]
        return list(zip(rows, theta, strict=True))

    @property
    def inputs(self) -> int:
        """Input channels."""
        return len(self.mean)

    @property
    def bias(self) -> torch.Tensor:
        """f32 [out], the learned one under training."""
        return self.stored_bias if self.learned is None else self.learned["bias"]

    def middle(self, code: torch.Tensor | None) -> torch.Tensor:
        """What is taken off the input: the mean f32 [in], or that of each token's cluster, i64 [T]: f32 [T, in]."""
        return self.mean if self.clusters is None or code is None else self.clusters.mean[code]

    def parameters(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Weight, log_rows and log_cols; None each, if they are not under training."""
        t = self.learned
        if t is None:
            return None, None, None
        weight: torch.Tensor = t["weight"]
        if "up" in t:
            weight = weight + t["up"] @ t["down"]
        return weight, t["log_rows"], t["log_cols"]

    def coded(self, *parameters: torch.Tensor | None) -> tuple[Slices, torch.Tensor, torch.Tensor]:
        """slices, rows and cols for the `parameters()` given; here they are at hand (`GradedModel.refresh`)."""
        return self.slices, self.rows, self.cols


class MaskedProduct(torch.autograd.Function):
    """(y, slices open for each token, of a row's mean): y = sum_k D_k (a * m_k) + always a, m_k = [score > theta_k],
    a = x for exact channels; see `graded` for the gradients. What comes back takes some tokens at a time
    through every elementwise pass. Masks are made again on the way back: kept, they would take most of the memory."""

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        score: torch.Tensor,
        theta: torch.Tensor,
        weight: torch.Tensor | None,
        log_rows: torch.Tensor | None,
        log_cols: torch.Tensor | None,
        group: GradedGroup,
        tau: float,
    ) -> Any:
        slices, rows, cols = group.coded(weight, log_rows, log_cols)
        coded, count = _read(group, slices, a, cols, score, theta)
        ctx.train_weight = weight is not None
        # What only rows' scales need is kept in half the bytes, unless all shall be exact.
        short = coded if products() == EXACT else coded.to(torch.bfloat16)
        again = (weight, log_rows, log_cols) if group.thin else (None, None, None)
        ctx.save_for_backward(a, score, theta, *((short, *again) if ctx.train_weight else ()))
        ctx.group, ctx.tau = group, tau
        y = coded * rows
        group.always.add(y, a)
        return y, count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        a, score, theta, *kept = ctx.saved_tensors
        slices, rows, cols = ctx.group.coded(*kept[1:])
        own, kind = grads[0] * rows, product_type()
        grad_a, grad_score, grad_theta = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(theta)
        grad_cols, read = torch.zeros_like(cols), a.new_empty(a.shape if ctx.train_weight else (0,), dtype=kind)
        grad_weight = own.new_empty(own.shape[1] if ctx.train_weight else 0, a.shape[1])
        members = ctx.group.members(theta)
        for (of, cuts), grad_cuts in zip(members, [grad_theta] if theta.ndim == 1 else grad_theta, strict=True):
            back, share = slices.part(of).back(own[:, of]), (of.stop - of.start) / own.shape[1]
            for part in chunks(a):
                scaled, opened = a[part] * cols, grads[1][part][:, None] * share
                mask, soft = torch.empty_like(scaled), torch.empty_like(scaled)
                through, pull = torch.zeros_like(scaled), torch.zeros_like(scaled)
                for k, (t, moved) in enumerate(zip(cuts, back(part), strict=True)):
                    through.addcmul_(moved, torch.gt(score[part], t, out=mask))
                    torch.sub(score[part], t, out=soft).div_(ctx.tau).sigmoid_()
                    soft.addcmul_(soft, soft, value=-1)  # the sigmoid's slope
                    moved = moved.mul(scaled).add_(opened).mul_(soft)
                    pull += moved
                    grad_cuts[k] -= moved.sum()
                    if ctx.train_weight and k == 0:
                        read[part] = mask.mul_(scaled)
                grad_score[part] += pull.div_(ctx.tau)
                grad_a[part] += through.mul_(cols)
                grad_cols += through.mul_(a[part]).sum(0)
            if ctx.train_weight:
                grad_weight[of] = own[:, of].to(kind).T @ read
        grad_theta /= ctx.tau
        ctx.group.always.add_back(grad_a, grads[0].contiguous())
        if not ctx.train_weight:
            return grad_a, grad_score, grad_theta, None, None, None, None, None
        grad_rows = own.mul_(kept[0]).sum(0)
        return grad_a, grad_score, grad_theta, grad_weight, grad_rows, grad_cols, None, None


def _read(
    group: GradedGroup,
    slices: Slices,
    a: torch.Tensor,
    cols: torch.Tensor,
    score: torch.Tensor,
    theta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Slices.read` of all rows, and the mean over them of the slices open, f32 [T]."""
    if theta.ndim == 1:
        return slices.read(a, cols, score, theta.unbind())
    parts, count = [], a.new_zeros(len(a))
    for of, cuts in group.members(theta):
        y, opened = slices.part(of).read(a, cols, score, cuts.unbind())
        parts.append(y)
        count += opened * ((of.stop - of.start) / group.out)
    return torch.cat(parts, 1), count
