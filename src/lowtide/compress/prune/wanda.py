"""Wanda (Sun et al. 2023, "A simple and effective pruning approach for large language models").

The score is |w_ij| * ||x_j||_2, compared within each output row; the weights that stay keep their values. Its square,
w_ij^2 * E[x_j^2], orders the weights of a row alike and adds up over the weights of a structure.
"""

from __future__ import annotations

import torch

from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import make_mask, parse_structure


def score(problem: LayerProblem) -> torch.Tensor:
    """w_ij^2 E[x_j^2], f32 [out, in]."""
    return problem.weight.square() * problem.second.float()


def prune(problem: LayerProblem, sparsity: float, structure: str) -> Pruned:
    """Every row loses the same share of its weights, rounded so that the layer's count is exact.

    LowtideError for an impossible sparsity or structure.
    """
    mask = make_mask(score(problem), sparsity, parse_structure(structure), problem.name, per_row=True)
    return Pruned(mask, problem.weight * mask)
