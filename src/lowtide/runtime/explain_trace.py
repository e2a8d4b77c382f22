"""A pass of the reference engine that is watched: what every group saw, read and found important.

The numpy reference gives the same bits as the native engine and knows every channel's score and level, so what it tells
is what the native engine reads. Tokens are known beforehand and go through together: 64 tokens of a 135M model take
some seconds.

Legend: n tokens, `in` channels, `out` rows, S slices, H features of the IPN, K entries kept of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowtide.format.groups import GroupTensors, LinearTensors
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import PolicyParams
from lowtide.rules import GroupStats, Rule, get_rule
from lowtide.rules.channel_norm import ChannelNorm
from lowtide.rules.ipn import token_offset

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Reading:
    """What one group read for n tokens.

    Attributes:
        index: place of the group, 4 * layer + kind.
        group: its tensors.
        x: f32 [n, in], its input.
        mean: f32 [in], or [n, in] where tokens have centroids: what its input is measured from.
        score: f32 [n, in], what the rule compared (see `ranking_score`); 0 for exact channels.
        levels: i32 [n, in], slices read, for each linear layer.
        bits: i64 [n], bits read, side data included.
        offset: f32 [n], the offset o of the rule `ipn`, 0 under other rules.
        drivers: f32 [n, D] or None, what each feature of the residual stream (behind its norm) added to o:
            x_j * sum over the active k of mix_k * scale_k * P_kj. o is their sum, biases and a constant added, clipped.
    """

    index: int
    group: GroupTensors
    x: F32
    mean: F32
    score: F32
    levels: list[I32]
    bits: I64
    offset: F32
    drivers: F32 | None

    def only(self, rows: Sequence[int]) -> Reading:
        """The same of some of its tokens."""
        r = list(rows)
        drivers = None if self.drivers is None else self.drivers[r]
        mean = self.mean if self.mean.ndim == 1 else self.mean[r]
        levels = [own[r] for own in self.levels]
        arrays = (self.x[r], mean, self.score[r], levels, self.bits[r], self.offset[r])
        return Reading(self.index, self.group, *arrays, drivers)


class Tracer(ReferenceEngine):
    """The reference engine with somebody looking on."""

    def trace(
        self, tokens: Sequence[int], pos: int, policy: PolicyParams, watch: Callable[[Reading], None]
    ) -> NDArray[np.int64]:
        """Tokens from position pos on, each masked by itself; calls `watch` for every group of the decoder in turn.

        Returns:
            i64 [n], bits read in the decoder's linear layers, side data included.

        Raises:
            LowtideError: as `decode_body`.
        """
        probe = _Probe(self, policy)

        def see(index: int, name: str, x: F32, gate: F32 | None, bits: I64) -> None:
            watch(probe.reading(index, name, x, gate, bits))

        return self.decode_body(tokens, pos, policy, see)[1]


class _Probe:
    """Works out once more what the rule decided for a group; remembers what serves the groups after it: the probe and
    the tokens' centroids."""

    def __init__(self, engine: ReferenceEngine, policy: PolicyParams) -> None:
        self.engine, self.policy, self.rule = engine, policy, get_rule(policy.rule)
        self.code: I64 | None = None
        self.features: F32 | None = None
        self.source: tuple[GroupStats, F32] | None = None

    def reading(self, index: int, name: str, x: F32, gate: F32 | None, bits: I64) -> Reading:
        group, own = self.engine.group(name)
        found, code = self.rule.features(own, x), self.rule.code(own, x)
        if found is not None:
            self.features, self.source = found, (own, x)
        if code is not None:
            self.code = code
        stats = self.engine.middle(name, self.rule, self.code).stats
        gain = 0.0 if self.policy.gains is None else float(self.policy.gains[index])
        params = self.rule.shift(self.policy.thresholds[index], self.policy.log2_offset)
        params = self.rule.waterline(stats, params, self.features, gain)
        levels = self.rule.member_levels(stats, x, params, len(group.linears), gate)
        offset, drivers = self._offset(stats, len(x))
        score = ranking_score(self.rule, stats, x, gate)
        return Reading(index, group, x, stats.mean, score, levels, bits, offset, drivers)

    def _offset(self, stats: GroupStats, n: int) -> tuple[F32, F32 | None]:
        if self.features is None or self.source is None or stats.ipn is None or stats.ipn.mix is None:
            return np.zeros(n, np.float32), None
        source, x = self.source
        assert source.ipn is not None and source.ipn.probe is not None and source.ipn.scale is not None
        weight = (self.features > 0) * (stats.ipn.mix[:-1] * source.ipn.scale)
        drivers = np.asarray(weight.astype(np.float32) @ source.ipn.probe * x, np.float32)
        return np.asarray(token_offset(stats.ipn.mix, self.features), np.float32), drivers


def ranking_score(rule: Rule, stats: GroupStats, x: F32, gate: F32 | None) -> F32:
    """Scores f32 [n, in] by which channels are put in order: the rule's own where they tell channels apart.

    `dense` and `gate` give all channels of a group the same score; channel-norm's takes its place there.
    """
    score = np.asarray(rule.score(stats, x, gate), np.float32)
    if not np.isfinite(score).all() or bool((score == score[..., :1]).all()):
        score = np.asarray(ChannelNorm().score(stats, x), np.float32)
    return score if stats.exact is None else np.where(stats.exact, np.float32(0), score)


def top(values: NDArray[np.float32], count: int) -> I64:
    """Indices i64 [n, min(count, m)] of the largest of each row of [n, m], largest first; ties: the lower index."""
    count = min(count, values.shape[1])
    order = np.argpartition(-values, count - 1, axis=1)[:, :count]
    order.sort(axis=1)
    chosen = np.take_along_axis(values, order, axis=1)
    return np.take_along_axis(order, np.argsort(-chosen, axis=1, kind="stable"), axis=1)


