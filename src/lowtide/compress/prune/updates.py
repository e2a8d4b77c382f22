"""The best values of the weights that stay.

For a mask M and a layer's problem, min over W' with support M of tr((W' - T) H (W' - T)'), where T is what the weights
should be (the dense weights, or a fit of the dense outputs) and H the damped Hessian of the inputs. The rows are
independent; row i solves H_SS w_S = (T H)_iS on its support S.

Two solvers. `least_squares` runs preconditioned conjugate gradients on all rows at once: a matrix product for each
iteration, the exact solution in the limit. `admm` (Boza 2024, "Fast and effective weight update for pruned large
language models") factors H + rho I once, shared by all rows, and can choose the mask on the way, a little more at
each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowtide.compress.prune.base import LayerProblem
from lowtide.errors import LowtideError

DAMPING = 0.2
"""Share of the mean diagonal that is added to the Hessian's diagonal. It holds the weights near the dense model's: what
calibration text fits beyond that, other text does not (stories15M at 60 %, KL: 0.01 0.841, 0.1 0.758, 0.3 0.739, 1.0
0.834; SparseGPT's own does not care, 0.01 1.172, 0.1 1.178)."""
ITERATIONS = 60
TOLERANCE = 1e-4
"""Conjugate gradients stop when every row's residual is this small beside its right side."""


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The Hessian with a share of its mean diagonal on the diagonal; f32 [in, in]."""
    return hessian + torch.eye(len(hessian)) * (damping * float(hessian.diagonal().mean().clamp_min(1e-30)))


def update(problem: LayerProblem, mask: torch.Tensor, weight: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The best weights for a mask.

    The metric is the plain Hessian. The gradient-weighted one gives more KL on held-out text: a few tokens of large
    gradient make up most of it, so it is an average of too few.

    Args:
        problem: its `target` (else its weight) is what is fitted.
        mask: bool [out, in].
        weight: f32 [out, in], where to start, e.g. a rule's own weights.
        damping: share of the mean diagonal; it also holds the weights to the target.

    Returns:
        f32 [out, in], 0 where the mask says.
    """
    target = problem.weight if problem.target is None else problem.target
    return least_squares(target, damped(problem.hessian, damping), mask, weight, name=problem.name)


def least_squares(
    target: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor | None = None,
    iterations: int = ITERATIONS,
    name: str = "the layer",
) -> torch.Tensor:
    """argmin over W' on the mask of tr((W' - target) H (W' - target)'), by conjugate gradients.

    Args:
        target, start: f32 [out, in]; start is target on the mask by default.
        hessian: f32 [in, in], positive definite (damp it first).
        mask: bool [out, in].
        iterations: at most.
        name: of the layer, for errors.

    Returns:
        f32 [out, in].

    Raises:
        LowtideError: values that are not finite.
    """
    inverse = 1 / hessian.diagonal()
    w = (target if start is None else start) * mask
    residual = ((target - w) @ hessian) * mask
    scale = ((target @ hessian) * mask).square().sum(1).clamp_min(1e-30)
    z = residual * inverse
    direction = z.clone()
    rho = (residual * z).sum(1, keepdim=True)
    for _ in range(iterations):
        if float((residual.square().sum(1) / scale).max()) < TOLERANCE**2:
            break
        image = (direction @ hessian) * mask
        step = rho / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        w += step * direction
        residual -= step * image
        z = residual * inverse
        after = (residual * z).sum(1, keepdim=True)
        direction = z + (after / rho.clamp_min(1e-30)) * direction
        rho = after
    if not torch.isfinite(w).all():
        raise LowtideError(f"{name}: the weight update diverged; give more calibration text")
    return w


def admm(
    target: torch.Tensor,
    hessian: torch.Tensor,
    choose: Callable[[torch.Tensor, float], torch.Tensor],
    iterations: int = 32,
    gradual: int = 0,
    rho: float = 1.0,
    name: str = "the layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """ADMM on the same problem, with masks that may grow on the way.

    Weights are rescaled so that the Hessian has a unit diagonal; then one rho suits all columns, and the magnitude of
    a rescaled weight is Wanda's score.

    Args:
        target: f32 [out, in].
        hessian: f32 [in, in], positive definite.
        choose: `choose(score, fraction) -> mask`: a mask bool [out, in] from f32 scores when `fraction` of the final
            sparsity is due.
        iterations: in all.
        gradual: of them, how many raise the fraction from 0 to 1 along the cubic 1 - (1 - t)^3; 0: the mask is final
            from the start.
        rho: penalty, in units of the rescaled Hessian's diagonal.

    Returns:
        (mask bool [out, in], weights f32 [out, in]).
    """
    norm = hessian.diagonal().sqrt()
    h = hessian / norm[:, None] / norm
    goal = (target * norm) @ h
    try:
        factor = torch.linalg.cholesky((h + rho * torch.eye(len(h))).double())
        inverse = torch.cholesky_inverse(factor).float()  # one product per iteration instead of two triangular solves
    except torch.linalg.LinAlgError:
        raise LowtideError(f"{name}: the Hessian of its inputs is not positive definite") from None
    dual = torch.zeros_like(target)
    w = target * norm
    mask = choose(w.square(), 1.0 if gradual == 0 else 0.0)
    for step in range(iterations):
        if step < gradual:
            left = 1 - (step + 1) / gradual
            mask = choose((w + dual).square(), 1 - left**3)
        z = (w + dual) * mask
        dual += w - z
        w = (goal + rho * (z - dual)) @ inverse
    return mask, ((w + dual) * mask) / norm
