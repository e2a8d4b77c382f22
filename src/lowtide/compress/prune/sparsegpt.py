"""SparseGPT (Frantar & Alistarh 2023, "Massive language models can be accurately pruned in one-shot").

Columns are visited from left to right. A removed weight's error is spread over the row's columns to the right by the
inverse Hessian of what is left, which is the upper Cholesky factor U of H^-1 (H^-1 = U'U), read row by row. Masks are
chosen in blocks of columns by the OBS saliency w^2 / U_jj^2; N:M masks group by group. Updates within a block
are applied at once, those of the columns beyond it lazily, as one product per block.
"""

from __future__ import annotations

import torch

from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import (
    Structure,
    check_fits,
    check_sparsity,
    make_mask,
    parse_structure,
    removal_count,
)
from lowtide.errors import LowtideError

BLOCK = 128
"""Columns whose mask is chosen together."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's diagonal."""


def prune(problem: LayerProblem, sparsity: float, structure: str) -> Pruned:
    """Prune one layer with the plain Hessian E[x x'], as published.

    Raises:
        LowtideError: an impossible sparsity or structure, a Hessian that is not positive definite.
    """
    return solve(problem.weight, problem.hessian, sparsity, parse_structure(structure), problem.name)


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    structure: Structure,
    name: str,
    damping: float = DAMPING,
    block: int = BLOCK,
    mask: torch.Tensor | None = None,
) -> Pruned:
    """The sweep itself.

    Args:
        weight: f32 [out, in].
        hessian: f32 [in, in]; not changed.
        sparsity, structure: what goes; row, column and block masks are chosen once, from the OBS saliency of the
            whole layer, and the sweep then updates the weights.
        damping: share of the mean diagonal added to the diagonal.
        block: columns whose mask is chosen together.
        mask: bool [out, in], a mask to keep to instead of choosing one.
    """
    out, inn = weight.shape
    check_sparsity(sparsity)
    check_fits(structure, out, inn, name)
    upper, dead = inverse_factor(hessian, damping, name)
    w = weight.clone()
    w[:, dead] = 0
    if structure.kind == "n:m":  # a group's mask is chosen at once, so blocks must hold whole groups
        block = max(structure.b, block // structure.b * structure.b)
    if mask is None and structure.kind not in ("unstructured", "n:m"):
        inverse = upper.square().sum(0)  # the diagonal of H^-1 = U'U
        mask = make_mask(w.square() / inverse, sparsity, structure, name)
    kept = torch.ones(w.shape, dtype=torch.bool) if mask is None else mask
    gone = 0
    for start in range(0, inn, block):
        end = min(start + block, inn)
        if mask is None and structure.kind == "unstructured":
            score = w[:, start:end].square() / upper.diagonal()[start:end].square()
            count = removal_count(sparsity, out * end) - gone  # so that the layer's count is exact
            kept[:, start:end] = _keep(score, count)
            gone += count
        step = structure if mask is None and structure.kind == "n:m" else None
        errors = _sweep(w[:, start:end], kept[:, start:end], upper[start:end, start:end], step)
        w[:, end:] -= errors @ upper[start:end, end:]
    return Pruned(kept, w * kept)


def _keep(score: torch.Tensor, remove: int) -> torch.Tensor:
    """bool like score: the `remove` lowest of all are False."""
    order = score.reshape(-1).sort(descending=True, stable=True).indices
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[order[score.numel() - remove :]] = False
    return keep.view(score.shape)


def _sweep(w: torch.Tensor, kept: torch.Tensor, upper: torch.Tensor, groups: Structure | None) -> torch.Tensor:
    """One block in place: w [out, n] loses what `kept` says, the rest is updated; returns scaled errors [out, n]."""
    errors = torch.zeros_like(w)
    for j in range(w.shape[1]):
        if groups and j % groups.b == 0:
            part = slice(j, j + groups.b)
            score = w[:, part].square() / upper.diagonal()[part].square()
            kept[:, part] = make_mask(score, 0.0, groups)
        error = torch.where(kept[:, j], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        errors[:, j] = error
    return errors


def inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(U, dead): the upper Cholesky factor U of the damped Hessian's inverse, H^-1 = U'U, and inputs never active.

    hessian: f32 [in, in]. U: f32 [in, in]; dead: bool [in].

    Raises:
        LowtideError: not positive definite (damaged statistics).
    """
    h = hessian.double()
    dead = h.diagonal() <= 0
    h = h + torch.diag(damping * h.diagonal().mean().clamp_min(1e-30) + dead.double())
    try:
        lower = torch.linalg.cholesky(h)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    except torch.linalg.LinAlgError:
        advice = "give more calibration text"
        raise LowtideError(f"{name}: the Hessian of its inputs is not positive definite; {advice}") from None
    return upper.float(), dead
