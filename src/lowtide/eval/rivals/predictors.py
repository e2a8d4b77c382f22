"""What the rules with a predictor share: two int8 factors between the MLP's input and a score for each neuron.

A rule says how predictors are made for a setting, and of what scores its thresholds are quantiles; what they are fitted
on, when they are made, and the plan of a setting are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowtide.eval.rivals.base import Fitted, Knobs, Plan, share_for
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.neurons import Fixed, NeuronPlan, choices, digit_bits
from lowtide.eval.rivals.r_sparse import to_int8

RANKS = (16, 32, 8)
"""Ranks to try in parts of the hidden size: r = hidden * n / 512, at least 1."""


@dataclass(frozen=True)
class Predictor:
    """score = up @ (down @ x) + bias: down f32 [r, in], up f32 [neurons, r], bias f32 [neurons]."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x f32 [..., in] -> scores f32 [..., neurons]."""
        return x @ self.down.T @ self.up.T + self.bias

    def stored(self) -> Predictor:
        """As it is kept: factors int8 with a float16 scale for each of their rows, bias float16."""
        return Predictor(to_int8(self.down, 1), to_int8(self.up, 1), self.bias.half().float())

    def bits(self) -> int:
        """Of all that is kept."""
        return 8 * (self.down.numel() + self.up.numel()) + 16 * (len(self.down) + len(self.up) + len(self.bias))


class PredictedPlan(NeuronPlan):
    """Neurons whose predicted score is above a threshold; gate, up and down are spared for the others.

    predictors, cuts: by layer. The offset is added to the thresholds: scores are logarithms (base 2) or logits.
    """

    needs_gate = False

    def __init__(self, fixed: Fixed, predictors: dict[str, Predictor], cuts: dict[str, float]) -> None:
        super().__init__(fixed)
        self.predictors, self.cuts = predictors, cuts

    def mask(self, model: RivalModel, layer: str, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.predictors[layer](x) > self.cuts[layer] + self.offset

    def side_bits(self, model: RivalModel, name: str) -> int:
        """The predictor besides."""
        layer, _, group = name.rpartition(".")
        return super().side_bits(model, name) + (self.predictors[layer].bits() if group == "gate_up" else 0)

    def share(self, model: RivalModel, bits: float) -> float:
        """The share of neurons that a budget leaves; OutOfReach if there is none."""
        always, masked = 0.0, 0.0
        for name in model.body:
            always += self.side_bits(model, name)
            if name.endswith((".gate_up", ".down")):
                masked += digit_bits(model, name, self.fixed.top)
            else:
                always += digit_bits(model, name, self.fixed.rest)
        return share_for(bits, always / model.body_weights, masked / model.body_weights)


class FittedPredictors(Fitted):
    """Predictors of one kind for every setting that is asked for, each made once."""

    def __init__(self, calibration: Calibration, trained_tokens: int) -> None:
        self.calibration, self.trained_tokens = calibration, trained_tokens
        self._made: dict[tuple[tuple[str, Any], ...], tuple[dict[str, Predictor], dict[str, Table]]] = {}

    @abstractmethod
    def make(self, **setting: Any) -> tuple[dict[str, Predictor], dict[str, Table]]:
        """The predictors of a setting as they are stored, and the distributions that its thresholds are quantiles of,
        both by layer."""

    def knobs(self, bits: float) -> Knobs:
        """fixed: the pair of levels; rank: of the predictor."""
        return {"fixed": choices(self.calibration.artifact.manifest.slices), "rank": ranks(self.calibration)}

    def plan(self, bits: float, fixed: Fixed | None = None, **setting: Any) -> Plan:
        assert fixed is not None
        key = tuple(sorted(setting.items()))
        if key not in self._made:
            self._made[key] = self.make(**setting)
        predictors, tables = self._made[key]
        plan = PredictedPlan(fixed, predictors, {})
        share = plan.share(self.calibration.model, bits)
        plan.cuts |= {layer: table.at(share) for layer, table in tables.items()}
        return plan


def ranks(calibration: Calibration) -> tuple[int, ...]:
    """The ranks to try for this model, each once, the likeliest first."""
    hidden = calibration.model.config.hidden_size
    return tuple(dict.fromkeys(max(1, hidden * n // 512) for n in RANKS))


def examples(calibration: Calibration) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Layer by layer what a predictor is fitted on: (layer, x, response).

    x f32 [tokens, in] is the MLP's input; response f32 [tokens, neurons] what there is to predict, |h - mean| times the
    importance of the `down` channel. An exact channel counts as 0.
    """
    for index, _, inputs in calibration.blocks():
        layer = f"layers.{index}"
        stats = calibration.model.groups[f"{layer}.down"].stats
        yield layer, inputs["gate_up"], (inputs["down"] - stats.mean).abs() * stats.importance
