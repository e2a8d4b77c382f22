"""DSnoT: counts stay, the expected error falls, weights keep their values."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune import PRUNERS
from lowtide.compress.prune.dsnot import refine
from lowtide.errors import LowtideError


def shifted(problem):
    """A layer whose inputs have means."""
    layer = problem()
    layer.mean = torch.linspace(-1, 1, 64) * layer.second.sqrt() * 0.7
    return layer


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("rule", ["random", "magnitude", "wanda"])
def test_expected_error_falls_and_counts_stay(problem, rule, structure):
    layer = shifted(problem)
    mask = PRUNERS[rule](layer, 0.5, structure).mask
    before = mask.clone()
    done = refine(layer, mask, structure)
    assert torch.equal(mask, before) and not torch.equal(done.mask, before)
    assert torch.equal(done.mask.sum(1), mask.sum(1))
    if structure == "2:4":
        assert (done.mask.view(-1, 4).sum(1) == 2).all()
    assert torch.equal(done.weight, layer.weight * done.mask)
    old, new = (((layer.weight * ~m) @ layer.mean).abs() for m in (mask, done.mask))
    assert (new <= old + 1e-6).all()
    assert float(new.mean()) < (0.3 if structure == "unstructured" else 0.8) * float(old.mean())


def test_without_means_nothing_moves(problem):
    layer = problem()
    layer.mean = torch.zeros(64)
    mask = PRUNERS["wanda"](layer, 0.5, "unstructured").mask
    assert torch.equal(refine(layer, mask, "unstructured").mask, mask)


def test_one_swap_by_hand(problem):
    """Removed 0.5 at input 0 (error +0.5); returning it and removing the weakest negative effect mends most."""
    layer = problem(out=1, inn=4, weight=torch.tensor([[0.5, 2.0, -0.1, 3.0]]))
    layer.mean, layer.second = torch.ones(4), torch.full((4,), 2.0)
    mask = torch.tensor([[False, True, True, True]])
    assert refine(layer, mask, "unstructured").mask.tolist() == [[True, True, False, True]]


def test_whole_rows_cannot_be_swapped(problem):
    with pytest.raises(LowtideError, match="--structure row: dsnot"):
        refine(problem(), torch.ones(24, 64, dtype=torch.bool), "row")
