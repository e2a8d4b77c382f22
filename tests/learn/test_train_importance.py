"""Training: it lowers the KL of masked models, repeats, resumes, and gives up in good order."""

from __future__ import annotations

import math

import pytest
import torch

from lowtide.errors import LowtideError
from lowtide.learn import train_importance as module
from lowtide.learn.checkpoint import tensors_of
from lowtide.learn.importance import ImportanceNetwork
from lowtide.learn.train_importance import Task, Trainer, TrainOptions, all_logs, kl_to_dense, masked_kl, train

FAST = TrainOptions(steps=24, warm_steps=8, check_every=8, windows=4, rate=0.05)


def equal(a: ImportanceNetwork, b: ImportanceNetwork) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def far(network: ImportanceNetwork) -> ImportanceNetwork:
    """A bad start: plain magnitude with kinds far apart."""
    network.set_powers(2, 0, 0, 0)
    with torch.no_grad():
        network.offset[:, 0] = torch.linspace(-1, 1, 7)
    return network


@pytest.mark.parametrize("relaxation", ["straight-through", "hard-concrete"])
def test_training_lowers_the_held_out_kl(small, relaxation):
    network, task = far(ImportanceNetwork()), small.task()
    options = TrainOptions(steps=40, warm_steps=20, check_every=20, windows=4, rate=0.1, relaxation=relaxation)
    outcome = train(network, [task], options)
    assert outcome.steps == 60 and not outcome.diverged
    assert outcome.kl_after < 0.9 * outcome.kl_before
    rows = torch.arange(len(task.ids) - task.held, len(task.ids))
    logs = all_logs(network, task)
    found = [math.log(masked_kl(task, logs, s, rows)) for s in (0.5, 0.6, 0.7)]
    assert math.exp(sum(found) / 3) == pytest.approx(outcome.kl_after)


def test_the_gradient_is_that_of_the_relaxed_loss(small, monkeypatch):
    """Two-part backward against autograd through soft masks, where both are exact."""
    task, network = small.task(), ImportanceNetwork()
    theta, tau, rows = 0.0, 1.5, torch.arange(2)

    def soft(logs, theta, tau, relaxation, generator=None):
        p = torch.sigmoid((logs - theta) / tau)
        return p, p * (1 - p) / tau

    def centre(logs, sparsity, exact=False):
        return -4.0

    monkeypatch.setattr(module, "relaxed", soft)
    monkeypatch.setattr(module, "threshold", centre)
    monkeypatch.setattr(module, "price", lambda *_: 0.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    trainer = Trainer(network, [task], TrainOptions(warm_steps=0, tau=tau, windows=2))
    monkeypatch.setattr(trainer.optimiser, "step", lambda *_: None)
    draw = torch.Generator().manual_seed(0)
    torch.rand((), generator=draw)
    rows = torch.randperm(len(task.ids) - task.held, generator=draw)[:2]
    trainer.step(0)
    ours = network.powers.grad.clone()
    network.zero_grad()
    x = task.states[0][rows]
    for index, block in enumerate(task.layers):
        parts = [w * soft(network(f), -4.0, tau, "")[0] for w, f in zip(task.weights(index), block, strict=True)]
        x = module.run_block(task, index, parts, x)
    kl_to_dense(task, x, rows).log().backward()
    assert network.powers.grad.abs().max() > 1e-4 and theta == 0.0
    assert torch.allclose(ours, network.powers.grad, rtol=1e-3, atol=1e-6)


def test_own_vectors_are_trained_and_belong_to_one_model(small):
    network, task = ImportanceNetwork(), small.task()
    train(network, [task], TrainOptions(steps=4, warm_steps=0, check_every=2, own=True, windows=4, vector_rate=0.1))
    assert set(network.row_vectors) == {f.name for block in task.layers for f in block}
    trained = Trainer(ImportanceNetwork(), [task], TrainOptions(own=True, warm_steps=0))
    trained.step(0)
    assert all(p.detach().abs().max() > 0 for p in trained.network.vectors())
    with pytest.raises(LowtideError, match="train them on one"):
        Trainer(ImportanceNetwork(), [task, task], TrainOptions(own=True))


def test_the_same_seed_gives_the_same_network_and_another_another(small):
    results = []
    for seed in (0, 0, 1):
        network = far(ImportanceNetwork())
        train(network, [small.task()], TrainOptions(steps=6, warm_steps=2, check_every=4, windows=2, seed=seed))
        results.append(network)
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_an_interrupted_run_goes_on_as_if_it_had_never_stopped(small, tmp_path):
    whole = far(ImportanceNetwork())
    expected = train(whole, [small.task()], FAST)

    class Stop(Exception):
        pass

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 11):
            raise Stop

    resumed = far(ImportanceNetwork())
    with pytest.raises(Stop):
        train(resumed, [small.task()], FAST, tmp_path, interrupt, "run")
    seen = []
    resumed = far(ImportanceNetwork())
    outcome = train(resumed, [small.task()], FAST, tmp_path, lambda *a: seen.append(a), "run")
    assert seen[0] == ("train", 9, 24)  # the last checkpoint is that of step 16, 8 of them warm
    assert outcome == expected
    assert equal(whole, resumed)
    seen.clear()
    train(far(ImportanceNetwork()), [small.task()], FAST, tmp_path, lambda *a: seen.append(a), "another run")
    assert seen[0] == ("warm", 1, 8)


def test_a_damaged_checkpoint_is_refused(small, tmp_path):
    train(far(ImportanceNetwork()), [small.task()], FAST, tmp_path, key="run")
    path = tmp_path / "progress.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LowtideError, match="progress.safetensors: cannot be read"):
        train(far(ImportanceNetwork()), [small.task()], FAST, tmp_path, key="run")


def test_a_diverging_run_stops_and_keeps_the_best(small):
    network = ImportanceNetwork()
    begin = tensors_of(network)
    outcome = train(network, [small.task()], TrainOptions(steps=40, warm_steps=0, check_every=1, rate=40.0))
    assert outcome.diverged and outcome.steps < 40
    assert outcome.kl_after <= outcome.kl_before
    if outcome.best_step == 0:
        assert all(torch.equal(begin[n], t) for n, t in tensors_of(network).items())


def test_a_loss_that_is_not_finite_stops_at_once(small, monkeypatch):
    monkeypatch.setattr(module, "kl_to_dense", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    monkeypatch.setattr(module.Trainer, "check", lambda self: 0.0)
    outcome = train(ImportanceNetwork(), [small.task()], TrainOptions(steps=10, warm_steps=0))
    assert (outcome.diverged, outcome.steps, outcome.best_step) == (True, 1, 0)


def test_bad_options_and_short_texts_are_refused(small):
    for options, message in (
        ({"sparsity": (0.8, 0.4)}, "--sparsity 0.8,0.4: must be"),
        ({"sparsity": (0.4, 1.0)}, "--sparsity 0.4,1: must be"),
        ({"sparsity": (float("nan"), 0.5)}, "--sparsity nan,0.5: must be"),
        ({"steps": 0}, "--steps 0: must be"),
        ({"relaxation": "soft"}, "--relaxation soft: known are straight-through, hard-concrete"),
    ):
        with pytest.raises(LowtideError, match=message):
            TrainOptions(**options)
    with pytest.raises(LowtideError, match="needs two windows of 24 tokens or more"):
        Task.of(small.model, small.ids[:1], [])
