"""What learning minimises: distillation, the price of bytes, and masks that do not jump about.

    loss = log KL(dense || masked) + pressure * max(0, bits - target)    (hinge, the default)
         | log KL(dense || masked) + l1 * mean soft mask                 (l1, the specification's term)
         + consistency * mean |m_t - m_{t+1}|, and |m(x) - m(x + noise)|, of soft masks

The logarithm gives every budget the same say: at 2 bits the KL is ten times that at 3.5. Bits are held on the budget by
a controller (`learn.level`), and what a price says about all thresholds together is taken out of their gradients; the
hinge still moves importances and offsets. log KL falls by about ELASTICITY for each bit that is read; a pressure below
that would buy quality with bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowtide.errors import LowtideError
from lowtide.learn.graded import GradedModel
from lowtide.learn.ipn import At
from lowtide.learn.level import rows_of

ELASTICITY = 1.6
"""-d log KL / d bits, measured from 2 to 3.5 bits on stories15M and SmolLM2."""
SPARSITY_LOSSES = ("hinge", "l1")
NOISE = 0.05
"""Root mean square of the perturbed copies' noise, relative to a channel's magnitude."""


@dataclass(frozen=True)
class Prices:
    """Weights of the terms: kind of the sparsity term, its weight (`pressure` or `l1`), and that of consistency."""

    kind: str = "hinge"
    pressure: float = 4.0
    l1: float = 1.0
    consistency: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SPARSITY_LOSSES:
            raise LowtideError(f"--sparsity-loss {self.kind}: known are {', '.join(SPARSITY_LOSSES)}")
        if self.kind == "hinge" and self.pressure <= ELASTICITY:
            raise LowtideError(f"--pressure {self.pressure:g}: must be above {ELASTICITY:g}, or bits buy quality")
        for option, value in (("--l1", self.l1), ("--consistency", self.consistency)):
            if not 0 <= value < math.inf:
                raise LowtideError(f"{option} {value:g}: must be 0 or more")

    @property
    def needs_margins(self) -> bool:
        """Whether soft masks enter the loss."""
        return self.kind == "l1" or self.consistency > 0


def loss_of(
    prices: Prices,
    model: GradedModel,
    kl: torch.Tensor,
    bits: torch.Tensor,
    target: float,
    at: At,
    draw: torch.Generator | None = None,
) -> torch.Tensor:
    """kl: scalar, nats; bits: f32 [B, N] read per weight; target: the budget of this step; at: the masks' margins;
    draw: the step's generator, for the perturbed copies."""
    loss = torch.log(kl.clamp_min(1e-8))
    if prices.kind == "hinge":
        loss = loss + prices.pressure * torch.relu(bits.mean() - target)
    else:
        loss = loss + prices.l1 * mean_open(model, at)
    if prices.consistency > 0:
        loss = loss + prices.consistency * unrest(model, at, bits.shape[1], draw)
    return loss


def mean_open(model: GradedModel, at: At) -> torch.Tensor:
    """Soft masks' mean over all slices and weights of the body: the L1 norm of the mask, from 0 to 1."""
    parts, weights = [], 0
    for name, margins in at.margins.items():
        group = model.groups[name]
        soft = torch.sigmoid(margins / at.tau).mean((1, 2)).sum(1)
        parts.append((rows_of(model, name, soft) * soft).sum())
        weights += group.out * group.inputs
    return torch.stack(parts).sum() / weights


def unrest(model: GradedModel, at: At, window: int, draw: torch.Generator | None = None) -> torch.Tensor:
    """How much soft masks differ between consecutive tokens and from those of a perturbed copy, weighted by outputs.

    The copy's input is x (1 + noise), whose log2 score moves by log2(1 + noise): scores are products.
    """
    parts, weights = [], 0
    for name, margins in at.margins.items():
        members, slices, tokens, inputs = margins.shape
        soft = torch.sigmoid(margins / at.tau).view(members, slices, tokens // window, window, inputs)
        noise = torch.randn(tokens, inputs, generator=draw).to(margins.device)
        moved = margins + torch.log2((1 + NOISE * noise).clamp_min(0.1))
        jumps = (soft[:, :, :, 1:] - soft[:, :, :, :-1]).abs().mean((1, 2, 3, 4))
        shaken = (soft.view_as(margins) - torch.sigmoid(moved / at.tau)).abs().mean((1, 2, 3))
        parts.append((rows_of(model, name, jumps) * inputs * (jumps + shaken)).sum())
        weights += model.groups[name].out * inputs
    return torch.stack(parts).sum() / weights
