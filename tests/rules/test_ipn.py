"""The rule ipn against its formula, written out with Python loops, and against torch."""

import dataclasses

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.rules import GroupStats, IpnStats, get_rule
from lowtide.rules.ipn import LIMIT, token_offset

IN, S, H = 37, 3, 19
RULE = get_rule("ipn")
THRESHOLDS = np.float32([0.2, 0.7, 1.6])


def f32(values):
    return np.asarray(values, np.float32)


@pytest.fixture
def case():
    """A group with a probe, one without, and inputs of both."""
    rng = np.random.default_rng(3)
    exact = np.zeros(IN, bool)
    exact[[0, 20]] = True
    importance, learned = (f32(np.where(exact, 0, rng.uniform(0.2, 2, IN))) for _ in range(2))
    mean = f32(np.where(exact, 0, rng.normal(0, 0.3, IN)))
    probe = rng.integers(-127, 128, (H, IN)).astype(np.float32)
    ipn = IpnStats(
        learned, f32(rng.normal(0, 0.7, H + 1)), probe, f32(rng.uniform(0.001, 0.003, H)), f32(rng.normal(size=H))
    )
    first = GroupStats(mean, importance, S, exact, ipn)
    second = dataclasses.replace(
        first, ipn=IpnStats(f32(rng.uniform(0, 2, IN) * ~exact), f32(rng.normal(0, 0.7, H + 1)))
    )
    x, inner = f32(rng.normal(0, 1, (2, 50, IN)))
    for stats in (first, second):  # offsets lie on both sides of 0
        stats.ipn.mix[H] = -np.median(RULE.features(first, x) @ stats.ipn.mix[:H])
    return first, second, x, inner


def by_hand(stats, source, x, seen, gain):
    """Levels of one token in float64: the specification's formulas, one number at a time."""
    features = []
    for k in range(H):
        value = sum(float(source.ipn.probe[k, j]) * float(seen[j]) for j in range(IN))
        features.append(max(0.0, float(source.ipn.scale[k]) * value + float(source.ipn.bias[k])))
    mix = stats.ipn.mix.astype(float)
    o = min(max(sum(m * f for m, f in zip(mix, features, strict=False)) + mix[H], -LIMIT), LIMIT)
    levels = []
    for j in range(IN):
        score = abs(float(x[j]) - float(stats.mean[j])) * float(stats.ipn.importance[j])
        levels.append(sum(score > float(t) * 2 ** (-gain * o) for t in THRESHOLDS))
    return o, levels


def test_levels_are_the_formula(case):
    first, second, x, inner = case
    features = RULE.features(first, x)
    assert features.shape == (50, H) and features.dtype == np.float32
    assert RULE.features(second, inner) is None
    offsets = []
    for stats, own, gain in ((first, x, 0.8), (second, inner, 0.4)):
        params = RULE.waterline(stats, THRESHOLDS, features, gain)
        assert params.shape == (S, 50, 1) and params.dtype == np.float32
        levels = RULE.levels(stats, own, params)
        o = token_offset(stats.ipn.mix, features)
        for t in range(50):
            expected_o, expected = by_hand(stats, first, own[t], x[t], gain)
            assert o[t] == pytest.approx(expected_o, abs=1e-4)
            np.testing.assert_array_equal(levels[t], expected)
        offsets.append(o)
    assert np.ptp(offsets[0]) > 1  # tokens differ, and some are held at the limit
    assert (np.abs(offsets[0]) == LIMIT).any() or (np.abs(offsets[1]) == LIMIT).any()


def test_a_positive_offset_reads_more_and_a_gain_of_zero_nothing_else(case):
    first, _, x, _ = case
    features = RULE.features(first, x)
    o = token_offset(first.ipn.mix, features)
    read = {g: RULE.levels(first, x, RULE.waterline(first, THRESHOLDS, features, g)).sum(-1) for g in (0.0, 0.5, 1.0)}
    np.testing.assert_array_equal(read[0.0], RULE.levels(first, x, THRESHOLDS).sum(-1))
    up, down = o > 0.5, o < -0.5
    assert up.any() and down.any()
    assert (read[1.0] >= read[0.5])[up].all() and (read[0.5] >= read[0.0])[up].all()
    assert (read[1.0] <= read[0.5])[down].all() and (read[1.0] < read[0.0])[down].any()


