"""Every rule: what it promises, on numpy and torch."""

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.rules import ALWAYS, RULES, GroupStats, IpnStats, get_rule, parse_policy

IN, S = 37, 3


@pytest.fixture
def case():
    rng = np.random.default_rng(7)
    exact = np.zeros(IN, bool)
    exact[[3, 30]] = True
    mean = np.where(exact, 0, rng.normal(0, 0.3, IN)).astype(np.float32)
    importance = np.where(exact, 0, rng.uniform(0.2, 2, IN)).astype(np.float32)
    x = rng.normal(0, 1, (200, IN)).astype(np.float32)
    gate = np.abs(rng.normal(0, 1, (200, IN))).astype(np.float32)
    learned = np.where(exact, 0, rng.uniform(0.2, 2, IN)).astype(np.float32)
    return GroupStats(mean, importance, S, exact, IpnStats(learned)), x, gate


def gate_for(rule, gate):
    return gate if rule.needs_gate else None


def test_known_rules():
    assert set(RULES) == {"channel-norm", "channel-abs", "gate", "topk", "statistical-topk", "dense", "ipn"}
    for name, rule in RULES.items():
        assert rule.name == name
        assert rule.summary and rule.source
        assert get_rule(name) is rule
        assert get_rule(f"{name}:0,4") is rule


def test_unknown_rule_names_the_known_ones():
    known = "channel-abs, channel-norm, dense, gate, ipn, statistical-topk, topk"
    with pytest.raises(LowtideError, match=rf"'magic'.*{known}"):
        get_rule("magic")
    with pytest.raises(LowtideError, match="unknown mask rule"):
        parse_policy("magic:0,4", S)


def test_channel_norm_counts_thresholds_strictly():
    stats = GroupStats(np.float32([1, 0, 0, 0]), np.float32([1, 2, 1, 1]), 3)
    x = np.float32([-1, 1, 4, np.nan])  # scores 2, 2, 4, NaN
    thresholds = np.float32([1, 2, np.inf])
    level = RULES["channel-norm"].levels(stats, x, thresholds)
    np.testing.assert_array_equal(level, [1, 1, 2, 0])
    assert level.dtype == np.int32


def test_channel_abs_ignores_importance_and_takes_the_mean_out():
    stats = GroupStats(np.float32([1, 0, 0]), np.float32([0.01, 100, 1]), 2)
    level = RULES["channel-abs"].levels(stats, np.float32([-1, 0.5, 1.5]), np.float32([1, 1.9]))
    np.testing.assert_array_equal(level, [2, 0, 1])


def test_gate_scores_the_gate_and_is_static_elsewhere():
    stats = GroupStats(np.zeros(3, np.float32), np.ones(3, np.float32), 2)
    params = np.float32([0.5, np.inf])
    x = np.float32([9, 9, 0])
    np.testing.assert_array_equal(RULES["gate"].levels(stats, x, params, gate=np.float32([-1, 0.2, 0.6])), [1, 0, 1])
    np.testing.assert_array_equal(RULES["gate"].levels(stats, x, params), [1, 1, 1])
    shifted = RULES["gate"].shift(params, 40.0)
    np.testing.assert_array_equal(RULES["gate"].levels(stats, x, shifted), [1, 1, 1])


def test_topk_reads_the_same_number_for_every_token(case):
    stats, x, _ = case
    level = RULES["topk"].levels(stats, x, np.float32([20, 11, 2]))
    for s, count in enumerate((20, 11, 2)):
        np.testing.assert_array_equal((level > s).sum(-1), count)
    score = RULES["channel-norm"].score(stats, x)
    chosen = np.where(level > 1, score, np.inf).min(-1)
    left = np.where(level > 1, -np.inf, score).max(-1)
    assert (chosen >= left).all()


def test_topk_breaks_ties_by_index_and_rounds_counts_up():
    stats = GroupStats(np.zeros(5, np.float32), np.ones(5, np.float32), 1)
    x = np.float32([1, -2, 2, 2, 0])
    np.testing.assert_array_equal(RULES["topk"].levels(stats, x, np.float32([2])), [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(RULES["topk"].levels(stats, x, np.float32([2.5])), [0, 1, 1, 1, 0])


def test_statistical_topk_follows_the_tokens_own_scale(case):
    stats, x, _ = case
    stats = GroupStats(stats.mean * 0, stats.importance, S, stats.exact)
    z = np.float32([0, 1, 2])
    level = RULES["statistical-topk"].levels(stats, x, z)
    np.testing.assert_array_equal(level, RULES["statistical-topk"].levels(stats, x * 8, z))
    score = np.abs(x) * stats.importance
    bound = score.mean(-1, keepdims=True) + score.std(-1, keepdims=True)
    np.testing.assert_array_equal(level >= 2, score > bound)


def test_dense_reads_everything_but_exact_channels(case):
    stats, x, _ = case
    level = RULES["dense"].levels(stats, x, np.full(S, np.inf, np.float32))
    np.testing.assert_array_equal(level, np.where(stats.exact, 0, S)[None].repeat(len(x), 0))


@pytest.mark.parametrize("name", sorted(RULES))
def test_exact_channels_are_never_read_and_levels_stay_in_range(case, name):
    stats, x, gate = case
    rule = RULES[name]
    params = rule.calibrate(stats, x, np.array([0.9, 0.5, 0.1]), gate_for(rule, gate))
    for g in (gate_for(rule, gate), None):
        level = rule.levels(stats, x, params, g)
        assert level.shape == x.shape
        assert level.min() >= 0 and level.max() <= S
        assert not level[:, stats.exact].any()


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_torch_and_numpy_agree(case, name, leading):
    torch = pytest.importorskip("torch")
    stats, x, gate = case
    rule = RULES[name]
    params = rule.calibrate(stats, x, np.array([0.73, 0.4, 0.07]), gate_for(rule, gate)) * np.float32(1.0001)
    n = int(np.prod(leading))
    x, gate = x[:n].reshape(*leading, IN), gate[:n].reshape(*leading, IN)
    there = stats.map(torch.from_numpy)
    got = rule.levels(
        there,
        torch.from_numpy(x),
        rule.shift(torch.from_numpy(params), 0.3),
        torch.from_numpy(gate) if rule.needs_gate else None,
    )
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), rule.levels(stats, x, rule.shift(params, 0.3), gate_for(rule, gate)))


