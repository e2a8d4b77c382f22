"""Nested masks against loops: nestedness, the flat rule where coarse masks are open, what is counted."""

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.rules import GroupStats, get_rule
from lowtide.rules.hierarchy import Hierarchy, decide, open_neurons, row_steps, run_scores, spread, weight_levels

IN, S, TOKENS = 22, 3, 40
CUTS = np.float32([0.3, 0.9, 2.0])


@pytest.fixture
def case():
    """Centred inputs, importance (0 for two exact channels), and the tokens' lifts."""
    rng = np.random.default_rng(5)
    importance = rng.uniform(0.3, 1.5, IN).astype(np.float32)
    importance[[3, 20]] = 0
    a = (rng.normal(0, 1, (TOKENS, IN)) ** 3).astype(np.float32)
    a[0] = 0.01
    return a, importance, np.exp2(rng.normal(0, 1, TOKENS)).astype(np.float32)


def flat_by_hand(a, importance, lift=None):
    lifts = np.ones(TOKENS) if lift is None else lift.astype(float)
    return np.array(
        [[sum(abs(float(a[t, j])) * float(importance[j]) * lifts[t] > c for c in CUTS) for j in range(IN)]
         for t in range(TOKENS)]
    )  # fmt: skip


def run_by_hand(a, importance, first, last):
    """Scores of one run for every token."""
    live = [j for j in range(first, last) if importance[j] > 0]
    v = np.sqrt(np.mean([float(importance[j]) ** 2 for j in live]))
    return np.array([np.sqrt(np.mean([float(a[t, j]) ** 2 for j in live])) * v for t in range(len(a))])


def asked(levels):
    """Comparisons that find these levels one slice after the other."""
    return np.minimum(levels + 1, S).sum(-1)


def test_without_coarse_steps_it_is_channel_norm(case):
    a, importance, lift = case
    exact = importance == 0
    mean = np.zeros(IN, np.float32)
    plain = get_rule("channel-norm").levels(GroupStats(mean, importance, S, exact), a, CUTS)
    found = decide(Hierarchy(), a, importance, CUTS)
    np.testing.assert_array_equal(found.levels, plain)
    np.testing.assert_array_equal(
        decide(Hierarchy(), a, importance, CUTS, lift).levels, flat_by_hand(a, importance, lift)
    )
    assert set(plain.ravel()) == {0, 1, 2, 3}
    assert (found.fine == IN - 2).all() and (found.scores == IN - 2).all() and found.open.all()
    np.testing.assert_array_equal(found.decisions, asked(plain[:, ~exact]))


def test_open_coarse_masks_change_nothing_and_cost_what_they_look_at(case):
    a, importance, lift = case
    flat = decide(Hierarchy(), a, importance, CUTS, lift)
    for steps, coarse in ((Hierarchy(layer=0.0), 1), (Hierarchy(block=4, block_cut=0.0), 6),
                          (Hierarchy(0.0, 4, 0.0), 7)):  # fmt: skip
        found = decide(steps, a, importance, CUTS, lift)
        np.testing.assert_array_equal(found.levels, flat.levels)
        np.testing.assert_array_equal(found.fine, flat.fine)
        np.testing.assert_array_equal(found.scores, flat.scores + coarse)
        np.testing.assert_array_equal(found.decisions, flat.decisions + coarse)


def test_run_scores_are_root_mean_squares_of_what_counts(case):
    a, importance, _ = case
    found = run_scores(a, importance, 4)
    assert found.shape == (TOKENS, 6)  # the last run has two channels, one of them exact
    for run in range(6):
        wanted = run_by_hand(a, importance, 4 * run, min(4 * run + 4, IN))
        np.testing.assert_allclose(found[:, run], wanted, rtol=1e-5)
    assert run_scores(a, 0 * importance, 4).max() == 0


def test_a_closed_run_spares_its_channels_and_leaves_the_others(case):
    a, importance, _ = case
    flat = flat_by_hand(a, importance)
    found = decide(Hierarchy(block=4, block_cut=1.5), a, importance, CUTS)
    fine, closed = np.zeros(TOKENS, int), 0
    for run in range(6):
        part = slice(4 * run, min(4 * run + 4, IN))
        is_open = run_by_hand(a, importance, part.start, part.stop) > 1.5 * CUTS[0]
        np.testing.assert_array_equal(found.levels[is_open, part], flat[is_open, part])
        assert not found.levels[~is_open, part].any()
        closed += int(flat[~is_open, part].any(-1).sum())
        fine += is_open * np.count_nonzero(importance[part])
    assert closed > 0  # something that the flat rule reads is spared
    np.testing.assert_array_equal(found.fine, fine)
    np.testing.assert_array_equal(found.scores, fine + 6)
    assert (found.decisions < asked(flat[:, importance > 0]) + 6).any()


def test_a_closed_layer_spares_runs_and_channels(case):
    a, importance, _ = case
    found = decide(Hierarchy(layer=2.0, block=4, block_cut=0.0), a, importance, CUTS)
    is_open = run_by_hand(a, importance, 0, IN) > 2 * CUTS[0]
    assert 0 < is_open.sum() < TOKENS
    np.testing.assert_array_equal(found.open, is_open)
    assert not found.levels[~is_open].any()
    np.testing.assert_array_equal(found.levels[is_open], flat_by_hand(a, importance)[is_open])
    np.testing.assert_array_equal(found.scores, np.where(is_open, 1 + 6 + IN - 2, 1))
    assert (found.decisions[~is_open] == 1).all()


