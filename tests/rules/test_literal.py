"""The literal form of the specification, and that the faster forms equal it where they must."""

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.rules import RULES, GroupStats
from lowtide.rules import literal as lit
from lowtide.rules.granularity import GRANULARITIES, mask, pool, spread

SHAPES = [(1, 1), (3, 1), (1, 5), (7, 13), (65, 37)]


def draw(out, channels, tokens=4, seed=0):
    rng = np.random.default_rng(seed + 100 * out + channels)
    return rng.normal(size=(tokens, channels)).astype(np.float32), rng.normal(size=(out, channels)).astype(np.float32)


def test_by_hand():
    x, w = np.float32([2, -1]), np.float32([[1, 3], [-0.4, 0.5]])
    scores = lit.importance(x, w)
    np.testing.assert_allclose(scores, [[2, 3], [0.8, 0.5]])
    m = lit.binary_mask(scores, 0.8)
    np.testing.assert_array_equal(m, [[True, True], [False, False]])  # strictly above
    np.testing.assert_allclose(lit.masked_product(x, w, m), [2 - 3, 0])
    np.testing.assert_allclose(lit.literal_linear(x, w, 0.8), [-1, 0])
    np.testing.assert_allclose(lit.literal_linear(x, w, 0.0), w @ x)
    np.testing.assert_allclose(lit.literal_linear(x, w, 0.5, scores=np.float32([[1, 0]])), [2, -0.8])


