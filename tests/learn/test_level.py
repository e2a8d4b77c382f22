"""The controller that keeps bits on the budget while thresholds learn."""

from __future__ import annotations

import pytest
import torch
from support.joint import make_learner

from lowtide.learn.ipn import At
from lowtide.learn.level import densities, hold, project
from lowtide.learn.parallel import Parallel


@pytest.fixture
def learner(source):
    found = make_learner(source, Parallel())
    found.ids = torch.randint(0, 104, (40, 24), generator=torch.Generator().manual_seed(2))  # windows of one kind
    return found


def read(learner, bits):
    with torch.no_grad():
        return float(learner.model.hidden(learner.ids[:12], At(learner.ipn, bits))[1].mean())


def test_bits_come_back_to_the_budget_and_stay_there(learner):
    optimiser, ipn = learner.optimiser(), learner.ipn
    with torch.no_grad():
        ipn.level += torch.tensor([-0.8, 0.3])  # as if the start had been far off
    learner.model.refresh()
    before = [abs(read(learner, bits) - bits) for bits in (4.0, 5.0)]
    for number in range(20):
        learner.step(number, optimiser)
    after = [abs(read(learner, bits) - bits) for bits in (4.0, 5.0)]
    assert min(before) > 0.15 and max(after) < 0.2 * min(before)
    assert ipn.level.grad is None and bool((ipn.level != 0).all())


def test_the_level_moves_by_the_least_that_the_error_asks_for(learner):
    ipn = learner.ipn
    hold(ipn, 4.5, 4.7, 0.4)
    assert float(ipn.level[0]) == pytest.approx(0.5 * 0.2 / 0.4) and float(ipn.level[1]) == 0  # in the middle
    hold(ipn, 5.0, 4.8, 0.4)
    assert float(ipn.level.sum()) == pytest.approx(0, abs=1e-6)  # what is read at 5 bits
    assert float(ipn.level[1]) == pytest.approx(-0.125)


def test_densities_are_the_slope_of_the_bits(learner):
    learner.model.refresh()
    at = At(learner.ipn, 4.5, keep_density=True)
    with torch.no_grad():
        learner.model.hidden(learner.ids[:12], at)
        found = float(sum(d.sum() for d in densities(learner.model, at).values()))
        ends = [learner.model.hidden(learner.ids[:12], At(learner.ipn, 4.5, s))[1].mean() for s in (-0.25, 0.25)]
    assert found == pytest.approx(float(ends[0] - ends[1]) / 0.5, rel=0.3)


def test_gradients_keep_nothing_that_all_thresholds_share(learner):
    density = {}
    for name in learner.model.groups:
        delta = learner.ipn.get(name, "delta")
        if delta is not None:
            delta.grad = torch.rand(delta.shape) + 1
            density[name] = torch.rand(1, *delta.shape)
    first = next(iter(density))
    kept = learner.ipn.get(first, "delta").grad.clone()
    project(learner.ipn, density)
    grads = {name: learner.ipn.get(name, "delta").grad for name in density}
    assert abs(float(sum(g.sum() for g in grads.values()))) < 1e-4
    taken = kept - grads[first]
    assert torch.allclose(taken / density[first][0], (taken / density[first][0])[0])
