"""ipn: a learned importance, and a learned estimate of how sensitive each group is to this token."""

from __future__ import annotations

import numpy as np

from lowtide.errors import LowtideError
from lowtide.kernels import reference_ops as ops
from lowtide.rules.arrays import Array, is_torch, like, namespace
from lowtide.rules.base import GroupStats, IpnStats, Rule

LIMIT = 4.0
"""A token's offset stays within this many units of log2."""

LN2 = np.float32(0.6931471805599453)


class Ipn(Rule):
    """score_j = |x_j - mean_j| * w_j against thresholds that a token moves: t_s * 2^(-gain * o).

    A probe reads the residual stream behind its norm: f_k = max(0, scale_k * sum_j P_kj x_j + bias_k), and each group
    mixes the features into its own offset o = clip(sum_k mix_k f_k + mix_H, -LIMIT, LIMIT). A positive offset lowers
    the waterline, so a token to which the group matters reads more. The probe at the input of `qkv` serves `o` as
    well, that of `gate_up` serves `down`; the head has the importance alone.

    Where the artifact has centroids, a token is measured from its own, mean_j becoming that centroid's: `code` says
    which, from keys at the inputs of `qkv`, `gate_up` and the head; `o` and `down` go by those of `qkv` and `gate_up`.

    Where the artifact has factors, thresholds of q, k and v are the group's times these (`member_levels`).

    `features` and `waterline` are the rule's two steps before `levels`, which takes thresholds already moved.
    """

    name = "ipn"
    summary = "learned importance, and thresholds that a small probe moves for every token"
    source = "ours; a small predictor on the residual stream, after Deja Vu (arXiv 2310.17157)"

    def score(self, stats: GroupStats, x: Array, gate: Array | None = None) -> Array:
        return abs(x - stats.mean) * _ipn(stats).importance

    def features(self, stats: GroupStats, x: Array) -> Array | None:
        """f32 [..., H] from the group's own probe, None if it has none. x: f32 [..., in]."""
        ipn = _ipn(stats)
        if ipn.probe is None or ipn.scale is None or ipn.bias is None:
            return None
        if is_torch(x):  # the order of sums is the library's
            sums = x @ ipn.probe.T
        else:
            sums = np.stack([ops.lane_sum(row * x) for row in ipn.probe], axis=-1)
        return (sums * ipn.scale + ipn.bias).clip(like(0, sums))

    def code(self, stats: GroupStats, x: Array) -> Array | None:
        """i64 [...]: the first of the centroids whose key fits best. What is not a number fits worst."""
        ipn = _ipn(stats)
        if ipn.keys is None or ipn.channels is None or ipn.key_scale is None or ipn.key_bias is None:
            return None
        picked = x[..., ipn.channels]
        if is_torch(x):
            sums = picked @ ipn.keys
        else:
            sums = ops.in_order(picked[..., None] * ipn.keys, axis=-2)
        fit = sums * ipn.key_scale + ipn.key_bias
        return namespace(fit).where(fit == fit, fit, like(-np.inf, fit)).argmax(-1)

    def waterline(self, stats: GroupStats, params: Array, features: Array | None, gain: float) -> Array:
        """Thresholds of every token: f32 [S, ..., 1] from params f32 [S] and features f32 [..., H].

        A group without a mix (the head) leaves them as they are, [S].
        """
        mix = _ipn(stats).mix
        if mix is None or features is None:
            return params
        offset = token_offset(mix, features)
        if is_torch(offset):
            factor = namespace(offset).exp2(-gain * offset)
        else:
            factor = ops.exponential(np.float32(gain) * offset * -LN2)
        return params.reshape(-1, *([1] * (offset.ndim + 1))) * factor[..., None]

    def member_levels(
        self, stats: GroupStats, x: Array, params: Array, count: int, gate: Array | None = None
    ) -> list[Array]:
        factor = _ipn(stats).factor
        if factor is None:
            return super().member_levels(stats, x, params, count, gate)
        return [self.levels(stats, x, params * own, gate) for own in factor]


def token_offset(mix: Array, features: Array) -> Array:
    """o f32 [...] from features f32 [..., H] and mix f32 [H + 1]: log2 units, within -LIMIT..LIMIT."""
    mixed = features * mix[:-1]
    total = (mixed.sum(-1) if is_torch(mixed) else ops.lane_sum(mixed)) + mix[-1]
    return total.clip(like(-LIMIT, total), like(LIMIT, total))


def _ipn(stats: GroupStats) -> IpnStats:
    if stats.ipn is None:
        raise LowtideError("rule ipn: the artifact has no importance prediction network; choose another --policy")
    return stats.ipn