def test_the_head_has_importance_only(case):
    first, _, x, _ = case
    head = dataclasses.replace(first, ipn=IpnStats(first.ipn.importance))
    params = RULE.waterline(head, THRESHOLDS, RULE.features(first, x), 1.0)
    np.testing.assert_array_equal(params, THRESHOLDS)
    plain = get_rule("channel-norm").levels(dataclasses.replace(head, importance=first.ipn.importance), x, params)
    np.testing.assert_array_equal(RULE.levels(head, x, params), plain)


def test_torch_agrees_but_for_ties(case):
    torch = pytest.importorskip("torch")
    first, second, x, inner = case
    features = RULE.features(first, x)
    there = RULE.features(first.map(torch.from_numpy), torch.from_numpy(x))
    np.testing.assert_allclose(there.numpy(), features, rtol=1e-5, atol=1e-5)
    params = RULE.waterline(second, THRESHOLDS, features, 0.7)
    stats = second.map(torch.from_numpy)
    moved = RULE.waterline(stats, torch.from_numpy(THRESHOLDS), there, 0.7)
    np.testing.assert_allclose(moved.numpy(), params, rtol=1e-5)
    levels = RULE.levels(stats, torch.from_numpy(inner), moved).numpy()
    assert (levels != RULE.levels(second, inner, params)).mean() < 1e-3


def test_the_code_is_the_first_of_the_keys_that_fit_best(case):
    torch = pytest.importorskip("torch")
    first, second, x, _ = case
    rng, channels = np.random.default_rng(1), np.arange(1, 33)
    keys = rng.integers(-127, 128, (32, 9)).astype(np.float32)
    keys[:, 5] = keys[:, 2]  # never the first
    scale, bias = f32(rng.uniform(0.5, 1.5, 9)), f32(rng.normal(0, 60, 9))
    scale[5], bias[5] = scale[2], bias[2]
    ipn = dataclasses.replace(first.ipn, channels=channels, keys=keys, key_scale=scale, key_bias=bias)
    stats = dataclasses.replace(first, ipn=ipn)
    code = RULE.code(stats, x)
    fit = x[:, channels].astype(float) @ keys.astype(float) * scale + bias
    np.testing.assert_array_equal(code, fit.argmax(1))
    assert code.dtype == np.int64 and len(set(code.tolist())) > 4 and 2 in code and 5 not in code
    np.testing.assert_array_equal(RULE.code(stats.map(torch.from_numpy), torch.from_numpy(x)).numpy(), code)
    assert RULE.code(first, x) is None and RULE.code(second, x) is None
    assert get_rule("channel-norm").code(stats, x) is None
    x[0, 3] = np.nan  # no key fits
    assert RULE.code(stats, x)[0] == RULE.code(stats.map(torch.from_numpy), torch.from_numpy(x))[0] == 0


def test_infinite_thresholds_stay_so(case):
    first, _, x, _ = case
    params = RULE.waterline(first, f32([0, 1, np.inf]), RULE.features(first, x), 5.0)
    assert np.isinf(params[2]).all() and not params[0].any()
    assert RULE.levels(first, x, params).max() == 2


def test_other_rules_ignore_the_network(case):
    first, _, x, _ = case
    for name in ("channel-norm", "topk", "dense"):
        rule = get_rule(name)
        assert rule.features(first, x) is None
        assert rule.waterline(first, THRESHOLDS, None, 1.0) is THRESHOLDS


def test_without_a_network_the_rule_says_so(case):
    first, _, x, _ = case
    with pytest.raises(LowtideError, match="rule ipn: the artifact has no importance prediction network"):
        RULE.levels(dataclasses.replace(first, ipn=None), x, THRESHOLDS)
