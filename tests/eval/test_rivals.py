"""The rivals' model and measurements: products against the literal one, budgets met, every byte counted."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.rivals import BITS, all_rows, inputs, literal, make_calibration, side_without_rule  # noqa: E402

from lowtide.compress.masked import MaskedModel  # noqa: E402
from lowtide.errors import LowtideError  # noqa: E402
from lowtide.eval.metrics import Tally, log_softmax  # noqa: E402
from lowtide.eval.rivals import (  # noqa: E402
    RIVALS,
    Calibration,
    Figures,
    OutOfReach,
    RivalModel,
    Tuner,
    allocation,
    measure,
    self_supervised,
    settle,
)
from lowtide.eval.rivals.base import Fitted, LevelPlan, share_for  # noqa: E402
from lowtide.eval.rivals.calibration import Table  # noqa: E402
from lowtide.eval.rivals.graded import GradedPlan  # noqa: E402
from lowtide.eval.rivals.measure import compare  # noqa: E402
from lowtide.rules import get_rule  # noqa: E402


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_calibration(tmp_path_factory.mktemp("shared"))


# ---- products ----


@pytest.mark.parametrize("name", ["layers.0.qkv", "layers.1.down", "head"])
def test_mixed_levels_equal_the_literal_product(shared, name):
    x = inputs(shared.artifact, name)
    levels = torch.randint(0, 4, x.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    y, bits = shared.model.read(name, x, levels)
    wanted, wanted_bits = literal(shared.artifact, name, x, all_rows(shared.artifact, name, levels))
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(bits, wanted_bits.float())


@pytest.mark.parametrize("level", [0, 1, 3])
def test_one_level_equals_the_literal_product(shared, level):
    name = "layers.0.gate_up"
    x = inputs(shared.artifact, name)
    levels = level * torch.randint(0, 2, x.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    y, bits = shared.model.read(name, x, levels)
    wanted, wanted_bits = literal(shared.artifact, name, x, all_rows(shared.artifact, name, levels))
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(bits, wanted_bits.float())


def test_some_rows_are_the_same_as_all_rows(shared):
    x = inputs(shared.artifact, "layers.0.qkv")
    levels = torch.randint(0, 4, x.shape, dtype=torch.int32)
    whole, bits = shared.model.read("layers.0.qkv", x, levels)
    parts = [shared.model.read("layers.0.qkv", x, levels, rows) for rows in shared.model.parts["layers.0.qkv"]]
    assert len(parts) == 3
    torch.testing.assert_close(torch.cat([y for y, _ in parts], -1), whole)
    torch.testing.assert_close(sum(b for _, b in parts), bits)


@pytest.mark.parametrize("one_level", [True, False])
def test_rounded_coefficients_are_those_of_the_masked_model(shared, one_level):
    model = RivalModel(shared.artifact)
    params = shared.params(BITS)["layers.1.gate_up"]
    params = np.array([params[0], params[0], np.inf], np.float32) if one_level else params
    x = inputs(shared.artifact, "layers.1.gate_up")
    wanted, (levels, _) = MaskedModel.product(model, "layers.1.gate_up", x, get_rule("channel-norm"), params)
    assert set(levels.unique().tolist()) == ({0, 2} if one_level else {0, 1, 2, 3})
    torch.testing.assert_close(model.read("layers.1.gate_up", x, levels)[0], wanted, rtol=1e-5, atol=1e-5)


def test_the_whole_model_is_the_masked_model(shared):
    model = RivalModel(shared.artifact)
    params = shared.params(BITS)
    logits, body = MaskedModel.logits(model, shared.ids, get_rule("channel-norm"), params)[:2]
    states, bits = model.states(shared.ids, GradedPlan(params))
    ours, head_bits = model.head(states, params["head"])
    torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)
    assert bits == pytest.approx(body, rel=1e-6)
    group = shared.artifact.groups["head"]
    levels = get_rule("channel-norm").levels(model.groups["head"].stats, states, torch.from_numpy(params["head"]))
    row = 2 * group.slices * group.in_features + 16 * group.in_features + 16
    wanted = 2.0 * levels.sum(-1) * group.linears[0].out_features + 8 * group.side_bytes() + row
    torch.testing.assert_close(head_bits, wanted.float())


# ---- measuring ----


def test_the_offset_keeps_the_budget(shared):
    plan = GradedPlan(shared.params(4.0))
    _, before = shared.model.states(shared.ids, plan)
    assert abs(before / BITS - 1) > 0.01
    _, read = settle(shared.model, plan, shared.ids, BITS)
    assert read == pytest.approx(BITS, rel=0.01) and plan.offset < 0
    assert shared.model.states(shared.ids, plan)[1] == pytest.approx(read)


def test_a_budget_out_of_reach_is_refused(shared):
    with pytest.raises(OutOfReach, match="20 bits per weight are not met"):
        settle(shared.model, GradedPlan(shared.params(BITS)), shared.ids, 20.0)


def test_kl_perplexity_and_bits_are_those_of_single_tokens(shared):
    plan, head = GradedPlan(shared.params(BITS)), shared.params(BITS)["head"]
    dense = [torch.log_softmax(shared.dense.logits(row[None])[0], -1) for row in shared.ids]
    found = measure(shared.model, plan, shared.ids, BITS, head, dense.__getitem__)
    tally, bits = Tally(), []
    for row, reference in zip(shared.ids, dense, strict=True):
        states, read = shared.model.states(row[None], plan)
        logits, head_bits = shared.model.head(states[0], head)
        bits.append(read * shared.model.body_weights + float(head_bits.mean()))
        for logit, wanted, target in zip(logits, reference, [*row[1:].tolist(), None], strict=True):
            tally.add(log_softmax(logit.numpy()), target, wanted.double().numpy())
    assert found.kl == pytest.approx(tally.mean_kl, rel=1e-4)
    assert found.ppl == pytest.approx(tally.perplexity, rel=1e-4)
    assert found.bits_read_total == pytest.approx(np.mean(bits) / shared.model.all_weights, rel=1e-5)
    states, _ = shared.model.states(shared.ids, plan)
    assert compare(shared.model, states, shared.ids, head, dense.__getitem__)[0] == pytest.approx(found.kl)


class Constant(LevelPlan):
    """Everything at one level; levels above `top` of the offset's sign never."""

    def __init__(self, level):
        self.level = level

    def levels(self, model, name, x, block):
        keep = torch.arange(x.shape[-1]) / x.shape[-1] < 0.5 * 2.0**-self.offset
        return (keep.int() * self.level).expand(x.shape)