@pytest.mark.parametrize(("out", "channels"), SHAPES)
def test_numpy_and_torch_agree(out, channels):
    torch = pytest.importorskip("torch")
    x, w = draw(out, channels)
    got = lit.literal_linear(torch.from_numpy(x), torch.from_numpy(w), 0.5)
    np.testing.assert_allclose(got.numpy(), lit.literal_linear(x, w, 0.5), rtol=1e-5, atol=1e-5)
    weights = np.stack([w * 0, w * 0.5, w])
    levels = np.random.default_rng(1).integers(0, 3, x.shape)
    got = lit.graded_linear(torch.from_numpy(x), torch.from_numpy(weights), torch.from_numpy(levels))
    np.testing.assert_allclose(got.numpy(), lit.graded_linear(x, weights, levels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("out", "channels"), SHAPES)
@pytest.mark.parametrize("name", ["channel-norm", "channel-abs", "gate", "topk", "statistical-topk"])
def test_channel_masks_of_a_rule_equal_literal_masks(out, channels, name):
    """Levels {0, S} are a literal mask whose score is the channel's, given to each of its weights."""
    x, w = draw(out, channels)
    stats = GroupStats(np.zeros(channels, np.float32), np.sqrt((w * w).sum(0)).astype(np.float32), 3)
    rule = RULES[name]
    gate = np.abs(x[:, ::-1]).copy() if rule.needs_gate else None
    cut = rule.calibrate(stats, x, np.full(3, 0.5), gate)
    levels = rule.levels(stats, x, cut, gate)
    assert set(np.unique(levels)) <= {0, 3}
    graded = lit.graded_linear(x, np.stack([w * 0, w * 9, w * 9, w]), levels)
    if name == "topk":
        chosen = levels[:, None, :].astype(np.float32)
        literal = lit.literal_linear(x, w, 0.5, scores=chosen)
    else:
        literal = lit.literal_linear(x, w, float(cut[0]), scores=rule.score(stats, x, gate)[:, None, :])
    np.testing.assert_allclose(graded, literal, rtol=1e-5, atol=1e-5)
    assert channels == 1 or 0 < (levels > 0).mean() < 1


@pytest.mark.parametrize(("out", "channels"), SHAPES)
def test_graded_levels_equal_a_sum_of_masked_slices(out, channels):
    """A nested code read to level L is the sum of L slices, each under its own binary channel mask."""
    x, w = draw(out, channels)
    rng = np.random.default_rng(3)
    slices = np.stack([np.rint(w * 2) / 2, rng.normal(0, 0.1, w.shape), rng.normal(0, 0.01, w.shape)]).astype(
        np.float32
    )
    weights = np.concatenate([np.zeros((1, *w.shape), np.float32), np.cumsum(slices, 0)])
    levels = rng.integers(0, 4, x.shape)
    masks = lit.levels_as_masks(levels, 3)
    assert masks.shape == (3, *x.shape)
    total = sum(
        lit.masked_product(x, s, np.broadcast_to(m[:, None, :], (len(x), *w.shape)))
        for s, m in zip(slices, masks, strict=True)
    )
    np.testing.assert_allclose(lit.graded_linear(x, weights, levels), total, rtol=1e-4, atol=1e-5)


def test_graded_weights_below_their_channels_step_are_a_per_weight_mask():
    """With one-slice codes that round small weights to 0, the levels are the literal per-weight mask."""
    x, w = draw(40, 24, tokens=6, seed=5)
    theta = np.float32(0.3)
    levels = (np.abs(x) * np.abs(w).max(0) > theta).astype(np.int32)
    literal = lit.literal_linear(x, w, theta)
    steps = theta / np.abs(x)[:, None, :]
    by_channel = lit.masked_product(x, w, (np.abs(w) > steps) & (levels[:, None, :] > 0))
    np.testing.assert_allclose(literal, by_channel, rtol=1e-5, atol=1e-5)


def test_pool_by_hand():
    s = np.float32([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(pool(s, "weight"), s)
    np.testing.assert_array_equal(pool(s, "neuron", how="mean"), [[2], [5]])
    np.testing.assert_array_equal(pool(s, "channel", how="max"), [[4, 5, 6]])
    np.testing.assert_allclose(pool(s, "channel"), np.sqrt([[8.5, 14.5, 22.5]]), rtol=1e-6)
    np.testing.assert_array_equal(pool(s, "block", (2, 2), "mean"), [[3, 4.5]])
    np.testing.assert_array_equal(pool(s, "block", (1, 2), "max"), [[2, 3], [5, 6]])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (3, 5), (100, 100)])
@pytest.mark.parametrize("how", ["rms", "mean", "max"])
def test_masks_are_constant_on_their_parts(granularity, block, how):
    torch = pytest.importorskip("torch")
    out, channels = 7, 11
    scores = np.random.default_rng(2).uniform(0, 1, (2, out, channels)).astype(np.float32)
    pooled = pool(scores, granularity, block, how)
    cut = float(np.median(pooled)) - 1e-4
    m = mask(scores, cut, granularity, block, how)
    assert m.shape == scores.shape and m.any()
    np.testing.assert_array_equal(spread(pooled, granularity, out, channels, block) > cut, m)
    np.testing.assert_array_equal(mask(torch.from_numpy(scores), cut, granularity, block, how).numpy(), m)
    rows, cols = {"weight": (1, 1), "neuron": (1, channels), "channel": (out, 1), "block": block}[granularity]
    for r in range(0, out, rows):
        for c in range(0, channels, cols):
            part = m[:, r : r + rows, c : c + cols]
            assert (part == part[:, :1, :1]).all()
            if how == "max":
                np.testing.assert_array_equal(part[:, 0, 0], scores[:, r : r + rows, c : c + cols].max((1, 2)) > cut)


def test_blocks_reach_the_other_granularities():
    scores = np.random.default_rng(4).uniform(0, 1, (6, 10)).astype(np.float32)
    for granularity, block in (("weight", (1, 1)), ("neuron", (1, 10)), ("channel", (6, 1))):
        np.testing.assert_array_equal(mask(scores, 0.55, granularity), mask(scores, 0.55, "block", block))


def test_wrong_names_are_refused():
    s = np.ones((2, 2), np.float32)
    with pytest.raises(LowtideError, match="known are weight, neuron, channel, block"):
        pool(s, "row")
    with pytest.raises(LowtideError, match="known are rms, mean, max"):
        pool(s, "neuron", how="sum")
    with pytest.raises(LowtideError, match="at least 1"):
        pool(s, "block", (0, 1))
