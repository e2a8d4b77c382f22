"""gate: the activated gate projection chooses the channels of the down projection, as CATS does."""

from __future__ import annotations

import numpy as np

from lowtide.rules.arrays import Array, namespace
from lowtide.rules.base import ALWAYS, GroupStats, Rule


class Gate(Rule):
    """score_j = |silu(gate_j)| for the group `down`; +inf for every channel of the other groups.

    The infinite score makes the thresholds of the other groups a static choice: finite ones are always passed,
    infinite ones never. CATS also leaves out the masked rows of the up projection; in a channel-major code a row is
    no contiguous run, nothing is saved, and so the bits of `up` count as read.
    """

    name = "gate"
    summary = "|silu(gate)| chooses the channels of down; the other groups read a fixed level"
    source = "CATS (arXiv 2404.08763)"
    needs_gate = True

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        return namespace(x).full_like(x, np.inf) if gate is None else abs(gate)

    def calibrate(
        self, stats: GroupStats, x: np.ndarray, shares: np.ndarray, gate: np.ndarray | None = None
    ) -> np.ndarray:
        """Thresholds f32 [S] for the shares; without a gate the nearest static level that is not 0."""
        if gate is not None:
            return super().calibrate(stats, x, shares, gate)
        level = max(1, round(float(np.sum(shares))))
        return np.where(np.arange(stats.slices) < level, ALWAYS, np.inf).astype(np.float32)
