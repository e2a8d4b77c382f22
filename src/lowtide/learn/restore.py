"""One-shot weight updates that mind what the loss sees of a layer's outputs.

For a mask M the weights that stay minimise

    tr(G (W' - T) H (W' - T)'),   W' = 0 off the mask,

H = E[x x'] of the inputs that the pruned model really gives the layer, T the weights that would best give the dense
outputs from them (`lowtide.compress.prune.sequential`), and G = E[g g'] of the loss's gradients g at the layer's
outputs: the Kronecker-factored Fisher information (Martens & Grosse 2015, arXiv 1503.05671). With G = 1 the rows are
independent, as in SparseGPT; with the measured G one row makes up for what another had to drop. It is a convex
least-squares problem, solved by conjugate gradients on the mask: two matrix products an iteration, no training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowtide.arch import GROUPS
from lowtide.compress.calibrate import GroupStats, head_pass
from lowtide.compress.dense import DenseModel, decoder_block, rope_tables
from lowtide.compress.prune.base import LayerProblem
from lowtide.compress.prune.problems import member_rows
from lowtide.compress.prune.sequential import Walk
from lowtide.compress.prune.updates import damped
from lowtide.errors import LowtideError

DAMPING = 0.1
"""Share of the mean diagonal added to the output metric: it is known from fewer independent numbers than H is."""
ITERATIONS = 40
GRADUAL = 6
STEP_ITERATIONS = 8
"""Steps that raise the sparsity, and iterations after each but the last."""
MOST_PER_SQUARE = 1e3
"""Importance per squared weight is cut at this multiple of its median: where w is 0 the quotient says nothing."""
TOLERANCE = 1e-4
METRIC_ROWS = 2048
"""A layer with more outputs has a metric in diagonal blocks of at most so many rows."""
Metric = list[torch.Tensor]
"""Blocks [n, n] along the diagonal of a layer's G, in row order."""


