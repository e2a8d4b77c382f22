"""Thresholds of q, k and v apart: how much more or less of each a token needs than of the three together.

One score for each channel serves the three matrices, but an error in q costs less than one in v. The dense model's
gradients say so, too, and exaggerate: what they ask for, two levels between q and v, gains nothing on SmolLM2's twin,
while q's thresholds twice as high alone take 5 % off the KL at 3 bits. So factors, the same in all layers, are found by
trying them in the masked model, at both ends of the budgets: q, then k, then v, by steps as long as it helps. A trial's
bits are kept where they were by moving all thresholds by what its own densities (`level`) foretell; what is left over
counts by `ELASTICITY`. Training may then move every layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lowtide.learn.head import head_kl
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_loss import ELASTICITY
from lowtide.learn.ipn_train import Learner
from lowtide.learn.level import densities

TOKENS = 4096
"""Of training text that a trial sees, in whole windows, at each end of the budgets."""
STEP, MOST = 0.5, 2.0
"""log2 of a factor's step, and of how far it may go."""
WORTH = 0.01
"""By how much the mean of log KL must fall for a step to be taken. Less is not worth another choice of channels, and
may be chance: at 0.003 and half as much text three seeds of SmolLM2's twin found factors for v of 1.4, 1 and 0.7."""


@torch.no_grad()
def find_factors(learner: Learner, report: Callable[[int, int], None] = lambda *_: None) -> None:
    """Set the factors of a network (`Ipn` factor and level) that has them. Where there are several processes all must
    call.

    Args:
        learner: the first of its windows but those held out are seen. Both ends of its budgets count the same.
        report: told of every trial; their number is not known before, at most the total.
    """
    ipn = learner.ipn
    if not ipn.apart:
        return
    best, shares = _look(learner)
    trials, most = 0, 3 * int(2 + 2 * MOST / STEP)
    for member in range(3):
        for step in (STEP, -STEP):
            taken = 0
            while taken * STEP < MOST:
                _move(ipn, member, step, shares)
                value, _ = _look(learner)
                trials += 1
                report(trials, most)
                if not value < best - WORTH:
                    _move(ipn, member, -step, shares)
                    break
                best, taken = value, taken + 1
            if taken:
                break
    report(most, most)


def _look(learner: Learner) -> tuple[float, torch.Tensor]:
    """The mean of log KL at both ends of the budgets, corrected for their bits, and what share q, k and v have in the
    density of all thresholds there, f32 [2, 3]."""
    team, model, ipn, o = learner.parallel, learner.model, learner.ipn, learner.options
    count = len(learner.ids) - learner.held
    batches = max(1, min(TOKENS // learner.ids.shape[1], count) // o.windows)
    model.refresh()
    value, shares = 0.0, torch.zeros(2, 3)
    for end, bits in enumerate((ipn.low, ipn.high)):
        found, own, every = torch.zeros(2), torch.zeros(3), torch.zeros(())
        for batch in range(batches):
            rows = [(batch * o.windows + i) % count for i in range(o.windows)][team.share(o.windows)]
            at = At(ipn, bits, keep_density=True, full_head=o.head == "full")
            hidden, read = model.hidden(learner.ids[rows], at)
            kl = head_kl(model, hidden, learner.dense_states(rows), learner.dense_head, at)
            found += torch.stack([kl, read.mean()]).cpu() / batches
            for name, density in densities(model, at).items():
                every += density.sum().cpu()
                own += density.sum(1).cpu() if ipn.get(name, "factor") is not None else 0
        kl, read = team.reduce_mean(found).tolist()
        value += (math.log(max(kl, 1e-8)) + ELASTICITY * (read - bits)) / 2
        shares[end] = team.reduce_mean(own) / team.reduce_mean(every).clamp_min(1e-9)
    return value, shares


def _move(ipn: Ipn, member: int, step: float, shares: torch.Tensor) -> None:
    """Move q's, k's or v's thresholds in all layers by `step`, log2 units, and all thresholds against it."""
    for name in ipn.start:
        factor = ipn.get(name, "factor")
        if factor is not None:
            factor[member] += step
    low, high = (-step * shares[:, member]).tolist()
    ipn.level[0] += (low + high) / 2
    ipn.level[1] += (high - low) / 2