class Columns:
    """One linear layer's weights column by column, as they are at each level, outliers and exact columns included."""

    def __init__(self, group: GroupTensors, linear: LinearTensors, planes: U8) -> None:
        """planes: u8 [S, in, out], the layer's digits (`ReferenceEngine.digits`)."""
        self._group, self._planes = group, planes
        self._row_scale = linear.row_scale.astype(np.float32)
        self._col_scale = group.col_scale.astype(np.float32)
        self._exact = linear.exact.astype(np.float32)
        rows, cols, values = linear.outliers()
        order = np.argsort(cols, kind="stable")
        self._rows, self._cols, self._values = rows[order], cols[order], values[order].astype(np.float32)
        self._start = np.searchsorted(self._cols, np.arange(group.in_features + 1))

    def peaks(self) -> F32:
        """The largest |weight| of every column at every level, f32 [S + 1, in]."""
        group, (slices, inputs, _) = self._group, self._planes.shape
        peaks = np.zeros((slices + 1, inputs), np.float32)
        np.maximum.at(peaks[0], self._cols, np.abs(self._values))
        total = np.zeros(self._planes.shape[1:], np.float32)
        for s in range(slices):
            total += self._digit_value(s, self._planes[s])
            scaled = total * self._row_scale
            unit = self._col_scale * group.shrink[s]
            scaled[self._cols, self._rows] += self._values / unit[self._cols]
            peaks[s + 1] = np.abs(scaled, out=scaled).max(axis=1) * unit
        if len(group.exact_channels):
            peaks[:, group.exact_channels] = np.abs(self._exact).max(axis=1)
        return peaks

    def read(self, channels: I64, levels: I32) -> F32:
        """Columns i64 [m] as read at levels i32 [m]: f32 [m, out]."""
        group, planes = self._group, self._planes
        value = np.zeros((len(channels), planes.shape[2]), np.float32)
        for s in range(len(planes)):
            value += np.where((levels > s)[:, None], self._digit_value(s, planes[s, channels]), np.float32(0))
        gamma = np.concatenate([np.zeros(1, np.float32), group.shrink.astype(np.float32)])[levels]
        value *= (self._col_scale[channels] * gamma)[:, None] * self._row_scale
        place, rows, index = self._outliers(channels)
        value[place, rows] += self._values[index]
        for e, channel in enumerate(group.exact_channels):
            value[channels == channel] = self._exact[e]
        return value

    def always(self, channels: I64) -> NDArray[np.bool_]:
        """Which weights of columns i64 [m] are stored as they are and always read, bool [m, out]."""
        kept = np.zeros((len(channels), self._planes.shape[2]), bool)
        kept[self._outliers(channels)[:2]] = True
        kept[np.isin(channels, self._group.exact_channels)] = True
        return kept

    def _outliers(self, channels: I64) -> tuple[I64, I64, I64]:
        """The outliers of columns [m]: place in `channels`, row, index of the value; each i64 [entries]."""
        first, counts = self._start[channels], self._start[channels + 1] - self._start[channels]
        place = np.repeat(np.arange(len(channels)), counts)
        index = np.arange(len(place)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        return place, self._rows[index], index

    def _digit_value(self, s: int, digits: U8) -> F32:
        """(d - t_s) * 4^-s, f32, of digits of slice s."""
        centre = np.float32(self._group.centres[s] / 2)
        return np.asarray((digits.astype(np.float32) - centre) * np.float32(4.0**-s), np.float32)


@dataclass(frozen=True)
class Found:
    """A single weight: row, input channel, what it added to the row's output, and the bits it was read with.

    bits is 16 for outliers and exact columns, which are stored as they are and always read.
    """

    row: int
    channel: int
    product: float
    bits: int


def strongest(columns: Columns, peaks: F32, reading: Reading, member: int, count: int) -> list[list[Found]]:
    """The single weights of a layer that moved its output most: the largest |w_ij * (x_j - mean_j)| among those read.

    w_ij is the weight as it was read, at its channel's level. The `count` largest lie in the `count` columns with the
    largest products of |x_j - mean_j| and the column's largest weight: each of these columns has one at least as large
    as any in the others. So only those are looked at.

    Args:
        columns: the layer.
        peaks: f32 [S + 1, in], `columns.peaks()`.
        reading: what its group read; member: which of the group's layers it is.
        count: how many to give for each token.

    Returns:
        for each token at most `count` `Found`, largest first; products of 0 are left out.
    """
    a = reading.x - reading.mean
    own = reading.levels[member]
    channels = top(np.abs(a) * np.take_along_axis(peaks, own, axis=0), count)  # [n, K]
    levels = np.take_along_axis(own, channels, axis=1)
    shape = (*channels.shape, -1)
    product = columns.read(channels.ravel(), levels.ravel()).reshape(shape)
    product = product * np.take_along_axis(a, channels, axis=1)[..., None]
    kept = columns.always(channels.ravel()).reshape(shape)
    best = top(np.abs(product).reshape(len(a), -1), count)
    found: list[list[Found]] = []
    for t, order in enumerate(best):
        entries = []
        for p, i in zip(*np.divmod(order, product.shape[2]), strict=True):
            bits = 16 if kept[t, p, i] else 2 * int(levels[t, p])
            entries.append(Found(int(i), int(channels[t, p]), float(product[t, p, i]), bits))
        found.append([entry for entry in entries if entry.product != 0])
    return found
