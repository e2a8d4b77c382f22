"""Relaxed masks: thresholds, slopes and the price of a weight."""

from __future__ import annotations

import pytest
import torch

from lowtide.learn import relax
from lowtide.learn.relax import price, relaxed, threshold


def logs(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, 50, generator=torch.Generator().manual_seed(seed))


def test_one_threshold_gives_the_sparsity_over_all_layers():
    a, b = logs(0), logs(1) + 2
    for sparsity in (0.3, 0.5, 0.8):
        theta = threshold([a, b], sparsity, exact=True)
        gone = int((a <= theta).sum() + (b <= theta).sum())
        assert gone == int(sparsity * 4000)
    assert float((a <= threshold([a, b], 0.5)).float().mean()) > 0.7  # the layer of lower importance loses more
    assert threshold([a], 0.0) == -float("inf")


def test_a_sampled_threshold_is_close(monkeypatch):
    a = logs()
    exact = threshold([a], 0.6)
    monkeypatch.setattr(relax, "QUANTILE_SAMPLE", 500)
    assert threshold([a], 0.6) == pytest.approx(exact, abs=0.15)
    assert threshold([a], 0.6, exact=True) == exact


def test_straight_through_is_hard_forward_and_has_the_sigmoids_slope():
    a = logs().double().requires_grad_(True)
    mask, slope = relaxed(a.detach(), 0.2, 0.5, "straight-through")
    assert torch.equal(mask, (a.detach() > 0.2).float())
    torch.sigmoid((a - 0.2) / 0.5).sum().backward()
    assert torch.allclose(slope, a.grad)


def test_hard_concrete_slope_is_the_derivative_and_most_masks_are_0_or_1():
    a, eps = logs().double(), 1e-6
    masks = [relaxed(a + d, 0.1, 0.3, "hard-concrete", torch.Generator().manual_seed(5))[0] for d in (-eps, eps)]
    mask, slope = relaxed(a, 0.1, 0.3, "hard-concrete", torch.Generator().manual_seed(5))
    numeric = (masks[1] - masks[0]) / (2 * eps)
    smooth = (mask > 1e-3) & (mask < 1 - 1e-3)
    assert torch.allclose(numeric[smooth], slope[smooth], rtol=1e-3, atol=1e-5)
    assert not slope[(mask == 0) | (mask == 1)].any()
    assert float(((mask == 0) | (mask == 1)).float().mean()) > 0.3


def test_the_price_leaves_the_expected_number_of_survivors_alone():
    gradients, slopes = [logs(1), logs(2)], [logs(3).square(), logs(4).square()]
    cost = price(gradients, slopes)
    step = sum(float(((g - cost) * s).sum()) for g, s in zip(gradients, slopes, strict=True))
    assert abs(step) < 1e-2
    assert price([logs()], [torch.zeros(40, 50)]) == 0.0
