"""CHESS: a threshold of its own for each neuron's gate, and masks for the query's and the output's projection."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.eval.rivals.base import THRESHOLD_BITS, Fitted, Knobs, Plan, Rival, share_for
from lowtide.eval.rivals.calibration import Calibration, Table
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.neurons import Fixed, NeuronPlan, choices, digit_bits


class Chess(Rival):
    """Neuron i is read where |silu(gate_i)| > t / E|up_i|, which is |silu(gate_i)| * E|up_i| > t.

    In attention only the query's and the output's projections are masked, by |x_j - mean_j| as in TEAL; key and value
    are read at the fixed level, the gate too. All masks have the same share; the two levels are tuned.
    """

    name = "chess"
    source = "CHESS (arXiv 2409.01366)"

    def fit(self, calibration: Calibration) -> Fitted:
        """E|up|, and the distributions of the scores of neurons and of the inputs of qkv and o."""
        ups: dict[str, torch.Tensor] = {}
        tables: dict[str, Table] = {}
        for index, _, inputs in calibration.blocks():
            layer = f"layers.{index}"
            ups[layer] = inputs["up"].abs().mean(0).half().float()
            tables[f"{layer}.down"] = Table(calibration.usable(f"{layer}.down", inputs["gate"].abs() * ups[layer]))
            for group in ("qkv", "o"):
                name = f"{layer}.{group}"
                a = (inputs[group] - calibration.model.groups[name].stats.mean).abs()
                tables[name] = Table(calibration.usable(name, a))
        return _Fitted(calibration, ups, tables)


class _Fitted(Fitted):
    def __init__(self, calibration: Calibration, ups: dict[str, torch.Tensor], tables: dict[str, Table]) -> None:
        self.calibration, self.ups, self.tables = calibration, ups, tables

    def knobs(self, bits: float) -> Knobs:
        """fixed: the pair of levels."""
        return {"fixed": choices(self.calibration.artifact.manifest.slices)}

    def plan(self, bits: float, fixed: Fixed | None = None, **setting: Any) -> Plan:
        assert fixed is not None
        model = self.calibration.model
        plan = ChessPlan(fixed, self.ups, {})
        always, masked = 0.0, 0.0
        for name in model.body:
            always += plan.side_bits(model, name)
            for place, rows in enumerate(model.parts[name]):
                free = (name.endswith(".qkv") and place > 0) or (name.endswith(".gate_up") and place == 0)
                if free:
                    always += digit_bits(model, name, fixed.rest, rows)
                else:
                    masked += digit_bits(model, name, fixed.top, rows)
        share = share_for(bits, always / model.body_weights, masked / model.body_weights)
        plan.cuts |= {name: table.at(share) for name, table in self.tables.items()}
        return plan


class ChessPlan(NeuronPlan):
    """ups: E|up| f32 [intermediate] by layer; cuts: thresholds by group (`down` for the neurons)."""

    def __init__(self, fixed: Fixed, ups: dict[str, torch.Tensor], cuts: dict[str, float]) -> None:
        super().__init__(fixed)
        self.ups, self.cuts = ups, cuts

    def mask(self, model: RivalModel, layer: str, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        assert gate is not None
        return gate.abs() * self.ups[layer] > self.cuts[f"{layer}.down"] * 2.0**self.offset

    def attention(self, model: RivalModel, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The query's rows and o under a mask, key and value at the level `rest`."""
        read = (x - model.groups[name].stats.mean).abs() > self.cuts[name] * 2.0**self.offset
        if name.endswith(".o"):
            return model.read(name, x, read.int() * self.fixed.top)
        query, key, value = model.parts[name]
        q, q_bits = model.read(name, x, read.int() * self.fixed.top, query)
        rest = slice(key.start, value.stop)
        kv, kv_bits = model.read(name, x, model.full_levels(name, x, self.fixed.rest), rest)
        return torch.cat([q, kv], -1), q_bits + kv_bits

    def side_bits(self, model: RivalModel, name: str) -> int:
        """A threshold f16 for each neuron besides, one for qkv and one for o."""
        neurons = 16 * model.groups[name].planes.shape[2] if name.endswith(".down") else 0
        one = THRESHOLD_BITS if name.endswith((".qkv", ".o")) else 0
        return super().side_bits(model, name) + neurons + one
