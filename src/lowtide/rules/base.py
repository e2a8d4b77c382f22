"""The interface of mask rules.

A rule decides, for one group of linear layers and one token (or many), how many 2-bit slices of each input
channel are read: a pure function of (group statistics, input, params) to integer levels. Level 0 reads nothing,
level S everything that is stored; a binary mask is the special case in which only 0 and one other level occur.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from lowtide.rules.arrays import Array, astype, like, ranks

ALWAYS = 2.0**-64
"""A score threshold that every channel passes whose score is not zero; finite, so it interpolates in log2."""


@dataclass(frozen=True)
class IpnStats:
    """What the rule `ipn` knows of a group (format.groups.IpnTensors), in f32; None where the group has no such tensor.

    Attributes:
        importance: f32 [in], w_j.
        mix: f32 [H + 1].
        probe: f32 [H, in], whole numbers.
        scale, bias: f32 [H].
        factor: f32 [3], of the thresholds of each member layer.
        channels: i64 [C], the channels that keys look at.
        keys: f32 [C, K], whole numbers; key_scale, key_bias: f32 [K].
    """

    importance: Array
    mix: Array | None = None
    probe: Array | None = None
    scale: Array | None = None
    bias: Array | None = None
    factor: Array | None = None
    channels: Array | None = None
    keys: Array | None = None
    key_scale: Array | None = None
    key_bias: Array | None = None

    @classmethod
    def of(cls, ipn: Any) -> IpnStats:
        """What a `lowtide.format.groups.IpnTensors` holds, as numpy arrays."""
        values = {f.name: getattr(ipn, f.name) for f in fields(cls)}
        kinds = {"channels": np.int64}
        made = {n: None if a is None else np.asarray(a, kinds.get(n, np.float32)) for n, a in values.items()}
        return cls(**made)


@dataclass(frozen=True)
class GroupStats:
    """What a rule may know about a group, besides the input. Arrays are numpy or torch, like the input.

    Attributes:
        mean: f32 [in], mean of the input over the calibration text (0 for exact channels); where tokens have centroids
            [..., in], each token's own.
        importance: f32 [in], v_j, the sensitivity-weighted norm of column j (0 for exact channels).
        slices: S, the number of stored 2-bit slices.
        exact: bool [in], channels that are kept exact and so never read through slices; None if there are none.
        ipn: for the rule `ipn`; None if the artifact has no such network.
    """

    mean: Array
    importance: Array
    slices: int
    exact: Array | None = None
    ipn: IpnStats | None = None

    @classmethod
    def of(cls, group: Any) -> GroupStats:
        """The statistics of a `lowtide.format.groups.GroupTensors`, as numpy arrays."""
        exact = np.zeros(group.in_features, dtype=bool)
        exact[np.asarray(group.exact_channels, dtype=np.int64)] = True
        mean, importance = (np.asarray(a, dtype=np.float32) for a in (group.mean, group.importance))
        return cls(
            mean, importance, int(group.slices), exact if exact.any() else None, group.ipn and IpnStats.of(group.ipn)
        )

    def map(self, change: Callable[[Any], Any]) -> GroupStats:
        """The same with every array changed, e.g. numpy to torch."""

        def changed(value: Any) -> Any:
            if isinstance(value, IpnStats):
                return IpnStats(**{f.name: changed(getattr(value, f.name)) for f in fields(value)})
            return value if value is None or isinstance(value, int) else change(value)

        return GroupStats(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})


class Rule(ABC):
    """One mask rule. Subclasses give `score`; those that do not compare scores with thresholds override `levels`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    """The paper or project the rule comes from."""
    needs_gate: ClassVar[bool] = False
    """Whether the rule looks at the activated gate projection (passed as `gate` for the group `down`)."""

    @abstractmethod
    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        """Scores f32 [..., in] of the channels for the inputs x f32 [..., in]; gate like x, or None."""

    def levels(self, stats: GroupStats, x: Array, params: Array, gate: Array | None = None) -> Array:
        """Levels int32 [..., in] in 0..S for the inputs x f32 [..., in] and params (score thresholds here).

        params: f32 [S], or for each token [S, ..., 1] (`waterline`).
        """
        return finish(stats, count_above(self.score(stats, x, gate), params))

    def member_levels(
        self, stats: GroupStats, x: Array, params: Array, count: int, gate: Array | None = None
    ) -> list[Array]:
        """`levels` of each of a group's `count` linear layers: the same array for all, or one for each."""
        return [self.levels(stats, x, params, gate)] * count

    def features(self, stats: GroupStats, x: Array) -> Array | None:
        """What the rule sees in a group's input x f32 [..., in] for this group and those after it; None: nothing."""
        return None

    def code(self, stats: GroupStats, x: Array) -> Array | None:
        """Which centroids a group's inputs x f32 [..., in], and those of the groups after it, are measured from: i64
        [...]. None: those of the group before, or there are none."""
        return None

    def waterline(self, stats: GroupStats, params: Array, features: Array | None, gain: float) -> Array:
        """params of each token: [S, ..., 1], or [S] where all tokens have the same.

        params: f32 [S], already shifted. features: the last that a group gave, or None. gain: see `PolicyParams.gains`.
        """
        return params

    def shift(self, params: Array, offset: float) -> Array:
        """params moved by the budget controller: every step of `offset` reads less. Shape and dtype stay."""
        return params * like(2.0**offset, params)

    def interpolate(self, low: np.ndarray, high: np.ndarray, fraction: float) -> np.ndarray:
        """params between two points of the budget grid; fraction 0 gives `low`, 1 gives `high`. f32, any shape.

        Thresholds move linearly in log2. One that is infinite ("never") at the lower budget stays so until the
        higher grid point is reached, because there is nothing to interpolate from.
        """
        low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        if fraction >= 1:
            return high.copy()
        finite = np.isfinite(low) & np.isfinite(high) & (low > 0) & (high > 0)
        a, b = (np.log2(np.where(finite, p, 1).astype(np.float64)) for p in (low, high))
        return np.where(finite, np.exp2(a + (b - a) * fraction), low).astype(np.float32)

    def calibrate(
        self, stats: GroupStats, x: np.ndarray, shares: np.ndarray, gate: np.ndarray | None = None
    ) -> np.ndarray:
        """params f32 [S] with which the share shares[s] of all channels of the sample x [tokens, in] reads slice s.

        shares f64 [S] descend within 0..1 and count exact channels as unread. 0 gives "never", and a share that
        takes in every channel that can be read gives `ALWAYS`.
        """
        return quantiles(_readable(stats, self.score(stats, x, gate)), self._readable_shares(stats, shares))

    def _readable_shares(self, stats: GroupStats, shares: np.ndarray) -> np.ndarray:
        """The shares as parts of the channels that are not exact."""
        total = stats.mean.shape[-1]
        left = total - (0 if stats.exact is None else int(np.count_nonzero(stats.exact)))
        return np.minimum(np.asarray(shares, np.float64) * total / max(left, 1), 1.0)


