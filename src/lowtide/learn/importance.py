"""The importance network: one small network for all layers, from a weight and cheap statistics to its importance.

The importance of weight w_ij is exp(l_ij), in nats of loss that its removal costs, where

    l_ij = a log|w_ij| + b log E x_j^2 - c log [H^-1]_jj + d log f_i        powers, one set per kind of layer
         + o_0 + o_1 depth + o_2 depth^2                                    offset, one set per kind of layer
         + r(row i) + s(column j) + (r'(row i) + s'(column j)) * (log|w_ij| - mean of the layer)

x is the layer's input, H = E[x x'] damped, f_i the Fisher information of output i (mean squared gradient of the loss).
(r, r') and (s, s') come from two networks of one hidden layer over features of a row and of a column. So
the powers (2, 0, 0, 0) rank as the magnitude does, (2, 1, 0, 0) as Wanda within a row, (2, 0, 1, 0) as the OBS
saliency w^2 / [H^-1]_jj, and d = 1 weighs each by the Fisher information, which makes layers comparable: the start is
w^2 E[x^2] f / 2, the second-order estimate of the loss. One threshold over all layers then allocates the sparsity.

Vectors may be added for the rows and columns of one model (structured importance, as in PST, arXiv 2205.11005);
they belong to that model only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from lowtide.compress.prune.base import LayerProblem
from lowtide.errors import LowtideError

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POWERS = ("weight", "second", "inverse_hessian", "fisher")
ROW_FEATURES = 5
COLUMN_FEATURES = 6
HIDDEN = 12
DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added before it is inverted."""
FLOOR = 1e-30
"""Below it a number counts as this one before its logarithm is taken."""
SHIPPED = Path(__file__).with_name("data") / "importance.safetensors"


@dataclass
class Features:
    """What the network sees of one layer.

    name: of the layer; kind: f32 [7], one-hot (equal shares for a kind it has not been told of); depth: 0 to 1;
    log_weight: f32 [out, in], log|w|; level: its mean; powers_in: f32 [in, 2], log E x^2 and -log [H^-1]_jj;
    log_fisher: f32 [out]; row: f32 [out, ROW_FEATURES] and column: f32 [in, COLUMN_FEATURES], dimensionless.
    """

    name: str
    kind: torch.Tensor
    depth: float
    log_weight: torch.Tensor
    level: float
    powers_in: torch.Tensor
    log_fisher: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


def _log(x: torch.Tensor) -> torch.Tensor:
    return x.float().clamp_min(FLOOR).log()


def _relative(x: torch.Tensor) -> torch.Tensor:
    """Logarithms about their mean, a dead row or column no farther than the edge of what training shows."""
    return (x - x.mean()).clamp(-6, 6)


