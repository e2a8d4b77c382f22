"""Bits stay on the budget while training: a controller moves all thresholds together, gradients only one against
another.

Left to gradients, bits wander: Adam moves every threshold at its rate whatever the size of its gradient, so what all
have in common adds up, and training spends its steps on another operating point than the one asked for.

After a step that read `read` bits at budget B the level is moved by `GAIN (read - B) / density`, where the density,
-d bits / d theta, is counted in the same forward pass. Two numbers are kept (`Ipn.level`), at the middle of the budgets
trained for and the slope from there to either end, and changed by the least that moves the level at B so far. Like
everything else that learns they are part of checkpoints.

What the gradient says about all thresholds together is taken out of it (`project`): where a bit is worth as much as
its price there is nothing to gain from it, and otherwise the controller would only undo it. What is taken is
proportional to each threshold's density, which is to say that thresholds feel the price at which no force is left on
their common level.
"""

from __future__ import annotations

import torch

from lowtide.learn.graded import GradedModel
from lowtide.learn.ipn import At, Ipn

GAIN = 0.5
"""Part of the error that a step takes back: a step's text is not all text."""
TINY = 1e-12
FLOOR = 0.1
"""Of the density, bits per log2 unit: where scores are far from thresholds, moving those far is no remedy."""


def densities(model: GradedModel, at: At) -> dict[str, torch.Tensor]:
    """-d bits / d theta of every group's thresholds, f32 [M, S] (see `At`), in bits per weight of the body."""
    return {name: 2.0 * rows_of(model, name, near) * near / model.weights for name, near in at.density.items()}


def rows_of(model: GradedModel, name: str, of: torch.Tensor) -> torch.Tensor:
    """Rows of what reads alike in a group, f32 [M, 1 ...], for `of` [M, ...]."""
    group = model.groups[name]
    rows = group.outs if len(of) > 1 else [group.out]
    return torch.tensor(rows, dtype=torch.float32).to(of.device).view(-1, *([1] * (of.ndim - 1)))


@torch.no_grad()
def hold(ipn: Ipn, bits: float, read: float, density: float) -> None:
    """Move the level after a step at a budget that read so many bits."""
    place = ipn.place(bits)
    move = GAIN * (read - bits) / max(density, FLOOR) / (1 + place * place)
    ipn.level[0] += move
    ipn.level[1] += move * place


@torch.no_grad()
def project(ipn: Ipn, density: dict[str, torch.Tensor]) -> None:
    """Take what all thresholds have in common out of the gradients of `delta`, `slope` and `factor`."""
    total = float(sum(d.sum() for d in density.values()))
    if total <= 0:
        return
    for what, over in (("delta", 0), ("slope", 0), ("factor", 1)):
        found = {name: p.grad for name in density if (p := ipn.get(name, what)) is not None and p.grad is not None}
        common = float(sum(g.sum() for g in found.values()))
        reach = float(sum(density[name].sum() for name in found))
        for name, g in found.items():
            g -= common / max(reach, TINY) * density[name].sum(over)