def count_above(score: Array, thresholds: Array) -> Array:
    """Number of thresholds below each score [...]: int32 [...]. Comparisons are strict; NaN scores give 0.

    thresholds: [S], or [S, ...] with what broadcasts to the scores.
    """
    level = astype(score > thresholds[0], "int32")
    for t in thresholds[1:]:
        level = level + astype(score > t, "int32")
    return level


def count_ranked(score: Array, counts: Array) -> Array:
    """Level [..., in] of channels of which the counts[s] best take slice s: int32. Ties: the lower index is better."""
    rank = ranks(score)
    level = astype(rank < counts[0], "int32")
    for c in counts[1:]:
        level = level + astype(rank < c, "int32")
    return level


def finish(stats: GroupStats, level: Array) -> Array:
    """Level 0 for exact channels, the rest unchanged."""
    if stats.exact is None:
        return level
    return level * astype(~stats.exact, "int32")


def quantiles(score: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Thresholds f32 [S] that the share shares[s] of all scores exceed (+inf for 0, `ALWAYS` for 1), ascending."""
    ordered = np.sort(np.asarray(score, np.float32).ravel())[::-1]
    out = []
    for share in shares:
        n = math.floor(float(share) * ordered.size + 0.5)
        if n <= 0:
            out.append(np.inf)
        elif n >= ordered.size:
            out.append(ALWAYS)
        else:
            out.append(float(ordered[n]))
    return np.maximum.accumulate(np.asarray(out, np.float32))


def _readable(stats: GroupStats, score: np.ndarray) -> np.ndarray:
    return score if stats.exact is None else score[..., ~np.asarray(stats.exact)]
