"""Pruning by a learned importance.

A network gives every weight an importance: what its removal costs. `mask_only` removes the least important and leaves
the others as they are. `prune` also finds the best values of those that stay, and lets the importance meet the
weights as they change: ADMM raises the sparsity step by step (see `updates.admm`), and at each step a weight's score is
its importance times (current value / first value)^2. With the importance w^2 E[x^2] this is the method of Boza 2024.
"""

from __future__ import annotations

import torch

from lowtide.compress.prune import updates
from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import check_fits, check_sparsity, make_mask, parse_structure

ITERATIONS = 16
GRADUAL = 10
"""ADMM's iterations, and how many of them raise the sparsity. Twice as many: no less KL (stories15M)."""
MULTIPLIER_RANGE = (1e-3, 1e3)
"""Bounds of importance / (w^2 E[x^2]) beside its median: where w is 0 the quotient says nothing."""


def importance(problem: LayerProblem) -> torch.Tensor:
    """What removing each weight costs, f32 [out, in]: by the trained network where there is one, else `saliency`."""
    from lowtide.learn.importance import SHIPPED, score  # here: learning imports this package

    if not SHIPPED.is_file():
        return saliency(problem)
    result: torch.Tensor = score(problem)
    return result


def saliency(problem: LayerProblem) -> torch.Tensor:
    """Optimal Brain Surgeon's cost in nats, w_ij^2 / [H^-1]_jj * fisher_i / 2, f32 [out, in] (Hassibi & Stork 1993)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(updates.damped(problem.hessian).double()))
    # two roundings of a tiny number may cross zero
    diagonal = inverse.diagonal().clamp_min(1e-30).float()
    return problem.weight.square() / diagonal * (0.5 * problem.fisher[:, None])


def mask_only(problem: LayerProblem, sparsity: float, structure: str) -> Pruned:
    """The least important weights go, the others keep their values."""
    mask = make_mask(importance(problem), sparsity, parse_structure(structure), problem.name)
    return Pruned(mask, problem.weight * mask)


def prune(problem: LayerProblem, sparsity: float, structure: str) -> Pruned:
    """The least important weights go step by step, the others take their best values.

    Raises:
        LowtideError: an impossible sparsity or structure, damaged statistics.
    """
    return guided(problem, importance(problem), sparsity, structure)


def guided(problem: LayerProblem, score: torch.Tensor, sparsity: float, structure: str) -> Pruned:
    """`prune` with a given importance, f32 [out, in]."""
    parsed = parse_structure(structure)
    check_sparsity(sparsity)
    check_fits(parsed, problem.weight.shape[0], problem.weight.shape[1], problem.name)
    hessian = updates.damped(problem.hessian)
    target = problem.weight if problem.target is None else problem.target
    wanda = problem.weight.square() * hessian.diagonal()
    multiplier = score / wanda.clamp_min(1e-30)
    middle = float(multiplier.median().clamp_min(1e-30))
    multiplier = (multiplier / middle).clamp(*MULTIPLIER_RANGE)
    steps = GRADUAL
    if parsed.kind != "unstructured":  # the first mask must already be one of the structure
        steps = 0

    def choose(square: torch.Tensor, fraction: float) -> torch.Tensor:
        return make_mask(square * multiplier, sparsity * fraction, parsed, problem.name)

    mask, weight = updates.admm(target, hessian, choose, ITERATIONS, steps, name=problem.name)
    return Pruned(mask, updates.least_squares(target, hessian, mask, weight, name=problem.name) * mask)
