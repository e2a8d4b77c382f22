"""The best values for a mask: against exact per-row solutions, and what ADMM's mask choice gains."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune import importance
from lowtide.compress.prune.masks import Structure, make_mask, parse_structure
from lowtide.compress.prune.updates import admm, damped, least_squares, update
from lowtide.errors import LowtideError

UNSTRUCTURED = Structure("unstructured")


def exact(target: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """H_SS w_S = (T H)_S for every row, in float64."""
    h, goal = hessian.double(), (target.double() @ hessian.double())
    result = torch.zeros(target.shape, dtype=torch.float64)
    for i in range(len(target)):
        s = mask[i].nonzero()[:, 0]
        result[i, s] = torch.linalg.solve(h[s][:, s], goal[i, s])
    return result


def test_conjugate_gradients_reach_the_exact_solution(problem):
    layer = problem()
    h = damped(layer.hessian)
    mask = make_mask(layer.weight.square(), 0.6, UNSTRUCTURED)
    got = least_squares(layer.weight, h, mask, iterations=300)
    want = exact(layer.weight, h, mask)
    assert (got[~mask] == 0).all()
    assert torch.allclose(got.double(), want, atol=1e-3)
    again = least_squares(layer.weight, h, mask, start=torch.randn(mask.shape), iterations=300)
    assert torch.allclose(again.double(), want, atol=1e-3)


def test_admm_with_a_fixed_mask_reaches_it_too(problem):
    layer = problem()
    h = damped(layer.hessian)
    mask = make_mask(layer.weight.square(), 0.6, UNSTRUCTURED)
    got_mask, got = admm(layer.weight, h, lambda score, fraction: mask, iterations=800)
    assert torch.equal(got_mask, mask)
    assert torch.allclose(got.double(), exact(layer.weight, h, mask), atol=2e-3)


def test_nothing_removed_nothing_changed(problem):
    layer = problem()
    everything = torch.ones_like(layer.weight, dtype=torch.bool)
    assert torch.allclose(least_squares(layer.weight, damped(layer.hessian), everything), layer.weight, atol=1e-5)
    assert torch.allclose(importance.prune(layer, 0.0, "unstructured").weight, layer.weight, atol=1e-3)


def test_a_target_is_what_is_fitted(problem):
    layer = problem()
    layer.target = layer.weight * 2
    everything = torch.ones_like(layer.weight, dtype=torch.bool)
    assert torch.allclose(update(layer, everything, layer.weight), layer.target, atol=5e-3)


def test_damping_holds_weights_near_the_target(problem):
    layer = problem()
    mask = make_mask(layer.weight.square(), 0.6, UNSTRUCTURED)
    loose, tight = (least_squares(layer.weight, damped(layer.hessian, d), mask, iterations=300) for d in (0.001, 100.0))
    kept = layer.weight * mask
    assert float((tight - kept).norm()) < 0.05 * float((loose - kept).norm())


@pytest.mark.parametrize("rule", ["magnitude", "wanda", "sparsegpt"])
def test_updates_never_hurt_the_metric_they_minimise(problem, rule):
    from lowtide.compress.prune import PRUNERS

    layer = problem()
    pruned = PRUNERS[rule](layer, 0.5, "unstructured")
    better = update(layer, pruned.mask, pruned.weight)
    h = damped(layer.hessian)

    def cost(w: torch.Tensor) -> float:
        return float((((w - layer.weight) @ h) * (w - layer.weight)).sum())

    assert cost(better) < cost(pruned.weight)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_importance_with_updates_has_less_error_than_sparsegpt(problem, error, sparsity):
    from lowtide.compress.prune import PRUNERS

    layer = problem(out=32, inn=96)
    wanda = layer.weight.square() * layer.second
    ours = importance.guided(layer, wanda, sparsity, "unstructured")
    assert error(layer, ours.weight) < 0.95 * error(layer, PRUNERS["sparsegpt"](layer, sparsity, "unstructured").weight)


def test_importance_decides_what_stays(problem):
    layer = problem()
    score = layer.weight.square() * layer.second
    score[:, 7] *= 30
    score[3] *= 30
    mask = importance.guided(layer, score, 0.7, "unstructured").mask
    assert mask[:, 7].float().mean() > 0.6 and mask[3].float().mean() > 0.6  # of all, 0.3 stay
    mask = importance.guided(layer, score, 0.5, "2:4").mask
    assert torch.equal(mask, make_mask(score, 0.5, parse_structure("2:4")))


def test_saliency_is_obs_in_nats(problem):
    layer = problem(out=3, inn=8)
    inverse = torch.linalg.inv(damped(layer.hessian).double()).diagonal()
    want = 0.5 * layer.fisher[:, None].double() * layer.weight.double().square() / inverse
    assert torch.allclose(importance.saliency(layer).double(), want, rtol=1e-4)


def test_values_that_are_not_finite_are_named(problem):
    layer = problem()
    layer.weight[0, 0] = torch.nan
    with pytest.raises(LowtideError, match="q_proj"):
        update(layer, torch.ones_like(layer.weight, dtype=torch.bool), layer.weight)
