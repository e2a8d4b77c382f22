"""statistical-topk: a threshold from the mean and the spread of the token's own scores, as Spark Transformer does."""

from __future__ import annotations

import numpy as np

from lowtide.rules.arrays import Array, astype, like, namespace
from lowtide.rules.base import GroupStats, Rule, finish, quantiles
from lowtide.rules.channel_norm import ChannelNorm


class StatisticalTopK(Rule):
    """Channel j takes slice s if score_j > mean(score) + params[s] * std(score).

    Mean and (population) standard deviation are over all channels of the group for this token, exact channels with
    their score of 0 included. About as many channels pass for every token as with topk, without a sort.
    params f32 [S] are z-scores, ascending; +inf = never.
    """

    name = "statistical-topk"
    summary = "channel-norm score against mean + z * standard deviation of the token's scores"
    source = "Spark Transformer (arXiv 2506.06644)"

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        """z-scores f32 [..., in]; 0 where all scores are equal."""
        raw = ChannelNorm().score(stats, x)
        centred = raw - raw.mean(-1)[..., None]
        spread = (centred * centred).mean(-1)[..., None] ** 0.5
        return centred / (spread + like(1e-30, raw))

    def levels(self, stats: GroupStats, x: Array, params: Array, gate: Array | None = None) -> Array:
        """Levels int32 [..., in] for x f32 [..., in]; params f32 [S]: z-scores."""
        raw = ChannelNorm().score(stats, x)
        exact = astype(raw, "float64")  # the threshold is one number for all channels: it may cost a little
        mean = exact.mean(-1)[..., None]
        spread = ((exact * exact).mean(-1)[..., None] - mean * mean).clip(0) ** 0.5
        level = astype(namespace(x).zeros_like(raw), "int32")
        for z in params:
            level = level + astype(raw > astype(mean + astype(z, "float64") * spread, "float32"), "int32")
        return finish(stats, level)

    def shift(self, params: Array, offset: float) -> Array:
        """z-scores rise by the offset."""
        return params + like(offset, params)

    def interpolate(self, low: np.ndarray, high: np.ndarray, fraction: float) -> np.ndarray:
        """z-scores move linearly; "never" at the lower budget stays until the higher grid point."""
        low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        if fraction >= 1:
            return high.copy()
        finite = np.isfinite(low) & np.isfinite(high)
        a, b = np.where(finite, low, 0), np.where(finite, high, 0)
        return np.where(finite, a + (b - a) * np.float32(fraction), low).astype(np.float32)

    def calibrate(
        self, stats: GroupStats, x: np.ndarray, shares: np.ndarray, gate: np.ndarray | None = None
    ) -> np.ndarray:
        """z-scores f32 [S] with which the given shares of the sample's channels are read."""
        score = self.score(stats, x)
        left = score if stats.exact is None else score[..., ~np.asarray(stats.exact)]
        shares = self._readable_shares(stats, shares)
        z = quantiles(left, shares)
        return np.where(shares >= 1, np.float32(np.min(score) - 1), z).astype(np.float32)
