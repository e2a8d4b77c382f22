"""Measuring plans: the offset that keeps the budget, KL and perplexity against the dense model, choosing settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.eval.rivals.base import Fitted, OutOfReach, Plan
from lowtide.eval.rivals.calibration import Calibration
from lowtide.eval.rivals.model import CHUNK_TOKENS, RivalModel

TOLERANCE, WORST = 0.004, 0.01
"""Relative miss of the budget at which the search for the offset stops, and the most that is let pass. Settings are
compared at the second."""
PASSES = 14
FIRST_SLOPE = -1.0
"""Bits per weight and unit of the offset: a fourfold threshold (2 units of log2) takes one 2-bit slice."""
LONGEST_STEP = 2.0
Dense = Callable[[int], torch.Tensor]
"""`dense(i)`: the dense model's log-probabilities f32 [N, V] of window i."""


@dataclass(frozen=True)
class Figures:
    """What was measured: mean KL to the dense model in nats, perplexity, bits read per weight."""

    kl: float
    ppl: float
    bits_read_body: float
    bits_read_total: float


def settle(
    model: RivalModel, plan: Plan, ids: torch.Tensor, bits: float, tolerance: float = TOLERANCE
) -> tuple[torch.Tensor, float]:
    """Move the plan's offset until the mean bits read over ids i64 [B, N] are the budget.

    Returns the head's inputs f32 [B, N, D] and the bits read per body weight.

    Raises:
        OutOfReach: no offset comes within 1 %.
    """
    low = high = None  # (offset, bits): reads too much, reads too little
    last: tuple[float, float] | None = None
    slope, best = FIRST_SLOPE, None
    for _ in range(PASSES):
        states, read = model.states(ids, plan)
        here = (plan.offset, read)
        miss = abs(read / bits - 1)
        if best is None or miss < best[0]:
            best = (miss, plan.offset, states, read)
        if miss <= tolerance:
            break
        if last is not None and here[0] != last[0] and (read - last[1]) / (here[0] - last[0]) < -1e-3:
            slope = (read - last[1]) / (here[0] - last[0])
        low, high = (here, high) if read > bits else (low, here)
        step = (bits - read) / slope
        wanted = here[0] + max(-LONGEST_STEP, min(LONGEST_STEP, step))
        if low is not None and high is not None and not low[0] < wanted < high[0]:
            wanted = (low[0] + high[0]) / 2
        last = here
        plan.offset = wanted
    assert best is not None
    if best[0] > WORST:
        raise OutOfReach(f"{bits:g} bits per weight are not met: {best[3]:.3g} is the nearest")
    plan.offset = best[1]
    return best[2], best[3]


def compare(
    model: RivalModel, states: torch.Tensor, ids: torch.Tensor, head: NDArray[np.float32], dense: Dense
) -> tuple[float, float, float]:
    """(mean KL, perplexity, bits of head and embedding per token) of the head's inputs f32 [B, N, D] of windows ids."""
    kl = nll = read = 0.0
    for i, (window, x) in enumerate(zip(ids, states, strict=True)):
        reference = dense(i)
        following = window[1:]
        for start in range(0, len(x), CHUNK_TOKENS // 4):
            part = slice(start, start + CHUNK_TOKENS // 4)
            logits, bits = model.head(x[part], head)
            ours = torch.log_softmax(logits, -1)
            kl += divergence(reference[part], ours)
            targets = following[part]
            nll -= float(ours[: len(targets)].gather(1, targets[:, None]).sum(dtype=torch.float64))
            read += float(bits.sum(dtype=torch.float64))
    windows, length = ids.shape
    return kl / ids.numel(), math.exp(min(nll / (windows * (length - 1)), 700.0)), read / ids.numel()


def divergence(reference: torch.Tensor, ours: torch.Tensor) -> float:
    """Sum over tokens of KL(reference || ours) in nats, of log-probabilities f32 [n, V]."""
    return float((reference.exp() * (reference - ours)).sum(-1, dtype=torch.float64).sum())


def measure(
    model: RivalModel,
    plan: Plan,
    ids: torch.Tensor,
    bits: float,
    head: NDArray[np.float32],
    dense: Dense,
    tolerance: float = TOLERANCE,
) -> Figures:
    """A plan at its budget on ids i64 [B, N]: every token of every window masked, the offset set on these very tokens.

    Raises:
        OutOfReach: the budget cannot be met within 1 %.
    """
    states, body = settle(model, plan, ids, bits, tolerance)
    kl, ppl, rest = compare(model, states, ids, head, dense)
    total = (body * model.body_weights + rest) / model.all_weights
    return Figures(kl, ppl, body, total)


class Tuner:
    """Chooses settings by KL on the calibration's choice windows. The dense log-probabilities are computed once."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        logits = (calibration.dense.logits(row[None])[0] for row in calibration.choice)
        self._dense = [torch.log_softmax(one, -1) for one in logits]

    def kl(self, plan: Plan, bits: float) -> float:
        """KL of a plan on the choice windows at its budget; the plan's offset is left there."""
        c = self.calibration
        return measure(c.model, plan, c.choice, bits, c.params(bits)["head"], self._dense.__getitem__, WORST).kl

    def tune(self, fitted: Fitted, bits: float) -> tuple[Plan, dict[str, Any]]:
        """The best plan found by going through the knobs one after the other, and its setting.

        Raises:
            OutOfReach: no setting of the first knob meets the budget.
        """
        knobs = fitted.knobs(bits)
        setting = {name: values[0] for name, values in knobs.items()}
        if all(len(values) == 1 for values in knobs.values()):
            plan = fitted.plan(bits, **setting)
            settle(self.calibration.model, plan, self.calibration.choice, bits)
            return plan, setting
        best: tuple[float, Plan] | None = None
        reason: OutOfReach | None = None
        for knob, values in knobs.items():
            for value in values:
                trial = setting | {knob: value}
                if best is not None and trial == setting:
                    continue  # measured already
                try:
                    plan = fitted.plan(bits, **trial)
                    kl = self.kl(plan, bits)
                except OutOfReach as error:
                    reason = error
                    continue
                if best is None or kl < best[0]:
                    best, setting = (kl, plan), trial
            if best is None:
                assert reason is not None
                raise reason
        assert best is not None
        return best[1], setting