@pytest.mark.parametrize("name", sorted(set(RULES) - {"dense"}))
def test_calibrate_meets_the_shares(case, name):
    stats, x, gate = case
    rule, shares = RULES[name], np.array([0.9, 0.5, 0.1])
    level = rule.levels(stats, x, rule.calibrate(stats, x, shares, gate_for(rule, gate)), gate_for(rule, gate))
    got = [(level > s).mean() for s in range(S)]
    np.testing.assert_allclose(got, shares, atol=0.5 / IN)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"dense"}))
def test_calibrate_at_the_ends(case, name):
    stats, x, gate = case
    rule = RULES[name]
    params = rule.calibrate(stats, x, np.array([1.0, 1.0, 0.0]), gate_for(rule, gate))
    level = rule.levels(stats, x, params, gate_for(rule, gate))
    np.testing.assert_array_equal(level, np.where(stats.exact, 0, 2)[None].repeat(len(x), 0))


@pytest.mark.parametrize("name", sorted(set(RULES) - {"dense"}))
def test_a_higher_offset_reads_less(case, name):
    stats, x, gate = case
    rule = RULES[name]
    params = rule.calibrate(stats, x, np.array([0.8, 0.5, 0.2]), gate_for(rule, gate))
    read = [rule.levels(stats, x, rule.shift(params, o), gate_for(rule, gate)).mean() for o in (-0.5, 0, 0.5)]
    assert read[0] > read[1] > read[2]
    np.testing.assert_array_equal(rule.shift(params, 0.0), params)


@pytest.mark.parametrize("name", sorted(RULES))
def test_interpolation_meets_both_grid_points_and_stays_between(case, name):
    stats, x, gate = case
    rule = RULES[name]
    low, high = (
        rule.calibrate(stats, x, np.array(shares), gate_for(rule, gate))
        for shares in ([0.6, 0.3, 0.0], [0.9, 0.5, 0.2])
    )
    np.testing.assert_array_equal(rule.interpolate(low, high, 1.0), high)
    np.testing.assert_allclose(rule.interpolate(low, high, 0.0), low, rtol=1e-6)
    middle = rule.interpolate(low, high, 0.5)
    assert middle.dtype == np.float32
    assert (np.minimum(low, high) <= middle).all() and (middle <= np.maximum(low, high)).all()
    if name in ("channel-norm", "channel-abs", "gate"):
        np.testing.assert_allclose(middle[:2], np.sqrt(low[:2] * high[:2]), rtol=1e-5)
        assert np.isinf(middle[2]) and np.isfinite(high[2])


def test_policies():
    graded = parse_policy("channel-norm", 3)
    assert graded.levels == (0, 1, 2, 3) and graded.graded and graded.text == "channel-norm"
    assert parse_policy("channel-norm:0,2,4,6", 3).text == "channel-norm"
    binary = parse_policy("topk:0,4", 3)
    assert binary.text == "topk:0,4" and binary.rule is RULES["topk"] and binary.levels == (0, 2) and not binary.graded
    np.testing.assert_array_equal(binary.expand([0.5], 3), np.float32([0.5, 0.5, np.inf]))
    np.testing.assert_array_equal(parse_policy("topk:2,6", 3).expand([0.5], 3), np.float32([ALWAYS, 0.5, 0.5]))


@pytest.mark.parametrize(
    "text", ["topk:", "topk:4", "topk:0,3", "topk:4,0", "topk:0,8", "topk:-2,4", "topk:0,4,4", "topk:a,b"]
)
def test_wrong_levels_are_refused(text):
    with pytest.raises(LowtideError, match="two or more of 0,2,4,6"):
        parse_policy(text, 3)


@pytest.mark.parametrize(
    "policy", ["channel-norm:0,4", "channel-norm:0,6", "channel-norm:0,2,6", "channel-norm:0,2,4", "channel-norm"]
)
@pytest.mark.parametrize("graded", [(0.87, 0.57, 0.09), (0.3, 0.2, 0.1), (0.95, 0.9, 0.1)])
def test_shares_keep_the_bits_where_they_can(policy, graded):
    parsed = parse_policy(policy, 3)
    shares = parsed.shares(np.array(graded))
    assert shares.sum() == pytest.approx(min(sum(graded), parsed.levels[-1]))
    assert (np.diff(shares) <= 0).all() and shares.max() <= 1
    for low, high in zip(parsed.levels[:-1], parsed.levels[1:], strict=True):
        assert len(set(shares[low:high])) == 1
    assert not shares[parsed.levels[-1] :].any()


def test_levels_follow_the_policy(case):
    stats, x, _ = case
    policy = parse_policy("channel-norm:0,4", S)
    params = policy.rule.calibrate(stats, x, policy.shares(np.array([0.8, 0.5, 0.1])))
    level = policy.rule.levels(stats, x, params)
    assert set(np.unique(level)) == {0, 2}
    assert level.mean() == pytest.approx(1.4, abs=0.05)
