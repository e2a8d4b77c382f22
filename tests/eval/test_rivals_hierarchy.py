"""Nested and shared masks as plans: the flat rule where all is open, literal products, every bit counted."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from support.rivals import BITS, all_rows, inputs, literal, make_calibration  # noqa: E402

from lowtide.errors import LowtideError  # noqa: E402
from lowtide.eval.rivals import HIERARCHIES, RivalModel, Tuner  # noqa: E402
from lowtide.eval.rivals.graded import GradedPlan  # noqa: E402
from lowtide.eval.rivals.hierarchy import gate_statistics, quantile  # noqa: E402
from lowtide.eval.rivals.neighbours import NeighbourPlan, _gain  # noqa: E402
from lowtide.eval.rivals.nested import INNER, OUTER, HierarchyPlan, Steps, split_classes  # noqa: E402
from lowtide.eval.rivals.scores import Scores  # noqa: E402
from lowtide.rules import get_rule  # noqa: E402
from lowtide.runtime.budget import policy_params  # noqa: E402

GATE_UP, DOWN = "layers.0.gate_up", "layers.0.down"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_calibration(tmp_path_factory.mktemp("shared"), policies=("ipn", "channel-norm"))


def make(shared, policy="channel-norm", kind=HierarchyPlan, **steps):
    """A plan with these very factors."""
    made = Steps(**steps)
    neurons = gate_statistics(shared, policy) if made.rows or made.neuron is not None else None
    classes = split_classes(shared.model) if made.weight is not None else None
    return kind(Scores(shared, policy, BITS), made, neurons, classes)


def body_bits(shared, plan):
    return shared.model.states(shared.ids, plan)[1] * shared.model.body_weights


def one(shared, plan, name, x):
    """A group's product on its own; the features of ipn are those of its layer's qkv input or gate_up input."""
    return plan.product(shared.model, name, x, {})


# ---- the flat plan ----


def test_the_flat_plan_is_our_own_rule(shared):
    plan = make(shared)
    states, bits = shared.model.states(shared.ids, plan)
    wanted, wanted_bits = shared.model.states(shared.ids, GradedPlan(shared.params(BITS)))
    assert torch.equal(states, wanted)
    exact = sum(len(shared.model.groups[n].exact_channels) for n in shared.model.body)
    # importance of exact channels is not asked for
    assert bits * shared.model.body_weights == pytest.approx(wanted_bits * shared.model.body_weights - 16 * exact)


def test_the_flat_plan_with_ipn_is_the_engine_s_rule(shared):
    params = policy_params(shared.artifact, "ipn", BITS)
    names = [n for n in shared.artifact.groups if n != "embed"]
    rows, gains = dict(zip(names, params.thresholds, strict=True)), dict(zip(names, params.gains, strict=True))
    ids = shared.ids
    _, body = shared.model.logits(ids, get_rule("ipn"), rows, gains)
    exact = sum(len(shared.model.groups[n].exact_channels) for n in shared.model.body)
    found = body_bits(shared, make(shared, "ipn"))
    assert found == pytest.approx(body * shared.model.body_weights - 16 * exact, rel=1e-6)
    assert found != pytest.approx(body_bits(shared, make(shared)), rel=1e-3)


def test_costs_are_those_of_the_last_offset(shared):
    plan = make(shared)
    shared.model.states(shared.ids, plan)
    plan.offset = 0.25
    shared.model.states(shared.ids, plan)
    cost = plan.costs[0.25]
    readable = sum(shared.model.readable(n) for n in shared.model.body)
    assert cost.tokens == shared.ids.numel() and cost.scores == readable * cost.tokens and cost.closed == 0
    assert cost.decisions < plan.costs[0.0].decisions  # fewer slices pass, fewer are asked for


def test_ipn_is_taken_where_stored_and_other_rules_are_refused(shared, tmp_path):
    assert HIERARCHIES["channel (flat)"].fit(shared).policy == "ipn"
    plain = make_calibration(tmp_path)
    assert HIERARCHIES["channel (flat)"].fit(plain).policy == "channel-norm"
    with pytest.raises(LowtideError, match="policy topk: nested masks start from"):
        Scores(shared, "topk", BITS)
    near = make_calibration(tmp_path / "centroids", policies=("ipn", "channel-norm"), centroids=5)
    with pytest.raises(LowtideError, match="policy ipn: this artifact's has centroids, and rivals know one mean only"):
        Scores(near, "ipn", BITS)
    assert Scores(near, "channel-norm", BITS).policy == "channel-norm"


# ---- coarse steps ----


@pytest.mark.parametrize("policy", ["channel-norm", "ipn"])
def test_open_coarse_masks_cost_only_their_importance(shared, policy):
    flat = make(shared, policy)
    states, _ = shared.model.states(shared.ids, flat)
    tokens, body = shared.ids.numel(), shared.model.body
    runs = sum(-(-shared.model.groups[n].planes.shape[2] // 8) for n in body)
    neurons = 16 * 80 * 2
    wanted = body_bits(shared, flat)
    readable = sum(shared.model.readable(n) for n in body)
    for steps, extra, looked in (
        ({"layer": 0.0}, 16 * len(body), len(body)),
        ({"whole": 0.0}, 16 * 2, 2),
        ({"block": 8, "block_cut": 0.0}, 16 * runs, runs),
        ({"neuron": -1.0}, neurons, 160),
        ({"layer": 0.0, "block": 8, "block_cut": 0.0, "neuron": -1.0}, 16 * (len(body) + runs) + neurons, 168 + runs),
    ):
        plan = make(shared, policy, **steps)
        found, bits = shared.model.states(shared.ids, plan)
        torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-4)
        assert bits * shared.model.body_weights == pytest.approx(wanted + extra), steps
        cost = plan.costs[0.0]
        assert cost.tokens == tokens and cost.scores == (readable + looked) * tokens


def test_a_closed_layer_is_its_bias_and_reads_next_to_nothing(shared):
    for steps in ({"layer": math.inf}, {"whole": math.inf}):
        plan = make(shared, **steps)
        block = {}
        for name in ("layers.0.qkv", "layers.0.o", GATE_UP, DOWN):
            group = shared.model.groups[name]
            y, bits = plan.product(shared.model, name, inputs(shared.artifact, name), block)
            assert torch.equal(y, group.bias.expand_as(y)) and not bits.any()
            tensors = shared.artifact.groups[name]
            kept = 8 * (tensors.mean.nbytes + sum(linear.bias.nbytes for linear in tensors.linears)) + 32 * 3
            own = 16 if "layer" in steps or name.endswith("qkv") else 0
            assert plan.side_bits(shared.model, name) == kept + own
        assert plan.costs[0.0].closed == 5 * 4 and plan.costs[0.0].decisions == (20 if "layer" in steps else 5)


def test_a_closed_layer_still_reads_the_network(shared):
    for name in ("layers.0.qkv", "layers.1.o"):
        group = shared.artifact.groups[name]
        kept = [make(shared, policy, layer=1.0).side_bits(shared.model, name) for policy in ("channel-norm", "ipn")]
        assert kept[1] - kept[0] == 8 * (group.ipn.side_bytes() - group.ipn.importance.nbytes) > 0


def test_a_layer_closes_for_single_tokens(shared):
    x = inputs(shared.artifact, GATE_UP)
    x[2] = shared.model.groups[GATE_UP].stats.mean
    flat, closing = make(shared), make(shared, layer=0.05)
    wanted, bits = one(shared, flat, GATE_UP, x)
    y, found = one(shared, closing, GATE_UP, x)
    open_tokens = torch.tensor([True, True, False, True, True])
    assert torch.equal(y[open_tokens], wanted[open_tokens])
    assert torch.equal(y[2], shared.model.groups[GATE_UP].bias) and found[2] == 0
    side = closing.side_bits(shared.model, GATE_UP) - 16 - flat.side_bits(shared.model, GATE_UP)
    assert side < 0 and torch.equal(found[open_tokens], bits[open_tokens] - side)


def test_closed_neurons_have_no_row_and_no_channel(shared):
    plan = make(shared, neuron=1.5)
    x, block = inputs(shared.artifact, GATE_UP), {}
    y, bits = plan.product(shared.model, GATE_UP, x, block)
    flat, flat_bits = one(shared, make(shared), GATE_UP, x)
    assert torch.equal(y, flat)  # what is closed is closed at `down`
    gate = F.silu(y[:, :80])
    exact = shared.model.groups[DOWN].stats.exact
    factor = plan.neurons["layers.0"].reach
    is_open = (gate.abs() * factor > 1.5 * plan.cuts(DOWN)[0]) | exact
    assert torch.equal(block["neurons"], is_open) and 0.1 < is_open.float().mean() < 0.9 and is_open[:, exact].all()
    levels = get_rule("channel-norm").levels(shared.model.groups[GATE_UP].stats, x, plan.cuts(GATE_UP))
    every = all_rows(shared.artifact, GATE_UP, levels)
    every[:, 80:] *= is_open.numpy()[:, :, None]
    fine = 16 * shared.model.readable(GATE_UP)
    torch.testing.assert_close(bits, literal(shared.artifact, GATE_UP, x, every)[1].float() + fine)
    assert (bits < flat_bits).all()
    h = inputs(shared.artifact, DOWN, seed=4)
    z, down_bits = plan.product(shared.model, DOWN, h, block)
    stats = shared.model.groups[DOWN].stats
    levels = get_rule("channel-norm").levels(stats, h, plan.cuts(DOWN)) * is_open.int()
    centred = torch.where(is_open, h, stats.mean)
    wanted, wanted_bits = literal(shared.artifact, DOWN, centred, all_rows(shared.artifact, DOWN, levels))
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(down_bits, wanted_bits.float() + 16.0 * (is_open & ~exact).sum(-1))


# ---- rows and weights ----


def row_levels(shared, plan, x, how):
    """Levels int [n, out, in] of gate_up, weight by weight."""
    stats, cuts = shared.model.groups[GATE_UP].stats, plan.cuts(GATE_UP)
    score = get_rule("channel-norm").score(stats, x)
    channel = (score[..., None] > cuts).sum(-1)
    levels = all_rows(shared.artifact, GATE_UP, channel)
    gate = shared.model.read(GATE_UP, x, channel.int(), shared.model.parts[GATE_UP][0])[0]
    sensitivity = F.silu(gate).abs() * plan.neurons["layers.0"].row * plan.steps.tilt
    for t in range(len(x)):
        for row in range(80):
            s = float(sensitivity[t, row])
            if how == "rows":
                usual = math.sqrt(float(score[t].square().mean()))
                levels[t, 80 + row] = sum(s * usual > float(c) for c in cuts)
            else:
                step = min(max(round(math.log2(max(s, 1e-20)) / 2), -3), 1)
                levels[t, 80 + row] = (score[t][:, None] * 4.0**step > cuts).sum(-1).numpy()
    return levels


@pytest.mark.parametrize("how", ["rows", "both"])
def test_rows_of_up_have_levels_of_their_own(shared, how):
    plan = make(shared, rows=how, tilt=1.5)
    x = inputs(shared.artifact, GATE_UP)
    y, bits = one(shared, plan, GATE_UP, x)
    levels = row_levels(shared, plan, x, how)
    assert set(levels[:, 80:].ravel()) == {0, 1, 2, 3}
    wanted, wanted_bits = literal(shared.artifact, GATE_UP, x, levels)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bits, wanted_bits.float() + 16 * shared.model.readable(GATE_UP))
    exact = shared.model.groups[DOWN].stats.exact
    assert (plan.neurons["layers.0"].row[exact] > 1e3).all()
    assert plan.side_bits(shared.model, GATE_UP) == make(shared).side_bits(shared.model, GATE_UP) + 16 * 80


def test_weights_of_a_channel_read_on_by_their_first_digit(shared):
    plan = make(shared, weight=1.0)
    x = inputs(shared.artifact, DOWN)
    y, bits = one(shared, plan, DOWN, x)
    score = get_rule("channel-norm").score(shared.model.groups[DOWN].stats, x)
    outer = (shared.model.groups[DOWN].planes[0].abs() > 1).numpy()
    levels = np.zeros((len(x), *outer.shape), int)
    for factor, mine in ((OUTER, outer), (INNER, ~outer)):
        level = (score[..., None] * factor > plan.cuts(DOWN)).sum(-1).clamp_min(1) * (score > plan.cuts(DOWN)[0])
        levels += level.numpy()[:, None] * mine
    wanted, wanted_bits = literal(shared.artifact, DOWN, x, levels)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bits, wanted_bits.float() + 16 * shared.model.readable(DOWN))
    assert OUTER**2 + INNER**2 == pytest.approx(2)
    whole = shared.model.groups[DOWN].planes
    assert torch.equal(sum(part.groups[DOWN].planes for part in plan.classes), whole)


# ---- neighbours ----


def test_levels_of_the_layer_before(shared):
    model, plan = shared.model, make(shared, kind=NeighbourPlan, share="levels")
    x0, x1 = inputs(shared.artifact, "layers.0.qkv"), inputs(shared.artifact, "layers.1.qkv", seed=9)
    first = plan.decide(model, "layers.0.qkv", x0, None, {})
    second = plan.decide(model, "layers.1.qkv", x1, None, {})
    own = make(shared).decide(model, "layers.0.qkv", x0, None, {})
    assert torch.equal(first.levels, own.levels)
    exact = model.groups["layers.1.qkv"].stats.exact
    assert torch.equal(second.levels, torch.where(exact, 0, first.levels))
    assert not second.scores.any() and not second.decisions.any() and not second.fine.any()
    ahead = make(shared, kind=NeighbourPlan, share="levels ahead")
    ahead.decide(model, "layers.0.qkv", x0, None, {})
    found = ahead.decide(model, "layers.1.qkv", x1, None, {})
    assert torch.equal(found.levels, second.levels) and (found.scores == model.readable("layers.1.qkv")).all()


@pytest.mark.parametrize(
    ("share", "source", "target"),
    [("input", "layers.0.gate_up", "layers.1.gate_up"), ("within", "layers.1.qkv", "layers.1.gate_up")],
)
def test_the_neighbour_s_input_is_scored_with_one_s_own_importance(shared, share, source, target):
    model, plan = shared.model, make(shared, kind=NeighbourPlan, share=share)
    x = inputs(shared.artifact, source)
    a = x - model.groups[source].stats.mean
    _, one_layer, one_kind = source.split(".")
    _, other_layer, other_kind = target.split(".")
    gain, other = _gain(model, int(one_layer), one_kind), _gain(model, int(other_layer), other_kind)
    same = a / gain * other + model.groups[target].stats.mean  # what the target sees if the residual stream stays
    plan.decide(model, source, x, None, {})
    found = plan.decide(model, target, torch.zeros_like(x), None, {})
    wanted = make(shared).decide(model, target, same, None, {})
    assert torch.equal(found.levels, wanted.levels) and found.levels.any()
    extra = plan.side_bits(model, target) - make(shared).side_bits(model, target)
    assert extra == 16 * x.shape[1] and plan.side_bits(model, "layers.0.qkv") == make(shared).side_bits(
        model, "layers.0.qkv"
    )


def test_groups_off_the_residual_stream_share_nothing(shared):
    plan = make(shared, kind=NeighbourPlan, share="levels")
    for name in ("layers.0.down", "layers.1.down"):
        x = inputs(shared.artifact, name, seed=len(name))
        found = plan.decide(shared.model, name, x, None, {})
        assert torch.equal(found.levels, make(shared).decide(shared.model, name, x, None, {}).levels)


# ---- tuning ----


@pytest.mark.parametrize("name", list(HIERARCHIES))
def test_every_hierarchy_keeps_the_budget(shared, name):
    tuner = Tuner(shared)
    plan, _ = tuner.tune(HIERARCHIES[name].fit(shared, "channel-norm"), BITS)
    assert shared.model.states(shared.choice, plan)[1] == pytest.approx(BITS, rel=0.01)
    assert plan.costs[plan.offset].tokens > 0


def test_shares_close_that_many_parts(shared):
    fitted = HIERARCHIES["layer > channel"].fit(shared, "channel-norm")
    plan = fitted.plan(BITS, layer=0.25)
    shared.model.states(shared.choice, plan)
    cost = plan.costs[0.0]
    assert cost.closed / cost.tokens / len(shared.model.body) == pytest.approx(0.25, abs=0.06)
    values = torch.arange(1.0, 11.0)
    assert quantile(values, 0.3) == 3 and quantile(values, 0.0) == 1 and quantile(values, 1.0) == 10


def test_a_model_of_classes_shares_nothing_that_it_changes(shared):
    before = {n: g.planes.clone() for n, g in shared.model.groups.items()}
    split_classes(shared.model)
    assert all(torch.equal(before[n], g.planes) for n, g in shared.model.groups.items())
    assert isinstance(shared.model, RivalModel)
