"""What the rules about neurons share: a mask over the MLP's intermediate channels saves rows as well as columns.

A neuron that is not read has no `up` row and no `down` column, and no `gate` row where the mask is known before the
gate. Rows are counted as saved although our own code is stored channel by channel: a layout of the rule's own would.
An unread neuron counts as its mean, as everywhere in the artifact's code; neurons whose `down` channel is kept exact
are always read.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState, Plan
from lowtide.eval.rivals.model import RivalModel


@dataclass(frozen=True)
class Fixed:
    """rest: the level of the matrices that are not masked; top: the level of what is read under a mask."""

    rest: int
    top: int


class NeuronPlan(Plan):
    """Masks over neurons; qkv and o are read at the level `rest`. needs_gate: the mask comes from the gate's output."""

    needs_gate = True

    def __init__(self, fixed: Fixed) -> None:
        self.fixed = fixed

    @abstractmethod
    def mask(self, model: RivalModel, layer: str, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Neurons to read, bool [..., intermediate], from the MLP's input x [..., in] and silu(gate), if it is known.

        layer: e.g. `layers.3`.
        """

    def product(
        self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, _, group = name.rpartition(".")
        if group == "gate_up":
            return self._gate_up(model, layer, x, block)
        if group == "down":
            mask = block["neurons"]
            x = torch.where(mask, x, model.groups[name].stats.mean)
            return model.read(name, x, mask.int() * self.fixed.top)
        return self.attention(model, name, x)

    def attention(self, model: RivalModel, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """qkv or o, as `product`."""
        return model.read(name, x, model.full_levels(name, x, self.fixed.rest))

    def _gate_up(
        self, model: RivalModel, layer: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        name = f"{layer}.gate_up"
        gate_rows, up_rows = model.parts[name]
        gate_level = self.fixed.rest if self.needs_gate else self.fixed.top
        gate, gate_bits = model.read(name, x, model.full_levels(name, x, gate_level), gate_rows)
        up, up_bits = model.read(name, x, model.full_levels(name, x, self.fixed.top), up_rows)
        mask = self.mask(model, layer, x, F.silu(gate) if self.needs_gate else None)
        exact = model.groups[f"{layer}.down"].stats.exact
        if exact is not None:
            mask = mask | exact
        block["neurons"] = mask
        share = mask.float().mean(-1)
        bits = gate_bits + share * up_bits if self.needs_gate else share * (gate_bits + up_bits)
        return torch.cat([gate, up], -1), bits

    def side_bits(self, model: RivalModel, name: str) -> int:
        """One threshold for each block besides."""
        return super().side_bits(model, name) + (THRESHOLD_BITS if name.endswith(".down") else 0)


def choices(slices: int) -> tuple[Fixed, ...]:
    """All pairs of levels, the likeliest first."""
    pairs = [Fixed(rest, top) for rest in range(1, slices + 1) for top in range(1, slices + 1)]
    return tuple(sorted(pairs, key=lambda p: abs(p.rest - 2) + abs(p.top - 2)))


def digit_bits(model: RivalModel, name: str, level: int, rows: slice | None = None) -> float:
    """Bits of a group's digits, or of those rows, when every channel is read at one level."""
    out = model.groups[name].out if rows is None else rows.stop - rows.start
    return 2.0 * level * model.readable(name) * out
