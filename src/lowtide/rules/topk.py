"""topk: the same number of channels for every token."""

from __future__ import annotations

import numpy as np

from lowtide.rules.arrays import Array, like
from lowtide.rules.base import GroupStats, Rule, count_ranked, finish
from lowtide.rules.channel_norm import ChannelNorm


class TopK(Rule):
    """The params[s] channels with the highest channel-norm score take slice s, whatever the scores are.

    params f32 [S] are counts, descending. A channel takes slice s if its rank (0 is best, ties go to the lower
    channel) is below params[s], so fractions of a channel round up.
    """

    name = "topk"
    summary = "a fixed number of channels per level, best channel-norm score first"
    source = "the fixed-count baseline of TEAL, WINA and Spark Transformer"

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        return ChannelNorm().score(stats, x)

    def levels(self, stats: GroupStats, x: Array, params: Array, gate: Array | None = None) -> Array:
        """Levels int32 [..., in] for x f32 [..., in]; params f32 [S]: counts."""
        return finish(stats, count_ranked(self.score(stats, x), params))

    def shift(self, params: Array, offset: float) -> Array:
        """Counts shrink by 2^-offset."""
        return params * like(2.0**-offset, params)

    def interpolate(self, low: np.ndarray, high: np.ndarray, fraction: float) -> np.ndarray:
        """Counts move linearly: the bits read are linear in them."""
        low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        return (low + (high - low) * np.float32(fraction)).astype(np.float32)

    def calibrate(
        self, stats: GroupStats, x: np.ndarray, shares: np.ndarray, gate: np.ndarray | None = None
    ) -> np.ndarray:
        """Counts f32 [S] for the shares; the sample plays no part."""
        total = stats.mean.shape[-1]
        return np.rint(np.asarray(shares, np.float64) * total).astype(np.float32)
