"""Clusters of inputs: found, told apart by their keys, stored, trained with, and what they leave to be read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.learning import FAST, tensors

import lowtide
from lowtide.arch import ModelConfig, norm_specs
from lowtide.compress import products
from lowtide.compress.dense import DenseModel
from lowtide.compress.masked import MaskedModel
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.native import Engine
from lowtide.kernels.reference import ReferenceEngine
from lowtide.learn import cluster_fit, first_network, graded
from lowtide.learn.cluster_fit import fit_clusters, k_means, nearest
from lowtide.learn.clusters import Clusters, Keys
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.head import head_kl
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_export import take_stored
from lowtide.learn.ipn_train import CENTROIDS, IpnOptions
from lowtide.learn.run_ipn import learn_ipn, learn_joint
from lowtide.rules import get_rule
from lowtide.runtime.budget import policy_params

pytestmark = pytest.mark.usefixtures("few_tokens")
SOME = dataclasses.replace(FAST, centroids=4)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(products, "_chosen", [products.EXACT])


@pytest.fixture
def opened(source):
    """(artifact, dense model)."""
    return open_artifact(source / "artifact"), DenseModel(open_source(source / "model"))


def known(artifact, dense, ids, count=4):
    stored = fit_clusters(artifact, dense, ids, count)
    return {name: Clusters.of(artifact.groups[name], own) for name, own in stored.items()}


def ipn_bits(model, ipn):
    """Of each weight, what the network reads; a model's groups do not know by themselves."""
    return sum(ipn.side_bits(name) for name in model.groups if name != "head") / model.weights


def blobs(count, channels, each=60):
    """Points around far corners, in random order, and which corner."""
    generator = torch.Generator().manual_seed(1)
    corner = 8 * torch.randn(count, channels, generator=generator)
    labels = torch.arange(count).repeat(each)[torch.randperm(count * each, generator=generator)]
    return corner[labels] + torch.randn(len(labels), channels, generator=generator), labels


def test_k_means_finds_what_is_far_apart():
    z, labels = blobs(3, 5)
    found = nearest(z, k_means(z, 12, torch.Generator().manual_seed(2)))  # more than there are: some share a corner
    for cluster in found.unique():
        assert len(labels[found == cluster].unique()) == 1


def test_keys_tell_clusters_apart_in_eight_bits():
    x, labels = blobs(6, 32)
    x = x * torch.logspace(-1, 0.5, 32) + 7
    stored = cluster_fit._keys(x, labels, 6, torch.Generator().manual_seed(3))
    assert stored["keys"].dtype == np.int8 and abs(stored["keys"]).max(0).tolist() == [127] * 6
    weight = torch.from_numpy(stored["keys"].T * stored["key_scale"][:, None])
    code = Keys(torch.arange(32), weight, torch.from_numpy(stored["key_bias"])).code(x)
    assert float((code == labels).float().mean()) > 0.98


def test_middles_are_where_most_of_a_cluster_is(opened):
    """A few inputs far away move a mean, and would cost all others bits."""
    artifact, _ = opened
    group = artifact.groups["layers.0.down"]
    mean = torch.from_numpy(group.mean.astype(np.float32))
    near, far = 0.3, 40.0
    seen = (mean + near).repeat(200, 1)
    seen[:10] += far
    stored = cluster_fit._middles(artifact, "layers.0.down", seen, torch.zeros(200, dtype=torch.int64), 1)
    found = stored["centroids"][0] * stored["step"].astype(np.float32)
    open_ = np.setdiff1d(np.arange(group.in_features), group.exact_channels)
    heavy = open_[group.importance[open_] > np.median(group.importance)]
    assert np.median(found[heavy]) == pytest.approx(near, abs=0.25)  # the mean lies at 2.3
    assert np.all(found[group.exact_channels] == 0) and np.all(stored["step"][group.exact_channels] == 0)


