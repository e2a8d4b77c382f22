"""channel-norm: distance of the input from its mean, times the importance of the column. The default."""

from __future__ import annotations

from lowtide.rules.arrays import Array
from lowtide.rules.base import GroupStats, Rule


class ChannelNorm(Rule):
    """score_j = |x_j - mean_j| * v_j, compared with the thresholds of the group.

    Reading channel j at b bits leaves an error of about |x_j - mean_j| * v_j * 2^-b at the outputs, so thresholds
    a factor 4 apart per 2-bit slice spend a budget where it lowers the error most (reverse water-filling).
    """

    name = "channel-norm"
    summary = "|x - mean| times the column's importance; graded levels"
    source = "WINA (arXiv 2505.19427) for the score; graded levels after GRINQH (arXiv 2606.23419)"

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        return abs(x - stats.mean) * stats.importance
