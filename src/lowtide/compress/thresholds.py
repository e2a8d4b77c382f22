"""Params of every policy for every budget of an artifact.

One lambda (nats^2 of error per bit) is shared by all groups. Reading one more slice of channel j for a token takes
(|a_j| v_j)^2 * (D_{k-1} - D_k) off the error and costs 2 * out bits, so slice k is read where

    |a_j| * v_j > tau_k = sqrt(lambda * 2 * out / (D_{k-1} - D_k)).

A budget's lambda is found by bisection over the inputs sampled during calibration. Rules whose params are no such
thresholds get the params with which every group reads the same share of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowtide.rules import ALWAYS, Policy, parse_policy

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
TABLE_SIZE = 1 << 16
SORT_LIMIT = 1 << 20
BUDGET_STEP = 0.25
LOWEST_USEFUL = 1.5
"""Bits per weight below which nothing useful comes out of any model seen so far."""
HEAD_LAMBDA = 0.1
"""The head's lambda relative to the body's. Its errors hit the logits directly, where the quadratic model behind lambda
is least true; measured on stories15M and SmolLM2."""
LAMBDA_RANGE = (-120.0, 60.0)
DEFAULT_POLICIES = ("channel-norm", "channel-norm:0,4", "channel-abs", "topk", "statistical-topk", "gate")
NORM = "channel-norm"


def score_table(score: F32) -> F32:
    """Sorted scores, thinned evenly to at most TABLE_SIZE; f32 [n] -> f32 [<= TABLE_SIZE]."""
    flat = score.reshape(-1)
    step = -(-flat.size // SORT_LIMIT)
    flat = np.sort(flat[:: step | 1])  # an odd step meets every channel of the (mostly even) widths
    if flat.size <= TABLE_SIZE:
        return flat.astype(np.float32)
    return flat[((np.arange(TABLE_SIZE) + 0.5) * (flat.size / TABLE_SIZE)).astype(np.int64)].astype(np.float32)


@dataclass
class GroupCurve:
    """What thresholds need to know about one group.

    out: rows of all member layers; side_bits: bits read whatever the mask; exact: channels never read through slices;
    distortion: relative error of levels 0..S; importance_rms: factor taken out of the importance; tables: rule name ->
    `score_table` of that rule's scores over the sampled tokens and the channels that are not exact.
    """

    name: str
    in_features: int
    out: int
    side_bits: int
    exact: int
    distortion: list[float]
    importance_rms: float
    tables: dict[str, F32] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Weights of the member layers."""
        return self.in_features * self.out

    @property
    def slices(self) -> int:
        """S."""
        return len(self.distortion) - 1

    @property
    def readable(self) -> float:
        """Share of the channels that are not exact: the most that can be read."""
        return 1.0 - self.exact / self.in_features

    def share(self, rule: str, thresholds: F32) -> F64:
        """Share of all channels whose score is above each threshold; f32 [S] -> f64 [S]."""
        table = self.tables[rule]
        above: F64 = 1.0 - np.searchsorted(table, thresholds, side="right") / table.size
        return above * self.readable

    def at_share(self, rule: str, share: float) -> float:
        """The threshold that this share of all channels exceeds; inf for none."""
        table = self.tables[rule]
        above = int(share / self.readable * table.size + 0.5) if self.readable else 0
        if above <= 0:
            return float("inf")
        return float(table[table.size - above - 1]) if above < table.size else self.below_all(rule)

    def below_all(self, rule: str) -> float:
        """A threshold under every score seen, near enough to interpolate to."""
        table = self.tables[rule]
        if rule == "statistical-topk":
            return float(table[0]) - 1
        positive = table[table > 0]
        return float(positive[0]) / 2 if positive.size else ALWAYS

    def rms_score(self) -> float:
        """Root mean square of the channel-norm scores."""
        return float(np.sqrt(np.mean(np.square(self.tables[NORM], dtype=np.float64))))


def lambda_cuts(curve: GroupCurve, policy: Policy, lam: float) -> F32:
    """tau_k of one group for the steps between the policy's levels, as params f32 [S], ascending."""
    cuts: list[float] = []
    for low, high in zip(policy.levels[:-1], policy.levels[1:], strict=True):
        gain = max(curve.distortion[low] - curve.distortion[high], 1e-12)
        cut = (lam * 2 * (high - low) * curve.out / gain) ** 0.5 / curve.importance_rms
        cuts.append(max(cut, cuts[-1]) if cuts else cut)
    return policy.expand(np.clip(cuts, ALWAYS, 1e30), curve.slices)


def body_bits(body: list[GroupCurve], shares: list[F64]) -> float:
    """bits_read_body when group g reads the shares[g] (f64 [S]) of its channels."""
    bits = sum(c.side_bits + 2.0 * float(s.sum()) * c.weights for c, s in zip(body, shares, strict=True))
    return bits / sum(c.weights for c in body)


def budget_grid(body: list[GroupCurve]) -> list[float]:
    """Budgets in bits_read_body: from the smallest useful one in steps of a quarter bit to the full read."""
    full = body_bits(body, [np.full(c.slices, c.readable) for c in body])
    side = body_bits(body, [np.zeros(c.slices) for c in body])
    lowest = max(LOWEST_USEFUL, np.ceil((side + BUDGET_STEP) / BUDGET_STEP) * BUDGET_STEP)
    return [float(b) for b in np.arange(lowest, full - BUDGET_STEP / 4, BUDGET_STEP)] + [full]


