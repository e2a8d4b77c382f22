"""TEAL: input channels with a small magnitude are not read, matrix by matrix."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.arch import GROUPS
from lowtide.eval.rivals.allocation import MEMBERS, Paths, greedy_paths
from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState, Fitted, Knobs, Plan, Rival, share_for
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.model import RivalModel

Tables = dict[tuple[str, str], Table]


class Teal(Rival):
    """score_j = |x_j - mean_j| against a threshold of each matrix; a channel is read at one level or not at all.

    Every block reads the same share of its weights; TEAL's greedy search spreads it over the block's seven matrices.
    The paper's inputs have no mean taken out; here an unread channel counts as its mean, so the distance from it takes
    the place of the magnitude. The level that is read is tuned.
    """

    name = "teal"
    source = "TEAL (arXiv 2408.14690)"

    def weigh(self, calibration: Calibration) -> dict[tuple[str, str], torch.Tensor] | None:
        """Factors f32 [in] of the magnitudes by (group's full name, matrix); None for none."""
        return None

    def fit(self, calibration: Calibration) -> Fitted:
        """The distributions of scores, and the greedy paths."""
        norms = self.weigh(calibration)
        tables: Tables = {}
        for index, _, inputs in calibration.blocks():
            for group in GROUPS:
                name = f"layers.{index}.{group}"
                a = (inputs[group] - calibration.model.groups[name].stats.mean).abs()
                shared = None if norms is not None else Table(calibration.usable(name, a))
                for matrix in MEMBERS[group]:
                    factor = None if norms is None else norms[name, matrix]
                    tables[name, matrix] = shared or Table(calibration.usable(name, a * factor))
        score = _Score(calibration.model, norms)
        return _Fitted(calibration, score, tables, greedy_paths(calibration, score, tables))


class _Score:
    """Magnitudes, times norms if there are any. Called as `allocation.Score`."""

    def __init__(self, model: RivalModel, norms: dict[tuple[str, str], torch.Tensor] | None) -> None:
        self.model, self.norms = model, norms

    def __call__(self, name: str, matrix: str, x: torch.Tensor) -> torch.Tensor:
        magnitude = (x - self.model.groups[name].stats.mean).abs()
        return magnitude if self.norms is None else magnitude * self.norms[name, matrix]


class _Fitted(Fitted):
    def __init__(self, calibration: Calibration, score: _Score, tables: Tables, paths: Paths) -> None:
        self.calibration, self.score, self.tables, self.paths = calibration, score, tables, paths

    def knobs(self, bits: float) -> Knobs:
        """top: the level that is read. One whose full read is just short of the budget cannot meet it."""
        slices = self.calibration.artifact.manifest.slices
        return {"top": tuple(top for top in range(1, slices + 1) if 2 * top > bits * 0.9)}

    def plan(self, bits: float, top: int = 0, **setting: Any) -> Plan:
        model = self.calibration.model
        plan = MatrixPlan(self.score, {}, top)
        side = sum(plan.side_bits(model, name) for name in model.body) / model.body_weights
        digits = sum(2.0 * top * model.readable(n) * model.groups[n].out for n in model.body) / model.body_weights
        density = share_for(bits, side, digits)
        for name in model.body:
            _, layer, group = name.split(".")
            shares = self.paths.at(int(layer), density)
            for matrix in MEMBERS[group]:
                plan.cuts[name, matrix] = self.tables[name, matrix].at(shares[matrix])
        return plan


class MatrixPlan(Plan):
    """Binary masks for each matrix. cuts: thresholds by (group's full name, matrix); top: the level that is read."""

    def __init__(self, score: _Score, cuts: dict[tuple[str, str], float], top: int) -> None:
        self.score, self.cuts, self.top = score, cuts, top

    def product(
        self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for matrix, rows in zip(MEMBERS[name.rpartition(".")[2]], model.parts[name], strict=True):
            read = self.score(name, matrix, x) > self.cuts[name, matrix] * 2.0**self.offset
            found.append(model.read(name, x, read.int() * self.top, rows))
        return torch.cat([y for y, _ in found], -1), torch.stack([bits for _, bits in found]).sum(0)

    def side_bits(self, model: RivalModel, name: str) -> int:
        """A threshold for each matrix besides, and its norms f16 [in] if the score has them."""
        matrices = len(model.parts[name])
        norms = 0 if self.score.norms is None else 16 * model.groups[name].planes.shape[2]
        return super().side_bits(model, name) + matrices * (THRESHOLD_BITS + norms)