def test_fewer_slices_are_read_for_the_same_thresholds(opened, small, exact):
    artifact, dense = opened
    grid, tables = budget_tables(artifact)
    importance = {n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items()}
    model, ipn, read = GradedModel(artifact, dense), Ipn(importance, grid, tables, features=2, low=4.0, high=6.0), []
    for clusters in ({}, known(artifact, dense, small.ids)):
        model.take_clusters(clusters)
        ipn.take_clusters(clusters)
        read.append(float(model.hidden(small.ids, At(ipn, 5.0))[1].mean()))
    assert read[1] < read[0] - 0.2
    first_network.set_level(model, ipn, small.ids)
    for bits in (4.0, 6.0):  # without the keys, whose bits the model's groups were not told
        assert float(model.hidden(small.ids, At(ipn, bits))[1].mean()) == pytest.approx(bits, rel=0.02)


def test_the_head_reads_as_much_as_without_clusters(opened, small, exact):
    artifact, dense = opened
    grid, tables = budget_tables(artifact)
    importance = {n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items()}
    model, ipn = GradedModel(artifact, dense), Ipn(importance, grid, tables, features=2, low=4.0, high=6.0)
    x = dense.hidden(small.ids).flatten(0, 1)

    def bits(at):
        at.see("head", x)
        score, theta = at.scores("head", x - model.groups["head"].middle(at.code))
        slices = (score[None] > theta[:, None, None]).sum() * 2.0 * model.groups["head"].out / len(x)
        return float(slices) + ipn.side_bits("head")

    before = {b: bits(At(ipn, b)) for b in grid[:-1]}
    clusters = known(artifact, dense, small.ids)
    model.take_clusters(clusters)
    ipn.take_clusters(clusters)
    first_network._level_head(model, ipn, x)
    for b, wanted in before.items():
        assert bits(At(ipn, b)) == pytest.approx(wanted, rel=0.02)


def test_under_training_the_products_with_centroids_follow_the_weights(opened, small, exact):
    artifact, dense = opened
    clusters = known(artifact, dense, small.ids)
    fixed, learning = GradedModel(artifact, dense), GradedModel(artifact, dense, train_weights=True)
    grid, tables = budget_tables(artifact)
    importance = {n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items()}
    ipn = Ipn(importance, grid, tables, features=2, low=4.0, high=6.0)
    for taker in (fixed, learning, ipn):
        taker.take_clusters(clusters)
    learning.refresh()
    every = torch.arange(4)
    for name in learning.codes:
        ours, theirs = (graded._bias(m.groups[name], every, torch.zeros(3)) for m in (learning, fixed))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)  # theirs are rounded to float16
    group = learning.groups["layers.1.gate_up"]
    assert group.learned is not None
    # A channel that no token reads learns all the same, through what its weights make of the centroids.
    shut = At(ipn, 4.0, shift=60.0)
    hidden, read = learning.hidden(small.ids[:2], shut)
    side = sum(g.side_bits for n, g in learning.groups.items() if n != "head") / learning.weights
    assert float(read.max()) == pytest.approx(side)
    torch.autograd.backward(head_kl(learning, hidden, dense.hidden(small.ids[:2]), dense.head_weight, shut))
    assert float(group.learned["weight"].grad.abs().max()) > 0


