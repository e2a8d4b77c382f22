"""dense: everything that is stored is read."""

from __future__ import annotations

import numpy as np

from lowtide.rules.arrays import Array, astype, namespace
from lowtide.rules.base import GroupStats, Rule, finish


class Dense(Rule):
    """Level S for every channel; params are ignored."""

    name = "dense"
    summary = "all slices of all channels"
    source = "the upper end of every curve"

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        return namespace(x).ones_like(x)

    def levels(self, stats: GroupStats, x: Array, params: Array, gate: Array | None = None) -> Array:
        """Levels int32 [..., in] for x f32 [..., in]."""
        return finish(stats, astype(namespace(x).ones_like(x), "int32") * stats.slices)

    def shift(self, params: Array, offset: float) -> Array:
        return params

    def calibrate(
        self, stats: GroupStats, x: np.ndarray, shares: np.ndarray, gate: np.ndarray | None = None
    ) -> np.ndarray:
        """Zeros f32 [S]: there is nothing to set."""
        return np.zeros(stats.slices, np.float32)
