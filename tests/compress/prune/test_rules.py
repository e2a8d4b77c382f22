"""What every rule promises, and what each is in particular."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune import PRUNERS, get_pruner, sparsegpt
from lowtide.compress.prune.masks import Structure, make_mask, parse_structure
from lowtide.errors import LowtideError

STRUCTURES = ["unstructured", "2:4", "row", "column", "block:4x8"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", PRUNERS)
def test_weights_are_zero_where_the_mask_says_and_only_there(problem, rule, structure):
    layer = problem()
    before = layer.weight.clone(), layer.hessian.clone()
    done = PRUNERS[rule](layer, 0.5, structure)
    assert done.mask.dtype == torch.bool and done.mask.shape == layer.weight.shape
    assert (done.weight[~done.mask] == 0).all() and (done.weight[done.mask] != 0).all()
    assert int(done.mask.sum()) == layer.weight.numel() // 2
    assert torch.equal(before[0], layer.weight) and torch.equal(before[1], layer.hessian)
    again = PRUNERS[rule](layer, 0.5, structure)
    assert torch.equal(done.weight, again.weight)
    if structure == "2:4":
        assert (done.mask.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("rule", PRUNERS)
def test_every_rule_refuses_what_cannot_be(problem, rule):
    with pytest.raises(LowtideError, match="--sparsity"):
        PRUNERS[rule](problem(), 1.0, "unstructured")
    with pytest.raises(LowtideError, match="q_proj has 64 inputs"):
        PRUNERS[rule](problem(), 0.5, "2:5")


@pytest.mark.parametrize("rule", sorted(set(PRUNERS) - {"random"}))
def test_every_rule_beats_random(problem, error, rule):
    layer = problem()
    random = PRUNERS["random"](layer, 0.5, "unstructured").weight
    assert error(layer, PRUNERS[rule](layer, 0.5, "unstructured").weight) < 0.6 * error(layer, random)


def test_unknown_rules_are_refused_with_a_list():
    with pytest.raises(LowtideError, match="--rule wander: known are .*wanda"):
        get_pruner("wander")


def test_magnitude_and_wanda_by_hand(problem):
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.1, 0.2, 0.3, 0.4]])
    layer = problem(out=2, inn=4, weight=weight, second=torch.tensor([25.0, 1.0, 0.01, 1.0]))
    assert PRUNERS["magnitude"](layer, 0.5, "unstructured").mask.tolist() == [[True] * 4, [False] * 4]
    wanda = PRUNERS["wanda"](layer, 0.5, "unstructured").mask
    assert wanda.tolist() == [[True, True, False, False], [True, False, False, True]]


def test_random_depends_on_seed_and_layer(problem):
    masks = [
        PRUNERS["random"](problem(seed=s, name=n), 0.5, "unstructured").mask for s, n in [(0, "a"), (0, "b"), (1, "a")]
    ]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_sparsegpt_leaves_diagonal_problems_alone(problem):
    """Without correlations nothing can be compensated: plain masks by w^2 h_jj within a block of columns."""
    layer = problem(inn=64)
    layer.hessian = torch.diag(layer.second)
    done = sparsegpt.solve(layer.weight, layer.hessian, 0.5, Structure("unstructured"), "x", damping=1e-9)
    assert torch.equal(done.mask, make_mask(layer.weight.square() * layer.second, 0.5, Structure("unstructured")))
    assert torch.allclose(done.weight, layer.weight * done.mask)


def test_sparsegpt_in_one_block_is_optimal_brain_surgery_column_by_column(problem):
    """Against the textbook step: w -= w_j / [H^-1]_jj * H^-1_j, H over the columns not yet visited."""
    layer = problem(out=5, inn=12)
    mask = make_mask(layer.weight.square(), 0.5, Structure("unstructured"))
    done = sparsegpt.solve(
        layer.weight, layer.hessian, 0.5, Structure("unstructured"), "x", damping=1e-3, block=5, mask=mask
    )
    h = layer.hessian.double() + 1e-3 * layer.hessian.diagonal().mean().double() * torch.eye(12)
    want = layer.weight.double().clone()
    for j in range(12):
        inverse = torch.linalg.inv(h[j:, j:])
        for row in range(5):
            if not mask[row, j]:
                want[row, j:] -= want[row, j] / inverse[0, 0] * inverse[0]
    assert torch.allclose(done.weight.double(), want * mask, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_sparsegpt_has_less_error_than_wanda(problem, error, sparsity):
    layer = problem(out=32, inn=96)
    ours, wanda = (error(layer, PRUNERS[r](layer, sparsity, "unstructured").weight) for r in ("sparsegpt", "wanda"))
    assert ours < 0.8 * wanda


def test_sparsegpt_counts_exactly_over_blocks(problem):
    layer = problem(out=7, inn=30)
    done = sparsegpt.solve(layer.weight, layer.hessian, 0.37, Structure("unstructured"), "x", block=8)
    assert int((~done.mask).sum()) == 78
    grouped = sparsegpt.solve(layer.weight, layer.hessian, 0, parse_structure("1:3"), "x", block=8)
    assert (grouped.mask.view(7, 10, 3).sum(2) == 1).all()


def test_inputs_that_never_fire_do_no_harm(problem):
    layer = problem()
    for t in (layer.hessian, layer.weighted):
        t[5] = 0
        t[:, 5] = 0
    layer.second[5] = 0
    done = PRUNERS["sparsegpt"](layer, 0.5, "unstructured")
    assert torch.isfinite(done.weight).all() and (done.weight[:, 5] == 0).all()


def test_a_damaged_hessian_is_named(problem):
    layer = problem()
    layer.hessian = -torch.eye(64) + 2 * torch.diag((torch.arange(64) < 32).float() * 4)
    layer.hessian[0, 1] = layer.hessian[1, 0] = 100
    with pytest.raises(LowtideError, match="q_proj.*Hessian"):
        PRUNERS["sparsegpt"](layer, 0.5, "unstructured")
