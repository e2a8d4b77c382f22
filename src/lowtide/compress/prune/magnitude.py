"""Magnitude: the smallest weights go (Han et al. 2015, "Learning both weights and connections")."""

from __future__ import annotations

from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import make_mask, parse_structure


def prune(problem: LayerProblem, sparsity: float, structure: str) -> Pruned:
    """Remove the weights with the least w^2, over the whole layer. LowtideError for an impossible sparsity."""
    mask = make_mask(problem.weight.square(), sparsity, parse_structure(structure), problem.name)
    return Pruned(mask, problem.weight * mask)