def test_what_is_closed_from_outside_stays_closed(case):
    a, importance, _ = case
    layer, channels = np.arange(TOKENS) % 2 == 0, np.arange(IN) % 3 > 0
    inside = np.broadcast_to(channels, a.shape)
    found = decide(Hierarchy(layer=0.0, block=4, block_cut=0.0), a, importance, CUTS, None, layer, inside)
    np.testing.assert_array_equal(found.levels, flat_by_hand(a, importance) * layer[:, None] * channels)
    assert (found.scores[~layer] == 0).all() and (found.decisions[~layer] == 0).all()
    assert (found.fine[layer] == np.count_nonzero(channels & (importance > 0))).all()


def test_runs_without_channels_share_one_level(case):
    a, importance, _ = case
    found = decide(Hierarchy(block=4, channel=False), a, importance, CUTS)
    counts = []
    for run in range(6):
        part = slice(4 * run, min(4 * run + 4, IN))
        level = (run_by_hand(a, importance, part.start, part.stop)[:, None] > CUTS).sum(-1)
        np.testing.assert_array_equal(found.levels[:, part], level[:, None] * (importance[part] > 0))
        counts.append(level)
    assert (found.scores == 6).all() and not found.fine.any()
    np.testing.assert_array_equal(found.decisions, asked(np.array(counts).T))
    one = decide(Hierarchy(block=1, channel=False), a, importance, CUTS)
    np.testing.assert_array_equal(one.levels, flat_by_hand(a, importance))


def test_spread_is_by_runs():
    np.testing.assert_array_equal(spread(np.array([[5, 6, 7]]), 3, 8), [[5, 5, 5, 6, 6, 6, 7, 7]])


def test_neurons_open_by_gate_times_factor(case):
    a, importance, _ = case
    exact = importance == 0
    found = open_neurons(a, importance, 0.4, exact)
    for t in range(TOKENS):
        for j in range(IN):
            assert found[t, j] == (exact[j] or abs(a[t, j]) * importance[j] > 0.4)
    assert not open_neurons(a, importance, 0.4)[:, exact].any()


def test_row_steps_are_whole_levels_within_bounds():
    sensitivity = np.float32([0, 2**-20, 0.2, 0.45, 0.55, 1, 1.9, 2.1, 900])
    np.testing.assert_array_equal(row_steps(sensitivity), [-3, -3, -1, -1, 0, 0, 0, 1, 1])
    assert row_steps(sensitivity, -1, 4).tolist() == [-1, -1, -1, -1, 0, 0, 0, 1, 4]


def test_weights_are_nested_in_channels(case):
    a, importance, _ = case
    score = abs(a) * importance
    levels = decide(Hierarchy(), a, importance, CUTS).levels
    outer, inner, same = weight_levels(score, levels, np.float32([2.0, 0.2, 1.0]), CUTS)
    for found in (outer, inner, same):
        np.testing.assert_array_equal(found > 0, levels > 0)
    assert (outer >= levels).all() and (inner <= levels).all()
    assert (outer > levels).any() and (inner < levels).any()
    np.testing.assert_array_equal(same, levels)
    wanted = np.where(levels > 0, np.maximum((score[..., None] * 2 > CUTS).sum(-1), 1), 0)
    np.testing.assert_array_equal(outer, wanted)


def test_torch_agrees(case):
    torch = pytest.importorskip("torch")
    a, importance, lift = case
    there = [torch.from_numpy(v) for v in (a, importance, CUTS, lift)]
    for steps in (Hierarchy(), Hierarchy(2.0, 4, 1.5), Hierarchy(block=5, channel=False)):
        ours, theirs = decide(steps, a, importance, CUTS, lift), decide(steps, *there)
        for field in ("levels", "open", "fine", "scores", "decisions"):
            np.testing.assert_array_equal(getattr(theirs, field).numpy(), getattr(ours, field))
            assert getattr(ours, field).dtype == getattr(theirs, field).numpy().dtype
    gate, factor = there[:2]
    np.testing.assert_array_equal(open_neurons(gate, factor, 0.4).numpy(), open_neurons(a, importance, 0.4))
    np.testing.assert_array_equal(row_steps(gate.abs()).numpy(), row_steps(abs(a)))
    levels = decide(Hierarchy(), a, importance, CUTS).levels
    factors = np.float32([1.3, 0.5])
    np.testing.assert_array_equal(
        weight_levels(gate.abs() * factor, torch.from_numpy(levels), torch.from_numpy(factors), there[2]).numpy(),
        weight_levels(abs(a) * importance, levels, factors, CUTS),
    )


@pytest.mark.parametrize("wrong", [{"layer": -0.1}, {"block": -1}, {"block_cut": -1.0}, {"channel": False}])
def test_steps_that_cannot_be_are_refused(wrong):
    with pytest.raises(LowtideError, match="must not be negative|give block"):
        Hierarchy(**wrong)
