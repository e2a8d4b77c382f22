"""The whole-window masked model against the reference engine, which decodes token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import DEFAULT, ODD, make_artifact

from lowtide.arch import norm_specs
from lowtide.compress.masked import MaskedModel
from lowtide.errors import LowtideError
from lowtide.format.codec import digit_planes
from lowtide.format.reader import open_artifact
from lowtide.kernels import reference_ops as ops
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import PolicyParams
from lowtide.rules import GroupStats, get_rule

POLICIES = ("channel-norm", "channel-abs", "topk", "statistical-topk", "gate", "ipn")


def masked_model(artifact, **options) -> MaskedModel:
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    return MaskedModel(artifact.config, artifact.groups, norms, **{"centroids": artifact.centroids(), **options})


def params(artifact, policy: str, budget: int) -> dict[str, np.ndarray]:
    index = artifact.manifest.policies.index(policy)
    return {name: g.thresholds[index, budget] for name, g in artifact.groups.items() if name != "embed"}


@pytest.mark.parametrize("options", [{}, {"base": ODD}, {"slices": 2, "qkv_bias": True, "tied": False}])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_group_equals_the_reference_kernel(tmp_path, options, policy):
    artifact = open_artifact(make_artifact(tmp_path / "tiny", policies=POLICIES, **options))
    masked, rule, chosen = masked_model(artifact), get_rule(policy), params(artifact, policy, 1)
    rng = np.random.default_rng(0)
    for name, params_ in chosen.items():
        group = artifact.groups[name]
        x = rng.normal(0, 1, (5, group.in_features)).astype(np.float32)
        gate = rng.normal(0, 1, x.shape).astype(np.float32) if name.endswith("down") else None
        levels = rule.levels(GroupStats.of(group), x, params_, gate)
        expected = []
        for linear in group.linears:
            planes = ops.channel_planes(digit_planes(linear.weight, linear.out_features, group.in_features))
            expected.append(ops.graded_linear(group, linear, planes, x, levels))
        gate_ = None if gate is None else torch.from_numpy(gate)
        y, ours = masked.product(name, torch.from_numpy(x), rule, params_, gate_)
        assert all(np.array_equal(own.numpy(), levels) for own in ours)
        np.testing.assert_allclose(y.numpy(), np.concatenate(expected, 1), atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"base": ODD}, {"slices": 2, "qkv_bias": True, "tied": False}])
def test_whole_model_agrees_with_the_reference_engine(tmp_path, options):
    """Only as distributions: the float16 KV cache moves inputs, and rounding to int8 makes steps of that."""
    artifact = open_artifact(make_artifact(tmp_path / "tiny", **options))
    ids = [1, 5, 9, 60, 3, 77]
    chosen = params(artifact, "channel-norm", 1)
    logits, bits = masked_model(artifact).logits(torch.tensor([ids]), get_rule("channel-norm"), chosen)
    policy = PolicyParams("channel-norm", np.stack([chosen[n] for n in artifact.groups if n != "embed"]))
    expected, stats = ReferenceEngine(artifact).decode_many(ids, 0, policy)
    p, q = (torch.log_softmax(t, -1) for t in (torch.from_numpy(expected), logits[0]))
    assert float((p.exp() * (p - q)).sum(-1).max()) < 0.01
    weights = sum(g.weights() for n, g in artifact.groups.items() if n not in ("head", "embed"))
    assert bits == pytest.approx(np.mean([s.body_bits for s in stats]) / weights, rel=5e-3)


@pytest.mark.parametrize("base, centroids, factors", [(DEFAULT, 1, False), (DEFAULT, 5, True), (ODD, 64, True)])
def test_groups_measured_from_centroids_equal_the_reference_kernel(tmp_path, base, centroids, factors):
    """And q, k and v under thresholds of their own."""
    options = {"policies": POLICIES, "centroids": centroids, "factors": factors}
    artifact = open_artifact(make_artifact(tmp_path / "tiny", base, **options))
    masked, rule, chosen = masked_model(artifact), get_rule("ipn"), params(artifact, "ipn", 1)
    reference, rng, code = ReferenceEngine(artifact), np.random.default_rng(0), None
    for name, params_ in chosen.items():
        group, stats = reference.group(name)
        x = rng.normal(0, 1, (5, group.in_features)).astype(np.float32)
        near, there = rule.code(stats, x), rule.code(masked.groups[name].stats, torch.from_numpy(x))
        assert (near is None) == (there is None)
        if near is not None:
            code = near
            assert np.array_equal(there.numpy(), near)
        middle = reference.middle(name, rule, code)
        factor = group.ipn.factor if factors and name.endswith("qkv") else np.ones(len(group.linears), np.float32)
        levels = [rule.levels(middle.stats, x, params_ * own) for own in factor]
        expected = [
            ops.graded_linear(group, linear, reference.digits(group, linear), x, own, middle.mean, bias)
            for linear, own, bias in zip(group.linears, levels, middle.bias, strict=True)
        ]
        y, ours = masked.product(name, torch.from_numpy(x), rule, params_, code=torch.from_numpy(code))
        assert all(np.array_equal(own.numpy(), wanted) for own, wanted in zip(ours, levels, strict=True))
        assert len({own.sum() for own in levels}) == len(set(factor.tolist()))
        np.testing.assert_allclose(y.numpy(), np.concatenate(expected, 1), atol=2e-5)


def test_the_rule_ipn_wants_the_centroids(tmp_path):
    artifact = open_artifact(make_artifact(tmp_path / "tiny", policies=POLICIES, centroids=5))
    bare, ids = masked_model(artifact, centroids=None), torch.tensor([[1, 5, 9]])
    with pytest.raises(LowtideError, match="qkv: the rule ipn measures from centroids here, and they were not given"):
        bare.logits(ids, get_rule("ipn"), params(artifact, "ipn", 1))
    chosen = params(artifact, "channel-norm", 1)
    one, other = (m.logits(ids, get_rule("channel-norm"), chosen) for m in (bare, masked_model(artifact)))
    assert torch.equal(one[0], other[0]) and one[1] == other[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"base": ODD, "features": 5}, {"centroids": 5, "factors": True}, {"base": ODD, "centroids": 64}],
)
def test_the_ipn_moves_every_token_by_itself(tmp_path, options):
    artifact = open_artifact(make_artifact(tmp_path / "tiny", policies=("ipn",), **options))
    model, rule, chosen = masked_model(artifact), get_rule("ipn"), params(artifact, "ipn", 1)
    gains = {name: 0.0 if g.ipn.gain is None else float(g.ipn.gain[1]) for name, g in artifact.groups.items() if g.ipn}
    ids = np.random.default_rng(1).integers(0, artifact.config.vocab_size, 24)
    logits, bits = model.logits(torch.from_numpy(ids[None]), rule, chosen, gains)
    rows = [np.stack([chosen[n] for n in chosen]), 0.0, np.float32([gains[n] for n in chosen])]
    expected, stats = ReferenceEngine(artifact).decode_many(ids, 0, PolicyParams("ipn", *rows))
    weights = sum(g.weights() for n, g in artifact.groups.items() if n not in ("head", "embed"))
    assert bits == pytest.approx(np.mean([s.body_bits for s in stats]) / weights, rel=5e-3)
    p, q = (torch.log_softmax(t, -1) for t in (torch.from_numpy(expected), logits[0]))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.01
    still, fewer = model.logits(torch.from_numpy(ids[None]), rule, chosen)
    assert abs(fewer - bits) > 0.02 and not torch.equal(still, logits)  # the gains matter


def test_coefficients_in_float32_are_nearer_to_the_dense_product(tmp_path):
    artifact = open_artifact(make_artifact(tmp_path / "tiny"))
    ids = torch.tensor([[1, 5, 9, 60]])
    everything = {n: np.zeros(3, np.float32) for n in artifact.groups}
    exact = masked_model(artifact, quantise_coefficients=False).logits(ids, get_rule("dense"), everything)[0]
    rounded = masked_model(artifact).logits(ids, get_rule("dense"), everything)[0]
    difference = (exact - rounded).abs().max()
    assert 0 < difference < 0.3


def test_windows_are_independent(tmp_path):
    artifact = open_artifact(make_artifact(tmp_path / "tiny"))
    model, rule, chosen = masked_model(artifact), get_rule("channel-norm"), params(artifact, "channel-norm", 0)
    pair = torch.tensor([[1, 5, 9], [7, 8, 2]])
    both, bits = model.logits(pair, rule, chosen)
    singles = [model.logits(row[None], rule, chosen) for row in pair]
    assert torch.allclose(both, torch.cat([s[0] for s in singles]), atol=1e-5)
    assert bits == pytest.approx(np.mean([s[1] for s in singles]))
