"""Low-rank predictor: which neurons will matter, foretold from the residual stream before any of them is computed."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.eval.rivals.base import Fitted, Rival
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.predictors import FittedPredictors, Predictor, examples

RIDGE = 1e-3
"""Of the regression, relative to the mean energy of the inputs."""
FLOOR = 2.0**-12
"""Scores below this part of the layer's root mean square count as this: their logarithm would rule the regression."""


class LowRankPredictor(Rival):
    """log2 |h_i - mean_i| v_i of every neuron, predicted by a low-rank linear map of the normed residual stream.

    The map is the reduced-rank ridge regression on the calibration tokens, which is the optimum that training a
    two-factor predictor on squared error approaches. The paper's predictors classify ReLU neurons as alive or dead;
    neurons of a gated MLP are never quite dead, hence a score. Every layer reads the same share of its neurons; levels
    and rank are tuned, attention is read at a fixed level.
    """

    name = "low-rank predictor"
    source = "Deja Vu (arXiv 2310.17157)"

    def fit(self, calibration: Calibration) -> Fitted:
        """The regressions at full rank, and the inputs to find thresholds on."""
        maps, inputs_of = {}, {}
        for layer, x, response in examples(calibration):
            floor = FLOOR * float(response.square().mean().sqrt()) + 1e-30
            maps[layer] = reduced_rank(x, response.clamp_min(floor).log2())
            inputs_of[layer] = x[::4]
        return _Fitted(calibration, maps, inputs_of)


def reduced_rank(x: torch.Tensor, y: torch.Tensor) -> Predictor:
    """Ridge regression of y f32 [n, out] on x f32 [n, in] as factors whose first r components are the best of rank r.

    With beta the ridge solution and P the principal directions of x beta, beta P_r P_r' is the best map of rank r
    (Izenman 1975).
    """
    mean_x, mean_y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
    x64, y64 = x.double() - mean_x, y.double() - mean_y
    gram = x64.T @ x64
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-12)
    beta = torch.linalg.solve(gram, x64.T @ y64)
    fitted = x64 @ beta
    directions = torch.linalg.eigh(fitted.T @ fitted).eigenvectors.flip(-1)[:, : x.shape[1]]
    down = (beta @ directions).T
    bias = mean_y - directions @ (down @ mean_x)
    return Predictor(down.float(), directions.float(), bias.float())


class _Fitted(FittedPredictors):
    def __init__(self, calibration: Calibration, maps: dict[str, Predictor], inputs: dict[str, torch.Tensor]) -> None:
        super().__init__(calibration, calibration.ids.numel())
        self.maps, self.inputs = maps, inputs

    def make(self, rank: int = 0, **setting: Any) -> tuple[dict[str, Predictor], dict[str, Table]]:
        """The first components, and each layer's own scores."""
        predictors = {layer: _first(full, rank, self.inputs[layer]) for layer, full in self.maps.items()}
        tables = {}
        for layer, predictor in predictors.items():
            tables[layer] = Table(self.calibration.usable(f"{layer}.down", predictor(self.inputs[layer])))
        return predictors, tables


def _first(full: Predictor, rank: int, x: torch.Tensor) -> Predictor:
    """The first components, their bias set so that the mean over x stays that of the full map."""
    cut = Predictor(full.down[:rank], full.up[:, :rank], full.bias)
    shift = (full(x) - cut(x)).mean(0)
    return Predictor(cut.down, cut.up, cut.bias + shift).stored()
