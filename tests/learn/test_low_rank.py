"""Joint training of an addition of low rank to the weights."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowtide.compress import products
from lowtide.compress.dense import DenseModel
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.learn import run_ipn
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_export import write_weights
from lowtide.learn.ipn_train import IpnOptions, Learner
from lowtide.learn.low_rank import low_rank
from lowtide.learn.parallel import Parallel
from lowtide.learn.run_ipn import learn_joint

OPTIONS = IpnOptions(steps=20, bits=(4.0, 5.0), focus=0.7, windows=4, features=4, check_every=5, weight_rate=0.02)
RANK = 3


@pytest.fixture
def made(source, monkeypatch):
    """Artifact, dense model and a network, products in float32."""
    monkeypatch.setattr(products, "_chosen", [products.EXACT])
    artifact = open_artifact(source / "artifact")
    grid, tables = budget_tables(artifact)
    importance = {n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items()}
    return artifact, DenseModel(open_source(source / "model")), Ipn(importance, grid, tables, features=4)


def test_it_begins_with_the_weights(made, small):
    artifact, dense, ipn = made
    at = At(ipn, 4.0)
    full, low = (GradedModel(artifact, dense, True, rank) for rank in (0, RANK))
    for model in (full, low):
        model.refresh()
    with torch.no_grad():
        assert torch.equal(low.hidden(small.ids[:2], at)[0], full.hidden(small.ids[:2], at)[0])


def test_factors_learn_and_the_weights_stay(made, small):
    artifact, dense, ipn = made
    model = GradedModel(artifact, dense, True, RANK)
    names = {n.rpartition(".")[2] for n in model.parameters()}
    assert {"up", "down", "bias", "log_rows", "log_cols"} <= names and "layers.0.o.weight" not in model.parameters()
    learner = Learner(model, ipn, small.ids, dataclasses.replace(OPTIONS, rank=RANK), Parallel())
    group = model.groups["layers.0.o"]
    before = group.learned["weight"].clone()
    optimiser = learner.optimiser()
    for step in range(2):  # the first moves `up` alone: `down` has no gradient while `up` is 0
        learner.step(step, optimiser)
    assert torch.equal(group.learned["weight"], before) and group.learned["weight"].grad is None
    added = (group.learned["up"] @ group.learned["down"]).detach()
    assert added.abs().max() > 0 and added.shape == before.shape and group.learned["up"].shape[1] == RANK
    assert torch.equal(group.parameters()[0], before + added)


def test_a_factors_gradient_is_the_weights(made, small):
    artifact, dense, ipn = made
    found = []
    for rank in (0, RANK):
        model = GradedModel(artifact, dense, True, rank)
        model.refresh()
        model.hidden(small.ids[:2], At(ipn, 4.0))[0].pow(2).mean().backward()
        found.append(model.groups["layers.0.down"].learned)
    full, low = found
    assert torch.allclose(low["up"].grad, full["weight"].grad @ low["down"].detach().T, rtol=1e-4, atol=1e-9)


def test_rates_are_relative_to_the_weights(made, small):
    artifact, dense, ipn = made
    model = GradedModel(artifact, dense, True, RANK)
    learned = model.groups["layers.0.o"].learned
    size = float(learned["weight"].pow(2).mean().sqrt())
    assert model.size_of("layers.0.o.up", learned["up"]) == pytest.approx(size)
    assert model.size_of("layers.0.o.down", learned["down"]) == pytest.approx(
        float(learned["down"].detach().pow(2).mean().sqrt())
    )
    factors = low_rank(torch.zeros(40, 30), 8, seed=1)
    change = torch.sign(torch.randn(40, 8)) @ factors["down"]
    assert float(change.pow(2).mean().sqrt()) == pytest.approx(1.0, rel=0.2)
    assert low_rank(torch.zeros(4, 30), 8, seed=1)["up"].shape == (4, 4)


def test_what_is_drawn_is_a_seeds_and_a_groups_own(made):
    artifact, dense, _ = made
    first, again, other = (GradedModel(artifact, dense, True, RANK, seed).groups for seed in (1, 1, 2))
    down = [groups["layers.0.o"].learned["down"] for groups in (first, again, other)]
    assert torch.equal(down[0], down[1]) and not torch.equal(down[0], down[2])
    assert not torch.equal(down[0], first["layers.1.o"].learned["down"])


def test_what_is_written_has_the_addition(made, tmp_path):
    artifact, dense, _ = made
    model = GradedModel(artifact, dense, True, RANK)
    name = "layers.0.down"
    group, code = model.groups[name], model.codes[name]
    with torch.no_grad():
        group.learned["up"].normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        whole = group.learned["weight"] + group.learned["up"] @ group.learned["down"]
    model.refresh()
    write_weights(artifact, model, tmp_path / "out", {})
    stored = torch.from_numpy(open_artifact(tmp_path / "out").groups[name].codes())
    assert torch.equal(stored, code.digits(whole)) and not torch.equal(stored, code.digits(group.learned["weight"]))


def test_the_result_is_an_ordinary_artifact_that_is_better(source, tmp_path):
    options = dataclasses.replace(OPTIONS, rank=RANK)
    figures = learn_joint(source / "model", tmp_path / "out", options, source / "artifact", source / "text")
    values = {h["step"]: h["value"] for h in figures["history"]}
    assert figures["best_step"] > 0 and values[figures["best_step"]] < values[0]
    assert open_artifact(tmp_path / "out").manifest.stats["learned"]["joint"]


def test_it_is_checked(source, tmp_path, monkeypatch):
    with pytest.raises(LowtideError, match="--rank -1: must be 0"):
        IpnOptions(rank=-1)
    monkeypatch.setattr(run_ipn, "join", lambda windows: SimpleNamespace(mesh=object(), main=True))
    monkeypatch.setattr(run_ipn, "compress", None)  # nothing is begun
    with pytest.raises(LowtideError, match="--rank 3: not with --use_fsdp"):
        learn_joint(source / "model", tmp_path / "out", dataclasses.replace(OPTIONS, rank=RANK))
    assert not list(tmp_path.iterdir())
