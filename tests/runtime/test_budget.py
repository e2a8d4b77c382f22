"""Budgets: thresholds between grid points, refusals, and the loop that holds the mean."""

import numpy as np
import pytest
from support.tamper import edit_manifest
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.native import Engine
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import PolicyParams
from lowtide.runtime.budget import (
    FULL_HEAD,
    BudgetController,
    _warn,
    body_side_bits,
    body_weights,
    parse_bits,
    parse_head,
    policy_params,
)

POLICIES = ("channel-norm", "topk:0,4")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return open_artifact(make_artifact(tmp_path_factory.mktemp("budget") / "a", policies=POLICIES))


def stored(artifact, policy: int, budget: int) -> np.ndarray:
    return np.stack([group.thresholds[policy, budget] for name, group in artifact.groups.items() if name != "embed"])


def test_parse_head():
    assert parse_head(" Once ") == (0, 0)
    assert parse_head("2.5,4") == (2.5, 4)
    assert parse_head("full ") == FULL_HEAD


@pytest.mark.parametrize(
    "text", ["", "twice", "2.5", "2.5,4,1", "0,4", "-1,4", "2,-1", "nan,1", "1,nan", "9,1", "1,inf"]
)
def test_a_wrong_head_is_told_in_one_line(text):
    with pytest.raises(LowtideError, match=r"--head .*OFFSET,MARGIN"):
        parse_head(text)


def test_parse_bits():
    assert parse_bits("2.5") == 2.5
    assert parse_bits(" Dense ") is None


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "three", "1e9"])
def test_a_budget_that_is_none_is_named(text):
    with pytest.raises(LowtideError, match=f"^--bits {text}"):
        parse_bits(text)


@pytest.mark.parametrize("tied", [True, False])
def test_one_row_for_each_group_but_the_embedding(tmp_path, tied):
    artifact = open_artifact(make_artifact(tmp_path / "a", tied=tied, layers=3))
    assert policy_params(artifact, None, 5).thresholds.shape == (3 * 4 + 1, 3)
    assert policy_params(artifact, None, None).thresholds.shape == (3 * 4 + 1, 3)


def test_at_a_grid_point_the_stored_thresholds_come_out(artifact):
    for policy, name in enumerate(POLICIES):
        for budget, bits in enumerate(artifact.manifest.budgets):
            params = policy_params(artifact, name, bits)
            assert params.rule == name.partition(":")[0]
            assert params.log2_offset == 0
            np.testing.assert_array_equal(params.thresholds, stored(artifact, policy, budget))