def test_a_products_gradient_is_that_of_the_linear_map(opened, small, exact):
    artifact, dense = opened
    learning = GradedModel(artifact, dense, train_weights=True)
    learning.take_clusters(known(artifact, dense, small.ids))
    learning.refresh()
    group, code = learning.groups["layers.1.o"], torch.tensor([2, 0, 2, 3])
    assert group.learned is not None and group.clusters is not None
    g = torch.randn(4, group.out, generator=torch.Generator().manual_seed(5))
    torch.autograd.backward((graded._bias(group, code, torch.zeros(3)) * g).sum())
    apart = (group.clusters.mean - group.mean)[code]
    wanted = (g * group.rows).T @ (apart * group.cols)
    torch.testing.assert_close(group.learned["weight"].grad, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(group.learned["bias"].grad, g.sum(0))


def test_clusters_are_not_fitted_to_what_is_held_out(source, tmp_path, monkeypatch):
    seen = []
    real = first_network.fit_clusters

    def fit(artifact, dense, ids, *rest):
        seen.append(ids.clone())
        return real(artifact, dense, ids, *rest)

    monkeypatch.setattr(first_network, "fit_clusters", fit)
    held = []
    start = first_network.start
    monkeypatch.setattr(first_network, "start", lambda learner, *rest: held.append(learner) or start(learner, *rest))
    learn_ipn(
        source / "artifact", source / "model", tmp_path / "out", dataclasses.replace(SOME, steps=0), source / "text"
    )
    (ids,), (learner,) = seen, held
    assert len(ids) == len(learner.ids) - learner.held and torch.equal(ids, learner.ids[: len(ids)])


def test_clusters_are_fitted_to_as_much_text_as_there_are_of_them(source, tmp_path, monkeypatch):
    seen = []

    def fit(artifact, dense, ids, count, *rest):
        seen.append(ids.numel())
        raise KeyboardInterrupt

    monkeypatch.setattr(first_network, "fit_clusters", fit)
    monkeypatch.setattr(cluster_fit, "TOKENS", (32, 32))
    monkeypatch.setattr(cluster_fit, "MEMBERS", 64)
    for count in (2, 4):
        given = source / "artifact", source / "model", tmp_path / f"out{count}"
        with pytest.raises(KeyboardInterrupt):
            learn_ipn(*given, dataclasses.replace(SOME, steps=0, centroids=count), source / "text")
    assert seen == [128, 256]


def test_k_means_goes_by_more_text_for_more_clusters(opened, monkeypatch):
    seen, real = [], cluster_fit.k_means

    def k_means(z, *rest):
        seen.append(len(z))
        return real(z, *rest)

    monkeypatch.setattr(cluster_fit, "k_means", k_means)
    monkeypatch.setattr(cluster_fit, "SAMPLE", 64)
    monkeypatch.setattr(cluster_fit, "DRAWN", 32)
    artifact = opened[0]
    group = artifact.groups["layers.0.o"]
    for count in (2, 4):
        inputs = {"layers.0.o": torch.randn(256, len(group.importance))}
        cluster_fit._fit(artifact, "layers.0.o", inputs, count, torch.Generator().manual_seed(0))
    assert seen == [64, 128]


def test_a_product_beyond_float16_says_what_to_do(source, tmp_path, monkeypatch):
    def of(*_):
        raise LowtideError("layers.0.o: a product with one of the centroids leaves float16's range")

    monkeypatch.setattr(first_network.Clusters, "of", of)
    given = source / "artifact", source / "model", tmp_path / "out"
    with pytest.raises(LowtideError, match="leaves float16's range: give --centroids 0$"):
        learn_ipn(*given, dataclasses.replace(SOME, steps=0), source / "text")


@pytest.mark.parametrize("way", ["ipn", "joint"])
def test_an_artifact_with_clusters_runs_and_keeps_its_budgets(source, tmp_path, way):
    out, text = tmp_path / "out", source / "text"
    if way == "ipn":
        learn_ipn(source / "artifact", source / "model", out, SOME, text)
    else:
        learn_joint(source / "model", out, dataclasses.replace(SOME, weight_rate=0.003), source / "artifact", text)
    artifact = open_artifact(out)
    info, channels = artifact.manifest.ipn, cluster_fit.key_channels(32)
    assert artifact.manifest.format_version == 4
    assert info is not None and (info["centroids"], info["key_channels"]) == (4, channels)
    params = policy_params(artifact, "ipn", 5.0)
    native, reference = Engine(artifact, threads=2, max_context=8), ReferenceEngine(artifact, max_context=8)
    for position, token in enumerate((5, 9, 3)):
        ours, stats = native.decode(token, position, params)
        theirs, expected = reference.decode(token, position, params)
        assert np.array_equal(ours, theirs) and stats.body_bits == expected.body_bits
    native.close()
    other = np.random.default_rng(3).integers(0, 104, (3, 32)).astype(np.int32)
    found = lowtide.evaluate(out, source / "model", other, window=32, bits=[4.5, 5.5], progress=False)
    for point in found["points"]:
        assert point["bits_read_body"] == pytest.approx(point["bits"], rel=0.04)
    # and from there on with the same clusters
    again = tmp_path / "again"
    learn_ipn(out, source / "model", again, dataclasses.replace(FAST, steps=0, features=None), text)
    before, after = tensors(out), tensors(again)
    for name in (n for n in before if n.endswith(("ipn_centroids", "ipn_keys", "ipn_step"))):
        assert np.array_equal(before[name], after[name])


def test_training_sees_what_the_engine_computes(source, opened, small, tmp_path, exact):
    artifact, dense = opened
    learn_ipn(source / "artifact", source / "model", tmp_path / "out", SOME, source / "text")
    made = open_artifact(tmp_path / "out")
    again = learn_ipn(
        tmp_path / "out", source / "model", tmp_path / "b", dataclasses.replace(SOME, steps=0), source / "text"
    )
    held = again["before"][0]
    assert held["read"] == pytest.approx(held["bits"], rel=0.05)
    model = GradedModel(made, dense)
    grid, tables = budget_tables(made, "ipn")
    importance = {n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in made.groups.items()}
    ipn = Ipn(importance, grid, tables, features=4, low=4.0, high=6.0)
    bits = min(grid, key=lambda b: abs(b - 5.0))
    stored = {n: first_network.stored_clusters(g) for n, g in made.groups.items()}
    clusters = {n: Clusters.of(made.groups[n], own) for n, own in stored.items() if own}
    model.take_clusters(clusters)
    ipn.take_clusters(clusters)
    take_stored(ipn, made)
    hidden, slices = model.hidden(small.ids[:2, :12], At(ipn, bits))
    ours = head_kl(model, hidden, dense.hidden(small.ids[:2, :12]), dense.head_weight, At(ipn, bits))
    params = policy_params(made, "ipn", bits)
    norms = {n: made.tensor(n) for n, _ in norm_specs(made.config)}
    masked = MaskedModel(made.config, made.groups, norms, quantise_coefficients=False, centroids=made.centroids())
    names = [n for n in made.groups if n != "embed"]
    thresholds, gains = (dict(zip(names, each, strict=True)) for each in (params.thresholds, params.gains))
    logits, read = masked.logits(small.ids[:2, :12], get_rule("ipn"), thresholds, gains)
    logp = F.linear(dense.hidden(small.ids[:2, :12]), dense.head_weight).log_softmax(-1)
    theirs = (logp.exp() * (logp - logits.log_softmax(-1))).sum(-1).mean()
    assert float(ours) == pytest.approx(float(theirs), rel=0.02)
    assert float(slices.detach().mean()) == pytest.approx(read - ipn_bits(model, ipn), rel=0.01)


def test_an_interrupted_run_keeps_its_clusters(source, tmp_path, monkeypatch):
    given = source / "artifact", source / "model"
    learn_ipn(*given, tmp_path / "whole", SOME, source / "text")

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if (stage, done) == ("train", 4):
            raise Stop

    with pytest.raises(Stop):
        learn_ipn(*given, tmp_path / "out", SOME, source / "text", report=stop)
    assert (tmp_path / "out.partial" / first_network.CLUSTERS).exists()
    monkeypatch.setattr(first_network, "fit_clusters", None)  # not found again
    learn_ipn(*given, tmp_path / "out", SOME, source / "text")
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[n], resumed[n]) for n in whole)


def test_clusters_that_were_kept_and_damaged_are_refused(source, tmp_path):
    kept = tmp_path / first_network.CLUSTERS
    kept.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(LowtideError, match=r"clusters.npz: cannot be read .*give --restart"):
        first_network._kept(kept)


def test_what_cannot_be_is_refused(opened, small):
    with pytest.raises(LowtideError, match="--centroids 1025: must be 0"):
        IpnOptions(centroids=1025)
    with pytest.raises(LowtideError, match="--centroids 1000: the text has 288 tokens; give a longer one, or fewer"):
        fit_clusters(*opened, small.ids, 1000)


def test_small_models_get_as_many_as_they_have_bits_for(small):
    def shaped(hidden, intermediate):
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "head_dim": hidden // 4}
        return ModelConfig(**{**vars(small.source.config), **sizes, "num_heads": 4, "num_kv_heads": 4})

    assert first_network.affordable(shaped(288, 768)) == CENTROIDS
    assert first_network.affordable(shaped(96, 256)) == 8
    assert first_network.affordable(shaped(8, 32)) == 0
