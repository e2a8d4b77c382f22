"""Thresholds land on their budgets, share one lambda, and suit their rules."""

from __future__ import annotations

import numpy as np
import pytest

from lowtide.compress import thresholds
from lowtide.compress.thresholds import (
    DEFAULT_POLICIES,
    GroupCurve,
    body_bits,
    budget_grid,
    find_lambda,
    full_row,
    lambda_cuts,
    policy_row,
    score_table,
    threshold_tables,
)
from lowtide.rules import ALWAYS, RULES, GroupStats, parse_policy

TOKENS, S = 300, 3


class Sample:
    """A group's inputs and statistics, and the curve made of them."""

    def __init__(self, name: str, inn: int, out: int, seed: int, gated: bool = False, exact: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.x = (rng.standard_t(4, (TOKENS, inn)) * rng.lognormal(0, 1, inn)).astype(np.float32)
        self.gate = np.abs(rng.standard_t(4, (TOKENS, inn))).astype(np.float32) if gated else None
        importance = rng.lognormal(0, 0.5, inn).astype(np.float32)
        mask = np.zeros(inn, bool)
        mask[:exact] = True
        importance[mask] = 0
        self.stats = GroupStats(np.zeros(inn, np.float32), importance, S, mask if exact else None)
        tables = {
            rule: score_table(np.asarray(RULES[rule].score(self.stats, self.x, self.gate))[:, ~mask])
            for rule in ("channel-norm", "channel-abs", "statistical-topk", *(["gate"] if gated else []))
        }
        side = 8 * (6 * inn + 4 * out)
        scale = float(rng.lognormal(0, 1))
        self.curve = GroupCurve(name, inn, out, side, exact, [1.0, 0.14, 0.01, 0.001], scale, tables)


@pytest.fixture(scope="module")
def model():
    """Two layers and a head."""
    groups = []
    for layer in range(2):
        shapes = {"qkv": (64, 128), "o": (64, 64), "gate_up": (64, 256), "down": (128, 64)}
        for seed, (group, (inn, out)) in enumerate(shapes.items()):
            sample = Sample(f"layers.{layer}.{group}", inn, out, 10 * layer + seed, gated=group == "down")
            groups.append(sample)
    return groups, Sample("head", 64, 500, 99, exact=0)


def measured_bits(model, policy, rows):
    """bits_read_body by applying the rule to the samples themselves."""
    groups, _ = model
    shares = []
    for sample, row in zip(groups, rows, strict=False):
        level = policy.rule.levels(sample.stats, sample.x, row, sample.gate)
        shares.append(np.array([(level > s).mean() for s in range(S)]))
    return body_bits([g.curve for g in groups], shares)


@pytest.mark.parametrize("text", [*DEFAULT_POLICIES, "channel-abs:0,6", "topk:0,4", "statistical-topk:0,6"])
@pytest.mark.parametrize("budget", [2.5, 3.5])
def test_every_policy_reads_its_budget(model, text, budget):
    groups, head = model
    policy = parse_policy(text, S)
    rows = policy_row([g.curve for g in groups], head.curve, policy, budget)
    assert measured_bits(model, policy, rows) == pytest.approx(budget, rel=0.03)
    allowed = set(policy.levels)
    for sample, row in zip([*groups, head], rows, strict=True):
        assert set(np.unique(policy.rule.levels(sample.stats, sample.x, row, sample.gate))) <= allowed | {0}


@pytest.mark.parametrize("text", DEFAULT_POLICIES)
def test_the_last_budget_reads_everything_a_policy_may(model, text):
    groups, head = model
    policy = parse_policy(text, S)
    rows = full_row([g.curve for g in groups] + [head.curve], policy)
    for sample, row in zip([*groups, head], rows, strict=True):
        level = policy.rule.levels(sample.stats, sample.x, row, sample.gate)
        readable = slice(None) if sample.stats.exact is None else ~sample.stats.exact
        assert (level[:, readable] == policy.levels[-1]).mean() > 0.999


def test_one_lambda_equalises_the_marginal_gain(model):
    """At every threshold the error taken off per bit is lambda, in all groups."""
    groups, _ = model
    policy = parse_policy("channel-norm", S)
    for sample in groups:
        curve = sample.curve
        cuts = lambda_cuts(curve, policy, 0.01).astype(np.float64) * curve.importance_rms
        gains = -np.diff(curve.distortion)
        np.testing.assert_allclose(cuts**2 * gains / (2 * curve.out), 0.01, rtol=1e-4)


def test_thresholds_ascend_even_where_gains_do_not():
    curve = GroupCurve("g", 8, 8, 0, 0, [1.0, 0.9, 0.1, 0.05], 1.0, {})
    cuts = lambda_cuts(curve, parse_policy("channel-norm", S), 1.0)
    assert (np.diff(cuts) >= 0).all()
    assert cuts[1] == cuts[0]


def test_a_larger_lambda_reads_less(model):
    groups, _ = model
    body = [g.curve for g in groups]
    policy = parse_policy("channel-norm", S)
    read = [body_bits(body, [c.share("channel-norm", lambda_cuts(c, policy, lam)) for c in body]) for lam in (1, 2, 4)]
    assert read[0] > read[1] > read[2]


def test_find_lambda_saturates_outside_what_can_be_read(model):
    body = [g.curve for g in model[0]]
    policy = parse_policy("channel-norm", S)

    def shares(c, lam):
        return c.share("channel-norm", lambda_cuts(c, policy, lam))

    assert np.log2(find_lambda(body, shares, 100.0)) == pytest.approx(thresholds.LAMBDA_RANGE[0], abs=0.01)


def test_grid_ends_with_the_exact_full_read(model):
    body = [g.curve for g in model[0]]
    grid = budget_grid(body)
    side = sum(c.side_bits for c in body) / sum(c.weights for c in body)
    exact = sum(c.exact * c.out for c in body) / sum(c.weights for c in body)
    assert grid[-1] == pytest.approx(6 - 6 * exact + side)
    assert grid == sorted(grid)
    assert grid[0] >= 1.5
    assert all(b % 0.25 == 0 for b in grid[:-1])


def test_tables_are_valid_for_the_artifact(model):
    groups, head = model
    grid, tables = threshold_tables([g.curve for g in groups], head.curve, list(DEFAULT_POLICIES))
    assert set(tables) == {g.curve.name for g in [*groups, head]}
    for table in tables.values():
        assert table.shape == (len(DEFAULT_POLICIES), len(grid), S)
        assert table.dtype == np.float32
        assert not np.isnan(table).any()
        assert (table > -np.inf).all()
        for p, text in enumerate(DEFAULT_POLICIES):
            steps = table[p, :, 1:] >= table[p, :, :-1] if text != "topk" else table[p, :, 1:] <= table[p, :, :-1]
            assert steps.all(), text
    # thresholds fall as the budget grows
    norm = tables["layers.0.qkv"][0]
    assert (norm[1:] <= norm[:-1]).all()


def test_the_head_reads_finer_than_the_body(model):
    groups, head = model
    body = [g.curve for g in groups]
    rows = policy_row(body, head.curve, parse_policy("channel-norm", S), 3.0)
    same = lambda_cuts(head.curve, parse_policy("channel-norm", S), 1.0) / rows[-1]
    first = lambda_cuts(body[0], parse_policy("channel-norm", S), 1.0) / rows[0]
    np.testing.assert_allclose((same / first) ** 2, 1 / thresholds.HEAD_LAMBDA, rtol=1e-3)


def test_score_table_is_the_distribution(monkeypatch):
    monkeypatch.setattr(thresholds, "TABLE_SIZE", 1000)
    monkeypatch.setattr(thresholds, "SORT_LIMIT", 20000)
    scores = np.random.default_rng(0).exponential(1, (500, 64)).astype(np.float32)
    table = score_table(scores)
    assert table.size <= 1000
    assert (np.diff(table) >= 0).all()
    for share in (0.5, 0.9, 0.99):
        assert np.quantile(table, share) == pytest.approx(-np.log(1 - share), rel=0.08)


def test_at_share_counts_exact_channels_as_unread():
    curve = GroupCurve("g", 10, 4, 0, 5, [1.0, 0.1], 1.0, {"channel-norm": np.arange(1, 101, dtype=np.float32)})
    assert curve.at_share("channel-norm", 0.0) == np.inf
    assert curve.at_share("channel-norm", 0.25) == 50
    assert curve.at_share("channel-norm", 0.5) == 0.5
    assert curve.share("channel-norm", np.float32([50, 0.5])).tolist() == [0.25, 0.5]


def test_below_all_of_an_all_zero_table():
    curve = GroupCurve("g", 10, 4, 0, 0, [1.0, 0.1], 1.0, {"channel-norm": np.zeros(5, np.float32)})
    assert curve.below_all("channel-norm") == ALWAYS