@pytest.mark.parametrize("offset", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("name", ["channel-norm", "channel-abs", "topk", "statistical-topk", "topk:0,4"])
def test_a_full_head_is_read_however_far_thresholds_have_moved(tmp_path, name, offset):
    artifact = open_artifact(make_artifact(tmp_path / "a", policies=(name,)))
    once, full = (policy_params(artifact, name, 4.25, head) for head in ((0.0, 0.0), FULL_HEAD))
    np.testing.assert_array_equal(full.thresholds[:-1], once.thresholds[:-1])
    assert full.head_offset == 0 and full.head_margin == 0
    for engine in (Engine(artifact, threads=1, max_context=4), ReferenceEngine(artifact, max_context=4)):
        dense = engine.decode(5, 0, policy_params(artifact, None, None))[1].head_bits
        read = engine.decode(5, 0, full.moved(offset))[1].head_bits
        assert read == dense or (":" in name and engine.decode(5, 0, once)[1].head_bits < read < dense)
        engine.close()


def test_between_grid_points_scores_mix_in_log2_and_counts_linearly(artifact):
    low, high = stored(artifact, 0, 0), stored(artifact, 0, 1)
    np.testing.assert_allclose(policy_params(artifact, None, 4.25).thresholds, low**0.75 * high**0.25, rtol=1e-6)
    low, high = stored(artifact, 1, 1), stored(artifact, 1, 2)
    np.testing.assert_allclose(policy_params(artifact, "topk:0,4", 5.5).thresholds, (low + high) / 2, rtol=1e-6)


def test_dense_is_a_rule_of_its_own(artifact):
    assert policy_params(artifact, None, None).rule == "dense"
    assert policy_params(artifact, "dense", None).rule == "dense"
    assert policy_params(artifact, "topk:0,4", None).rule == "dense"
    with pytest.raises(LowtideError, match="--policy dense reads everything: ask for --bits dense"):
        policy_params(artifact, "dense", 5)


@pytest.mark.parametrize("bits", [3.99, 6.01])
def test_a_budget_outside_the_grid_is_refused_with_the_range(artifact, bits):
    with pytest.raises(LowtideError, match=rf"--bits {bits}: .*from 4 to 6 .*dense"):
        policy_params(artifact, None, bits)


def test_an_unknown_rule_and_one_that_is_not_stored_are_told_apart(artifact):
    with pytest.raises(LowtideError, match="unknown mask rule 'waterline'"):
        policy_params(artifact, "waterline", 5)
    with pytest.raises(LowtideError, match=r"--policy gate: .*stored: channel-norm, topk:0,4, dense"):
        policy_params(artifact, "gate", 5)
    with pytest.raises(LowtideError, match="unknown mask rule"):
        policy_params(artifact, "waterline", None)


def test_weights_and_side_bits_leave_head_and_embedding_out(tmp_path):
    artifact = open_artifact(make_artifact(tmp_path / "a", tied=False, layers=1))
    h, f, kv = 48, 80, 2 * 12
    assert body_weights(artifact) == h * h + 2 * h * kv + h * h + 2 * h * f + f * h
    by_hand = sum(8 * artifact.groups[f"layers.0.{g}"].side_bytes() for g in ("qkv", "o", "gate_up", "down"))
    assert body_side_bits(artifact) == by_hand


def controller(target: float | None, rule: str = "channel-norm", **kw) -> BudgetController:
    return BudgetController(PolicyParams(rule, np.ones((1, 3), np.float32)), target, n_body_weights=1000, **kw)


def simulate(control: BudgetController, bias: float, tokens: int) -> None:
    """A plant like ours: one log2 of threshold costs about one bit; tokens differ a lot from each other."""
    noise = np.random.default_rng(0).normal(0, 0.4, tokens)
    for n in noise:
        control.update(round(1000 * (3.0 + bias - control.params.log2_offset + n)))


@pytest.mark.parametrize("bias", [-0.5, 0.0, 0.5])
def test_the_mean_is_held_within_one_per_cent(bias):
    control = controller(3.0)
    simulate(control, bias, 2048)
    assert control.tokens == 2048
    assert control.mean_bits == pytest.approx(3.0, rel=0.01)
    assert np.sign(round(control.params.log2_offset, 1)) == np.sign(bias)


@pytest.mark.parametrize("bias", [-0.3, 0.3])
def test_a_short_text_comes_near_its_budget(bias):
    control = controller(3.0)
    simulate(control, bias, 64)
    assert control.mean_bits == pytest.approx(3.0, rel=0.03)


def test_without_control_the_same_plant_misses():
    control = controller(3.0, gain=0.0)
    simulate(control, 0.5, 2048)
    assert abs(control.mean_bits - 3.0) > 0.3


def test_the_offset_is_bounded():
    control = controller(3.0)
    for _ in range(10000):
        control.update(8000)
    assert control.params.log2_offset == 8.0


def test_dense_is_counted_but_not_controlled():
    for control in (controller(None), controller(3.0, rule="dense")):
        control.update(6000)
        control.update(7000)
        assert control.mean_bits == 6.5
        assert control.params.log2_offset == 0


def test_a_target_below_what_is_always_read_is_refused():
    with pytest.raises(LowtideError, match=r"--bits 0.5: 0.6 bits are read whatever"):
        controller(0.5, side_bits=600)
    assert controller(0.7, side_bits=600).mean_bits == 0.0


@pytest.fixture(scope="module")
def with_ipn(tmp_path_factory):
    """Its network is trained for 4.5 to 5.5 bits, its grid reaches from 4 to 6."""
    path = make_artifact(tmp_path_factory.mktemp("ipn") / "a", policies=("ipn", "channel-norm"))
    edit_manifest(path, lambda m: m["ipn"].update(low=4.5, high=5.5))
    return open_artifact(path)


def test_gains_move_linearly_between_grid_points(with_ipn):
    stored_gains = [None if g.ipn.gain is None else g.ipn.gain for g in with_ipn.groups.values()]
    assert np.ptp(stored_gains[0]) > 0
    params = policy_params(with_ipn, None, 4.75)
    assert params.rule == "ipn" and params.bits is None
    expected = [0.0 if gain is None else gain[0] + 0.75 * (gain[1] - gain[0]) for gain in stored_gains]
    assert expected[-1] == 0 and params.gains.dtype == np.float32
    np.testing.assert_allclose(params.gains, expected, rtol=1e-6)
    np.testing.assert_array_equal(policy_params(with_ipn, None, 5.0).gains[:-1], [g[1] for g in stored_gains[:-1]])
    assert policy_params(with_ipn, "channel-norm", 5.0).gains is None
    assert policy_params(with_ipn, None, None).rule == "dense"


@pytest.mark.parametrize("asked, held", [(4.0, 4.5), (0.5, 4.5), (6.0, 5.5), (900.0, 5.5)])
def test_the_ipn_holds_a_budget_within_what_it_was_trained_for(with_ipn, capsys, asked, held):
    _warn.cache_clear()
    for _ in range(2):
        params = policy_params(with_ipn, "ipn", asked)
    assert params.bits == held
    at_the_end = policy_params(with_ipn, "ipn", held)
    np.testing.assert_array_equal(params.thresholds, at_the_end.thresholds)
    np.testing.assert_array_equal(params.gains, at_the_end.gains)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"lowtide: warning: --bits {asked:g}: ")
    assert "4.5 to 5.5 bits" in lines[0] and f"using {held:g}" in lines[0]
    budget = BudgetController(params, asked, body_weights(with_ipn), body_side_bits(with_ipn, "ipn"))
    budget.update(round(held * body_weights(with_ipn)))
    assert budget.params.log2_offset == pytest.approx(0, abs=1e-4)  # held is what it aims at
    assert budget.params.gains is params.gains


