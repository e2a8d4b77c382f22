"""R-Sparse: channels with a small magnitude go through a low-rank factor of the matrix instead of being dropped."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.arch import GROUPS
from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState, Fitted, Knobs, OutOfReach, Plan, Rival, share_for
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.model import RivalModel

RANK_SHARES = (0.1, 0.05, 0.2)
"""Parts of the bits that are not side data which the factors may take; tuned in place of the paper's evolutionary
search over all layers."""
FACTOR_BITS = 8


class RSparse(Rival):
    """y = W (mask * a) + U V ((1 - mask) * a), mask_j = |a_j| > t, a = x - mean.

    U V is the best approximation of the group's matrices (outliers and exact channels, which are always read, taken
    out) of its rank, channels weighed by the root mean square of their a; the factors are int8 with a float16 scale for
    each component, and every token reads them. All groups have the same share of channels.
    """

    name = "r-sparse"
    source = "R-Sparse (arXiv 2504.19449)"

    def fit(self, calibration: Calibration) -> Fitted:
        """Magnitudes and the singular value decompositions."""
        tables, factors = {}, {}
        for index, block, inputs in calibration.blocks():
            for group in GROUPS:
                name = f"layers.{index}.{group}"
                coded = calibration.model.groups[name]
                a = inputs[group] - coded.stats.mean
                tables[name] = Table(calibration.usable(name, a.abs()))
                weight = torch.where(coded.outliers == 0, block.weights[group], 0.0)
                if coded.stats.exact is not None:
                    weight = torch.where(coded.stats.exact, 0.0, weight)
                factors[name] = decompose(weight, a.square().mean(0).sqrt())
        return _Fitted(calibration, tables, factors)


def decompose(weight: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (U f32 [out, R], V f32 [R, in]) of weight f32 [out, in], best first; their product's first r components
    are the best rank-r approximation for inputs of root mean square energy f32 [in]."""
    energy = energy.clamp_min(1e-6 * float(energy.max()) + 1e-12)
    u, s, v = torch.linalg.svd(weight * energy, full_matrices=False)
    return u * s, v / energy


def to_int8(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Values rounded to 8 bits with one float16 scale for each slice along `dim`; f32, same shape."""
    scale = (values.abs().amax(dim, keepdim=True) / 127).half().float().clamp_min(2.0**-24)
    return (values / scale).round().clamp(-127, 127) * scale


class _Fitted(Fitted):
    def __init__(
        self,
        calibration: Calibration,
        tables: dict[str, Table],
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.calibration, self.tables, self.factors = calibration, tables, factors

    def knobs(self, bits: float) -> Knobs:
        """top: the level that is read; part: what the factors may take."""
        slices = self.calibration.artifact.manifest.slices
        return {"top": tuple(t for t in range(1, slices + 1) if 2 * t > bits * 0.8), "part": RANK_SHARES}

    def plan(self, bits: float, top: int = 0, part: float = 0.0, **setting: Any) -> Plan:
        model = self.calibration.model
        plan = RSparsePlan({}, {}, top)
        free = bits - sum(plan.side_bits(model, name) for name in model.body) / model.body_weights
        if free <= 0:
            raise OutOfReach(f"{bits:g} bits per weight are less than the side data")
        for name, (u, v) in self.factors.items():
            rank = max(1, int(part * free * model.weights(name) / (FACTOR_BITS * (u.shape[0] + v.shape[1]))))
            plan.factors[name] = (to_int8(u[:, :rank], 0), to_int8(v[:rank], 1))
        side = sum(plan.side_bits(model, name) for name in model.body) / model.body_weights
        digits = sum(2.0 * top * model.readable(n) * model.groups[n].out for n in model.body) / model.body_weights
        share = share_for(bits, side, digits)
        plan.cuts |= {name: table.at(share) for name, table in self.tables.items()}
        return plan


class RSparsePlan(Plan):
    """factors: (U f32 [out, r], V f32 [r, in]) by group; cuts: thresholds by group; top: the level that is read."""

    def __init__(self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], cuts: dict[str, float], top: int) -> None:
        self.factors, self.cuts, self.top = factors, cuts, top

    def product(
        self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a = x - model.groups[name].stats.mean
        read = a.abs() > self.cuts[name] * 2.0**self.offset
        y, bits = model.read(name, x, read.int() * self.top)
        u, v = self.factors[name]
        return y + torch.where(read, 0.0, a) @ v.T @ u.T, bits

    def side_bits(self, model: RivalModel, name: str) -> int:
        """The factors, two float16 scales for each component, and a threshold besides."""
        extra = THRESHOLD_BITS
        if name in self.factors:
            u, v = self.factors[name]
            extra += FACTOR_BITS * (u.numel() + v.numel()) + 32 * u.shape[1]
        return super().side_bits(model, name) + extra