class Choices(Fitted):
    """Two knobs; what is tried is written down."""

    def __init__(self):
        self.tried = []

    def knobs(self, bits):
        return {"level": (1, 2, 3), "spare": ("a", "b")}

    def plan(self, bits, level, spare):
        self.tried.append((level, spare))
        if level == 1:
            raise OutOfReach("too low")
        return Constant(level)


def test_the_tuner_takes_the_setting_of_the_least_kl(shared):
    fitted, tuner = Choices(), Tuner(shared)
    plan, setting = tuner.tune(fitted, BITS)
    kl = {level: tuner.kl(Constant(level), BITS) for level in (2, 3)}
    best = min(kl, key=kl.__getitem__)
    assert setting["level"] == best == plan.level
    assert fitted.tried[:3] == [(1, "a"), (2, "a"), (3, "a")] and fitted.tried[3:] == [(best, "b")]


def test_a_tuner_without_a_setting_in_reach_says_why(shared):
    class Hopeless(Choices):
        def plan(self, bits, level, spare):
            raise OutOfReach("too low")

    with pytest.raises(OutOfReach, match="too low"):
        Tuner(shared).tune(Hopeless(), BITS)


def test_share_for_is_linear_between_its_ends():
    assert share_for(3.0, 1.0, 4.0) == 0.5
    for bits in (1.0, 5.1):
        with pytest.raises(OutOfReach):
            share_for(bits, 1.0, 4.0)


def test_tables_give_quantiles_back():
    scores = torch.arange(1000.0)
    table = Table(scores)
    for share in (0.1, 0.5, 0.9):
        assert float((scores > table.at(share)).float().mean()) == pytest.approx(share, abs=0.002)
        assert table.share(table.at(share)) == pytest.approx(share, abs=0.002)
    assert table.at(0.0) == math.inf and float((scores >= table.at(1.0)).float().mean()) == 1.0


# ---- every rival ----


@pytest.mark.parametrize("name", list(RIVALS))
def test_every_rival_keeps_the_budget_and_is_deterministic(shared, name, monkeypatch):
    monkeypatch.setattr(self_supervised, "STEPS", 20)
    monkeypatch.setattr(allocation, "STEPS", 10)
    found: list[Figures] = []
    for _ in range(2):
        tuner = Tuner(shared)
        plan, setting = tuner.tune(RIVALS[name].fit(shared), BITS)
        ids = shared.ids.flip(0)[:2]
        dense = [torch.log_softmax(shared.dense.logits(row[None])[0], -1) for row in ids]
        found.append(measure(shared.model, plan, ids, BITS, shared.params(BITS)["head"], dense.__getitem__))
    assert found[0] == found[1]
    assert found[0].bits_read_body == pytest.approx(BITS, rel=0.01)
    assert 0 < found[0].kl < 20 and found[0].ppl > 1
    always = sum(side_without_rule(shared.artifact, n) for n in shared.model.body)
    assert sum(plan.side_bits(shared.model, n) for n in shared.model.body) > always


def test_an_artifact_without_our_thresholds_is_refused(tmp_path):
    with pytest.raises(LowtideError, match="no thresholds of the policy channel-norm"):
        make_calibration(tmp_path, policies=("topk",))


def test_settings_are_compared_on_the_last_windows(shared):
    assert isinstance(shared, Calibration)
    assert torch.equal(shared.choice, shared.ids)  # fewer tokens than are wanted: all of them
