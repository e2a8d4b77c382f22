"""The distillation loss through the output head, which is read at the budget like everything else.

The head does not learn, nor do its thresholds: a budget counts the decoder's bits. But what comes out of the decoder
should suit the head that will read it, so it is read in full for those who will do so (`--head full`). On stories15M,
whose head is 60 % of its weights, a model trained with a head read in full had a KL of 0.1668 with such a head and
0.1967 with the engine's (st-j2 at 2.357 bits, benchmarks/results/joint-stories15M-feedback-600.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lowtide.compress.products import product_type
from lowtide.learn.graded import GradedModel, Masks
from lowtide.learn.graded_group import GradedGroup

TOKENS, TOKENS_ELSEWHERE = 64, 2048
"""Whose logits are in memory at a time, on a processor and on other devices."""


def head_kl(
    model: GradedModel, ours: torch.Tensor, theirs: torch.Tensor, dense_head: torch.Tensor, masks: Masks
) -> torch.Tensor:
    """KL(dense || ours), nats per token.

    ours, theirs: f32 [..., D], what the heads read; dense_head: [V, D]; masks: decide what is read of ours.
    """
    width = ours.shape[-1]
    result = _HeadKL.apply(ours.reshape(-1, width), theirs.reshape(-1, width), model.groups["head"], dense_head, masks)
    assert isinstance(result, torch.Tensor)
    return result


class _HeadKL(torch.autograd.Function):
    """Mean over tokens, logits never kept: forward and gradient in one pass over some tokens at a time. Masks are held
    on the way back."""

    @staticmethod
    def forward(
        ctx: Any, ours: torch.Tensor, theirs: torch.Tensor, head: GradedGroup, dense_head: torch.Tensor, masks: Masks
    ) -> Any:
        grad, total = torch.empty_like(ours), ours.new_zeros((), dtype=torch.float64)
        at_once = TOKENS if ours.device.type == "cpu" else TOKENS_ELSEWHERE
        masks.see("head", ours)
        a = ours - head.middle(masks.code)
        score, theta = masks.scores("head", a)
        known = head.clusters if masks.code is not None else None
        for start in range(0, len(ours), at_once):
            part = slice(start, start + at_once)
            bias = head.bias if known is None or masks.code is None else known.bias[masks.code[part]]
            product = _Masked(head, a[part], score[part], theta, bias)
            wanted = F.linear(theirs[part].to(product_type()), dense_head).float()
            given = product.forward()
            p, q = wanted.softmax(-1), given.softmax(-1)
            norms = _log_norm(wanted, p) - _log_norm(given, q)
            total += wanted.sub_(given).mul_(p).sum() - norms.sum()
            grad[part] = product.backward(q.sub_(p))
        ctx.save_for_backward(grad / len(ours))
        return (total / len(ours)).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None, None, None, None


class _Masked:
    """The head's product for a few tokens: centred inputs a and scores f32 [T, D], thresholds f32 [S] in log2, and a
    bias f32 [V] or [T, V]."""

    def __init__(
        self, head: GradedGroup, a: torch.Tensor, score: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor
    ) -> None:
        self._head, self._a, self._score, self._cuts, self._bias = head, a, score, theta.unbind(), bias

    def forward(self) -> torch.Tensor:
        """Logits f32 [T, V]."""
        y, _ = self._head.slices.read(self._a, self._head.cols, self._score, self._cuts)
        y.mul_(self._head.rows)
        self._head.always.add(y, self._a)
        return y.add_(self._bias)

    def backward(self, g: torch.Tensor) -> torch.Tensor:
        """What the logits' gradient f32 [T, V] says of x, f32 [T, D]."""
        found = torch.zeros_like(self._a)
        for t, moved in zip(self._cuts, self._head.slices.back(g * self._head.rows)(slice(0, len(g))), strict=True):
            found += moved.mul_(self._score > t)
        found *= self._head.cols
        self._head.always.add_back(found, g)
        return found


def _log_norm(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """log sum exp of logits [T, V], whose softmax p is there already: read off the likeliest."""
    largest, index = logits.max(-1)
    return largest - p.gather(1, index[:, None])[:, 0].log()
