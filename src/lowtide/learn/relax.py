"""Masks that can be differentiated: a threshold over log-importances, and how the mask moves with them.

With log-importance l, threshold theta and temperature tau a weight survives with probability
p = sigmoid((l - theta) / tau).

- `straight-through`: the forward mask is hard (l > theta), its slope that of p.
- `hard-concrete` (Louizos, Welling & Kingma 2018): the forward mask is clip((zeta - gamma) s + gamma, 0, 1) of
  s = sigmoid((l - theta + tau log(u / (1 - u))) / tau), u uniform; its slope is the exact one.

The penalty on importances above the threshold is lambda * (expected number of survivors). The sparsity is given, so
lambda is not guessed: it is the price in nats at which the step leaves the expected number as it is. Along the
step, sum of slope * (gradient - lambda) = 0 (`price`): Lagrange's condition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

RELAXATIONS = ("straight-through", "hard-concrete")
GAMMA, ZETA = -0.1, 1.1
QUANTILE_SAMPLE = 1 << 20
"""At most so many log-importances are sorted for a threshold while training."""


def threshold(logs: Sequence[torch.Tensor], sparsity: float, exact: bool = False) -> float:
    """The global threshold theta: a share `sparsity` of the log-importances of all layers lies at or below it.

    logs: f32 of any shapes. Unless `exact`, from an even sample of QUANTILE_SAMPLE of them. Minus infinity if
    nothing is to go.
    """
    total = sum(t.numel() for t in logs)
    step = 1 if exact else max(1, total // QUANTILE_SAMPLE)
    sample = torch.cat([t.detach().reshape(-1)[step // 2 :: step] for t in logs])
    count = int(sparsity * len(sample))
    return float(sample.kthvalue(count).values) if count else -float("inf")


def relaxed(
    logs: torch.Tensor, theta: float, tau: float, relaxation: str, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, slope), each f32 [out, in]: the forward mask in [0, 1] and its derivative by the log-importance.

    logs: f32 [out, in]; tau: nats; generator: for the noise of `hard-concrete`.
    """
    if relaxation == "straight-through":
        p = torch.sigmoid((logs - theta) / tau)
        return (logs > theta).float(), p * (1 - p) / tau
    assert relaxation == "hard-concrete", relaxation
    u = torch.rand(logs.shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
    s = torch.sigmoid((logs - theta) / tau + torch.logit(u))
    stretched = (ZETA - GAMMA) * s + GAMMA
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), inside * ((ZETA - GAMMA) / tau) * s * (1 - s)


def price(gradients: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor]) -> float:
    """Lambda: the mean of the mask's gradients, weighed by the slopes, nats per weight.

    gradients: dL/dmask [out, in] of each layer; slopes: dmask/dlog-importance, same shapes.
    """
    gain = sum(float((g * s).sum()) for g, s in zip(gradients, slopes, strict=True))
    room = sum(float(s.sum()) for s in slopes)
    return gain / room if room > 0 else 0.0