def block_sizes(rows: int) -> list[int]:
    """Sizes of the diagonal blocks of a metric with `rows` rows: as few and as even as METRIC_ROWS allows."""
    count = -(-rows // METRIC_ROWS)
    return [rows // count + (i < rows % count) for i in range(count)]


def output_metrics(
    model: DenseModel, ids: torch.Tensor, seed: int, report: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Metric]:
    """G = E[g g'] of every linear layer of the body, by its name; blocks f32 [n, n], nats^2.

    Labels are drawn from the model's own distribution, as for the Fisher diagonal; seed is theirs. Memory: the
    metrics of all layers, 4 * out * min(out, 2048) bytes each.
    """
    states = model.block_inputs(ids)
    layers = model.config.num_layers
    grad, _ = head_pass(model, states[layers], seed + 1)
    found: dict[str, Metric] = {}
    for index in range(layers - 1, -1, -1):
        grad = _block_metrics(model, index, states[index], grad, found)
        states[index] = torch.empty(0)
        report("metric", layers - index, layers)
    return found


def _block_metrics(
    model: DenseModel, index: int, states: torch.Tensor, grad_out: torch.Tensor, found: dict[str, Metric]
) -> torch.Tensor:
    """Back through block `index`, its layers' metrics into `found`; the gradient at its input, f32 [B, N, D]."""
    block, rope = model.block(index), rope_tables(model.config, 0, states.shape[1])
    grad_in = torch.empty_like(states)
    tokens = states.shape[0] * states.shape[1]
    for row in range(states.shape[0]):
        seen: dict[str, torch.Tensor] = {}

        def apply(group: str, x: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> torch.Tensor:
            seen[group] = block.apply(group, x)
            seen[group].retain_grad()
            return seen[group]

        x = states[row : row + 1].detach().requires_grad_(True)
        with torch.enable_grad():
            out = decoder_block(model.config, (block.input_norm, block.post_norm), x, apply, rope)
        out.backward(grad_out[row : row + 1])
        assert x.grad is not None
        grad_in[row] = x.grad[0]
        for group, members in GROUPS.items():
            g = seen[group].grad
            assert g is not None
            for member, part in zip(members, g[0].split(member_rows(model, group), -1), strict=True):
                pieces = part.split(block_sizes(part.shape[-1]), -1)
                sums = [p.T @ p / tokens for p in pieces]
                name = f"model.layers.{index}.{member}"
                found[name] = [a + b for a, b in zip(found[name], sums, strict=True)] if name in found else sums
    return grad_in


def solve(
    target: torch.Tensor,
    hessian: torch.Tensor,
    metric: Metric,
    mask: torch.Tensor,
    start: torch.Tensor,
    name: str,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """argmin over W' on the mask of tr(G (W' - target) H (W' - target)').

    Args:
        target, start: f32 [out, in]; hessian: f32 [in, in] and metric's blocks, both positive definite (damp them).
        mask: bool [out, in].
        name: of the layer, for errors; iterations: at most.

    Returns:
        f32 [out, in].

    Raises:
        LowtideError: values that are not finite.
    """

    def image(d: torch.Tensor) -> torch.Tensor:
        parts = (d @ hessian).split([len(b) for b in metric])
        return torch.cat([b @ p for b, p in zip(metric, parts, strict=True)]) * mask

    scale = 1 / (torch.cat([b.diagonal() for b in metric])[:, None] * hessian.diagonal())
    w = start * mask
    residual = image(target - w)
    z = residual * scale
    direction, rho = z.clone(), float((residual * z).sum())
    goal = rho * TOLERANCE**2
    for _ in range(iterations):
        if rho <= max(goal, 1e-30):
            break
        step = image(direction)
        length = rho / max(float((direction * step).sum()), 1e-38)
        w += length * direction
        residual -= length * step
        z = residual * scale
        before, rho = rho, float((residual * z).sum())
        direction = z + (rho / before) * direction
    if not torch.isfinite(w).all():
        raise LowtideError(f"{name}: the weight update diverged; give more calibration text")
    return w


def refit(problem: LayerProblem, mask: torch.Tensor, metric: Metric, score: torch.Tensor | None = None) -> torch.Tensor:
    """`solve` for a problem, statistics damped; f32 [out, in].

    score: f32 [out, in], importances of the dense weights. With them the layer keeps as many weights as the mask does,
    but removes them in GRADUAL steps, refitting in between: a weight's score is its importance times (its value now /
    its dense value)^2, so that those that make up for others stay.
    """
    # all blocks share one ridge: rows must keep their weight beside those of other blocks
    ridge = DAMPING * float(torch.cat([b.diagonal() for b in metric]).mean().clamp_min(1e-30))
    solid = [b + ridge * torch.eye(len(b)) for b in metric]
    target = problem.weight if problem.target is None else problem.target
    hessian = damped(problem.hessian)
    if score is None:
        return solve(target, hessian, solid, mask, target, problem.name)
    w, kept, removed = target, torch.ones_like(mask), mask.numel() - int(mask.sum())
    per_square = score / problem.weight.square().clamp_min(1e-30)
    per_square = per_square.clamp_max(float(per_square.median()) * MOST_PER_SQUARE)
    for step in range(GRADUAL):
        count = round(removed * (1 - (1 - (step + 1) / GRADUAL) ** 3))
        if count:
            now = torch.where(kept, per_square * w.square(), -1.0).reshape(-1)
            kept = torch.ones_like(kept)
            kept.view(-1)[now.argsort(stable=True)[:count]] = False
        last = step == GRADUAL - 1
        w = solve(target, hessian, solid, kept, w, problem.name, ITERATIONS if last else STEP_ITERATIONS)
    return w


def restore(
    model: DenseModel,
    ids: torch.Tensor,
    masks: dict[str, torch.Tensor],
    metrics: dict[str, Metric],
    report: Callable[[str, int, int], None] = lambda *_: None,
    share: float = 0.0,
    scores: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The best weights for a model's masks, block by block from the front; layer name -> f32 [out, in].

    Args:
        ids: calibration text, i64 [windows, tokens].
        masks: layer name -> bool [out, in].
        metrics: from `output_metrics`.
        share: how much of the residual stream's error a layer makes up for, see `sequential`.
        scores: layer name -> importances f32 [out, in]: then the masks give the counts only, see `refit`.
    """
    walk = Walk(model, ids, share)
    found: dict[str, torch.Tensor] = {}

    def prune(members: list[LayerProblem]) -> list[torch.Tensor]:
        for p in members:
            found[p.name] = refit(p, masks[p.name], metrics[p.name], None if scores is None else scores[p.name])
        return [found[p.name] for p in members]

    for index in range(model.config.num_layers):
        walk.block(index, _known(model, index, metrics), 0, prune)
        report("update", index + 1, model.config.num_layers)
    return found


def _known(model: DenseModel, index: int, metrics: dict[str, Metric]) -> dict[str, GroupStats]:
    """The Fisher information of a block's outputs, which is all that the walk asks of the dense model's statistics."""
    found = {}
    for group, members in GROUPS.items():
        inputs = model.block(index).weights[group].shape[1]
        parts = [b.diagonal() for m in members for b in metrics[f"model.layers.{index}.{m}"]]
        stats = GroupStats(torch.zeros(inputs), torch.zeros(inputs), torch.cat(parts), torch.empty(0))
        stats.hessian = stats.weighted = torch.zeros(0, 0)
        found[group] = stats
    return found
