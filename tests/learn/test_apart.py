"""Thresholds of q, k and v apart: factors that are found by trying, train, and come back from an artifact."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
import typer
from support.joint import Threads, make_learner
from support.learning import FAST, tensors

from lowtide.cli import learn
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.learn import apart as module
from lowtide.learn import run_ipn
from lowtide.learn.apart import find_factors
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_train import IpnOptions
from lowtide.learn.level import densities, project
from lowtide.learn.parallel import Parallel
from lowtide.learn.run_ipn import learn_ipn

QKV = ("layers.0.qkv", "layers.1.qkv")


def make(source, team=None):
    learner = make_learner(source, team or Parallel())
    ipn = learner.ipn
    learner.ids = torch.randint(0, 104, (40, 24), generator=torch.Generator().manual_seed(2))
    importance = {name: start.exp2() * ipn.open[name] for name, start in ipn.start.items()}
    learner.ipn = Ipn(importance, ipn.grid, ipn.tables, 4, 0, Ipn.PARTS, 4.0, 5.0, apart=True)
    learner.ipn.take_clusters(ipn.clusters)
    learner.model.refresh()
    return learner


def factors(learner):
    return torch.stack([learner.ipn.get(name, "factor").detach() for name in QKV])


@pytest.fixture
def valued(monkeypatch):
    """Trials that prefer factors of 1, 0 and -0.5 (log2); returns how many there were."""
    seen = []

    def look(learner):
        seen.append(factors(learner)[0].tolist())
        best = torch.tensor([1.0, 0.0, -0.5])
        return float((factors(learner)[0] - best).abs().sum()), torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.1, 0.1]])

    monkeypatch.setattr(module, "_look", look)
    return seen


def test_steps_are_taken_as_long_as_they_help(source, valued):
    learner, told = make(source), []
    find_factors(learner, lambda done, total: told.append((done, total)))
    assert factors(learner).tolist() == [[1.0, 0.0, -0.5]] * 2
    # q: 0.5, 1, 1.5; k: 0.5, -0.5; v: 0.5, -0.5, -1
    assert len(valued) == 1 + 3 + 2 + 3
    assert [done for done, _ in told[:-1]] == list(range(1, 9)) and told[-1][0] == told[-1][1]
    # all thresholds moved against it, by what was foretold: q -0.1 at either end, v +0.15 and +0.05
    low, high = (float(learner.ipn.level @ torch.tensor([1.0, place])) for place in (-1.0, 1.0))
    assert low == pytest.approx(-0.1 + 0.15, abs=1e-6) and high == pytest.approx(-0.1 + 0.05, abs=1e-6)


def test_a_factor_goes_no_further_than_it_may(source, valued, monkeypatch):
    monkeypatch.setattr(module, "MOST", 0.5)
    learner = make(source)
    find_factors(learner)
    assert factors(learner).tolist() == [[0.5, 0.0, -0.5]] * 2


def test_a_step_that_helps_by_next_to_nothing_is_not_taken(source, valued, monkeypatch):
    monkeypatch.setattr(module, "WORTH", 0.6)
    learner = make(source)
    find_factors(learner)
    assert not factors(learner).any() and not learner.ipn.level.any()


def test_what_was_spoilt_is_found_to_be_better_undone(source):
    """v's thresholds much too high, at equal bits."""
    learner = make(source)
    with torch.no_grad():
        for name in QKV:
            learner.ipn.get(name, "factor")[2] = 2.0
    before, _ = module._look(learner)
    find_factors(learner)
    after, _ = module._look(learner)
    assert after < before - 0.01 and factors(learner)[0, 2] < 2


