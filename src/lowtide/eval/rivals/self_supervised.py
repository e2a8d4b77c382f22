"""Self-supervised predictor: trained to tell the neurons that are among the oracle's top k."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lowtide.eval.rivals.base import Fitted, Knobs, Rival
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.predictors import FittedPredictors, Predictor, examples

STEPS, BATCH, RATE = 300, 256, 0.03
MASSES = (0.8, 0.9)
"""Parts of a token's response that its top k neurons must hold; tuned."""


class SelfSupervisedPredictor(Rival):
    """A low-rank classifier of the MLP's input, trained with cross-entropy to reproduce the oracle's top-k mask.

    k is each token's own: the fewest neurons that hold the given mass of its response |h_i - mean_i| v_i. One threshold
    on the logits serves all layers and tokens, so both may take more or fewer neurons, as in the paper, where it is 0;
    here the budget sets it. Levels, rank and mass are tuned, attention is read at a fixed level.
    """

    name = "self-supervised predictor"
    source = "Fire Together Wire Together (arXiv 2110.08232)"

    def fit(self, calibration: Calibration) -> Fitted:
        """Inputs and responses; training waits for a rank and a mass."""
        inputs, responses = {}, {}
        for layer, x, response in examples(calibration):
            inputs[layer], responses[layer] = x.half(), response.half()
        return _Fitted(calibration, inputs, responses)


def top_mask(response: torch.Tensor, mass: float) -> torch.Tensor:
    """The fewest channels that hold that part of each token's response f32 [n, channels]: bool, same shape."""
    ordered, order = response.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    taken = before < mass * response.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def train(x: torch.Tensor, target: torch.Tensor, rank: int, seed: int) -> Predictor:
    """Adam on the cross-entropy of masks: x f32 [n, in], target bool [n, neurons] -> the predictor, not yet rounded."""
    generator = torch.Generator().manual_seed(seed)
    rms = float(x.square().mean().sqrt()) + 1e-12
    down = (torch.randn(rank, x.shape[1], generator=generator) / (rms * x.shape[1] ** 0.5)).requires_grad_()
    up = torch.zeros(target.shape[1], rank, requires_grad=True)
    prior = target.float().mean(0).clamp(1e-3, 1 - 1e-3)
    bias = torch.logit(prior).requires_grad_()
    steps = [{"params": [down], "lr": RATE / (rms * x.shape[1] ** 0.5)}, {"params": [up, bias], "lr": RATE}]
    optimiser = torch.optim.Adam(steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
        loss = F.binary_cross_entropy_with_logits(x[rows] @ down.T @ up.T + bias, target[rows].float())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return Predictor(down.detach(), up.detach(), bias.detach())


class _Fitted(FittedPredictors):
    def __init__(self, calibration: Calibration, x: dict[str, torch.Tensor], response: dict[str, torch.Tensor]) -> None:
        super().__init__(calibration, STEPS * min(BATCH, calibration.ids.numel()))
        self.x, self.response = x, response

    def knobs(self, bits: float) -> Knobs:
        """mass besides."""
        return super().knobs(bits) | {"mass": MASSES}

    def make(self, rank: int = 0, mass: float = 0.0, **setting: Any) -> tuple[dict[str, Predictor], dict[str, Table]]:
        """Trains them; every layer's threshold is a quantile of all layers' logits."""
        predictors, logits = {}, []
        for layer, x in self.x.items():
            target = top_mask(self.response[layer].float(), mass)
            with torch.enable_grad():
                predictors[layer] = train(x.float(), target, rank, self.calibration.seed).stored()
            scores = predictors[layer](x[::8].float())
            logits.append(self.calibration.usable(f"{layer}.down", scores).reshape(-1))
        return predictors, dict.fromkeys(predictors, Table(torch.cat(logits)))
