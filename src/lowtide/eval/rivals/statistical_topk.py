"""statistical top-k: a threshold from the mean and the spread of the token's own scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState, Fitted, Knobs, LevelPlan, OutOfReach, Plan, Rival
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.model import RivalModel
from lowtide.rules import Policy, get_rule

RULE = get_rule("statistical-topk")


class StatisticalTopK(Rival):
    """Level s where the channel-norm score is above mean + z_s * standard deviation of the token's scores.

    z_s makes every group read the share of channels that our own thresholds read there, so about as many channels pass
    for every token. With all levels.
    """

    name = "statistical-topk"
    source = "Spark Transformer (arXiv 2506.06644)"
    binary = False

    def fit(self, calibration: Calibration) -> Fitted:
        """The distributions of scores and of their z-scores, group by group."""
        norms, tables = {}, {}
        for index, _, inputs in calibration.blocks():
            for group in ("qkv", "o", "gate_up", "down"):
                name, x = f"layers.{index}.{group}", inputs[group]
                norms[name] = Table(calibration.norm_scores(name, x))
                tables[name] = Table(calibration.usable(name, RULE.score(calibration.model.groups[name].stats, x)))
        return _Fitted(calibration, norms, tables, self.binary)


class BinaryStatisticalTopK(StatisticalTopK):
    """As the paper has it: a channel is read or it is not. The level read is tuned."""

    name = "statistical-topk, binary"
    binary = True


class _Fitted(Fitted):
    def __init__(
        self, calibration: Calibration, norms: dict[str, Table], tables: dict[str, Table], binary: bool
    ) -> None:
        self.calibration, self.norms, self.tables, self.binary = calibration, norms, tables, binary
        self.slices = calibration.artifact.manifest.slices

    def knobs(self, bits: float) -> Knobs:
        """top: the level that is read; binary only."""
        tops = tuple(top for top in range(1, self.slices + 1) if 2 * top >= bits * 0.9)
        return {"top": tops} if self.binary else {}

    def plan(self, bits: float, top: int | None = None, **setting: Any) -> Plan:
        z, params = {}, self.calibration.params(bits)
        for name, table in self.tables.items():
            shares = np.array([self.norms[name].share(float(t)) for t in params[name]])
            if top is not None:
                shares = Policy("", RULE, (0, top)).shares(shares)
            z[name] = [table.at(float(s)) for s in shares]
            if top is not None and not np.isfinite(z[name][0]):
                raise OutOfReach(f"{bits:g} bits per weight leave nothing to read in {name}")
        return StatisticalPlan(z)


class StatisticalPlan(LevelPlan):
    """z: z-scores, S by group."""

    def __init__(self, z: dict[str, list[float]]) -> None:
        self.z = {name: torch.tensor(values, dtype=torch.float32) for name, values in z.items()}

    def levels(self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState) -> torch.Tensor:
        params = self.z[name] + float(self.offset)
        level: torch.Tensor = RULE.levels(model.groups[name].stats, x, params)
        return level

    def side_bits(self, model: RivalModel, name: str) -> int:
        """Importance f16 [in] and S z-scores besides."""
        _, _, inputs = (planes := model.groups[name].planes).shape
        return super().side_bits(model, name) + 16 * inputs + THRESHOLD_BITS * len(planes)