def test_two_processes_find_what_one_does(source):
    whole, barrier, slots = make(source), threading.Barrier(2), [None, None]
    learners = [make(source, Threads(rank, barrier, slots)) for rank in range(2)]
    with torch.no_grad():
        for learner in (whole, *learners):
            for name in QKV:
                learner.ipn.get(name, "factor")[2] = 1.5
    find_factors(whole)
    done = []

    def find(learner):
        find_factors(learner)
        done.append(learner)

    threads = [threading.Thread(target=find, args=(learner,)) for learner in learners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2 and factors(whole)[0, 2] < 1.5
    assert torch.equal(factors(learners[0]), factors(learners[1]))
    assert torch.allclose(factors(learners[0]), factors(whole))


def test_bits_count_every_layers_own_rows(source):
    """Under factors bits read are the sums over q, k and v, and densities their slopes."""
    learner = make(source)
    ipn, model = learner.ipn, learner.model
    with torch.no_grad():
        for name in QKV:
            ipn.get(name, "factor").copy_(torch.tensor([1.0, 0.0, -1.0]))
        at = At(ipn, 4.5, keep_margins=True, keep_density=True)
        _, bits = model.hidden(learner.ids[:8], at)
        total = sum(g.side_bits for name, g in model.groups.items() if name != "head")
        for name, margins in at.margins.items():
            group = model.groups[name]
            rows = group.outs if name in QKV else [group.out]
            assert len(margins) == len(rows) == len(at.density[name])
            total += sum(2 * r * float((m > 0).float().sum((0, 2)).mean()) for r, m in zip(rows, margins, strict=True))
        assert float(bits.mean()) == pytest.approx(total / model.weights, rel=1e-4)
        found = float(sum(d.sum() for d in densities(model, at).values()))
        ends = [model.hidden(learner.ids[:8], At(ipn, 4.5, s))[1].mean() for s in (-0.25, 0.25)]
    assert found == pytest.approx(float(ends[0] - ends[1]) / 0.5, rel=0.3)


def test_factors_learn_one_against_another(source):
    """What gradients say about all of them together is taken out, as it is for thresholds."""
    learner = make(source)
    density = {name: torch.rand(3 if name in QKV else 1, 3) for name in learner.ipn.start if name != "head"}
    for name in QKV:
        learner.ipn.get(name, "factor").grad = torch.rand(3) + 1
    before = learner.ipn.get(QKV[0], "factor").grad.clone()
    project(learner.ipn, density)
    grads = [learner.ipn.get(name, "factor").grad for name in QKV]
    assert abs(float(sum(g.sum() for g in grads))) < 1e-4
    taken = (before - grads[0]) / density[QKV[0]].sum(1)
    assert torch.allclose(taken, taken[0].expand(3)) and taken[0] > 0
    learner.step(0, learner.optimiser())
    assert (factors(learner) != 0).all()


def test_a_loss_that_is_not_finite_takes_no_step(source, monkeypatch):
    learner = make(source)
    monkeypatch.setattr(module, "_look", lambda learner: (float("nan"), torch.zeros(2, 3)))
    find_factors(learner)
    assert not factors(learner).any()


def test_a_text_of_fewer_windows_than_a_step_is_looked_at_without_those_held_out(source, monkeypatch):
    learner, seen = make(source), []
    learner.ids = learner.ids[:3]
    dense = learner.dense_states
    monkeypatch.setattr(learner, "dense_states", lambda rows: seen.extend(rows) or dense(rows))
    find_factors(learner)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("asked, expected", [([], None), (["--apart"], True), (["--together"], False)])
@pytest.mark.parametrize("command", ["ipn", "joint"])
def test_the_commands_hand_their_options_on(monkeypatch, command, asked, expected):
    class Seen(Exception):
        pass

    def run(*given, **_):
        (options,) = (value for value in given if isinstance(value, IpnOptions))
        assert options.apart is expected and options.own_text == 0.25
        raise Seen

    monkeypatch.setattr(run_ipn, f"learn_{command}", run)
    paths = ["artifact", "model", "out"] if command == "ipn" else ["model", "out"]
    with pytest.raises(Seen):
        typer.main.get_command(learn.app)([command, *paths, "--own-text", "0.25", *asked], standalone_mode=False)


@pytest.mark.usefixtures("few_tokens")
def test_factors_are_stored_and_gone_on_with(source, tmp_path, monkeypatch):
    def find(learner, report):
        with torch.no_grad():
            for name in QKV:
                learner.ipn.get(name, "factor").copy_(torch.tensor([0.5, 0.0, -0.5]))

    monkeypatch.setattr("lowtide.learn.run_ipn.find_factors", find)
    idle, model, text = dataclasses.replace(FAST, steps=0, apart=True), source / "model", source / "text"
    learn_ipn(source / "artifact", model, tmp_path / "first", idle, text)
    first = open_artifact(tmp_path / "first", verify="full")
    assert first.manifest.format_version == 5 and first.manifest.ipn["factors"] == 1
    for name, group in first.groups.items():
        if name in QKV:
            np.testing.assert_allclose(group.ipn.factor, 2 ** np.float32([0.5, 0, -0.5]), rtol=1e-6)
        else:
            assert group.ipn is None or group.ipn.factor is None
    monkeypatch.setattr("lowtide.learn.run_ipn.find_factors", None)  # not asked for again
    learn_ipn(tmp_path / "first", model, tmp_path / "again", dataclasses.replace(idle, apart=None), text)
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "again")
    for name in (n for n in before if n.endswith("ipn_factor")):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6)
    learn_ipn(tmp_path / "first", model, tmp_path / "joined", dataclasses.replace(idle, apart=False), text)
    assert open_artifact(tmp_path / "joined").manifest.format_version == 3


@pytest.mark.usefixtures("few_tokens")
def test_factors_are_looked_for_where_they_are_new(source, tmp_path, monkeypatch):
    asked, helpful = [], True

    def find(learner, report):
        asked.append(learner.ipn.apart)
        if learner.ipn.apart and helpful:
            with torch.no_grad():
                learner.ipn.get(QKV[0], "factor")[0] = 0.5

    monkeypatch.setattr("lowtide.learn.run_ipn.find_factors", find)
    idle, model, text = dataclasses.replace(FAST, steps=0), source / "model", source / "text"

    def run(start, out, **options):
        learn_ipn(start, model, tmp_path / out, dataclasses.replace(idle, **options), text)
        return open_artifact(tmp_path / out).manifest.ipn["factors"]

    assert run(source / "artifact", "default") == 0
    assert run(source / "artifact", "together", apart=False) == 0
    assert run(tmp_path / "together", "still") == 0  # as in the network that is there
    assert run(tmp_path / "together", "apart", apart=True) == 1
    with pytest.raises(LowtideError, match="--apart: .*; --parts importance,offset leaves theta out"):
        run(source / "artifact", "fixed", parts=("importance", "offset"), apart=True)
    assert asked == [False, False, False, True]
    helpful = False
    assert run(source / "artifact", "useless", apart=True) == 0  # not stored where they are all 1
