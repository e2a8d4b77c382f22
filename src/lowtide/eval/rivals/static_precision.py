"""static precision: each channel has one level for all tokens, by its mean energy."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.eval.rivals.base import BlockState, Fitted, Knobs, LevelPlan, Plan, Rival
from lowtide.eval.rivals.calibration import F32, Calibration
from lowtide.eval.rivals.model import RivalModel, threshold_of
from lowtide.rules.base import count_above


class StaticPrecision(Rival):
    """Reverse water-filling over channels: score_j = sqrt(E[(x_j - mean_j)^2]) * v_j against our own thresholds.

    Nothing depends on the token, so nothing besides the levels need be read: 2 bits for each channel.
    """

    name = "static precision"
    source = "reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3) on channels"

    def fit(self, calibration: Calibration) -> Fitted:
        """Root mean squares of the channels' scores, f32 [in] by group."""
        scores = {}
        for index, _, inputs in calibration.blocks():
            for group in ("qkv", "o", "gate_up", "down"):
                name = f"layers.{index}.{group}"
                stats = calibration.model.groups[name].stats
                energy = (inputs[group] - stats.mean).square().mean(0)
                scores[name] = energy.sqrt() * stats.importance
        return _Fitted(calibration, scores)


class _Fitted(Fitted):
    def __init__(self, calibration: Calibration, scores: dict[str, torch.Tensor]) -> None:
        self.calibration, self.scores = calibration, scores

    def knobs(self, bits: float) -> Knobs:
        return {}

    def plan(self, bits: float, **setting: Any) -> Plan:
        return StaticPlan(self.scores, self.calibration.params(bits))


class StaticPlan(LevelPlan):
    """scores: f32 [in] by group; params: f32 [S] by group."""

    def __init__(self, scores: dict[str, torch.Tensor], params: dict[str, F32]) -> None:
        self.scores, self.params = scores, params

    def levels(self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState) -> torch.Tensor:
        level: torch.Tensor = count_above(self.scores[name], threshold_of(self.params, name) * 2.0**self.offset)
        return level.expand(x.shape)

    def side_bits(self, model: RivalModel, name: str) -> int:
        """A level of 2 bits for each channel besides."""
        return super().side_bits(model, name) + 2 * model.groups[name].planes.shape[2]