def find_lambda(body: list[GroupCurve], shares: Callable[[GroupCurve, float], F64], budget: float) -> float:
    """The largest lambda at which groups that read shares(group, lambda) are still within the budget... or above it
    by less than can be told. shares must fall as lambda grows."""
    low, high = LAMBDA_RANGE
    while high - low > 1e-3:
        middle = (low + high) / 2
        above = body_bits(body, [shares(c, 2.0**middle) for c in body]) > budget
        low, high = (middle, high) if above else (low, middle)
    return float(2.0**high)


def threshold_tables(
    body: list[GroupCurve], head: GroupCurve, policies: list[str]
) -> tuple[list[float], dict[str, F32]]:
    """Params of all policies: the budget grid and, per group name, f32 [P, B, S]."""
    curves = [*body, head]
    grid = budget_grid(body)
    tables = {c.name: np.zeros((len(policies), len(grid), c.slices), np.float32) for c in curves}
    for p, text in enumerate(policies):
        policy = parse_policy(text, head.slices)
        for b, budget in enumerate(grid):
            full = b == len(grid) - 1
            rows = full_row(curves, policy) if full else policy_row(body, head, policy, budget)
            for curve, row in zip(curves, rows, strict=True):
                tables[curve.name][p, b] = row
    return grid, tables


def full_row(curves: list[GroupCurve], policy: Policy) -> list[F32]:
    """Params f32 [S] of every group with which a policy reads all it may."""
    rule, rows = policy.rule.name, []
    for curve in curves:
        if rule in ("topk", "dense"):
            always = float(curve.in_features)
        else:
            always = curve.below_all(rule) if rule in curve.tables else ALWAYS
        never = 0.0 if rule in ("topk", "dense") else np.inf
        rows.append(policy.expand([always] * (len(policy.levels) - 1), curve.slices, never=never, always=always))
    return rows


def policy_row(body: list[GroupCurve], head: GroupCurve, policy: Policy, budget: float) -> list[F32]:
    """Params f32 [S] of every group (head last) of one policy at one budget."""
    rule = policy.rule.name
    if rule in (NORM, "channel-abs"):
        lam = find_lambda(body, lambda c, lam: c.share(rule, lambda_cuts(c, policy, lam)), budget)
        return [lambda_cuts(c, policy, lam) for c in body] + [lambda_cuts(head, policy, lam * HEAD_LAMBDA)]
    if rule == "gate":
        return _gate_row(body, head, policy, budget)

    def shares(curve: GroupCurve, lam: float) -> F64:
        return policy.shares(curve.share(NORM, lambda_cuts(curve, _graded(policy, curve), lam)))

    lam = find_lambda(body, shares, budget)
    all_shares = [shares(c, lam) for c in body] + [shares(head, lam * HEAD_LAMBDA)]
    return [_at_shares(c, policy, s) for c, s in zip([*body, head], all_shares, strict=True)]


def _graded(policy: Policy, curve: GroupCurve) -> Policy:
    return Policy(NORM, policy.rule, tuple(range(curve.slices + 1)))


def _at_shares(curve: GroupCurve, policy: Policy, shares: F64) -> F32:
    """Params f32 [S] with which the policy's rule reads the given shares of a group's channels, f64 [S] descending."""
    rule = policy.rule.name
    if rule == "topk":
        return np.rint(shares * curve.in_features).astype(np.float32)
    if rule == "dense":
        return np.zeros(curve.slices, np.float32)
    return np.maximum.accumulate(np.array([curve.at_share(rule, float(s)) for s in shares], np.float32))


def _gate_row(body: list[GroupCurve], head: GroupCurve, policy: Policy, budget: float) -> list[F32]:
    """The gated groups read the channels that the gate picks, the others one level for all tokens.

    The other groups take the level that their mean score pays for; what then is left of the budget goes to `down`.
    """

    def fixed(curve: GroupCurve, lam: float) -> F64:
        read = curve.rms_score() > lambda_cuts(curve, policy, lam)
        read[: max(policy.levels[0], policy.levels[1])] = True
        return np.asarray(read * curve.readable, np.float64)

    def gated(curve: GroupCurve, lam: float) -> F64:
        return policy.shares(curve.share(NORM, lambda_cuts(curve, _graded(policy, curve), lam)))

    def mixed(curve: GroupCurve, lam: float) -> F64:
        return gated(curve, lam) if "gate" in curve.tables else fixed(curve, lam)

    lam = find_lambda(body, mixed, budget)
    rest = find_lambda(body, lambda c, x: gated(c, x) if "gate" in c.tables else fixed(c, lam), budget)
    rows = []
    for curve in [*body, head]:
        if "gate" in curve.tables:
            rows.append(_at_shares(curve, policy, gated(curve, rest)))
        else:
            read = fixed(curve, lam * HEAD_LAMBDA if curve is head else lam) > 0
            rows.append(np.where(read, ALWAYS, np.inf).astype(np.float32))
    return rows
