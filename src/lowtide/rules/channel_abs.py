"""channel-abs: the magnitude of the input alone, as TEAL does."""

from __future__ import annotations

from lowtide.rules.arrays import Array
from lowtide.rules.base import GroupStats, Rule


class ChannelAbs(Rule):
    """score_j = |x_j - mean_j|: the weights have no say.

    TEAL's inputs have no mean taken out; ours do (an unread channel counts as its mean, not as 0), so the distance
    from the mean takes the place of the magnitude.
    """

    name = "channel-abs"
    summary = "|x - mean| alone"
    source = "TEAL (arXiv 2408.14690)"

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        return abs(x - stats.mean)
