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
FLOOR = 0.1
"""Of the density, bits per log2 unit: where scores are far from thresholds, moving those far is no remedy."""


def densities(model: GradedModel, at: At) -> dict[str, torch.Tensor]:
    """-d bits / d theta of every group's thresholds, f32 [S], in bits per weight of the body."""
    return {name: 2.0 * model.groups[name].out * near / model.weights for name, near in at.density.items()}


@torch.no_grad()
def hold(ipn: Ipn, bits: float, read: float, density: float) -> None:
    """Move the level after a step at a budget that read so many bits."""
    place = ipn.place(bits)
    move = GAIN * (read - bits) / max(density, FLOOR) / (1 + place * place)
    ipn.level[0] += move
    ipn.level[1] += move * place


@torch.no_grad()
def project(ipn: Ipn, density: dict[str, torch.Tensor]) -> None:
    """Take what all thresholds have in common out of the gradients of `delta` and `slope`."""
    total = float(sum(d.sum() for d in density.values()))
    if total <= 0:
        return
    for what in ("delta", "slope"):
        found = {name: p.grad for name in density if (p := ipn.get(name, what)) is not None and p.grad is not None}
        common = float(sum(g.sum() for g in found.values()))
        for name, g in found.items():
            g -= common / total * density[name]
