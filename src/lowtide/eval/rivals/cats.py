"""CATS: the gate's activation chooses the neurons of the MLP."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.eval.rivals.base import Fitted, Knobs, Plan, Rival, share_for
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.neurons import Fixed, NeuronPlan, choices, digit_bits


class Cats(Rival):
    """Rows of up and columns of down are read where |silu(gate_i)| is above the layer's threshold.

    Every layer has the same share of neurons on calibration text. Attention and gate are read at one fixed level; that
    level and the one of up and down are tuned.
    """

    name = "cats"
    source = "CATS (arXiv 2404.08763)"

    def fit(self, calibration: Calibration) -> Fitted:
        """The distribution of |silu(gate)| in each layer."""
        tables = {}
        for index, _, inputs in calibration.blocks():
            layer = f"layers.{index}"
            tables[layer] = Table(calibration.usable(f"{layer}.down", inputs["gate"].abs()))
        return _Fitted(calibration, tables)


class _Fitted(Fitted):
    def __init__(self, calibration: Calibration, tables: dict[str, Table]) -> None:
        self.calibration, self.tables = calibration, tables

    def knobs(self, bits: float) -> Knobs:
        """fixed: the pair of levels."""
        return {"fixed": choices(self.calibration.artifact.manifest.slices)}

    def plan(self, bits: float, fixed: Fixed | None = None, **setting: Any) -> Plan:
        assert fixed is not None
        plan = CatsPlan(fixed, {})
        share = mlp_share(self.calibration.model, plan, bits)
        plan.cuts |= {layer: table.at(share) for layer, table in self.tables.items()}
        return plan


def mlp_share(model: RivalModel, plan: NeuronPlan, bits: float) -> float:
    """The share of neurons that a budget leaves to up and down, everything else being read at the level `rest`."""
    fixed, masked = 0.0, 0.0
    for name in model.body:
        fixed += plan.side_bits(model, name)
        if name.endswith(".gate_up"):
            gate, up = model.parts[name]
            fixed += digit_bits(model, name, plan.fixed.rest, gate)
            masked += digit_bits(model, name, plan.fixed.top, up)
        elif name.endswith(".down"):
            masked += digit_bits(model, name, plan.fixed.top)
        else:
            fixed += digit_bits(model, name, plan.fixed.rest)
    return share_for(bits, fixed / model.body_weights, masked / model.body_weights)


class CatsPlan(NeuronPlan):
    """cuts: the threshold of |silu(gate)| by layer."""

    def __init__(self, fixed: Fixed, cuts: dict[str, float]) -> None:
        super().__init__(fixed)
        self.cuts = cuts

    def mask(self, model: RivalModel, layer: str, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        assert gate is not None
        return gate.abs() > self.cuts[layer] * 2.0**self.offset
