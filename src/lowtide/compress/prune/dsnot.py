"""DSnoT (Zhang et al. 2023, "Dynamic sparse no training: training-free fine-tuning for sparse LLMs").

On top of any rule's mask: in each row, swap one removed weight for one kept, again and again, so that the expected
error of the output, E[e_i] = sum over removed j of w_ij E[x_j], goes towards zero. The weight that returns takes most
of it away, given the variance of its input; the weight that goes is the one of least Wanda score among those whose
removal moves the error the same way. Values stay those of the dense model: the rule's own weight updates are given up.
"""

from __future__ import annotations

import torch

from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import Structure, parse_structure
from lowtide.errors import LowtideError

CYCLES = 50
TOLERANCE = 0.1
"""A row is left alone once its expected error is this small beside the mean over the rows at first."""


def refine(problem: LayerProblem, mask: torch.Tensor, structure: str, cycles: int = CYCLES) -> Pruned:
    """Swap weights in and out of a mask.

    Args:
        problem: the layer.
        mask: bool [out, in], of any rule; not changed.
        structure: `unstructured`, where rows keep their counts, or `N:M`, where groups of M do.
        cycles: swaps per row at most.

    Raises:
        LowtideError: a structure whose units cannot be swapped weight by weight.
    """
    parsed = parse_structure(structure)
    if parsed.kind not in ("unstructured", "n:m"):
        raise LowtideError(f"--structure {structure}: dsnot swaps single weights; give unstructured or N:M")
    w, mean = problem.weight, problem.mean
    mask = mask.clone()
    effect = w * mean  # what a weight's removal adds to the expected error
    variance = (problem.second - mean.square()).clamp_min(1e-12)
    wanda = w.abs() * problem.second.sqrt()
    error = (effect * ~mask).sum(1)
    limit = TOLERANCE * float(error.abs().mean())
    active = error.abs() > limit
    rows = torch.arange(len(w))
    for _ in range(cycles):
        if not active.any():
            break
        sign = error.sign()[:, None]
        toward = sign * effect  # > 0: returning it, or keeping it out, matters in the error's direction
        drop = torch.where(mask & (toward < 0), wanda, torch.inf)
        grow = torch.where(~mask & (toward > 0) & _can_drop(drop, parsed), toward / variance, -torch.inf)
        returns, gain = grow.argmax(1), grow.amax(1)
        drop = torch.where(_same_group(returns, w.shape[1], parsed), drop, torch.inf)
        leaves, cost = drop.argmin(1), drop.amin(1)
        after = error - effect[rows, returns] + effect[rows, leaves]
        active &= torch.isfinite(gain) & torch.isfinite(cost) & (after.abs() < error.abs())
        mask[rows[active], returns[active]] = True
        mask[rows[active], leaves[active]] = False
        error = torch.where(active, after, error)
        active &= error.abs() > limit
    return Pruned(mask, w * mask)


def _can_drop(drop: torch.Tensor, structure: Structure) -> torch.Tensor:
    """bool [out, in]: weights whose group of M holds one that may go."""
    if structure.kind != "n:m":
        return torch.isfinite(drop).any(1, keepdim=True)
    groups = torch.isfinite(drop).view(len(drop), -1, structure.b).any(2)
    return groups.repeat_interleave(structure.b, 1)


def _same_group(place: torch.Tensor, inn: int, structure: Structure) -> torch.Tensor:
    """bool [out, in]: inputs in the same group of M as `place` i64 [out]; all of them if unstructured."""
    if structure.kind != "n:m":
        return torch.ones(1, inn, dtype=torch.bool)
    return torch.arange(inn) // structure.b == (place // structure.b)[:, None]