def test_other_policies_of_such_an_artifact_refuse_as_ever(with_ipn, capsys):
    with pytest.raises(LowtideError, match="from 4 to 6"):
        policy_params(with_ipn, "channel-norm", 3.0)
    assert policy_params(with_ipn, "channel-norm", 6.0).bits is None
    assert capsys.readouterr().err == ""


def test_a_range_beyond_the_grid_ends_with_the_grid(tmp_path, capsys):
    path = make_artifact(tmp_path / "a", policies=("ipn",))
    edit_manifest(path, lambda m: m["ipn"].update(low=1.0, high=7.0))
    artifact = open_artifact(path)
    assert policy_params(artifact, None, 2.0).bits == 4.0
    assert policy_params(artifact, None, 6.5).bits == 6.0
    assert "trained for 4 to 6 bits" in capsys.readouterr().err
    edit_manifest(path, lambda m: m["ipn"].update(low=7.0, high=8.0))
    assert policy_params(open_artifact(path), None, 5.0).bits == 6.0


def test_side_bits_under_the_ipn_are_its_own(with_ipn):
    body = [g for name, g in with_ipn.groups.items() if name not in ("head", "embed")]
    assert body_side_bits(with_ipn, "ipn") == sum(8 * g.side_bytes(ipn=True) for g in body)
    assert body_side_bits(with_ipn, "ipn") > body_side_bits(with_ipn, "channel-norm") == body_side_bits(with_ipn)
