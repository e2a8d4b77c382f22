"""A plan of nested masks (lowtide.rules.hierarchy) under our own scores.

Bits count what a closed part spares: digits, the importance of channels that are not asked, and, where layers can
close, all of the layer's side data but means, thresholds and bias. Rows and single weights are counted as spared
although the stored layout, channel by channel, could not skip them: a layout of the rule's own would have to.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from lowtide.eval.rivals.base import BlockState, Plan
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.scores import VALUE_BITS, Scores
from lowtide.rules.base import count_above
from lowtide.rules.hierarchy import Decision, Hierarchy, decide, open_neurons, row_steps, run_scores, weight_levels

OUTER, INNER = 1.5 / 1.25**0.5, 0.5 / 1.25**0.5
"""Magnitude of a weight by its first digit (0 or 3, 1 or 2) relative to the root mean square of both."""


@dataclass(frozen=True)
class Steps:
    """Which steps a plan takes, and their factors; `Hierarchy` has the first four.

    Attributes:
        whole: factor of the cut of a whole decoder block, decided at the input of its attention; None: off.
        neuron: factor of the cut of FFN neurons by the gate's value; None: off.
        rows: "rows": levels of `up` by row alone; "both": by row and channel; "": by channel.
        tilt: factor of the rows' sensitivity.
        weight: exponent of a weight's magnitude in its score: 1 is |x| |w|, 0 would be the channel's; None: off.
        share: see neighbours.py; "" for none.
    """

    layer: float | None = None
    block: int = 0
    block_cut: float = 1.0
    channel: bool = True
    whole: float | None = None
    neuron: float | None = None
    rows: str = ""
    tilt: float = 1.0
    weight: float | None = None
    share: str = ""

    def masks(self) -> Hierarchy:
        """The steps of `decide`."""
        return Hierarchy(self.layer, self.block, self.block_cut, self.channel)

    @property
    def closes_layers(self) -> bool:
        """Whether a group may be left out altogether."""
        return self.layer is not None or self.whole is not None


@dataclass
class Neurons:
    """What the gate's value is judged by, per layer: `reach` f32 [neurons], importance of the channel of `down` times
    the root mean square of `up` (16 bits each); `row` f32 [neurons], that importance over its usual product with the
    gate (no bits of its own but one scale)."""

    reach: torch.Tensor
    row: torch.Tensor


@dataclass
class Cost:
    """Sums over the tokens seen at one offset."""

    tokens: int = 0
    scores: int = 0
    decisions: int = 0
    closed: int = 0
    """Groups left out."""


class HierarchyPlan(Plan):
    """One setting at one budget. `costs[offset]`: what was computed there; cleared by whoever wants a fresh count."""

    def __init__(
        self,
        scores: Scores,
        steps: Steps,
        neurons: dict[str, Neurons] | None = None,
        classes: tuple[RivalModel, RivalModel] | None = None,
    ) -> None:
        self.scores, self.steps, self.masks = scores, steps, steps.masks()
        self.neurons, self.classes = neurons or {}, classes
        self.costs: dict[float, Cost] = {}

    def cuts(self, name: str) -> torch.Tensor:
        """Thresholds f32 [S] of a group at the offset."""
        return self.scores.cuts[name] * 2.0**self.offset

    def product(
        self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y f32 [..., out], bits f32 [...]: digits, importance that was asked, side data of layers that may close."""
        self.scores.see(model, name, x, block)
        lift = self.scores.lift(model, name, block)
        group = model.groups[name]
        kind = name.rpartition(".")[2]
        if kind == "down" and "neurons" in block:
            x = torch.where(block["neurons"], x, group.stats.mean)
        found = self.decide(model, name, x, lift, block)
        cost = self.count(name, found)
        if kind == "gate_up" and (self.steps.rows or self.steps.neuron is not None):
            y, bits = self._gate_up(model, name, x, lift, found, block, cost)
        elif self.classes is not None and self.steps.weight is not None:
            y, bits = self._by_weight(model, name, x, lift, found, cost)
        else:
            y, bits = model.read(name, x, found.levels)
        bits = bits + VALUE_BITS * found.fine
        if self.steps.closes_layers:
            y = torch.where(found.open[..., None], y, group.bias)
            bits = torch.where(found.open, bits, 0.0) + self._closing(model, name) * found.open
        return y, bits

    def decide(
        self, model: RivalModel, name: str, x: torch.Tensor, lift: torch.Tensor | None, block: BlockState
    ) -> Decision:
        """The rule on one group; a block of the decoder is decided on at its first group."""
        a, importance, cuts = x - model.groups[name].stats.mean, self.scores.importance(model, name), self.cuts(name)
        if self.steps.whole is not None and name.endswith(".qkv"):
            lifted = a if lift is None else a * lift[..., None]
            score = run_scores(lifted, importance, a.shape[-1])[..., 0]
            block["open"] = score > self.steps.whole * cuts[0]
        neurons = block.get("neurons") if name.endswith(".down") else None
        return decide(self.masks, a, importance, cuts, lift, block.get("open"), neurons)

    def count(self, name: str, found: Decision) -> Cost:
        """Add one group's decision to the costs."""
        cost = self.costs.setdefault(self.offset, Cost())
        first = name == "layers.0.qkv"
        cost.tokens += found.open.numel() if first else 0
        cost.scores += int(found.scores.sum())
        cost.decisions += int(found.decisions.sum())
        cost.closed += int((~found.open).sum())
        if self.steps.whole is not None and name.endswith(".qkv"):
            cost.scores += found.open.numel()
            cost.decisions += found.open.numel()
        return cost

    def _closing(self, model: RivalModel, name: str) -> int:
        """Side data that a closed layer spares."""
        return self.scores.side_bits(model, name) - self.scores.kept_bits(model, name)

    def side_bits(self, model: RivalModel, name: str) -> int:
        """What every token reads: side data, importance of coarse parts, 16 bits per neuron where gates decide."""
        inputs = model.groups[name].planes.shape[2]
        bits = self.scores.side_bits(model, name)
        if self.steps.closes_layers:
            bits -= self._closing(model, name)
        if self.steps.layer is not None or (self.steps.whole is not None and name.endswith(".qkv")):
            bits += VALUE_BITS
        if self.steps.block:
            bits += VALUE_BITS * -(-inputs // self.steps.block)
        if name.endswith(".gate_up") and (self.steps.neuron is not None or self.steps.rows):
            bits += VALUE_BITS * (model.parts[name][1].stop - model.parts[name][1].start)
        return bits

    def _gate_up(
        self,
        model: RivalModel,
        name: str,
        x: torch.Tensor,
        lift: torch.Tensor | None,
        found: Decision,
        block: BlockState,
        cost: Cost,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`gate` by channels, then `up` under masks of its rows."""
        layer = name.rpartition(".")[0]
        gate_rows, up_rows = model.parts[name]
        gate, bits = model.read(name, x, found.levels, gate_rows)
        silu = F.silu(gate)
        looked = silu.shape[-1] * int(found.open.sum())
        cost.scores += looked
        cost.decisions += looked
        if self.steps.neuron is not None:
            down = f"{layer}.down"
            lift_down = self.scores.lift(model, down, block)
            judged = silu if lift_down is None else silu * lift_down[..., None]
            cut = self.steps.neuron * self.cuts(down)[0]
            is_open = open_neurons(judged, self.neurons[layer].reach, cut, model.groups[down].stats.exact)
            block["neurons"] = is_open
            up, up_bits = model.read(name, x, found.levels, up_rows)
            return torch.cat([gate, up], -1), bits + up_bits * is_open.float().mean(-1)
        sensitivity = silu.abs() * self.neurons[layer].row * self.steps.tilt
        make = self._up_by_rows if self.steps.rows == "rows" else self._up_by_both
        up, up_bits = make(model, name, x, lift, found, sensitivity, cost)
        return torch.cat([gate, up], -1), bits + up_bits

    def _score(self, model: RivalModel, name: str, x: torch.Tensor, lift: torch.Tensor | None) -> torch.Tensor:
        score = (x - model.groups[name].stats.mean).abs() * self.scores.importance(model, name)
        return score if lift is None else score * lift[..., None]

    def _up_by_rows(
        self,
        model: RivalModel,
        name: str,
        x: torch.Tensor,
        lift: torch.Tensor | None,
        found: Decision,
        sensitivity: torch.Tensor,
        cost: Cost,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A row of `up` is read at one level in all channels: its sensitivity times the usual score of a channel."""
        usual = self._score(model, name, x, lift).square().mean(-1, keepdim=True).sqrt()
        levels: torch.Tensor = count_above(sensitivity * usual, self.cuts(name)) * found.open[..., None]
        rows, y = model.parts[name][1], torch.zeros(())
        for level in range(len(self.cuts(name)) + 1):
            one, _ = model.read(name, x, model.full_levels(name, x, level), rows)
            y = torch.where(levels == level, one, y)
        return y, 2.0 * model.readable(name) * levels.sum(-1, dtype=torch.float32)

    def _up_by_both(
        self,
        model: RivalModel,
        name: str,
        x: torch.Tensor,
        lift: torch.Tensor | None,
        found: Decision,
        sensitivity: torch.Tensor,
        cost: Cost,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every class of rows has its own waterline for the channels."""
        score = self._score(model, name, x, lift)
        steps = row_steps(sensitivity)
        rows, y = model.parts[name][1], torch.zeros(())
        bits = torch.zeros(x.shape[:-1])
        for step in range(int(steps.min()), int(steps.max()) + 1):
            mine = steps == step
            levels = count_above(score * 4.0**step, self.cuts(name)) * found.open[..., None].int()
            one, _ = model.read(name, x, levels, rows)
            y = torch.where(mine, one, y)
            bits = bits + 2.0 * levels.sum(-1) * mine.sum(-1)
            cost.decisions += int(found.fine.sum())
        return y, bits

    def _by_weight(
        self, model: RivalModel, name: str, x: torch.Tensor, lift: torch.Tensor | None, found: Decision, cost: Cost
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights with an outer and those with an inner first digit at levels of their own."""
        assert self.classes is not None and self.steps.weight is not None
        factors = torch.tensor([OUTER**self.steps.weight, INNER**self.steps.weight])
        levels = weight_levels(self._score(model, name, x, lift), found.levels, factors, self.cuts(name))
        y, bits = torch.zeros(()), 2.0 * model.groups[name].out * (found.levels > 0).sum(-1, dtype=torch.float32)
        cost.decisions += int(model.groups[name].out * (found.levels > 0).sum())
        for one, level in zip(self.classes, levels, strict=True):
            part, _ = one.read(name, x, level)
            y = y + part
            number = (one.groups[name].planes[0] != 0).sum(0, dtype=torch.float32)
            bits = bits + 2.0 * (level - 1).clamp_min(0).float() @ number
        return y, bits


def split_classes(model: RivalModel) -> tuple[RivalModel, RivalModel]:
    """Two models that add up to the given one in their body: weights whose first digit is 0 or 3, and the rest. What
    is read exactly, and the bias, belong to the former."""
    parts = []
    for outer in (True, False):
        one = copy.copy(model)
        one.groups, one._int8, one._sparse = {}, {}, {}
        for name in model.body:
            group = model.groups[name]
            planes = group.planes * ((group.planes[0].abs() > 1) == outer)
            one.groups[name] = replace(group, planes=planes)
            if not outer:
                one.groups[name].bias = torch.zeros_like(group.bias)
                one.groups[name].outliers = torch.zeros_like(group.outliers)
                one.groups[name].exact = torch.zeros_like(group.exact)
        parts.append(one)
    return parts[0], parts[1]