def inverse_diagonal(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Diagonal of the damped Hessian's inverse, f32 [in].

    Raises:
        LowtideError: not positive definite (damaged statistics).
    """
    h = hessian.double()
    h = h + torch.eye(len(h)) * (damping * float(h.diagonal().mean().clamp_min(FLOOR)))
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise LowtideError("the Hessian of a layer's inputs is not positive definite; give more calibration text")
    return torch.cholesky_inverse(lower).diagonal().float()


def features(problem: LayerProblem, inverse: torch.Tensor | None = None) -> Features:
    """The features of a layer.

    Args:
        problem: the layer and its statistics.
        inverse: `inverse_diagonal` of its Hessian if known, f32 [in] (layers of one group share it).

    Raises:
        LowtideError: statistics that are not finite, a Hessian that is not positive definite.
    """
    if inverse is None:
        inverse = inverse_diagonal(problem.hessian)
    kind = torch.tensor([float(problem.kind == k) for k in KINDS])
    if not kind.any():
        kind[:] = 1 / len(KINDS)
    squared = problem.weight.float().square()
    second, fisher = problem.second.float(), problem.fisher.float()
    log_weight = _log(squared).div_(2)
    row_norm, column_norm = squared.mean(1), squared.mean(0)
    log_second, log_inverse, log_fisher = _log(second), -_log(inverse), _log(fisher)
    depth = torch.tensor(problem.depth)
    row = torch.stack(
        [
            _relative(log_fisher),
            _relative(_log(row_norm)),
            _relative(_log(squared @ second)),
            (_log(squared.square().mean(1)) - 2 * _log(row_norm)).clamp(-6, 6),  # kurtosis: few large weights?
            depth.expand(len(row_norm)),
        ],
        1,
    )
    column = torch.stack(
        [
            _relative(log_second),
            (log_second - log_inverse).clamp(-6, 6),  # log of the variance inflation: can others replace the input?
            _relative(_log(column_norm)),
            (problem.mean.float().square() / second.clamp_min(FLOOR)).clamp(0, 1),
            _relative(_log(problem.weighted.diagonal()) - log_second),  # is it large where the loss is sensitive?
            depth.expand(len(second)),
        ],
        1,
    )
    result = Features(
        problem.name,
        kind,
        problem.depth,
        log_weight,
        float(log_weight.mean()),
        torch.stack([log_second, log_inverse], 1),
        log_fisher,
        row,
        column,
    )
    if not all(torch.isfinite(t).all() for t in (result.row, result.column, result.powers_in, log_fisher, log_weight)):
        raise LowtideError(f"{problem.name}: weights or statistics that are not finite")
    return result


class ImportanceNetwork(nn.Module):
    """The network. Begins at half the Fisher-weighted, squared Wanda score, its residual at zero.

    powers: f32 [7, 4] (weight, second, inverse_hessian, fisher); offset: f32 [7, 3], of 1, depth and depth^2;
    row_vectors, column_vectors: layer name -> f32 [out] and [in], empty unless trained for one model.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.powers = nn.Parameter(torch.tensor([2.0, 1.0, 0.0, 1.0]).repeat(len(KINDS), 1))
        self.offset = nn.Parameter(torch.tensor([math.log(0.5), 0.0, 0.0]).repeat(len(KINDS), 1))
        generator = torch.Generator().manual_seed(seed)
        self.row = _residual(ROW_FEATURES + len(KINDS), generator)
        self.column = _residual(COLUMN_FEATURES + len(KINDS), generator)
        self.row_vectors: dict[str, nn.Parameter] = {}
        self.column_vectors: dict[str, nn.Parameter] = {}

    def shared(self) -> list[nn.Parameter]:
        """The parameters that all models share."""
        return list(self.parameters())

    def vectors(self) -> list[nn.Parameter]:
        """The row and column vectors of one model."""
        return [*self.row_vectors.values(), *self.column_vectors.values()]

    def add_vectors(self, layers: list[Features]) -> None:
        """Give the layers vectors of their own, zeros to begin with."""
        for f in layers:
            self.row_vectors[f.name] = nn.Parameter(torch.zeros(f.log_weight.shape[0]))
            self.column_vectors[f.name] = nn.Parameter(torch.zeros(f.log_weight.shape[1]))

    def set_powers(self, weight: float, second: float, inverse_hessian: float, fisher: float) -> None:
        """The same powers for all kinds: a point such as magnitude (2, 0, 0, 0) or OBS (2, 0, 1, 0)."""
        with torch.no_grad():
            self.powers[:] = torch.tensor([weight, second, inverse_hessian, fisher])

    def forward(self, f: Features) -> torch.Tensor:
        """Log-importance of every weight, f32 [out, in]."""
        power = f.kind @ self.powers
        offset = f.kind @ self.offset @ torch.tensor([1.0, f.depth, f.depth**2])
        row = self.row(torch.cat([f.row, f.kind.expand(len(f.row), -1)], 1))
        column = self.column(torch.cat([f.column, f.kind.expand(len(f.column), -1)], 1))
        row_offset = offset + power[3] * f.log_fisher + row[:, 0] - row[:, 1] * f.level
        column_offset = f.powers_in @ power[1:3] + column[:, 0] - column[:, 1] * f.level
        if f.name in self.row_vectors:
            row_offset = row_offset + self.row_vectors[f.name]
            column_offset = column_offset + self.column_vectors[f.name]
        slope = (power[0] + row[:, 1])[:, None] + column[:, 1]
        return torch.addcmul(row_offset[:, None] + column_offset, slope, f.log_weight)


def _residual(inputs: int, generator: torch.Generator) -> nn.Sequential:
    first, last = nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, 2)
    with torch.no_grad():
        first.weight.copy_(torch.randn(first.weight.shape, generator=generator) / inputs**0.5)
        for zero in (first.bias, last.weight, last.bias):
            zero.zero_()
    return nn.Sequential(first, nn.Tanh(), last)


def score_with(network: ImportanceNetwork, problem: LayerProblem) -> torch.Tensor:
    """Importance of every weight, f32 [out, in], larger = keep, comparable between layers (nats).

    Raises:
        LowtideError: statistics that are not finite, or vectors of another model.
    """
    found = features(problem)
    rows = network.row_vectors.get(problem.name)
    if rows is not None and (len(rows), len(network.column_vectors[problem.name])) != tuple(problem.weight.shape):
        raise LowtideError(f"{problem.name}: the importance was trained on a model of other shapes; train it again")
    with torch.no_grad():
        return network(found).clamp(-80, 80).exp()


@lru_cache(maxsize=1)
def shipped() -> ImportanceNetwork:
    """The network that comes with the package."""
    from lowtide.learn.checkpoint import load

    return load(SHIPPED)[0]


def score(problem: LayerProblem) -> torch.Tensor:
    """`score_with` the network that comes with the package."""
    return score_with(shipped(), problem)
