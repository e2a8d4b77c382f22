"""graded: levels by |x_j - mean_j| times the column's importance. Our own untrained rule, like GRINQH's levels."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState, Fitted, Knobs, LevelPlan, Plan, Rival
from lowtide.eval.rivals.calibration import F32, WATERLINE, Calibration
from lowtide.eval.rivals.model import RivalModel, threshold_of
from lowtide.rules import get_rule


class Graded(Rival):
    """The artifact's own thresholds of `channel-norm`, one lambda for all groups, read level by level."""

    name = "graded"
    source = "GRINQH (arXiv 2606.23419) for channel levels; thresholds by reverse water-filling are ours"

    def fit(self, calibration: Calibration) -> Fitted:
        """Nothing is left to learn: the thresholds come with the artifact."""
        return _Fitted(calibration)


class _Fitted(Fitted):
    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration

    def knobs(self, bits: float) -> Knobs:
        return {}

    def plan(self, bits: float, **setting: Any) -> Plan:
        return GradedPlan(self.calibration.params(bits))


class GradedPlan(LevelPlan):
    """params: f32 [S] by group."""

    def __init__(self, params: dict[str, F32]) -> None:
        self.params = params

    def levels(self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState) -> torch.Tensor:
        cuts = threshold_of(self.params, name) * 2.0**self.offset
        level: torch.Tensor = get_rule(WATERLINE).levels(model.groups[name].stats, x, cuts)
        return level

    def side_bits(self, model: RivalModel, name: str) -> int:
        """Importance f16 [in] and S thresholds besides."""
        _, _, inputs = (planes := model.groups[name].planes).shape
        return super().side_bits(model, name) + 16 * inputs + THRESHOLD_BITS * len(planes)
